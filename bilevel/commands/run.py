"""`bilevel run`: one run of `minimize`, and everything about it in a folder."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any, final

from bilevel._estimate import Estimate
from bilevel._files import write_atomically
from bilevel._instance import Instance
from bilevel._minimize import Record, Solution, minimize
from bilevel._result import BilevelError, Stats
from bilevel._tree import Tree, ravel
from bilevel.commands.folder import Folder
from bilevel.commands.plan import Plan, Request, plan
from bilevel.commands.plot import draw
from bilevel.commands.progress import note, number, progress, table
from bilevel.commands.result import describe, versions


class Failure(Exception):  # noqa: N818  (its name is what the exit code says)
    """A computation that began and did not succeed; what it computed has been written."""


@final
@dataclass(frozen=True, eq=False)
class Outcome:
    """How a run ended: the name of a status, "interrupted", or "failed" for an exception of f or g."""

    status: str
    message: str
    x: Tree
    y: Tree
    history: tuple[Record, ...]


def run(request: Request) -> None:
    """Run, show, and leave the files; see :class:`Folder` for which.

    Raises:
        ValueError: if the request makes no sense.
        Failure: if the computation did not succeed.
        KeyboardInterrupt: if it was interrupted; the files are written first.
    """
    folder = _folder(request)
    before = folder.read_result() if request.resume else None
    made = plan(request, None if before is None else before["settings"])
    folder.path.mkdir(parents=True, exist_ok=True)
    if not request.resume:
        folder.clear()
    for text in made.notes:
        note(text)
    earlier = 0.0 if before is None else float(before.get("seconds") or 0.0)
    outcome, began, cause = _compute(request, made, folder)
    seconds = earlier + time.perf_counter() - began
    _write(request, made, folder, outcome, seconds)
    if outcome.status == "interrupted":
        raise KeyboardInterrupt(outcome.message) from cause
    if outcome.status != "successful":
        raise Failure(outcome.message) from cause


def _folder(request: Request) -> Folder:
    if request.resume and request.overwrite:
        raise ValueError("`--resume` continues a run and `--overwrite` replaces it: choose one.")
    if request.out is None:
        if request.resume:
            raise ValueError("`--resume` needs `--out DIR` to say which run.")
        stem = PurePath(request.problem).name.replace(".py:", "-")
        path = Path("runs") / f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"
        again = 1
        while path.exists():
            again += 1
            path = path.with_name(f"{path.name.partition('.')[0]}.{again}")
        return Folder(path)
    folder = Folder(Path(request.out))
    if folder.path.exists() and not folder.path.is_dir():
        raise ValueError(f"`--out {request.out}` is a file: name a folder.")
    if folder.occupied and not (request.resume or request.overwrite):
        raise ValueError(f"{request.out!r} holds a run: `--resume` continues it, `--overwrite` replaces it.")
    return folder


def _compute(request: Request, made: Plan, folder: Folder) -> tuple[Outcome, float, BaseException | None]:
    """Run `minimize`, writing the history as it goes; whatever ends it becomes an outcome."""
    instance, records = made.instance, list[Record]()
    if request.resume:
        records = [Record.from_dict(record) for record in folder.read_checkpoint()["history"]]
        folder.write_history(records)
    began, first = time.perf_counter(), True

    with progress(made.options["max_steps"], quiet=request.quiet) as show:

        def callback(record: Record, _: Estimate) -> None:
            nonlocal first
            if first:
                folder.write_result(_head(request, made) | {"status": "running"})
                first = False
            records.append(record)
            folder.append_history(record)
            show(record)

        try:
            solution = minimize(
                instance.problem,
                instance.x0,
                instance.y0,
                callback=callback,
                checkpoint=folder.checkpoint,
                resume=request.resume,
                throw=not request.keep_going,
                **made.options,
            )
        except BilevelError as error:
            if not isinstance(error.partial, Solution):
                raise
            return _ended(error.partial), began, error
        except KeyboardInterrupt as error:
            step = records[-1].step if records else 0
            again = shlex.join(["bilevel", "run", request.problem, "--out", str(folder.path), "--resume"])
            message = f"interrupted after step {step}. Continue with: {again}"
            return _stopped(instance, folder, records, "interrupted", message), began, error
        except Exception as error:
            if first:  # nothing was computed: the input is at fault
                raise
            message = f"stopped after step {records[-1].step} by {type(error).__name__}: {error}"
            return _stopped(instance, folder, records, "failed", message), began, error
    return _ended(solution), began, None


def _ended(solution: Solution) -> Outcome:
    message = "" if solution.status.ok else f"the run did not succeed. {solution.message}"
    return Outcome(solution.status.name, message, solution.x, solution.y, solution.history)


def _stopped(instance: Instance, folder: Folder, records: list[Record], status: str, message: str) -> Outcome:
    """What the checkpoint, which `minimize` wrote on its way out, says."""
    x, y = instance.x0, instance.y0
    if folder.checkpoint.exists():
        saved = folder.read_checkpoint()
        x = ravel(instance.x0, "x0")[1].unravel(saved["x"])
        y = ravel(instance.y0, "y0")[1].unravel(saved["y"])
    return Outcome(status, message, x, y, tuple(records))


def _head(request: Request, made: Plan) -> dict[str, Any]:
    return {
        "problem": request.problem,
        "description": made.instance.description,
        "settings": made.settings,
        "versions": versions(),
    }


def _write(request: Request, made: Plan, folder: Folder, outcome: Outcome, seconds: float) -> None:
    notes: list[str] = []
    history, instance = outcome.history, made.instance
    stats = sum((record.stats for record in history), Stats())
    content = _head(request, made) | {
        "status": outcome.status,
        "message": outcome.message,
        "steps": history[-1].step if history else 0,
        "initial": {"value": history[0].value, "grad_norm": history[0].grad_norm} if history else None,
        "final": {"value": history[-1].value, "grad_norm": history[-1].grad_norm} if history else None,
        "x": describe(outcome.x),
        "metrics": {},
        "stats": stats.as_dict(),
        "seconds": seconds,
        "notes": notes,
    }
    folder.write_history(history)
    folder.write_solution(outcome.x, outcome.y)
    folder.write_result(content)  # before anything that a problem's own code could stop
    if instance.metrics is not None:
        metrics = instance.metrics
        _attempt("its metrics", lambda: content.update(metrics=dict(metrics(outcome.x, outcome.y))), notes)
    if history:
        picture = lambda file: draw(file, instance, outcome.x, outcome.y, history)  # noqa: E731
        _attempt("plot.png", lambda: write_atomically(folder.plot, picture), notes)
    folder.write_result(content)
    for text in notes:
        note(text)
    if not request.quiet and history:
        _show(made, folder, content)


def _attempt(what: str, action: Callable[[], object], notes: list[str]) -> None:
    """Something without which the run is still a success: if it fails, a note says so."""
    try:
        action()
    except Exception as error:
        missing = isinstance(error, ImportError)
        notes.append(f"{what} left out: {error if missing else f'{type(error).__name__}: {error}'}")


def _show(made: Plan, folder: Folder, content: dict[str, Any]) -> None:
    settings, counts = made.settings, content["stats"]
    files = sorted(file.name for file in folder.path.iterdir() if not file.name.startswith("."))
    rows = [
        ("status", content["status"]),
        ("Phi", f"{number(content['initial']['value'])} -> {number(content['final']['value'])}"),
        ("|h|", f"{number(content['initial']['grad_norm'])} -> {number(content['final']['grad_norm'])}"),
        *((name.replace("_", " "), number(value)) for name, value in content["metrics"].items()),
        ("oracle calls", ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count)),
        ("outer steps", str(content["steps"])),
        ("seconds", f"{content['seconds']:.2f}"),
        ("files", f"{folder.path}: {', '.join(files)}"),
    ]
    table(f"{settings['problem']}: {settings['chosen']['estimator']}, {settings['chosen']['outer']}", rows)
