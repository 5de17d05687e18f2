"""What a training run says after each step and at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, final

from torch import nn

from bilevel._result import Stats
from bilevel._tree import Tree
from bilevel.arguments.fits import demand_types
from bilevel.few_shot.learner import Learner
from bilevel.few_shot.validate import Validation
from bilevel.outer.solution import Record

Ended: TypeAlias = Literal["max_steps", "patience", "seconds", "callback", "failed", "interrupted"]


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

    def __post_init__(self) -> None:
        demand_types(self)


@final
@dataclass(frozen=True, eq=False)
class Trained:
    """What `train` returns.

    Attributes:
        learner: the method.
        x: what was learned: the x of the best validation; the last x if there was none.
        step: of that x.
        ended: why training stopped: "max_steps", "patience", "seconds", "callback", or "failed": too many estimates in
            a row were lost, or the last three, or one did not succeed and `OuterLoop.throw` was asked for; of the
            `partial` of another exception "interrupted".
        message: what to do about it, if it failed; what happened, if it was interrupted.
        validations: the validation scores, in order.
        history: one record an outer step.
        failed: how many steps' estimates did not succeed, by the name of the status. Those that `skipped` counts were
            passed over, the others used all the same.
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

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def skipped(self) -> int:
        """Along how many estimates no step was taken, as they were not finite or their inner solver diverged."""
        return sum(record.status.lost for record in self.history)

    @property
    def best(self) -> Validation | None:
        """The validation that x was chosen by."""
        return next((validation for validation in self.validations if validation.step == self.step), None)

    def module(self) -> nn.Module:
        """Your module with what was learned; its `state_dict()` loads into another copy of it."""
        return self.learner.export(self.x)


Callback: TypeAlias = Callable[[Progress], bool | None]
