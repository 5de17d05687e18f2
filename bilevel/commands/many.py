"""`bilevel run --seeds --sweep`: one run for each seed and combination, and their table."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, final

from bilevel._files import write_atomically
from bilevel._result import Status
from bilevel.commands.contents import read_result
from bilevel.commands.folder import Folder
from bilevel.commands.plan import Request
from bilevel.commands.progress import note
from bilevel.commands.raised import Failure
from bilevel.commands.result import plain
from bilevel.portable.folded import COLUMNS

_OPTIONS: Mapping[str, Callable[[str], Any]] = {
    **dict.fromkeys(("estimator", "algorithm", "outer"), str),
    **dict.fromkeys(("step", "tol"), float),
    "steps": int,
}
_MOST = 10_000  # runs
# The 97.5 % quantile of Student's distribution by degrees of freedom; 1.96 and a little beyond the last.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@final
@dataclasses.dataclass(frozen=True)
class One:
    """One of the runs: the name of its folder, its combination, its seed, and what is asked for."""

    name: str
    combination: tuple[tuple[str, str], ...]
    seed: int | None
    request: Request


def seeds_of(text: str) -> tuple[int, ...]:
    """`"0-3"`, `"1,5"` or `"0-2,7"` as numbers.

    Raises:
        ValueError: if it is something else.

    Example:
        >>> seeds_of("0-2,7")
        (0, 1, 2, 7)
    """
    found: list[int] = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", word)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if high < low or len(found) + high - low >= _MOST:
            raise ValueError(f"must be seeds such as 0-9 or 1,5,7, at most {_MOST}. Got {text!r:.100}")
        found += range(low, high + 1)
    return tuple(dict.fromkeys(found))


def requests(request: Request, seeds: Sequence[int], sweeps: Sequence[str]) -> list[One]:
    """The runs, those of one combination after each other.

    Raises:
        ValueError: if a sweep is not key=a,b,c, or a value is none.
    """
    axes: list[list[tuple[str, str]]] = []
    for sweep in sweeps:
        key, equals, values = sweep.partition("=")
        words = [word.strip() for word in values.split(",")]
        if not equals or not key.strip().isidentifier() or not all(words):
            raise ValueError(f"`--sweep` needs key=a,b,c. Got {sweep!r:.100}.")
        axes.append([(key.strip(), word) for word in words])
    twice = {axis[0][0] for axis in axes if [other[0][0] for other in axes].count(axis[0][0]) > 1}
    if twice:
        raise ValueError(f"`--sweep {sorted(twice)[0]}=...` was given twice. Give all values at once.")
    count = math.prod(map(len, axes)) * max(1, len(seeds))
    if count > _MOST:
        raise ValueError(f"`--sweep` and `--seeds` ask for {count} runs; at most {_MOST} are made.")
    out = Path(request.out) if request.out is not None else _fresh(request.problem)
    found = []
    for combination in itertools.product(*axes):
        for seed in seeds or (request.seed,):
            parts = [f"{key}={value}" for key, value in combination] + ([f"seed={seed}"] if seeds else [])
            name = re.sub(r"[^\w.=+-]", "_", ",".join(parts))
            own = dataclasses.replace(_with(request, combination), seed=seed, out=str(out / name), quiet=True)
            found.append(One(name, combination, seed, own))
    if len({one.name for one in found}) < len(found):
        raise ValueError("`--sweep` has values that are the same, or that differ only in signs that no file name has.")
    return found


def _with(request: Request, combination: Sequence[tuple[str, str]]) -> Request:
    changes: dict[str, Any] = {}
    arguments = list(request.arguments)
    for key, value in combination:
        if key not in _OPTIONS:
            arguments.append(f"{key}={value}")
            continue
        try:
            changes[key] = _OPTIONS[key](value)
        except ValueError as error:
            raise ValueError(f"`--sweep {key}=...` must be numbers. Got {value!r:.100}.") from error
    return dataclasses.replace(request, **changes, arguments=tuple(arguments))


def _fresh(problem: str) -> Path:
    name = re.sub(r"[^\w.-]", "-", problem)[:100]
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def run_many(
    request: Request, seeds: Sequence[int], sweeps: Sequence[str], run: Callable[[Request], None], *, quiet: bool
) -> None:
    """Make all runs, print their table, and leave it in `runs.json` of the folder that theirs are in.

    A run that fails is a row as well, and the others are made. With `--resume`, those that are there are gone on with.

    Raises:
        ValueError: if the request makes no sense, as the first run shows.
        Failure: if a run did not succeed, after all are made.
    """
    made, failures = requests(request, seeds, sweeps), []
    rows: list[tuple[One, dict[str, Any]]] = []
    for number, one in enumerate(made, 1):
        folder = Folder(Path(one.request.out or ""))
        if not quiet:
            note(f"run {number}/{len(made)}: {one.name}")
        own = dataclasses.replace(one.request, resume=request.resume and folder.result.exists())
        try:
            run(own)
        except Failure as error:
            failures.append(f"{one.name}: {error}")
        if folder.result.exists():
            rows.append((one, read_result(folder)))
    names, table = summary(rows)
    out = Path(made[0].request.out or "").parent
    content = {"problem": request.problem, "runs": [one.name for one, _ in rows], "columns": names, "rows": table}
    text = json.dumps(plain(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomically(out / "runs.json", lambda file: file.write(text.encode()))
    if not quiet:
        print(shown(names, table))
        print(f"{out}: {len(rows)} runs, runs.json. All of them side by side:")
        print(f"  bilevel report {out}/*/")
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise Failure(f"{len(failures)} of {len(made)} runs did not succeed. {failures[0]}{more}")


def summary(rows: Sequence[tuple[One, Mapping[str, Any]]]) -> tuple[list[str], list[dict[str, Any]]]:
    """A row for each combination: means over the runs that succeeded, with half of the 95 % interval of the mean."""
    groups: dict[tuple[tuple[str, str], ...], list[Mapping[str, Any]]] = {}
    for one, result in rows:
        groups.setdefault(one.combination, []).append(result)
    table, names = [], ["value", "grad_norm", "seconds"]
    for combination, results in groups.items():
        columns: dict[str, list[float]] = {}
        good = [result for result in results if _succeeded(result)]
        for result in good:
            final = result.get("final") or {}
            values = {name: final.get(name) for name in ("value", "grad_norm")}
            values |= {"seconds": result.get("seconds"), **(result.get("metrics") or {})}
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    columns.setdefault(name, []).append(float(value))
        names += [name for name in columns if name not in names]
        row: dict[str, Any] = {"combination": dict(combination), "runs": len(results), "succeeded": len(good)}
        row |= {name: {"mean": statistics.fmean(v), "half_width": half_width(v)} for name, v in columns.items()}
        table.append(row)
    return names, table


def _succeeded(result: Mapping[str, Any]) -> bool:
    status = str(result.get("status"))
    return status in Status.__members__ and Status[status].ok


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean, by Student's distribution; None of a single value.

    Example:
        >>> round(half_width([1.0, 2.0, 3.0]), 3)
        2.484
    """
    n = len(values)
    if n < 2:
        return None
    quantile = _STUDENT[n - 2] if n - 2 < len(_STUDENT) else 1.96 + 2.6 / (n - 1)
    return quantile * statistics.stdev(values) / math.sqrt(n)


def _runs(row: Mapping[str, Any]) -> str:
    """How many runs a mean is over, and of how many."""
    return str(row["runs"]) if row["succeeded"] == row["runs"] else f"{row['succeeded']} of {row['runs']}"


def shown(names: Sequence[str], table: Sequence[Mapping[str, Any]], width: int = COLUMNS) -> str:
    """The table as text within `width` columns: names that do not fit beside each other go below."""
    keys = list(table[0]["combination"]) if table else []
    head = [*keys, "runs", *names]
    lines = [head]
    for row in table:
        cells = [row["combination"][key] for key in keys] + [_runs(row)]
        for name in names:
            entry = row.get(name)
            half = None if entry is None else entry["half_width"]
            cells.append("" if entry is None else f"{entry['mean']:.4g}" + ("" if half is None else f" ± {half:.1g}"))
        lines.append(cells)
    lead, blocks = len(keys) + 1, list[str]()
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    column = lead
    while column < len(head) or not blocks:
        last, used = column, sum(widths[:lead]) + 2 * lead
        while last < len(head) and (last == column or used + widths[last] <= width):
            used, last = used + widths[last] + 2, last + 1
        chosen = [*range(lead), *range(column, last)]
        text = "\n".join("  ".join(line[i].ljust(widths[i]) for i in chosen).rstrip() for line in lines)
        blocks.append(text)
        column = max(last, column + 1)
    return "\n\n".join(blocks)
