"""`bilevel run`: one run of `minimize`, and everything about it in a folder."""

from __future__ import annotations

import itertools
import shlex
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any

from bilevel._estimate import Estimate
from bilevel._instance import Instance
from bilevel._optimizer import AbstractOuterDriver
from bilevel._result import BilevelError, Status
from bilevel._tree import ravel
from bilevel.commands.contents import append_history, read_checkpoint, read_result, write_history, write_result
from bilevel.commands.folder import Folder
from bilevel.commands.outcome import RunOutcome, head, write
from bilevel.commands.plan import Plan, Request, plan
from bilevel.commands.progress import note, progress
from bilevel.commands.raised import told
from bilevel.commands.replaced import bring_back, forget, set_aside
from bilevel.outer.checkpoint import demand_same
from bilevel.outer.minimize import minimize
from bilevel.outer.solution import Record, Solution


class Failure(Exception):  # noqa: N818  (its name is what the exit code says)
    """A computation that began and did not succeed; what it computed has been written."""


def run(request: Request) -> None:
    """Run, show, and leave the files; see :class:`Folder` for which.

    Raises:
        ValueError: if the request makes no sense.
        Failure: if the computation did not succeed.
        KeyboardInterrupt: if it was interrupted; the files are written first.
    """
    if request.seconds is not None:
        raise ValueError(f"`--seconds` limits the training of few-shot experiments, and {request.problem} is none.")
    folder = folder_of(request)
    before = read_result(folder) if request.resume else None
    made = plan(request, None if before is None else before["settings"])
    if before is not None:
        demand_same(folder.checkpoint, made.instance.problem, made.options.get("data"))
    if before is not None and _complete(before, made, folder):
        if not request.quiet:
            note(f"nothing to do: the run in {str(folder.path)!r} has taken its steps. Raise `--steps` to continue it.")
        return
    folder.path.mkdir(parents=True, exist_ok=True)
    if request.overwrite:
        set_aside(folder)
    elif not request.resume:
        folder.clear()
    for text in made.notes:
        note(text)
    earlier = 0.0 if before is None else float(before.get("seconds") or 0.0)
    try:
        outcome, began, cause = _compute(request, made, folder)
    except BaseException as error:
        if bring_back(folder):
            error.add_note(_kept(folder))
        raise
    if bring_back(folder):  # the first evaluation did not succeed
        raise _failure(outcome, f"{outcome.message} {_kept(folder)}") from cause
    _name_outer(made, folder)
    seconds = earlier + time.perf_counter() - began
    try:
        write(request, made, folder, outcome, seconds)
    except OSError as error:
        raise Failure(f"{outcome.message} Its files could not be written: {error}. {left(folder)}".strip()) from error
    if outcome.failed:
        raise _failure(outcome, outcome.message) from cause


def _complete(before: Mapping[str, Any], made: Plan, folder: Folder) -> bool:
    """Whether the run that is to be resumed has converged, or succeeded and taken all the steps that are asked for."""
    ended = (Status.successful.name, Status.steps_used_up.name)
    if before.get("status") not in ended or made.options["tol"] != before["settings"].get("tol"):
        return False
    if before.get("converged"):
        return True
    if isinstance(made.options.get("outer"), AbstractOuterDriver):  # its file counts evaluations
        return bool(made.options["max_steps"] == before["settings"]["steps"])
    return bool(read_checkpoint(folder)["step"] >= made.options["max_steps"])


def _failure(outcome: RunOutcome, message: str) -> BaseException:
    return KeyboardInterrupt(message) if outcome.status == "interrupted" else Failure(message)


def _kept(folder: Folder) -> str:
    return f"The earlier run in {str(folder.path)!r} is kept."


def folder_of(request: Request) -> Folder:
    """The run's folder; a new one under `runs` where none was named.

    Raises:
        ValueError: if it is a file, or holds a run and nothing was said about what to do with it.
    """
    if request.resume and request.overwrite:
        raise ValueError("`--resume` continues a run and `--overwrite` replaces it: choose one.")
    if request.out is None:
        if request.resume:
            raise ValueError("`--resume` needs `--out DIR` to say which run.")
        stem = PurePath(request.problem).name.replace(".py:", "-")
        name = f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"
        names = itertools.chain([name], (f"{name}-{again}" for again in itertools.count(2)))
        return Folder(next(path for path in (Path("runs") / name for name in names) if not path.exists()))
    folder = Folder(Path(request.out))
    if folder.path.exists() and not folder.path.is_dir():
        raise ValueError(f"`--out {request.out}` is a file: name a folder.")
    if not folder.result.exists():
        bring_back(folder)  # of a run that was killed before its first evaluation had ended
    if folder.occupied and not (request.resume or request.overwrite):
        raise ValueError(f"{request.out!r} holds a run: `--resume` continues it, `--overwrite` replaces it.")
    return folder


def _compute(request: Request, made: Plan, folder: Folder) -> tuple[RunOutcome, float, BaseException | None]:
    """Run `minimize`, writing the history as it goes; whatever ends it becomes an outcome."""
    instance, records = made.instance, list[Record]()
    if request.resume:
        records = [Record.from_dict(record) for record in read_checkpoint(folder)["history"]]
    write_history(folder, records)
    began, first = time.perf_counter(), True

    with progress(made.options["max_steps"], quiet=request.quiet) as show:

        def callback(record: Record, _: Estimate) -> None:
            nonlocal first
            if first:
                write_result(folder, head(request, made) | {"status": "running"})
                first = False
            if record.status.ok or record.step > 0:
                forget(folder)
            if record.step < len(records):  # a resumed outer method has asked for another point than before
                del records[record.step :]
                write_history(folder, records)
            append_history(folder, record)
            records.append(record)
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
            if error.partial.status is Status.interrupted:  # a full disk, or an error of f
                message = f"{told(error, request.problem)} {left(folder)}"
                return _stopped(instance, folder, records, "failed", message, error.partial), began, error
            return _ended(error.partial, folder, records), began, error
        except KeyboardInterrupt as error:
            if folder.replaced.is_dir() or not (records or folder.checkpoint.exists()):
                folder.clear()
                raise
            step = records[-1].step if records else 0
            again = shlex.join(["bilevel", "run", request.problem, "--out", str(folder.path), "--resume"])
            kept = f"Continue with: {again}" if folder.checkpoint.exists() else "No checkpoint could be written."
            message = f"interrupted after step {step}. {kept}"
            return _stopped(instance, folder, records, "interrupted", message, partial_of(error)), began, error
        except Exception as error:
            if first:  # nothing was computed
                if not request.resume:
                    folder.clear()
                raise
            message = f"stopped after step {records[-1].step}: {told(error, request.problem)}"
            if isinstance(error, OSError):  # as on a full disk, where nothing more may be written
                message = f"{message}. {left(folder)}"
            return _stopped(instance, folder, records, "failed", message, partial_of(error)), began, error
    return _ended(solution, folder, records), began, None


def _name_outer(made: Plan, folder: Folder) -> None:
    """Which outer method the default was, as the checkpoint tells."""
    if made.options.get("outer") is None and "outer" in made.settings["chosen"] and folder.checkpoint.exists():
        made.settings["chosen"]["outer"] = read_checkpoint(folder)["settings"]["outer"]


def _ended(solution: Solution, folder: Folder, records: list[Record]) -> RunOutcome:
    if len(solution.history) != len(records):  # a resumed outer method needed fewer evaluations than before
        write_history(folder, solution.history)
    message = f"the run did not succeed. {solution.message}" if solution.failed else solution.message
    point, status = (solution.x, solution.y), solution.status.name
    return RunOutcome(status, solution.failed, message, solution.history[-1].step, point, solution.history, solution)


def _stopped(
    instance: Instance, folder: Folder, records: list[Record], status: str, message: str, partial: Solution | None
) -> RunOutcome:
    """What the checkpoint, which `minimize` wrote on its way out, says; where it could not, what it left."""
    saved = read_checkpoint(folder) if folder.checkpoint.exists() else None
    if saved is not None and (saved["step"] >= len(records) - 1 or partial is None):
        del records[saved["step"] + 1 :]
        x, y = (
            structure.unravel(vector.to(structure.device))
            for structure, vector in ((ravel(instance.x0)[1], saved["x"]), (ravel(instance.y0)[1], saved["y"]))
        )
        return RunOutcome(status, True, message, saved["step"], (x, y), tuple(records))
    if partial is None:
        return RunOutcome(status, True, message, records[-1].step if records else 0, None, tuple(records))
    del records[len(partial.history) :]
    point = partial.x, partial.y
    return RunOutcome(status, True, message, partial.history[-1].step, point, tuple(records))


def partial_of(error: BaseException) -> Solution | None:
    """What `minimize` left with the exception."""
    partial = getattr(error, "partial", None)
    return partial if isinstance(partial, Solution) else None


def left(folder: Folder) -> str:
    """What is kept where a run could not be written to its end."""
    try:
        step = read_checkpoint(folder)["step"]
    except ValueError:
        return "No checkpoint was written."
    return f"Kept: the checkpoint of step {step} in {str(folder.path)!r}, from which `--resume` continues."
