"""The outer objective of the variational methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, final, get_args

from bilevel._validate import demand_types

OuterLoss: TypeAlias = Literal["expected", "predictive"]


@final
@dataclass(frozen=True)
class OuterObjective:
    """f = E_q[loss(query)] + w' KL(q || p) - w'' log p(m, d), or with -log E_q[p(target)] as its first term.

    That one, "predictive", is the loss of what is predicted: predictions average probabilities over draws. It is at
    most the expected loss, and does not make the posterior narrower than the predictions need.

    Attributes:
        loss: "expected" or "predictive".
        kl_weight: w'.
        hyper_prior_weight: w'', of m ~ N(0, 1) and 1 / d ~ Gamma, entry by entry.
        precision_prior: shape and rate of that Gamma distribution.

    Raises:
        ValueError: if there is no such loss, or a number is out of range.

    Example:
        >>> OuterObjective("predictive").kl_weight
        0.0
    """

    loss: OuterLoss = "expected"
    kl_weight: float = 0.0
    hyper_prior_weight: float = 0.0
    precision_prior: tuple[float, float] = (1.0, 0.01)

    def __post_init__(self) -> None:
        demand_types(self)
        if self.loss not in get_args(OuterLoss):
            allowed = " or ".join(map(repr, get_args(OuterLoss)))
            raise ValueError(f"`OuterObjective(loss=...)` must be {allowed}. Got {self.loss!r}.")
        for name, value in (("kl_weight", self.kl_weight), ("hyper_prior_weight", self.hyper_prior_weight)):
            if not value >= 0:
                raise ValueError(f"`OuterObjective({name}=...)` must be at least 0. Got {value}.")
        if min(self.precision_prior) <= 0:
            raise ValueError(
                f"`OuterObjective(precision_prior=...)` must be positive numbers. Got {self.precision_prior}."
            )
