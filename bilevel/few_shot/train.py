"""Training a learner over tasks."""

from __future__ import annotations

import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, final

import torch
from torch import nn

from bilevel._estimate import AbstractEstimator, Estimate
from bilevel._files import write_atomically
from bilevel._optimizer import AbstractOptimizer
from bilevel._result import Stats, Status
from bilevel._sets import Constraint
from bilevel._tree import Tree
from bilevel.few_shot.adapt import Adapted, demand_tasks, noise_seed, predict, ready
from bilevel.few_shot.board import Board
from bilevel.few_shot.evaluate import Evaluation, evaluate, score_tasks
from bilevel.few_shot.learner import Learner
from bilevel.few_shot.validate import Validation, Validations
from bilevel.named.auto import Auto
from bilevel.outer.minimize import Record, Solution, minimize
from bilevel.solvers.adam import Adam
from bilevel.solvers.scheduled import Scheduled
from bilevel.tasks.ragged import check_batch
from bilevel.tasks.source import AbstractTasks, batches

Ended: TypeAlias = Literal["max_steps", "patience", "seconds", "callback", "failed"]
_VALIDATION = 2**34  # validation tasks are drawn from another stream of seeds than training tasks


@final
@dataclass(frozen=True, eq=False)
class Progress:
    """What is known after a step.

    Attributes:
        record: the outer step: the mean outer loss over the batch, |h|, status, oracle calls, seconds.
        score: the accuracy, or mean squared error, on the queries of this very batch after adaptation; None where it
            was not computed.
        validation: the validation of this step, if there was one.
        best: the best validation so far.
        seconds: since training began, validations and earlier parts of a resumed run included.
    """

    record: Record
    score: float | None
    validation: Validation | None
    best: Validation | None
    seconds: float


@final
@dataclass(frozen=True, eq=False)
class Trained:
    """What `train` returns.

    Attributes:
        learner: the method.
        x: what was learned: the x of the best validation; the last x if there was none.
        step: of that x.
        ended: why training stopped: "max_steps", "patience", "seconds", "callback", or "failed" for NaN.
        message: what to do about it, if it failed.
        validations: the validation scores, in order.
        history: one record an outer step.
        failed: how many steps' estimates did not succeed, by the name of the status. They were used all the same.
        stats: the oracle calls of training, validations not included.
        seconds: wall-clock time, validations and earlier parts of a resumed run included.
        last: where the outer iteration ended.
    """

    learner: Learner
    x: Tree = field(repr=False)
    step: int
    ended: Ended
    message: str
    validations: tuple[Validation, ...] = field(repr=False)
    history: tuple[Record, ...] = field(repr=False)
    failed: Mapping[str, int]
    stats: Stats
    seconds: float
    last: Tree = field(repr=False)

    @property
    def best(self) -> Validation | None:
        """The validation that x was chosen by."""
        return next((validation for validation in self.validations if validation.step == self.step), None)

    def module(self) -> nn.Module:
        """Your module with what was learned; its `state_dict()` loads into another copy of it."""
        return self.learner.export(self.x)


Callback: TypeAlias = Callable[[Progress], bool | None]


def train(
    learner: Learner,
    tasks: AbstractTasks,
    *,
    max_steps: int,
    batch: int = 16,
    seed: int = 0,
    outer: AbstractOptimizer | None = None,
    schedule: Callable[[int], float] | None = None,
    estimator: AbstractEstimator | Auto | str | None = None,
    constraint: Constraint = None,
    validation: AbstractTasks | None = None,
    validation_learner: Learner | None = None,
    validate_every: int = 200,
    validate_episodes: int = 200,
    patience: int | None = None,
    seconds: float | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    checkpoint_every: int = 250,
    chunk_size: int | None = None,
    callback: Callback | None = None,
    score_every: int = 10,
    tensorboard: str | os.PathLike[str] | None = None,
    throw: bool = False,
) -> Trained:
    """min_x E_t f(x, y_t(x), task_t) by outer steps on batches of new tasks; the x of the best validation is kept.

    A layer over `bilevel.minimize`, without warm starts, as every step has other tasks. From the same arguments the
    same bits follow, also when a run is interrupted and resumed.

    Cost: one hypergradient estimate a step, and `evaluate` at each validation.

    Args:
        learner: the method, with its start `learner.x0`.
        tasks: what is trained on.
        max_steps: how many outer steps.
        batch: tasks a step.
        seed: of the tasks and of what the learner draws.
        outer: the outer optimizer; `Adam(1e-3)` if None. `Clipped(Adam(1e-3), max_norm=10.0)` clips gradients.
        schedule: step -> factor of the step length, such as `Cosine(max_steps)`.
        estimator: how hypergradients are estimated; the learner's own if None.
        constraint: a set for x, or for entries of it; as in `minimize`.
        validation: where validation tasks come from: the same ones at each validation; None: no validation.
        validation_learner: evaluates in place of `learner`, with the same x: for training on more classes a task than
            will be told apart, or adapting by more steps than are trained through.
        validate_every: steps between validations; there is one at step 0 and one at the end.
        validate_episodes: how many tasks.
        patience: stop after so many validations without a better one; None: never.
        seconds: stop after so much time; None: never. It is looked at after each step.
        out: a folder for `checkpoint.pt`, `best.pt` and, at the end, `model.pt` (the state dict of the module).
        resume: continue from the checkpoint in `out`.
        checkpoint_every: steps between checkpoints; one is also written at the end, and when training is interrupted.
        chunk_size: how many tasks to treat at a time: bounds the memory; None: all.
        callback: called with the `Progress` after each estimate; a true return value stops training.
        score_every: steps between scores of the training batch itself (for the callback and TensorBoard).
        tensorboard: a folder for scalars (with the extra `tensorboard`); None: none.
        throw: raise at the first estimate that does not succeed. By default training goes on with what such an
            estimate gives, unless it is NaN, and counts it.

    Raises:
        ValueError: if a number is out of range, a batch of tasks is malformed, or the estimator does not apply.
        TypeError: if `learner` is none, or a source of tasks has no `sample`.
        ImportError: if `tensorboard` is asked for and missing.
        BilevelError: if `throw` and an estimate did not succeed.

    Example:
        >>> from bilevel import ITD, BilevelProblem
        >>> from bilevel.extending import Learner
        >>> from bilevel.solvers import GradientDescent, Iterate
        >>> from bilevel.tasks.sinusoid import Sinusoid
        >>> problem = BilevelProblem(
        ...     f=lambda x, y, task: (y - task["query_y"]).square().mean(),
        ...     g=lambda x, y, task: (y - task["support_y"]).square().mean() / 2,
        ...     init=lambda x, task: x,
        ...     tasks=True,
        ... )
        >>> inner, x0 = Iterate(GradientDescent(0.1), max_steps=1), torch.tensor(3.0)
        >>> predict = lambda x, y, task: y.expand(task["query_y"].shape)
        >>> learner = Learner("mean", problem, x0, x0, ITD(inner), inner, predict, lambda x: None)
        >>> trained = train(learner, Sinusoid(), max_steps=100, outer=Adam(0.1))
        >>> bool(trained.x.abs() < 1)  # sinusoids have mean zero
        True
    """
    _check(
        max_steps=(max_steps, 0),
        batch=(batch, 1),
        validate_every=(validate_every, 1),
        validate_episodes=(validate_episodes, 1),
        score_every=(score_every, 1),
        patience=(patience, 1),
    )
    demand_tasks("train", learner, tasks=tasks, validation=validation)
    if seconds is not None and not seconds > 0:
        raise ValueError(f"`train(seconds=...)` must be positive, or None. Got {seconds}.")
    if patience is not None and validation is None:
        raise ValueError("`train(patience=...)` needs `validation=`: the tasks that tell what is better.")
    folder = None if out is None else Path(out)
    if resume and folder is None:
        raise ValueError("`train(resume=True)` needs `out=` to say which run.")
    chosen = Adam(1e-3) if outer is None else outer
    validate = None
    if validation is not None:
        validate = functools.partial(
            evaluate,
            learner if validation_learner is None else validation_learner,
            tasks=validation,
            episodes=validate_episodes,
            seed=seed + _VALIDATION,
        )
    run = _Run(
        learner,
        _Data(learner, batches(tasks, batch, seed), seed),
        Validations.begin(None if folder is None else folder / "best.pt", learner.x0, resume=resume),
        validate,
        callback,
        None if tensorboard is None else Board(tensorboard),
        _Limits(max_steps, validate_every, score_every, patience, seconds),
        _earlier_seconds(folder / "checkpoint.pt") if resume and folder is not None else 0.0,
    )
    try:
        solution = minimize(
            learner.problem,
            learner.x0,
            learner.y0,
            estimator=learner.estimator if estimator is None else estimator,
            outer=chosen if schedule is None else Scheduled(chosen, schedule),
            max_steps=max_steps,
            data=run.data,
            constraint=constraint,
            callback=run.after_step,
            checkpoint=None if folder is None else folder / "checkpoint.pt",
            checkpoint_every=checkpoint_every,
            resume=resume,
            warm_start=False,
            chunk_size=chunk_size,
            throw=throw,
        )
    finally:
        if run.board is not None:
            run.board.close()
    trained = run.trained(solution)
    if folder is not None:
        state = trained.module().state_dict()
        write_atomically(folder / "model.pt", lambda file: torch.save(state, file))
    return trained


@final
@dataclass(frozen=True, eq=False)
class _Data:
    """step -> its batch, as the learner sees it; the latest is kept for its score."""

    learner: Learner
    batches: Callable[[int], Any]
    seed: int
    latest: dict[int, Any] = field(default_factory=dict)

    def __call__(self, step: int) -> Any:
        if step not in self.latest:
            self.latest.clear()
            batch = self.batches(step)
            check_batch(batch)
            self.latest[step] = ready(self.learner, self.learner.x0, batch, noise_seed(self.seed, step))
        return self.latest[step]


@final
@dataclass(frozen=True)
class _Limits:
    """When what happens."""

    last_step: int
    every: int
    score_every: int
    patience: int | None
    seconds: float | None


@final
class _Run:
    """What happens after each step, and what is left at the end."""

    def __init__(
        self,
        learner: Learner,
        data: _Data,
        validations: Validations,
        validate: Callable[[Tree], Evaluation] | None,
        callback: Callback | None,
        board: Board | None,
        limits: _Limits,
        earlier: float,
    ) -> None:
        self.learner, self.data, self.validations, self.validate = learner, data, validations, validate
        self.callback, self.board, self.limits, self.earlier = callback, board, limits, earlier
        self.ended: Ended = "max_steps"
        self.began = time.perf_counter()

    def after_step(self, record: Record, estimate: Estimate) -> bool:
        if estimate.status is Status.nonfinite:
            self.ended = "failed"
            self._tell(record, None, None)
            return True
        out_of_time = self.limits.seconds is not None and self._seconds() >= self.limits.seconds
        validation = None
        if self.validate is not None and (
            record.step % self.limits.every == 0 or record.step == self.limits.last_step or out_of_time
        ):
            validation = self.validations.at(record.step, estimate.x, self.validate, self._seconds)
        score = None
        if (self.callback is not None or self.board is not None) and record.step % self.limits.score_every == 0:
            score = self._score(record.step, estimate)
        stop = self._tell(record, score, validation)
        if record.step == self.limits.last_step:
            return True
        if self.limits.patience is not None and self.validations.stale(record.step) >= self.limits.patience:
            self.ended = "patience"
        elif out_of_time:
            self.ended = "seconds"
        elif stop:
            self.ended = "callback"
        return self.ended != "max_steps"

    def _tell(self, record: Record, score: float | None, validation: Validation | None) -> bool:
        progress = Progress(record, score, validation, self.validations.best(record.step), self._seconds())
        if self.board is not None:
            self.board.write(record, score, validation)
        return self.callback is not None and bool(self.callback(progress))

    def _score(self, step: int, estimate: Estimate) -> float:
        batch = self.data(step)
        adapted = Adapted(estimate.y, (), Stats(), batch)
        return float(score_tasks(predict(self.learner, estimate.x, adapted), batch).mean())

    def _seconds(self) -> float:
        return self.earlier + time.perf_counter() - self.began

    def trained(self, solution: Solution) -> Trained:
        step = solution.history[-1].step
        best = self.validations.best()
        return Trained(
            learner=self.learner,
            x=solution.x if best is None else self.validations.x,
            step=step if best is None else best.step,
            ended=self.ended,
            message=solution.estimate.message if self.ended == "failed" else "",
            validations=self.validations.until(),
            history=solution.history,
            failed=dict(Counter(record.status for record in solution.history if record.status != "successful")),
            stats=solution.stats,
            seconds=self._seconds(),
            last=solution.x,
        )


def _check(**numbers: tuple[int | None, int]) -> None:
    for name, (value, least) in numbers.items():
        if value is None and name == "patience":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"`train({name}=...)` must be an integer of at least {least}. Got {value!r}.")


def _earlier_seconds(checkpoint: Path) -> float:
    """The time that the run so far took, from the records in its checkpoint."""
    if not checkpoint.exists():
        return 0.0  # `minimize` says so
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        return float(sum(record["seconds"] for record in content["history"]))
    except Exception:
        return 0.0  # as above
