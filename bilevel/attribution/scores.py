"""The scores of training samples, and what is known about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from bilevel._result import Report, Stats, Status
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import COUNT
from bilevel.portable.result import AbstractResult


@final
@dataclass(frozen=True, eq=False)
class Influence(AbstractResult):
    """To first order Phi(without sample i) - Phi, for each training sample i: what `bilevel.influence` returns.

    Positive: the test loss would rise without the sample, which helps. Negative: the sample harms, as one with a wrong
    label does. Scores add up: that of a group is their sum, to the same order.

    Attributes:
        scores: `(n,)`, in the order of the training samples; with `per_test` `(m, n)`, a row for each test sample.
        errors: an estimate of |score - exact first-order score|, of the same shape: what the residual of the linear
            system leaves. It says nothing of the first order itself.
        bound: a certified bound on the same, where it was asked for.
        value: Phi, the mean test loss.
        stationarity: |grad g| over the root mean square of the gradients of the training samples' losses: 0 where the
            parameters are what g is minimized by, 1 / sqrt(n) where its terms only cancel as random ones do.
        status: the worst status of its parts.
        reports: how each part ended.
        stats: oracle calls, one for each batch.
    """

    scores: Tensor = field(repr=False)
    errors: Tensor = field(repr=False)
    bound: Tensor | None = field(repr=False)
    value: float
    stationarity: float
    status: Status
    reports: tuple[Report, ...]
    stats: Stats

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def message(self) -> str:
        """The reports of the parts that failed, one sentence each; empty if none did."""
        return " ".join(str(report) for report in self.reports if not report.status.ok)

    @checked("Influence.most_harmful", count=COUNT)
    def most_harmful(self, count: int) -> Tensor:
        """The training samples with the lowest scores, the worst first: `(count,)` indices, or `(m, count)`."""
        return self.scores.argsort(dim=-1, stable=True)[..., :count]
