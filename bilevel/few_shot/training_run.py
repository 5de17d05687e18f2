"""A training run as it goes: the batches, the clock, the validations, the reports, and what is left at the end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, final

from torch import Tensor

from bilevel._estimate import Estimate
from bilevel._result import Stats
from bilevel._tree import Tree, tree_leaves
from bilevel.few_shot.adapt import Adapted, check_padding, check_tasks, noise_seed, ready, tasks_of
from bilevel.few_shot.board import Board
from bilevel.few_shot.evaluate import Evaluation, scores_of
from bilevel.few_shot.learner import Learner
from bilevel.few_shot.options import OuterLoop, Reporting
from bilevel.few_shot.trained import Ended, Progress, Trained
from bilevel.few_shot.validate import Validation, Validations
from bilevel.outer.solution import Record, Solution
from bilevel.outer.watcher import AbstractEverywhere, before_save
from bilevel.ranks.ranks import Ranks, first_says

_AT_THE_END = 3  # lost estimates in a row at the end of a run are no accident


@final
@dataclass(frozen=True, eq=False)
class TrainingBatches:
    """step -> its batch, as the learner sees it; the latest is kept for its score."""

    TOLD_BY = ("learner", "sample", "seed")

    learner: Learner
    sample: Callable[[int], Any]
    seed: int
    latest: dict[int, Any] = field(default_factory=dict)
    looked_at: list[int] = field(default_factory=list)  # the step whose padding was

    def __call__(self, step: int) -> Any:
        if step not in self.latest:
            self.latest.clear()
            batch = self.sample(step)
            check_tasks(self.learner, batch)
            self.latest[step] = ready(self.learner, self.learner.x0, batch, noise_seed(self.seed, step))
            if not self.looked_at:  # later batches may be the first that have padding
                self.looked_at.extend([step] * check_padding(self.learner, self.learner.x0, self.latest[step]))
        return self.latest[step]


@final
@dataclass(frozen=True)
class Clock:
    """The time since training began, and whether it is over.

    Attributes:
        earlier: what the parts of a resumed run before this one took.
        limit: how long the run may take; None: as long as it likes.
        began: this part.
    """

    earlier: float
    limit: float | None
    began: float = field(default_factory=time.perf_counter)

    def seconds(self) -> float:
        """Since training began."""
        return self.earlier + time.perf_counter() - self.began

    def over(self) -> bool:
        """Whether the time is up."""
        return self.limit is not None and self.seconds() >= self.limit


@final
@dataclass(frozen=True, eq=False)
class Validator:
    """The validations of a run: when, of what, and whether another may help.

    Attributes:
        kept: those so far.
        evaluate: x -> its evaluation; None: there are no validations.
        every: steps between them.
        patience: how many without a better one are enough; None: never.
    """

    kept: Validations
    evaluate: Callable[[Tree], Evaluation] | None = None
    every: int = 1
    patience: int | None = None

    def at(self, step: int, x: Tree, clock: Clock, *, last: bool) -> Validation | None:
        """The validation of a step, if it has one."""
        if self.evaluate is None or not (last or step % self.every == 0):
            return None
        return self.kept.at(step, x, self.evaluate, clock.seconds)

    def enough(self, step: int) -> bool:
        """Whether x has not become better for too long."""
        return self.patience is not None and self.kept.stale(step) >= self.patience


@final
class Reporter:
    """Tells the callback and TensorBoard.

    Args:
        given: whom, and how often a score is made for them.
        ranks: the processes of which the first tells, and all learn its answer; None: this one alone.

    Raises:
        ImportError: if tensorboard is missing.
    """

    def __init__(self, given: Reporting, ranks: Ranks | None = None) -> None:
        self._given, self._ranks = given, ranks
        mine = given.tensorboard is not None and (ranks is None or ranks.rank == 0)
        self._board = Board(given.tensorboard) if mine and given.tensorboard is not None else None

    def scores(self, step: int) -> bool:
        """Whether somebody is to be told the score of this step's batch."""
        return self._tells and step % self._given.score_every == 0

    @property
    def _tells(self) -> bool:
        return self._given.callback is not None or self._given.tensorboard is not None

    def tell(self, progress: Progress) -> bool:
        """Tell them; whether the callback asks to stop."""
        if self._ranks is None:
            return self._told(progress)
        return self._tells and first_says(self._ranks, partial(self._told, progress))

    def _told(self, progress: Progress) -> bool:
        if self._board is not None:
            self._board.write(progress.record, progress.score, progress.validation)
        return self._given.callback is not None and bool(self._given.callback(progress))

    def before_save(self) -> None:
        """Before a checkpoint is written."""
        before_save(self._given.callback)

    def close(self) -> None:
        """Write what is left."""
        if self._board is not None:
            self._board.close()


@final
class TrainingRun(AbstractEverywhere):
    """What happens after each step, and what is left at the end.

    Args:
        batches: of the learner that is trained.
        last_step: where training ends at the latest.
        clock: of this run.
        validator: for its validations.
        reporter: for its reports.
        loop: of its outer steps.
        ranks: the processes that train together, whose time is that of the first; None: this one alone.
    """

    def __init__(
        self,
        batches: TrainingBatches,
        last_step: int,
        clock: Clock,
        validator: Validator,
        reporter: Reporter,
        loop: OuterLoop = OuterLoop(),
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks
        self._batches, self._last_step, self._clock, self._loop = batches, last_step, clock, loop
        self._validator, self._reporter = validator, reporter
        self._ended: Ended = "max_steps"

    def before_save(self) -> None:
        """Before a checkpoint is written."""
        self._reporter.before_save()

    def __call__(self, record: Record, estimate: Estimate) -> bool:
        """Validate, score and report as this step asks for; whether training ends here."""
        out_of_time, at_end = self._over(), record.step == self._last_step
        validation = self._validator.at(record.step, estimate.x, self._clock, last=at_end or out_of_time)
        scores = self._reporter.scores(record.step) and not estimate.status.lost
        score = self._score(record.step, estimate) if scores else None
        stop = self._tell(record, score, validation)
        if at_end:
            return True
        if self._validator.enough(record.step):
            self._ended = "patience"
        elif out_of_time:
            self._ended = "seconds"
        elif stop:
            self._ended = "callback"
        return self._ended != "max_steps"

    def trained(self, solution: Solution) -> Trained:
        """What the run comes to."""
        last, kept = solution.history[-1], self._validator.kept
        step, best = last.step, kept.best()
        if self._ended in ("max_steps", "seconds") and self._failed(solution.history):
            self._ended = "failed"
        return Trained(
            learner=self._batches.learner,
            x=solution.x if best is None else kept.x,
            step=step if best is None else best.step,
            ended=self._ended,
            message=solution.estimate.message if self._ended == "failed" else "",
            validations=kept.until(),
            history=solution.history,
            failed=dict(Counter(record.status.name for record in solution.history if not record.status.ok)),
            stats=solution.stats,
            seconds=self._clock.seconds(),
            last=solution.x,
        )

    def interrupted(self, solution: Solution) -> Trained:
        """What there is where an exception ended it."""
        self._ended = "interrupted"
        return replace(self.trained(solution), message=solution.message)

    def _over(self) -> bool:
        if self._ranks is None or self._clock.limit is None:
            return self._clock.over()
        return first_says(self._ranks, self._clock.over)

    def _failed(self, history: Sequence[Record]) -> bool:
        """Whether the run was ended by what did not succeed, or ends where it no longer does."""
        if self._ended == "max_steps" and history[-1].step < self._last_step:
            return True
        if self._loop.throw:
            return not history[-1].status.ok
        return all(record.status.lost for record in history[-min(_AT_THE_END, self._loop.skip + 1) :])

    def _tell(self, record: Record, score: float | None, validation: Validation | None) -> bool:
        best = self._validator.kept.best(record.step)
        return self._reporter.tell(Progress(record, score, validation, best, self._clock.seconds()))

    def _score(self, step: int, estimate: Estimate) -> float:
        batch, ranks = self._batches(step), self._ranks
        if ranks is None:
            return float(self._scores(estimate, batch).mean())
        count = next(leaf.shape[0] for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
        scores = self._scores(estimate, tasks_of(batch, ranks.rows(count)))
        return float(ranks.total(scores.sum())[0]) / count

    def _scores(self, estimate: Estimate, batch: Any) -> Tensor:
        adapted = Adapted(estimate.y, (), Stats(), batch)
        return scores_of(self._batches.learner, estimate.x, adapted)
