"""`bilevel run`: one run of `minimize`, and everything about it in a folder."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Iterator
from typing import Literal, final

import torch

from bilevel._estimate import Estimate
from bilevel._instance import Instance
from bilevel._optimizer import AbstractOuterDriver
from bilevel._result import BilevelError, Status
from bilevel._tree import ravel
from bilevel.commands.claim import Claim, claimed
from bilevel.commands.company import Company, as_restarted, company, demand_shared
from bilevel.commands.contents import (
    BEGUN,
    FINISHING,
    INTERRUPTED,
    STOPPED,
    append_history,
    damaged,
    read_checkpoint,
    read_records,
    sync_history,
    write_history,
    write_result,
)
from bilevel.commands.folder import Folder
from bilevel.commands.home import Home
from bilevel.commands.outcome import RunOutcome, finish, head, write
from bilevel.commands.plan import Plan, Request, plan
from bilevel.commands.progress import note, progress
from bilevel.commands.raised import Failure, raised_by, told
from bilevel.commands.replaced import bring_back, forget, set_aside
from bilevel.outer.checkpoint import demand_same
from bilevel.outer.minimize import minimize
from bilevel.outer.solution import Record, Solution
from bilevel.outer.watcher import AbstractWatcher

SECONDS = 30.0  # between checkpoints, at most


def run(request: Request) -> None:
    """Run, show, and leave the files; see :class:`Folder` for which.

    Raises:
        ValueError: if the request makes no sense.
        Failure: if the computation did not succeed.
        KeyboardInterrupt: if it was interrupted; the files are written first.
    """
    if request.seconds is not None:
        raise ValueError(f"`--seconds` limits the training of few-shot experiments, and {request.problem} is none.")
    with placed(request.device), company() as ranks:
        if not ranks.leads:
            _follow(request, ranks)
            return
        with ranks.led():
            request = as_restarted(request)
            with claimed(request) as claim:
                _run(request, claim, ranks)


@contextlib.contextmanager
def placed(device: str | None) -> Iterator[None]:
    """Tensors that are made without saying where go to this device; None: where they do anyhow.

    Raises:
        ValueError: if it is none that torch has here.
    """
    if device is None:
        yield
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0][:200]
        raise ValueError(f"`--device {device}` is not here: {why}. `bilevel info` lists devices.") from error
    with torch.device(device):
        yield


def _follow(request: Request, ranks: Company) -> None:
    """Compute what rank 0 does, and leave everything else to it."""
    told_first = ranks.told()
    if told_first is None:
        return
    made = plan(request, told_first["recorded"])
    try:
        minimize(
            made.instance.problem,
            made.instance.x0,
            made.instance.y0,
            callback=lambda record, estimate: False,  # noqa: ARG005 (rank 0 alone calls its own)
            checkpoint=told_first["checkpoint"],
            resume=told_first["resume"],
            throw=not request.keep_going,
            group=ranks.ranks,
            **made.options,
        )
    except BilevelError as error:
        raise Failure(told(error, request.problem)) from error


def _run(request: Request, claim: Claim, ranks: Company) -> None:
    folder, before = claim.folder, claim.before
    made = plan(request, None if before is None else before["settings"])
    demand_shared(request, made, ranks)
    if claim.goes_on:
        read_checkpoint(folder)  # if it can be read
    if claim.goes_on and not request.force:
        demand_same(folder.checkpoint, made.instance.problem, made.options.get("data"))
    if claim.goes_on and _all_computed(claim, made):
        if before is not None and before["status"] == FINISHING and finish(request, made, folder, before):
            return
        if before is not None and before["status"] != FINISHING:
            if not request.quiet:
                name = str(folder.path)
                note(f"nothing to do: the run in {name!r} has taken its steps. Raise `--steps` to continue it.")
            return
    if request.overwrite:
        set_aside(folder)
    elif not claim.goes_on:
        folder.clear(but_result=True)
    for text in made.notes:
        note(text)
    earlier = 0.0 if before is None else float(before.get("seconds") or 0.0)
    began = time.perf_counter()
    going = _Going(request, made, claim, ranks)
    try:
        outcome, cause = _compute(going)
    except BaseException as error:
        if bring_back(folder):
            error.add_note(_kept(folder))
        elif not (going.told or request.resume):  # nothing was computed
            folder.clear()
        raise
    if bring_back(folder):  # the first evaluation did not succeed
        raise _failure(outcome, f"{outcome.message} {_kept(folder)}") from cause
    try:
        _name_outer(made, folder)
        write(request, made, folder, outcome, earlier + time.perf_counter() - began)
    except OSError as error:  # nothing else is wrong with it
        raise Failure(f"{outcome.message} Its files could not be written: {error}. {left(folder)}".strip()) from error
    except KeyboardInterrupt as error:
        message = f"interrupted while metrics and plot were made. Continue with: {again(request, folder)}"
        raise KeyboardInterrupt(message) from error
    if outcome.failed:
        raise _failure(outcome, outcome.message) from cause


def _all_computed(claim: Claim, made: Plan) -> bool:
    """Whether the run that is to be resumed has converged, or succeeded and taken all the steps that are asked for.

    One whose files were not finished, because it was killed then, has also if it failed: all that is known is written.
    """
    before = claim.before
    assert before is not None
    ended = (Status.successful.name, Status.steps_used_up.name, FINISHING)
    if before["status"] not in ended or made.options["tol"] != before["settings"].get("tol"):
        return False
    if before["status"] == FINISHING or isinstance(made.options.get("outer"), AbstractOuterDriver):
        # the file of a driver counts evaluations
        return bool(before.get("converged") or made.options["max_steps"] == before["settings"].get("steps"))
    return bool(before.get("converged") or read_checkpoint(claim.folder)["step"] >= made.options["max_steps"])


def _failure(outcome: RunOutcome, message: str) -> BaseException:
    return KeyboardInterrupt(message) if outcome.status == INTERRUPTED else Failure(message)


def _kept(folder: Folder) -> str:
    return f"The earlier run in {str(folder.path)!r} is kept."


def again(request: Request, folder: Folder) -> str:
    """The command that continues a run."""
    return shlex.join(["bilevel", "run", request.problem, "--out", str(folder.path), "--resume"])


@final
class _Going:
    """A run as it goes: its records, and whether a new one has been `told`."""

    def __init__(self, request: Request, made: Plan, claim: Claim, ranks: Company) -> None:
        self.request, self.made, self.claim, self.ranks = request, made, claim, ranks
        self.records: list[Record] = []
        self.told = False
        self.home = Home()

    def tell(self, record: Record) -> None:
        """Write the record of a step."""
        self.home.back_from(self.request.problem)
        folder = self.claim.folder
        if not self.told:
            write_result(folder, head(self.request, self.made) | {"status": BEGUN})
        if record.status.ok or record.step > 0:
            forget(folder)
        if not self.told or record.step < len(self.records):
            del self.records[record.step :]  # a resumed outer method may ask for another point than before
            write_history(folder, self.records)
        append_history(folder, record)
        self.records.append(record)
        self.told = True


@final
class _Teller(AbstractWatcher):
    """Writes and shows each record."""

    def __init__(self, going: _Going, show: Callable[[Record], None]) -> None:
        self._going, self._show = going, show

    def __call__(self, told: Record, estimate: Estimate) -> None:
        self._going.tell(told)
        self._show(told)

    def before_save(self) -> None:
        if self._going.told:
            sync_history(self._going.claim.folder)


def _compute(going: _Going) -> tuple[RunOutcome, BaseException | None]:
    """Run `minimize`, writing the history as it goes; whatever ends it becomes an outcome."""
    request, made, folder = going.request, going.made, going.claim.folder
    instance, records, goes_on = made.instance, going.records, going.claim.goes_on
    if goes_on:
        records.extend(read_records(folder))
    else:  # before anything is computed: who is killed now has said what was to be run
        write_result(folder, head(request, made) | {"status": BEGUN})
    name = request.problem.rpartition("/")[2]
    with progress(made.options["max_steps"], quiet=request.quiet, name=name) as show:
        try:
            try:
                resume, before = resuming(request, goes_on=goes_on), going.claim.before
                recorded = None if before is None else before["settings"]
                going.ranks.tell(recorded=recorded, checkpoint=str(folder.checkpoint), resume=resume)
                solution = minimize(
                    instance.problem,
                    instance.x0,
                    instance.y0,
                    callback=_Teller(going, show),
                    checkpoint=folder.checkpoint,
                    checkpoint_seconds=request.checkpoint_seconds or SECONDS,
                    resume=resume,
                    throw=not request.keep_going,
                    group=going.ranks.ranks,
                    **made.options,
                )
            finally:
                going.home.back_from(request.problem)
        except BilevelError as error:
            if not isinstance(error.partial, Solution):
                raise
            if error.partial.status is Status.interrupted:  # a full disk
                message = f"{told(error, request.problem)} {left(folder)}"
                return _stopped(instance, folder, records, STOPPED, message, error.partial), error
            return _ended(error.partial, folder, records), error
        except KeyboardInterrupt as error:
            if not going.told:
                if folder.replaced.is_dir() or not folder.saved:
                    raise
                message = f"interrupted before another step was taken. Continue with: {again(request, folder)}"
                if goes_on:
                    raise KeyboardInterrupt(message) from error
                return _stopped(instance, folder, records, INTERRUPTED, message, partial_of(error)), error
            kept = f"Continue with: {again(request, folder)}" if folder.saved else "No checkpoint could be written."
            message = f"interrupted after step {records[-1].step}. {kept}"
            return _stopped(instance, folder, records, INTERRUPTED, message, partial_of(error)), error
        except BaseException as error:  # also `sys.exit` in f or g
            if not going.told:  # nothing was computed
                if goes_on and isinstance(error, MISREAD) and not raised_by(error):
                    raise damaged(folder) from error
                raise
            message = f"stopped after step {records[-1].step}: {told(error, request.problem)}"
            if isinstance(error, OSError):  # as on a full disk, where nothing more may be written
                message = f"{message}. {left(folder)}"
            return _stopped(instance, folder, records, STOPPED, message, partial_of(error)), error
    return _ended(solution, folder, records), None


MISREAD = (KeyError, IndexError, AttributeError, RuntimeError)  # of what a checkpoint holds, and should not


def _name_outer(made: Plan, folder: Folder) -> None:
    """Which outer method the default was, as the checkpoint tells."""
    if made.options.get("outer") is None and "outer" in made.settings["chosen"] and folder.saved:
        made.settings["chosen"]["outer"] = read_checkpoint(folder)["settings"]["outer"]


def _ended(solution: Solution, folder: Folder, records: list[Record]) -> RunOutcome:
    if len(solution.history) != len(records):  # a resumed outer method needed fewer evaluations than before
        write_history(folder, solution.history)
    message = f"the run did not succeed. {solution.message}" if solution.failed else solution.message
    point, status = (solution.x, solution.y), solution.status.name
    return RunOutcome(status, solution.failed, message, solution.history[-1].step, point, solution.history, solution)


def resuming(request: Request, *, goes_on: bool) -> bool | Literal["force"]:
    """The argument `resume` of `minimize`."""
    return "force" if goes_on and request.force else goes_on


def _stopped(
    instance: Instance, folder: Folder, records: list[Record], status: str, message: str, partial: Solution | None
) -> RunOutcome:
    """What the checkpoint, which `minimize` wrote on its way out, says; where it could not, what it left."""
    saved = read_checkpoint(folder) if folder.saved else None
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
