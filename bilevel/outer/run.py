"""The outer loop, which runs every algorithm: records, callbacks, statuses, checkpoints and the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias, final

from torch import Tensor

from bilevel._calculus import demand_beyond_start
from bilevel._estimate import Estimate, FlatEstimate
from bilevel._flat import FlatProblem
from bilevel._result import BilevelError, Stats, Status, Tally
from bilevel.algorithms.algorithm import AbstractAlgorithm, Evaluated
from bilevel.algorithms.oracle import Oracle
from bilevel.outer.batches import positions, run_forward
from bilevel.outer.best import Candidate, Keeper
from bilevel.outer.encoding import decoded, encoded
from bilevel.outer.entries import MISREAD, unreadable
from bilevel.outer.looks import BLOWN, Look, Looks, blown, is_finite
from bilevel.outer.partial import attach
from bilevel.outer.randomness import Randomness, drawn_so_far, go_on_from
from bilevel.outer.saves import NotSavedError, Saves
from bilevel.outer.solution import Record, Solution
from bilevel.outer.sound import demand_point, demand_state, sound_best, sound_records, suspect
from bilevel.outer.sweep import Winner
from bilevel.outer.trial import Trial
from bilevel.requirements.first_look import looked_at
from bilevel.requirements.padding import demand_padding_unseen
from bilevel.requirements.properties import STRICTEST, DoesNotApply
from bilevel.requirements.why_not import refusal, why_not

Callback: TypeAlias = Callable[[Record, Estimate], bool | None]
# (problem, x, estimate, its number) -> the estimate in the user's structures, with the calls in the problem's tally
Structured: TypeAlias = Callable[[FlatProblem, Tensor, FlatEstimate, int], Estimate]


@final
@dataclass(frozen=True, eq=False)
class Rules:
    """When a run ends, who is told of its steps, and where its state is kept.

    Attributes:
        max_steps: how many steps at most.
        tol: at which measure of stationarity it ends; None: at none.
        throw: whether it ends, with an error, where something does not succeed.
        callback: what is called with each record; a true value ends the run.
        saves: the checkpoints that are written, or None.
        resume: whether the run begins with what is in the file.
        skip: how many estimates in a row that are lost (see `Status.lost`) are passed over, x staying where it is.
        looks: when a run on batches looks at all the data.
    """

    max_steps: int
    tol: float | None
    throw: bool
    callback: Callback | None
    saves: Saves | None
    resume: bool
    skip: int = 0
    looks: Looks = Looks()


# How a run ends short of its tolerance. Where that is the outer method's own, nobody was promised it: no error.
SHORT = frozenset({Status.steps_used_up, Status.max_steps, Status.stagnated, Status.line_search_failed})


@final
class Run:
    """What every run has, whoever owns the iteration: its records, and what they mean for its end.

    Args:
        rules: when it ends, who is told.
        structured: how estimates get their structures.
        compares: whether values of different steps are of one function.
        note: why this algorithm, where it was chosen: of every estimate.
    """

    def __init__(self, rules: Rules, structured: Structured, compares: bool, note: str = "") -> None:
        self.rules, self.structured, self.note = rules, structured, note
        self.history: list[Record] = []
        self.best = Keeper(compares)
        self.trials: tuple[Trial, ...] = ()  # of the sweep that it began with
        self._latest: tuple[int, FlatProblem, Tensor, Estimate] | None = None

    def record(
        self, step: int, estimate: Estimate, norm: float, seconds: float, rejected: bool = False, *, before: int = -1
    ) -> Record:
        """Keep the record of a step, after so many of steps before; one of each, unless it is said how many."""
        record = Record(step, estimate.value, norm, estimate.status, estimate.stats, seconds, rejected)
        del self.history[step if before < 0 else before :]
        self.history.append(record)
        return record

    def lost(self, step: int) -> int:
        """How many estimates in a row, up to that of a step, are no basis for a step."""
        found = 0
        while found < len(self.history):
            record = self.history[-1 - found]
            if not (record.status.lost and record.step == step - found):
                break
            found += 1
        return found

    def passes_over(self, step: int) -> bool:
        """Whether no step is taken along the estimate there, and the run goes on with the next batch."""
        return 0 < self.lost(step) <= self.rules.skip

    def stops(self, estimate: Estimate) -> bool:
        """Whether the callback, which is told of the latest record, ends the run."""
        callback = self.rules.callback
        return callback is not None and bool(callback(self.history[-1], estimate))

    def failed(self, estimate: Estimate) -> bool:
        """Whether the run ends because of an estimate that did not succeed."""
        refused = estimate.status.lost if self.rules.skip else estimate.status is Status.nonfinite
        return refused or (self.rules.throw and not estimate.status.ok)

    def met(self, norm: float, own: float | None) -> bool:
        """Whether a measure of stationarity meets the tolerance: that which was asked for, else the method's own."""
        tol = own if self.rules.tol is None else self.rules.tol
        return tol is not None and norm <= tol

    @property
    def used_up(self) -> Status:
        """How a run ends whose steps do."""
        return Status.steps_used_up if self.rules.tol is None else Status.max_steps

    def reached(self, step: int, problem: FlatProblem, x: Tensor, estimate: Estimate) -> None:
        """Take note of what would be left if the run ended here."""
        self._latest = step, problem, x, estimate

    def so_far(self, why: str = "") -> Solution | None:
        """What an exception leaves: a solution at the latest point whose estimate is whole; None before the first."""
        if self._latest is None or self.best.best is None:
            return None
        step, problem, x, estimate = self._latest
        return self._solution(problem, x, estimate, Status.interrupted, why, self.history[: step + 1])

    def leave(self, error: BaseException, save: Callable[[], None]) -> None:
        """Nothing is lost by an exception: what was computed goes along with it, and into the checkpoint.

        Raises:
            BaseException: another one that arrives meanwhile, such as a second Ctrl-C; with the same.
        """
        try:
            attach(error, self.so_far(f"{type(error).__name__}: {error}"))
            save()
        except Exception as failure:  # must not hide what went wrong first
            error.add_note(f"The checkpoint could not be written either: {failure}")
        except BaseException as second:
            attach(second, self.so_far(f"{type(error).__name__}: {error}"))
            raise

    def not_saved(self, failure: NotSavedError, solution: Solution | None = None) -> BilevelError:
        """What to say where a checkpoint cannot be written: nothing else went wrong."""
        step = self.history[-1].step if self.history else 0
        message = f"`minimize` stopped after step {step}: {failure}. What was computed is its `partial`."
        partial = self.so_far(message) if solution is None else solution
        return BilevelError(message, Status.interrupted, partial)

    def finish(self, solution: Solution) -> Solution:
        """The solution.

        Raises:
            BilevelError: if something failed, or a tolerance that was asked for is missed, and that is to be raised.
        """
        if self.rules.throw and solution.failed:
            step = self.history[-1].step
            text = f"`minimize` did not succeed; it stopped at step {step}. {solution.message}"
            raise BilevelError(text, solution.status, solution)
        return solution

    def solution(self, problem: FlatProblem, x: Tensor, estimate: Estimate, ended: Status) -> Solution:
        """Where the run ended, at x `(p,)`."""
        message = "" if ended.ok else estimate.message or f"minimize: {ended.value}"
        return self._solution(problem, x, estimate, ended, message, self.history)

    def _solution(
        self, problem: FlatProblem, x: Tensor, estimate: Estimate, ended: Status, message: str, history: list[Record]
    ) -> Solution:
        met = Status.worst(record.status for record in history if not record.rejected)
        stopped = ended is Status.interrupted
        status = ended if stopped else Status.worst([ended, met])
        short = ended in SHORT and self.rules.tol is None and met.ok
        if ended.ok and not status.ok:
            failed = next(record.step for record in history if record.status is status and not record.rejected)
            message = f"the estimate at step {failed}: {status.value}"
        return Solution(
            x=problem.x.unravel(x.clone()),
            y=estimate.y,
            value=estimate.value,
            status=status,
            message=message,
            stats=sum((record.stats for record in history), Stats()),
            history=tuple(history),
            estimate=estimate,
            failed=not (status.ok or short),
            converged=ended is Status.successful and estimate.status.ok,
            best=self.best.told(problem.x, problem.y),
            sweep=self.trials,
        )


@final
@dataclass(frozen=True, eq=False)
class _Reached:
    """Where a run is: at `state`, with the oracle calls that led there since the latest record, and the best before.

    And with the random numbers that were drawn on the way, as far as there is a file to keep them in; how many records
    there are of the steps before; how many calls for samples the latest look at all the data took, and at which norm a
    certificate was last tried.
    """

    step: int
    state: Any
    calls: Stats
    best: Candidate | None = None
    drawn: Randomness | None = None
    loaders: Any = None
    records: int = 0
    look: int = 0
    tried: float = math.inf


_UNKEPT = Stats()  # where no file is written, nobody asks for the calls since the latest record


def iterate(
    run: Run, algorithm: AbstractAlgorithm[Any], oracle: Oracle, x: Tensor, y: Tensor, begun: Winner | None = None
) -> Solution:
    """Run an algorithm from x and y, or from where its checkpoint is.

    Args:
        run: the records.
        algorithm: what is run.
        oracle: of step 0.
        x: the start `(p,)`.
        y: the start `(q,)`, of one task.
        begun: by a sweep, whose state and number of steps are then the start; None: nothing has been done.

    Raises:
        ValueError: if a checkpoint is of another run, or the algorithm does not apply to the problem.
        BilevelError: if the run does not succeed, and that is to be raised.
    """
    why = why_not(algorithm, oracle.like.problem)
    if why:
        raise ValueError(why)
    try:
        demand_padding_unseen(oracle.problem().with_tally(Tally()), x, y)
        if (
            algorithm.requires is STRICTEST
        ):  # it says nothing: what others see where they form derivatives is looked for
            problem = oracle.problem().with_tally(Tally())
            demand_beyond_start(problem, x, problem.start(x, y).detach())
        return _iterate(run, algorithm, oracle, x, y, begun)
    except DoesNotApply as error:  # seen on the way only
        raise attach(ValueError(refusal(algorithm, error.reason)), getattr(error, "partial", None)) from error


def _iterate(
    run: Run, algorithm: AbstractAlgorithm[Any], oracle: Oracle, x: Tensor, y: Tensor, begun: Winner | None
) -> Solution:
    rules, tally = run.rules, oracle.like.tally
    initial = algorithm.init(oracle, x, y)
    reached = _Reached(0, initial, tally.stats(), None, *_drawn(rules, oracle))
    if begun is not None:
        run.trials = begun.trials
        reached = replace(reached, step=begun.steps, state=begun.state)
        oracle = oracle.at(begun.steps)
    if rules.resume:
        assert rules.saves is not None
        reached = _resumed(run, rules.saves, algorithm, initial, oracle)
        oracle = oracle.at(reached.step)
        tally.clear()
        tally.add(reached.calls)
        go_on(oracle, reached)
    solution: Solution | None = None
    first_step = reached.step
    try:
        seconds = 0.0
        while True:
            at = _seen(run, algorithm, oracle, reached, seconds)
            ended = None if at.estimate is None else _ended(run, reached.step, at, reached.step >= rules.max_steps)
            if ended is not None:
                break
            before = time.perf_counter()
            state = reached.state
            if not run.passes_over(reached.step):
                state = algorithm.step(oracle, state, at.found)
            seconds = at.seconds + time.perf_counter() - before
            records = len(run.history) if at.estimate is not None else reached.records
            calls = tally.stats() if rules.saves is not None else _UNKEPT
            kept = run.best.best, *_drawn(rules, oracle), records, at.look, at.tried
            reached = _Reached(reached.step + 1, state, calls, *kept)
            oracle = oracle.at(reached.step)
            if rules.saves is not None and rules.saves.due(reached.step):
                _save(run, algorithm, reached, initial)
        if at.found.back is not None:  # what is returned is not a trial point that was no good
            back = _Reached(reached.step + 1, at.found.back, Stats(), records=len(run.history))
            at = _look(run, algorithm, oracle.at(back.step), back, 0.0)
            ended = _returned(run, at, ended)
        assert at.estimate is not None
        solution = run.solution(oracle.like, at.x, at.estimate, ended)
        _save(run, algorithm, reached, initial, last=True)
        return run.finish(solution)
    except NotSavedError as failure:
        raise run.not_saved(failure, solution) from failure.__cause__
    except BaseException as error:
        if rules.saves is not None and rules.resume and reached.step <= first_step:
            suspect(error, rules.saves.checkpoint.path)
        if solution is not None:
            attach(error, solution)
        else:  # the last whole step is kept; its record, if it has one, is written on resuming
            run.leave(error, partial(_save, run, algorithm, reached, initial, last=True))
        raise


def _drawn(rules: Rules, oracle: Oracle) -> tuple[Randomness | None, Any]:
    """Where the global random numbers are, and the loaders in their data, if that is kept."""
    return (None, None) if rules.saves is None else (drawn_so_far(), positions(oracle.data))


def go_on(oracle: Oracle, reached: _Reached) -> None:
    """Bring loaders and the global random numbers to where they were."""
    if reached.drawn is not None:
        run_forward(oracle.data, oracle.draws, reached.step)
        go_on_from(reached.drawn)


@final
@dataclass(frozen=True, eq=False)
class _At:
    """What is known at a point: `(p,)`, what the algorithm found there, and that as an estimate with its measure.

    Where nothing is recorded there is no estimate; seconds are those since the latest record, and look how many calls
    for samples the latest look at all the data took.
    """

    x: Tensor
    found: Evaluated
    estimate: Estimate | None
    measure: float
    seconds: float = 0.0
    look: int = 0
    tried: float = math.inf


def _seen(run: Run, algorithm: AbstractAlgorithm[Any], oracle: Oracle, reached: _Reached, seconds: float) -> _At:
    """Evaluate at a state; record it, and in a run on batches look at all the data, where that is due."""
    if oracle.is_fixed or not oracle.has_whole:
        return _look(run, algorithm, oracle, reached, seconds)
    looks, spent = run.rules.looks, oracle.like.tally.sampled
    if reached.step >= run.rules.max_steps or looks.due(reached.step, spent, reached.look):
        return _look(run, algorithm, oracle, reached, seconds, on_everything=True)
    before = time.perf_counter()
    found, x = algorithm.evaluate(oracle, reached.state), algorithm.point(reached.state)[0]
    took = seconds + time.perf_counter() - before
    if is_finite(found.estimate):
        return _At(x, found, None, math.nan, took, reached.look, reached.tried)
    here = Look(oracle.first(), found.estimate, math.nan, math.nan)
    return _recorded(run, oracle, reached, x, found, here, took, is_phi=False)


def _look(
    run: Run,
    algorithm: AbstractAlgorithm[Any],
    oracle: Oracle,
    reached: _Reached,
    seconds: float,
    *,
    on_everything: bool = False,
) -> _At:
    """Evaluate at a state, and record it."""
    before = time.perf_counter()
    found, x = algorithm.evaluate(oracle, reached.state), algorithm.point(reached.state)[0]
    if not run.history and algorithm.requires:  # else it asks an estimator, which looks itself
        found = replace(found, estimate=looked_at(oracle.first(), x, found.estimate, partial(why_not, algorithm)))
    if on_everything:
        look = run.rules.looks.look(algorithm, oracle, reached.state, found, reached.tried)
        noticed = tuple(report for report in found.estimate.reports if not report.status.ok)  # at the first look
        seen = replace(look.estimate, reports=(*look.estimate.reports, *noticed))
        look = blown(replace(look, estimate=seen), run.history[0].grad_norm if run.history else look.norm)
    else:
        norm = float(algorithm.stationarity(oracle, reached.state, found))
        look = Look(oracle.first(), found.estimate, norm, norm)
    took = seconds + time.perf_counter() - before
    is_phi = not on_everything or algorithm.values_are_phi or reached.step > 0  # else y is where it was put
    return _recorded(run, oracle, reached, x, found, look, took, is_phi=is_phi)


def _recorded(
    run: Run,
    oracle: Oracle,
    reached: _Reached,
    x: Tensor,
    found: Evaluated,
    look: Look,
    took: float,
    *,
    is_phi: bool,
) -> _At:
    """What is known at a point, as a record."""
    seen = look.estimate if not run.note else replace(look.estimate, note=run.note)
    estimate = run.structured(look.problem, x, seen, reached.step)
    rejected = found.back is not None
    record = run.record(reached.step, estimate, look.norm, took, rejected, before=reached.records)
    run.best.see(Candidate(x, look.estimate.y, record, estimate.status.ok and is_phi))
    run.reached(len(run.history) - 1, oracle.like, x, estimate)
    oracle.like.tally.clear()
    return _At(x, found, estimate, look.measure, 0.0, max(1, look.cost), look.tried)


def _ended(run: Run, step: int, at: _At, last_step: bool) -> Status | None:
    """Why the run ends here, or None; the callback is told of the record."""
    assert at.estimate is not None
    stops, goes_back = run.stops(at.estimate), at.found.back is not None
    if run.passes_over(step):
        return at.estimate.status if last_step else Status.stopped if stops else None
    if (run.failed(at.estimate) or _is_blown(at.estimate)) and not goes_back:
        return at.estimate.status
    if run.met(at.measure, at.found.tol) and not goes_back:
        return Status.successful
    if stops:
        return Status.stopped
    return at.found.ended or (run.used_up if last_step else None)


def _is_blown(estimate: Estimate) -> bool:
    return any(report.part == BLOWN and report.status is Status.diverged for report in estimate.reports)


def _returned(run: Run, at: _At, ended: Status) -> Status:
    """How the run has ended, at the point that was gone back to."""
    assert at.estimate is not None
    run.stops(at.estimate)
    if run.failed(at.estimate):
        return at.estimate.status
    return Status.successful if run.met(at.measure, at.found.tol) else ended


def _save(run: Run, algorithm: AbstractAlgorithm[Any], reached: _Reached, initial: Any, *, last: bool = False) -> None:
    if run.rules.saves is None:
        return
    run.rules.saves.save(
        reached.step,
        algorithm.point(reached.state),
        run.history,
        last=last,
        state=encoded(reached.state, initial),
        calls=reached.calls.as_dict(),
        best=None if reached.best is None else reached.best.as_dict(),
        kept=reached.records,
        trials=[trial.to_dict() for trial in run.trials],
        look=reached.look,
        tried=reached.tried,
        random=reached.drawn,
        loaders=reached.loaders,
    )


def _resumed(run: Run, saves: Saves, algorithm: AbstractAlgorithm[Any], initial: Any, oracle: Oracle) -> _Reached:
    """Where the checkpoint is; its records become those of the run."""
    checkpoint, start = saves.checkpoint, algorithm.point(initial)
    content = checkpoint.load(*start)
    if "state" not in content:
        raise checkpoint.foreign("it holds the evaluations of a method that runs its own loop")
    try:
        state = decoded(content["state"], initial)
    except ValueError as error:
        raise checkpoint.foreign(error) from error
    except MISREAD as error:
        raise ValueError(unreadable(checkpoint.path, "its state makes no sense")) from error
    checkpoint.demand(content)
    with checkpoint.intact(content):
        demand_state(state, initial, (len(start[0]), start[1].shape[-1]))
        demand_point(algorithm.point(state), content, start)
        # else there is a record of each look, or of the steps after a sweep
        each_step = not run.trials and (oracle.is_fixed or not oracle.has_whole)
        kept = content["step"] if each_step else content.get("kept", content["step"])
        run.history = sound_records(content["history"], content["step"], kept)
        if content.get("best") is not None:  # files of earlier versions do not tell
            run.best.best = sound_best(content["best"], *start, run.history)
        calls = Stats(**content["calls"])
    saves.go_on_from(content)
    drawn, loaders = content.get("random"), content.get("loaders")
    look, tried = content.get("look", 0), content.get("tried", math.inf)
    return _Reached(content["step"], state, calls, run.best.best, drawn, loaders, kept, look, tried)
