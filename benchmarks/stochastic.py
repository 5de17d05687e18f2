"""Stochastic algorithms on finite sums: |grad Phi|^2 against calls for samples, and against CPU seconds.

    python benchmarks/stochastic.py --workloads q20,q100,a9a --data PATH --out benchmarks/results

runs everything (an hour on one core); `--algorithms SABA,SRBA` some of them, the others' results are kept. Steps
are those of a grid that is stated with every table, tuned for every budget; numbers are medians over three
orders of the data. Algorithms that have no form side by side are tuned on the first order only. `PATH` is a folder
with a9a.npz.

    python benchmarks/stochastic.py --draw --out benchmarks/results

draws what has been found into docs/images, and writes the tables of docs/stochastic_benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from _harness import Row, Table, machine, markdown, write
from _stochastic import Entry, Result, Tuned, Workload, a9a, cpu_ms, q20, q100, quadratic_sum, tuned

from bilevel import FiniteDifferences
from bilevel.algorithms import (
    BOME,
    BSA,
    F2SA,
    FSLA,
    MASOBA,
    MEHA,
    MRBO,
    PBGD,
    SABA,
    SOBA,
    SPABA,
    SRBA,
    SUSTAIN,
    TTSA,
    VRBO,
    AmIGO,
    FdeHBO,
    Power,
    StocBiO,
)

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
Make = Callable[[Any, Any], Any]

ROOT = Power(0.5)
EVERY: dict[str, Make] = {
    "SABA": SABA,
    "SRBA": SRBA,
    "SPABA": SPABA,
    "SRBA-FD": lambda rho, gamma: SRBA(rho, gamma, products=FiniteDifferences()),
    "SOBA": lambda rho, gamma: SOBA(rho, gamma, schedule=ROOT),
    "MA-SOBA": lambda rho, gamma: MASOBA(rho, gamma, theta=ROOT, schedule=ROOT),
    "FdeHBO": FdeHBO,
    "FSLA": FSLA,
    "AmIGO": AmIGO,
    "stocBiO": StocBiO,
    "BSA": BSA,
    "TTSA": TTSA,
    "SUSTAIN": SUSTAIN,
    "MRBO": MRBO,
    "VRBO": VRBO,
    "F2SA": lambda rho, gamma: F2SA(rho, gamma, weight=10.0, order=1),
    "F2SA-2": lambda rho, gamma: F2SA(rho, gamma, weight=10.0, order=2),
    "V-PBGD": lambda rho, gamma: PBGD(rho, gamma, weight=10.0),
    "BOME": lambda rho, gamma: BOME(rho, gamma, inner_steps=10),
    "MEHA": MEHA,
}


@dataclass(frozen=True, eq=False)
class Race:
    """A workload, the algorithms that take part, the grid of their steps and the budgets in passes."""

    title: str
    make: Callable[[Path], Workload]
    entries: dict[str, Make]
    grid: list[tuple[float, float]]
    steps: str
    passes: list[float]
    shown: list[float]
    seeds: tuple[int, ...] = (0,)


def _pairs(first: Sequence[float], second: Sequence[float], ratio: bool = False) -> list[tuple[float, float]]:
    return [(a, a / b if ratio else b) for a in first for b in second]


def _some(names: str, **others: Make) -> dict[str, Make]:
    return {name: others.get(name.replace("-", "_"), EVERY[name]) for name in names.split()}


RACES = {
    "q20": Race(
        "Q20: a quadratic sum, n = m = 1024, q = 20, p = 10",
        lambda _: q20(),
        EVERY,
        _pairs((0.1, 0.3, 1.0), (0.03, 0.1, 0.3, 1.0)),
        "rho in {.1, .3, 1}, gamma in {.03, .1, .3, 1}",
        [3, 10, 30, 100, 200, 300],
        [10, 30, 100, 300],
        (0, 1, 2),
    ),
    "q100": Race(
        "Q100: a quadratic sum, n = 32768, m = 1024, q = 100, p = 10",
        lambda _: q100(),
        _some("SABA SRBA SPABA SOBA FSLA AmIGO stocBiO MRBO", SRBA=lambda rho, gamma: SRBA(rho, gamma, period=132)),
        _pairs((0.1, 0.3, 1.0), (0.3, 1.0, 3.0, 10.0), ratio=True),
        "rho in {.1, .3, 1}, rho / gamma in {.3, 1, 3, 10}",
        [1, 3, 10, 30],
        [1, 3, 10, 30],
        (0, 1, 2),
    ),
    "a9a": Race(
        "a9a: logistic regression, a penalty for each of 123 features, x <= 1",
        a9a,
        _some(
            "SABA SRBA SPABA SRBA-FD SOBA MA-SOBA FdeHBO FSLA AmIGO stocBiO MRBO VRBO F2SA-2",
            MA_SOBA=MASOBA,
        ),
        _pairs((0.1, 0.3), (10.0, 30.0, 100.0)),
        "rho in {.1, .3}, gamma in {10, 30, 100}",
        [1, 3, 10],
        [3, 10],
        (0, 1, 2),
    ),
    "tiny": Race(  # does it run?
        "A tiny quadratic sum",
        lambda _: quadratic_sum("tiny", 20, 12, 4, 3, batch=8),
        EVERY,
        _pairs((0.3,), (0.1, 0.3)),
        "rho in {.3}, gamma in {.1, .3}",
        [1, 4],
        [1, 4],
    ),
}


def number(value: float) -> str:
    """2 digits, or that it diverged."""
    return f"{value:.1e}" if math.isfinite(value) else "diverged"


def table(race: Race, results: list[Result]) -> Table:
    """A row for each algorithm, the best first."""
    columns = ["", *(f"{p:g} pass{'es' if p > 1 else ''}" for p in race.shown), "rho, gamma", "CPU s", "steps a pass"]
    rows = []
    for found in sorted(results, key=lambda found: found.tuned[-1].value):
        last = found.tuned[-1]
        cells = [number(found.at(p).value) for p in race.shown]
        cells += [f"{last.rho:.3g}, {last.gamma:.3g}", f"{found.seconds(last.passes):.1f}", f"{found.steps:.1f}"]
        rows.append(Row(found.name, cells, asdict(found)))
    notes = [
        f"|grad Phi|^2, {'one order' if len(race.seeds) == 1 else f'the median of {len(race.seeds)} orders'} of the"
        f" data; steps tuned for every budget: {race.steps}. CPU seconds"
        f" are those of {race.shown[-1]:g} passes of one run, one thread."
    ]
    return Table(race.title, columns, rows, notes)


def read(path: Path) -> dict[str, Result]:
    """What has been found before, by name."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["tables"][0]["rows"]
    return {row["name"]: _result(row["numbers"]) for row in rows}


def _result(told: dict[str, Any]) -> Result:
    best = tuple(Tuned(**{k: math.inf if v is None else v for k, v in one.items()}) for one in told["tuned"])
    return Result(told["name"], best, told["steps"], told["cpu_ms"])


def _plain(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run(name: str, chosen: Sequence[str] | None, data: Path, out: Path | None, timed: bool = False) -> list[Result]:
    """The race of that name; results are written as they come, those of others are kept.

    With `timed` nothing is tuned: the CPU time of what has been found before is measured again.
    """
    race = RACES[name]
    workload = race.make(data)
    path = None if out is None else out / f"stochastic_{name}.json"
    found: dict[str, Result] = {} if path is None else read(path)
    for label, make in race.entries.items():
        if (chosen is not None and label not in chosen) or (timed and label not in found):
            continue
        if timed:
            last = found[label].tuned[-1]
            result = replace(found[label], cpu_ms=cpu_ms(workload, make(last.rho, last.gamma)))
        else:
            seconds = 0.01 if name == "tiny" else 0.3
            result = tuned(workload, Entry(label, make), race.grid, race.passes, race.seeds, seconds)
        found = (found if path is None else read(path)) | {label: result}  # another process may have written meanwhile
        last = result.tuned[-1]
        ms = f"{result.cpu_ms:.2f} ms a step"
        print(f"{name} {label}: {number(last.value)} at rho={last.rho:g}, gamma={last.gamma:.3g}, {ms}", flush=True)
        if path is not None:
            shown = table(race, list(found.values()))
            command = f"python benchmarks/stochastic.py --workloads {name} --data PATH --out benchmarks/results"
            record = {"command": command, "machine": machine(), "tables": [_plain(asdict(shown))]}
            write(path, json.dumps(record, indent=1) + "\n")
            write(path.with_suffix(".md"), f"`{command}`\n\n{markdown(shown)}")
    return list(found.values())


def draw(name: str, results: list[Result], path: Path) -> None:
    """|grad Phi|^2 against passes, and against CPU seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for i, found in enumerate(sorted(results, key=lambda found: found.tuned[-1].value)):
        values = [one.value for one in found.tuned]
        style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10], "linewidth": 1.3}
        axes[0].plot([one.passes for one in found.tuned], values, label=found.name, **style)
        axes[1].plot([found.seconds(one.passes) for one in found.tuned], values, **style)
    for axis, label in zip(axes, ("passes over the samples of f and g", "CPU seconds, one thread"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(r"$|\nabla\Phi|^2$")
    figure.legend(loc="outside right center", fontsize="small")
    figure.suptitle(RACES[name].title, fontsize="medium")
    figure.savefig(path, dpi=110)


BEGIN, END = "<!-- {}: written by benchmarks/stochastic.py -->\n", "<!-- end -->\n"


def with_table(page: str, name: str, text: str) -> str:
    """The page with what is between the two marks of a workload replaced."""
    before, rest = page.split(BEGIN.format(name))
    after = rest.split(END, 1)[1]
    return f"{before}{BEGIN.format(name)}\n{text.strip()}\n{END}{after}"


def publish(results: Path, docs: Path = DOCS) -> None:
    """Draw what is there, and put the tables into the page."""
    page = docs / "stochastic_benchmarks.md"
    for name in ("q20", "q100", "a9a", "cleaning", "overhead", "peers"):
        path = results / f"stochastic_{name}.json"
        if not path.exists():
            continue
        if name in RACES:
            draw(name, list(read(path).values()), docs / "images" / f"stochastic_{name}.png")
        text = path.with_suffix(".md").read_text(encoding="utf-8")
        write(page, with_table(page.read_text(encoding="utf-8"), name, text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="q20", help=f"which of {','.join(RACES)}")
    parser.add_argument("--algorithms", help="which; all that take part if it is not said")
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("BILEVEL_DATA", ".")), help="a folder ($BILEVEL_DATA)"
    )
    parser.add_argument("--out", type=Path, help="write JSON and Markdown there")
    parser.add_argument("--time", action="store_true", help="measure only the CPU time of what is in --out")
    parser.add_argument("--draw", action="store_true", help="run nothing: pictures and tables of what is in --out")
    given = parser.parse_args()
    names = given.workloads.split(",")
    if given.draw:
        publish(given.out or HERE / "results")
        return
    for name in names:
        run(name, None if given.algorithms is None else given.algorithms.split(","), given.data, given.out, given.time)


if __name__ == "__main__":
    main()
