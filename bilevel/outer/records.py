"""What every run has, whoever owns the iteration: its rules, its records, and what they mean for its end."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, final

from torch import Tensor

from bilevel._estimate import Estimate, FlatEstimate
from bilevel._flat import FlatProblem
from bilevel._result import BilevelError, Stats, Status
from bilevel.algorithms.outer_constraints import OuterConstraints
from bilevel.arguments.unchecked import unchecked
from bilevel.outer.best import Keeper
from bilevel.outer.looks import Looks
from bilevel.outer.partial import attach
from bilevel.outer.saves import NotSavedError, Saves
from bilevel.outer.solution import Record, Solution
from bilevel.outer.trial import Trial
from bilevel.outer.watcher import AbstractEverywhere
from bilevel.ranks.ranks import Ranks, first_says
from bilevel.ranks.whole_vectors import WholeVectors

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
        ranks: the processes that run together; None: this one runs alone.
        whole: puts vectors together for a checkpoint where each rank has a part of y; None: it has all of it.
    """

    max_steps: int
    tol: float | None
    throw: bool
    callback: Callback | None
    saves: Saves | None
    resume: bool
    skip: int = 0
    looks: Looks = Looks()
    ranks: Ranks | None = None
    whole: WholeVectors | None = None


_record = unchecked(Record)

# How a run ends short of its tolerance. Where that is the outer method's own, nobody was promised it: no error.
SHORT = frozenset({Status.steps_used_up, Status.max_steps, Status.stagnated, Status.line_search_failed})


@final
class Run:
    """What every run has, whoever owns the iteration: its records, and what they mean for its end.

    Args:
        rules: when it ends, who is told.
        structured: how estimates get their structures.
        compares: whether values of different steps are of one function.
        by_norm: whether the best iterate is that of the least measure of stationarity, and not of the lowest value.
        note: why this algorithm, where it was chosen: of every estimate.
    """

    def __init__(
        self, rules: Rules, structured: Structured, compares: bool, note: str = "", by_norm: bool = False
    ) -> None:
        self.rules, self.structured, self.note = rules, structured, note
        self.history: list[Record] = []
        self.best = Keeper(compares, by_norm)
        self.trials: tuple[Trial, ...] = ()  # of the sweep that it began with
        self._latest: tuple[int, FlatProblem, Tensor, Estimate] | None = None

    def record(
        self,
        step: int,
        estimate: Estimate,
        norm: float,
        seconds: float,
        rejected: bool = False,
        *,
        before: int = -1,
        outer: OuterConstraints | None = None,
    ) -> Record:
        """Keep the record of a step, after so many of steps before; one of each, unless it is said how many."""
        record = _record(step, estimate.value, norm, estimate.status, estimate.stats, seconds, rejected, outer)
        del self.history[step if before < 0 else before :]
        self.history.append(record)
        return record

    def first_norm(self, count: int) -> float:
        """The largest measure of stationarity among so many of the first records; 0: there is none yet."""
        return max((r.grad_norm for r in self.history[:count] if math.isfinite(r.grad_norm)), default=0.0)

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
        callback, ranks = self.rules.callback, self.rules.ranks
        if callback is None:
            return False
        everywhere: bool = isinstance(callback, AbstractEverywhere)
        if ranks is not None and not everywhere:
            return first_says(ranks, partial(callback, self.history[-1], estimate))
        return bool(callback(self.history[-1], estimate))

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
        if self._latest is None or self.best.kept.best is None:
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
            if isinstance(error, Exception):  # the first signal, as where another rank has died: it waits for the file
                with contextlib.suppress(Exception):
                    save()
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
        if self.trials and status.lost and all(trial.status.lost for trial in self.trials):
            message = f"{message}. All combinations of the sweep had diverged: sweep over shorter steps."
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
            best=self.best.told(problem.x, problem.y, ended),
            sweep=self.trials,
        )
