"""The Gaussian prior of the variational methods, and how much it counts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from bilevel._validate import demand_types


@final
@dataclass(frozen=True)
class GaussianPrior:
    """w KL(q || p) in g, p = N(m, diag d): the prior is learned, from m = the module's parameters and d as given.

    `w / d` is to the posterior's mean what lambda is to iMAML's parameters, so that the two go together. With a loss
    that is a mean of -log p over n samples and w = 1 / n, -n g is the evidence lower bound; with less, q is a tempered
    posterior.

    Attributes:
        kl_weight: w.
        log_variance: where l = log d starts.
        isotropic: learn one variance for all parameters; posteriors have one for each all the same.
        learn_variance: learn the prior's variance, and adapt the posterior's. False: both stay at `log_variance`.

    Raises:
        ValueError: if the weight is not positive, the variance not finite, or a fixed variance isotropic.

    Example:
        >>> GaussianPrior(kl_weight=0.1, log_variance=-2.0)
        GaussianPrior(kl_weight=0.1, log_variance=-2.0, isotropic=False, learn_variance=True)
    """

    kl_weight: float
    log_variance: float
    isotropic: bool = False
    learn_variance: bool = True

    def __post_init__(self) -> None:
        demand_types(self)
        if not self.kl_weight > 0:
            raise ValueError(
                f"`GaussianPrior(kl_weight=...)` must be positive. Got {self.kl_weight}. Without a prior, tasks share"
                " nothing."
            )
        if not math.isfinite(self.log_variance):
            raise ValueError(f"`GaussianPrior(log_variance=...)` must be a finite number. Got {self.log_variance}.")
        if not self.learn_variance and self.isotropic:
            raise ValueError(
                "`GaussianPrior(isotropic=True)` says what is learned of a variance: needs learn_variance=True."
            )

    @property
    def fixed(self) -> float | None:
        """The log-variance of prior and posterior where it is not learned."""
        return None if self.learn_variance else self.log_variance
