"""How a run ended, and what is left of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from bilevel._files import write_atomically
from bilevel._numerics.nesting import tree_map
from bilevel._result import Stats
from bilevel._tree import Tree, ravel
from bilevel.commands.contents import FINISHING, read_history, read_solution, write_result, write_solution
from bilevel.commands.folder import Folder
from bilevel.commands.home import Home
from bilevel.commands.plan import Plan, Request
from bilevel.commands.plot import draw
from bilevel.commands.progress import note, number, table
from bilevel.commands.raised import Failure
from bilevel.commands.result import describe, plain, versions
from bilevel.outer.solution import Best, Record, Solution


@final
@dataclass(frozen=True, eq=False)
class RunOutcome:
    """How a run ended.

    Attributes:
        status: the name of a `Status`, "interrupted", or "failed" for an exception of f or g.
        failed: whether that is a failure.
        message: what to do about it.
        steps: how many outer steps led to x; one more than the last record's where the run was stopped after a step.
        point: x and y; None where no checkpoint could be written.
        history: the records.
        solution: what `minimize` returned; None where it did not.
    """

    status: str
    failed: bool
    message: str
    steps: int
    point: tuple[Tree, Tree] | None
    history: tuple[Record, ...]
    solution: Solution | None = None


def head(request: Request, made: Plan) -> dict[str, Any]:
    """What is known before a run starts."""
    return {
        "problem": request.problem,
        "description": made.instance.description,
        "settings": made.settings,
        "versions": versions(),
    }


def write(request: Request, made: Plan, folder: Folder, outcome: RunOutcome, seconds: float) -> None:
    """Write every file of a run that has ended, and show its table."""
    history = outcome.history
    stats = sum((record.stats for record in history), Stats())
    content = head(request, made) | {
        "status": outcome.status,
        "converged": outcome.solution is not None and outcome.solution.converged,
        "message": outcome.message,
        "estimate_note": "" if outcome.solution is None else outcome.solution.estimate.note,
        "steps": outcome.steps,
        "initial": _values(history[0]) if history else None,
        "final": _values(history[-1]) if history else None,
        "best": None if outcome.solution is None else _values(outcome.solution.best),
        "x": None if outcome.point is None else describe(outcome.point[0]),
        "metrics": {},
        "stats": stats.as_dict(),
        "seconds": seconds,
        "notes": [],
    }
    if outcome.point is not None:
        write_solution(folder, *outcome.point)
    unfinished = {"status": FINISHING, "computed": {"status": outcome.status, "failed": outcome.failed}}
    write_result(folder, content | (unfinished if outcome.solution is not None else {}))
    _complete(request, made, folder, content, outcome.point, history)


def finish(request: Request, made: Plan, folder: Folder, before: Mapping[str, Any]) -> bool:
    """Make what is missing of a run that was killed while :func:`write` was at its metrics or its picture.

    Nothing is computed again. False where the files that this needs cannot be read.

    Raises:
        Failure: if the run did not succeed, as it would have said itself.
    """
    computed, point = before.get("computed"), read_solution(folder)
    try:
        history = tuple(Record.from_dict(_numbers(line)) for line in read_history(folder))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return False
    if not isinstance(computed, dict) or point is None or not history or history[-1].step != before.get("steps"):
        return False
    x, y = (_moved(tree, start) for tree, start in zip(point, (made.instance.x0, made.instance.y0), strict=True))
    content = {name: value for name, value in before.items() if name != "computed"}
    content |= {"status": str(computed.get("status")), "metrics": {}, "notes": []}
    _complete(request, made, folder, content, (x, y), history)
    if computed.get("failed"):
        raise Failure(str(before.get("message")))
    return True


def _complete(
    request: Request,
    made: Plan,
    folder: Folder,
    content: dict[str, Any],
    point: tuple[Tree, Tree] | None,
    history: tuple[Record, ...],
) -> None:
    """What a problem's own code makes of x and y; then the result, by which the run is finished."""
    instance, notes = made.instance, content["notes"]
    if point is not None:
        x, y = point
        if instance.metrics is not None:
            metrics = instance.metrics
            _attempt("its metrics", lambda: content.update(metrics=plain(dict(metrics(x, y)))), notes)
        if history:
            picture = lambda file: draw(file, instance, x, y, history)  # noqa: E731
            _attempt("plot.png", lambda: write_atomically(folder.plot, picture), notes)
    write_result(folder, content)
    for text in notes:
        note(text)
    if not request.quiet and history:
        _show(made, folder, content)


def _moved(tree: Tree, start: Tree) -> Tree:
    """A structure on the device of another one."""
    device = ravel(start)[1].device
    return tree_map(lambda leaf: leaf.to(device), tree)


def _numbers(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of history.jsonl with its numbers, of which those that JSON does not have are texts there."""
    return {**line, **{name: float(line[name]) for name in ("value", "grad_norm", "seconds")}}


def _values(record: Record | Best) -> dict[str, Any]:
    return {"step": record.step, "value": record.value, "grad_norm": record.grad_norm}


def _attempt(what: str, action: Callable[[], object], notes: list[str]) -> None:
    """Something without which the run is still a success: if it fails, a note says so."""
    home = Home()
    try:
        action()
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ImportError)
        notes.append(f"left out {what}: {error if missing else f'{type(error).__name__}: {error}'}")
    finally:
        home.back_from(f"the code of {what}")


def _told(value: Any) -> str:
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _show(made: Plan, folder: Folder, content: dict[str, Any]) -> None:
    settings, counts = made.settings, content["stats"]
    files = sorted(file.name for file in folder.path.iterdir() if not file.name.startswith("."))
    rows = [
        ("status", content["status"] + ("" if content["converged"] else ", not converged")),
        ("Phi", f"{number(content['initial']['value'])} -> {number(content['final']['value'])}"),
        ("|h|", f"{number(content['initial']['grad_norm'])} -> {number(content['final']['grad_norm'])}"),
        *((name.replace("_", " "), _told(value)) for name, value in content["metrics"].items()),
        ("oracle calls", ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count)),
        ("outer steps", str(content["steps"])),
        *([("note", content["estimate_note"])] if content.get("estimate_note") else []),
        ("seconds", f"{content['seconds']:.2f}"),
        ("files", f"{folder.path}: {', '.join(files)}"),
    ]
    table(f"{settings['problem']}: {', '.join(settings['chosen'].values())}", rows)
