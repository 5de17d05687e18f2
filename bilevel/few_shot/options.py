"""What `train` may be told about its outer steps, its validations, its files and its reports."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, final

from bilevel._estimate import AbstractEstimator
from bilevel._optimizer import AbstractOptimizer, demand_numbers
from bilevel._sets import Constraint
from bilevel._validate import Group
from bilevel.algorithms.algorithm import AbstractAlgorithm
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import COUNT, SIZE, Range, demand_ranges
from bilevel.few_shot.learner import Learner
from bilevel.few_shot.trained import Callback
from bilevel.named.auto import Auto
from bilevel.portable.pickling import AbstractPortable
from bilevel.solvers.adam import Adam
from bilevel.solvers.scheduled import Scheduled
from bilevel.tasks.source import AbstractTasks


@final
@dataclass(frozen=True, eq=False)
class OuterLoop:
    """How x moves, and what ends it early; as in `minimize`.

    Attributes:
        optimizer: the outer optimizer. `Clipped(Adam(1e-3), max_norm=10.0)` clips gradients, and
            `Scheduled(Adam(1e-3), Cosine(max_steps))` changes the step length.
        estimator: how hypergradients are estimated; None: the learner's own.
        algorithm: a whole algorithm in the place of optimizer and estimator, as for `minimize`; None: descent by them.
        constraint: a set for x, or for entries of it.
        chunk_size: how many tasks to treat at a time: bounds the memory; None: all.
        seconds: stop after so much time; None: never. It is looked at after each step.
        throw: raise at the first estimate that does not succeed. By default a step is taken along what such an estimate
            gives (too few linear steps, negative curvature in a task), and it is counted; unless it is lost:
        skip: how many estimates in a row may be lost, that is not finite, or with an inner solver that diverged on some
            task. No step is taken along such a one, x and the optimizer stay as they are, the next batch comes, and it
            is counted. Where more follow each other, or the last three of a run are lost, training ends with a
            `BilevelError`.

    Raises:
        ValueError: if the time is not positive, `skip` is negative, or there is an estimator beside an algorithm.
        TypeError: if the optimizer is none.

    Example:
        >>> OuterLoop(seconds=60.0).optimizer.step_size
        0.001
    """

    optimizer: AbstractOptimizer = Adam(1e-3)
    estimator: AbstractEstimator | Auto | str | None = None
    algorithm: AbstractAlgorithm[Any] | None = None
    constraint: Constraint = None
    chunk_size: int | None = None
    seconds: float | None = None
    throw: bool = False
    skip: int = 10

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, chunk_size=SIZE, seconds=Range(open=True, infinite=True), skip=COUNT)
        demand_numbers("OuterLoop", "optimizer", self.optimizer)
        beside = [name for name in ("estimator", "chunk_size") if getattr(self, name) is not None]
        if self.algorithm is not None and beside:
            raise ValueError(f"`OuterLoop(algorithm=...)` has its own {beside[0]}. Leave `{beside[0]}=` out.")


@final
@dataclass(frozen=True, eq=False)
class Validating:
    """On which tasks the best x is chosen, and how often one looks.

    Attributes:
        tasks: where validation tasks come from: the same ones at each validation.
        every: steps between validations; there is one at step 0 and one at the end.
        episodes: how many tasks.
        patience: stop after so many validations without a better one; None: never.
        learner: evaluates in place of the one that is trained, with the same x: for training on more classes a task
            than will be told apart, or adapting by more steps than are trained through; None: that one.

    Raises:
        ValueError: if a number is less than one.
        TypeError: if the learner is none.

    Example:
        >>> from bilevel.tasks import Sinusoid
        >>> Validating(Sinusoid(), every=100, patience=5).episodes
        200
    """

    tasks: AbstractTasks
    every: int = 200
    episodes: int = 200
    patience: int | None = None
    learner: Learner | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, every=SIZE, episodes=SIZE, patience=SIZE)


@final
@dataclass(frozen=True)
class Saving:
    """Where a run is kept, for itself to go on from and for others to load.

    Attributes:
        folder: for `checkpoint.pt`, `best.pt` and, at the end, `model.pt` (the state dict of the module).
        every: steps between checkpoints; one is also written at the end, and when training is interrupted.
        resume: continue from the checkpoint in the folder, to the same bits as without the interruption; "force": also
            where it is of a run with other data, another learner or the like, which is refused otherwise.
        seconds: time between checkpoints, at most, a step more or less; None: it does not matter.

    Raises:
        ValueError: if a number is out of range.
        TypeError: if the folder is no path.

    Example:
        >>> Saving("runs/sinusoids", resume=True).every
        250
    """

    folder: str | os.PathLike[str]
    every: int = 250
    resume: bool | Literal["force"] = False
    seconds: float | None = 30.0

    def __post_init__(self) -> None:
        demand_types(self, {"folder": "a path", "resume": 'True, False or "force"'})
        demand_ranges(self, every=SIZE, seconds=Range(open=True, infinite=True))

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder)

    @property
    def checkpoint(self) -> Path:
        """The file that a run goes on from."""
        return self.path / "checkpoint.pt"

    @property
    def best(self) -> Path:
        """The x of the best validation, and all validations."""
        return self.path / "best.pt"


@final
@dataclass(frozen=True, eq=False)
class Reporting(AbstractPortable):
    """Who is told after each step.

    Attributes:
        callback: called with the `Progress` after each estimate; a true return value stops training; None: nobody.
        score_every: steps between scores of the training batch itself, which cost its predictions.
        tensorboard: a folder for scalars (with the extra `tensorboard`); None: none.

    Raises:
        ValueError: if a number is less than one.
        TypeError: if the callback is no function.

    Example:
        >>> Reporting(
        ...     lambda progress: progress.record.value < 0.1, score_every=1
        ... ).tensorboard is None
        True
    """

    callback: Callback | None = None
    score_every: int = 10
    tensorboard: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        demand_types(self, {"callback": "a function of the `Progress`, or None"})
        demand_ranges(self, score_every=SIZE)


# The short forms of `train`'s arguments: an optimizer, tasks, a folder and a function.


def outer_loop(outer: AbstractOptimizer | OuterLoop) -> OuterLoop:
    """With the defaults for the rest."""
    return outer if isinstance(outer, OuterLoop) else OuterLoop(outer)


def validating(validation: AbstractTasks | Validating | None) -> Validating | None:
    """With the defaults for the rest."""
    return validation if validation is None or isinstance(validation, Validating) else Validating(validation)


def saving(out: str | os.PathLike[str] | Saving | None) -> Saving | None:
    """With the defaults for the rest."""
    return out if out is None or isinstance(out, Saving) else Saving(out)


def reporting(callback: Callback | Reporting | None) -> Reporting:
    """With the defaults for the rest."""
    return callback if isinstance(callback, Reporting) else Reporting(callback)


# The keywords that `train` took before they were grouped.


def _outer(outer: Any, changes: dict[str, Any]) -> OuterLoop:
    loop, schedule = outer_loop(outer), changes.pop("schedule", None)
    optimizer = loop.optimizer if schedule is None else Scheduled(loop.optimizer, schedule)
    return replace(loop, optimizer=optimizer, **changes)


def _validation(validation: Any, changes: dict[str, Any]) -> Validating | None:
    own = validating(validation)
    if own is not None:
        return replace(own, **changes)
    if changes.get("patience") is not None:
        raise ValueError("`train(patience=...)` needs `validation=`: the tasks that tell what is better.")
    return None


def _out(out: Any, changes: dict[str, Any]) -> Saving | None:
    own = saving(out)
    if own is not None:
        return replace(own, **changes)
    if changes.get("resume"):
        raise ValueError("`train(resume=True)` needs `out=` to say which run.")
    return None


FORMERLY = {
    "outer": Group(
        {name: name for name in ("schedule", "estimator", "constraint", "chunk_size", "seconds", "throw")}, _outer
    ),
    "validation": Group(
        {
            "validation_learner": "learner",
            "validate_every": "every",
            "validate_episodes": "episodes",
            "patience": "patience",
        },
        _validation,
    ),
    "out": Group({"checkpoint_every": "every", "resume": "resume"}, _out),
    "callback": Group(
        {"score_every": "score_every", "tensorboard": "tensorboard"},
        lambda callback, changes: replace(reporting(callback), **changes),
    ),
}
