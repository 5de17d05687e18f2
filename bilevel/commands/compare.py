"""`bilevel compare`: the estimators on a problem, as a table, as JSON and as a picture."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, final

from bilevel._files import made_folder, write_atomically
from bilevel._hypergradient import hypergradient
from bilevel.certificates.certificate import Constants
from bilevel.certificates.estimate_constants import estimate_constants
from bilevel.commands.home import Home
from bilevel.commands.progress import note
from bilevel.commands.raised import Failure
from bilevel.commands.result import plain, versions
from bilevel.commands.subject import NamedProblem, subject
from bilevel.diagnostics.compare import compare as compare_estimators
from bilevel.diagnostics.comparison import Comparison
from bilevel.named.registry import demand_names
from bilevel.outer.lock import locked

_WIDTH, _HEIGHT, _DPI = 9.0, 5.0, 110


@final
@dataclass(frozen=True)
class Wish:
    """The words of `bilevel compare`; empty or None where nothing was said."""

    problem: str
    estimator: tuple[str, ...] = ()
    budgets: tuple[int, ...] = ()
    arguments: tuple[str, ...] = ()
    seed: int | None = None
    out: str | None = None
    json: bool = False
    estimate_constants: bool = False


def compare(wish: Wish) -> None:
    """Print the comparison at the problem's start; with `out`, also leave compare.json and compare.png there.

    Raises:
        ValueError: if the request makes no sense, or another process has the folder.
        BilevelError: if not even the reference could be computed.
        Failure: if no estimator applies; what there is to say is printed and written first.
    """
    if wish.out is not None and Path(wish.out).exists() and not Path(wish.out).is_dir():
        raise ValueError(f"`--out {wish.out}` is a file: name a folder.")
    with contextlib.ExitStack() as stack:
        if wish.out is not None:
            try:
                stack.enter_context(made_folder(Path(wish.out)))
                stack.enter_context(locked(Path(wish.out)))
            except OSError as error:
                raise ValueError(f"`--out {wish.out}` cannot hold a comparison: {error}.") from error
        _compare(wish)


def _compare(wish: Wish) -> None:
    home = Home()
    at = subject(wish.problem, wish.arguments, wish.seed)
    demand_names(*wish.estimator)  # which the file of the problem may have registered
    if wish.seed is not None and not at.seeded:
        note(f"--seed has no effect: {wish.problem} draws no random numbers.")
    made = at.instance
    constants = _constants(at, wish)
    found = compare_estimators(
        made.problem,
        made.x0,
        made.y0,
        estimators=wish.estimator or None,
        budgets=wish.budgets or None,
        data=at.data,
        constants=constants,
    )
    content = plain(
        {
            "problem": wish.problem,
            "set": wish.arguments,
            "seed": wish.seed,
            "budgets": wish.budgets or None,
            "constants": None if constants is None else _plain(constants),
            "versions": versions(),
            **found.as_dict(),
        }
    )
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    print(text if wish.json else f"{found}\n{_worth(constants)}")
    home.back_from(wish.problem)
    if wish.out is not None:
        _write(Path(wish.out), text, found)
    if not math.isfinite(found.reference_error):
        note(f"the error of the reference, {found.reference}, is unknown: `bilevel check {wish.problem}` may say why.")
    if not any(row.applies for row in found.rows):
        raise Failure(f"no estimator applies to {wish.problem}.")


def _constants(at: NamedProblem, wish: Wish) -> Constants | None:
    """Those of the problem, else, if it was asked for, estimates at an inner solution."""
    made = at.instance
    if made.constants is not None:
        if wish.estimate_constants:
            note(f"--estimate-constants has no effect: {wish.problem} comes with its own, which are better.")
        return made.constants(made.x0)
    if not wish.estimate_constants:
        return None
    solved = hypergradient(made.problem, made.x0, made.y0, estimator="aid-cg", data=at.data, throw=False)
    return estimate_constants(made.problem, made.x0, solved.y, data=at.data)


def _worth(constants: Constants | None) -> str:
    """What the column of certificates is worth, in words."""
    if constants is None:
        return "no certificates: no constants are known (`--estimate-constants` estimates them)"
    if constants.heuristic:
        return f"certificates are heuristic: {', '.join(sorted(constants.heuristic))} were estimated from products"
    sure = "" if constants.confidence == 1 else f", with probability {constants.confidence:.3g}"
    return f"certificates are proven{sure}: constants are {constants.source}"


def _plain(constants: Constants) -> dict[str, Any]:
    content = asdict(constants)
    return content | {"heuristic": sorted(constants.heuristic), "local": sorted(constants.local)}


def _write(folder: Path, text: str, found: Comparison) -> None:
    write_atomically(folder / "compare.json", lambda file: file.write(f"{text}\n".encode()))
    if not any(row.applies for row in found.rows):
        return
    try:
        write_atomically(folder / "compare.png", lambda file: _draw(file, found))
    except ImportError as error:
        note(str(error))


def _draw(file: BinaryIO, found: Comparison) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing compare.png needs matplotlib: `pip install "bilevel[plots]"`.') from error
    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, layout="constrained")
    found.plot(figure)
    figure.savefig(file, format="png")
