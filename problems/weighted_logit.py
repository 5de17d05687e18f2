"""Sample weights on one logit: data hyper-cleaning that can be solved on paper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem
from bilevel.arguments.checked import checked, fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import BETWEEN_0_AND_1, SEED, Range, demand_ranges
from bilevel.arguments.shapes import Shape, demand_shapes
from bilevel.certificates.certificate import Constants
from bilevel.problems._constants import RADIUS, structural

LOGISTIC_THIRD = 1 / (6 * math.sqrt(3))  # the greatest |third derivative| of log(1 + exp)


@final
@dataclass(frozen=True, eq=False)
class WeightedLogit:
    """g = mean_i sigmoid(x_i) log(1 + exp(-b_i y)),  f = log(1 + exp y) - r y.

    Labels b_i = +-1, one logit y, and f the cross entropy with a share r of positive labels in clean data. With
    P and N the weights sigmoid(x_i) summed over positive and negative labels, y* = log(P / N), and Phi is least
    where P / (P + N) = r.

    mu, L and C_G hold for |y - y*(x)| <= 1.

    Args:
        labels: b `(n,)`, both signs present.
        share: r in (0, 1).
    """

    labels: Tensor
    share: float

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, share=BETWEEN_0_AND_1)
        demand_shapes("WeightedLogit", {"labels": Shape("n")}, vars(self))

    @fitting
    def f(self, _: Tensor, y: Tensor) -> Tensor:
        """The outer objective."""
        return -(self.share * logsigmoid(y) + (1 - self.share) * logsigmoid(-y))

    @fitting
    def g(self, x: Tensor, y: Tensor) -> Tensor:
        """The inner objective."""
        return -(torch.sigmoid(x) * logsigmoid(self.labels * y)).mean()

    def _masses(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, positive = torch.sigmoid(x), (self.labels > 0).to(x)
        return (w * positive).sum(), (w * (1 - positive)).sum()

    @fitting
    def solution(self, x: Tensor) -> Tensor:
        """y* = log(P / N)."""
        P, N = self._masses(x)
        return P.log() - N.log()

    @fitting
    def gradient(self, x: Tensor) -> Tensor:
        """The hypergradient at x: (P / (P + N) - r) (dP / P - dN / N)."""
        P, N = self._masses(x)
        dw, positive = torch.sigmoid(x) * torch.sigmoid(-x), (self.labels > 0).to(x)
        return (P / (P + N) - self.share) * dw * (positive / P - (1 - positive) / N)

    @fitting
    def constants(self, x: Tensor) -> Constants:
        """The constants for |y - y*(x)| <= 1."""
        y, weight = float(self.solution(x)), float(torch.sigmoid(x).mean())
        slopes = torch.sigmoid(x) * torch.sigmoid(-x) / x.numel()

        def variance(z: float) -> float:
            return 1 / (2 + math.exp(z) + math.exp(-z))

        near, far = max(abs(y) - RADIUS, 0.0), abs(y) + RADIUS
        positive = (self.labels > 0).to(x)
        ends = [y - RADIUS, y + RADIUS]  # |grad of sample i| is monotone in y
        entries = torch.maximum(
            *((1 / (1 + math.exp(-z)) - positive).abs() for z in ends),
        )
        return structural(
            mu=weight * variance(far),
            L=weight * variance(near),
            L_fyy=0.25,
            radius=RADIUS,
            M_yy=weight * LOGISTIC_THIRD,
            M_xy=0.25 * float(torch.linalg.vector_norm(slopes)),
            C_G=float(torch.linalg.vector_norm(slopes * entries)),
        )


@checked(n=Range(2, 2.0**31), share=BETWEEN_0_AND_1, seed=SEED)
def weighted_logit(*, n: int = 8, share: float = 0.7, seed: int = 0) -> Instance:
    """The problem of :class:`WeightedLogit` with random labels.

    Args:
        n: number of samples, each with a weight.
        share: of positive labels in clean data.
        seed: of the draw.

    Raises:
        ValueError: if n < 2, or the share is not between 0 and 1.

    Example:
        >>> weighted_logit(n=4).solution(torch.zeros(4, dtype=torch.float64))
        tensor(0., dtype=torch.float64)
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.where(torch.randperm(n, generator=generator, device="cpu") < (n + 2) // 3, 1.0, -1.0).double()
    family = WeightedLogit(labels, share)
    return Instance(
        problem=BilevelProblem(family.f, family.g),
        x0=torch.zeros(n, dtype=torch.float64, device="cpu"),
        y0=torch.zeros((), dtype=torch.float64, device="cpu"),
        description="one logit with a weight for each sample, in closed form",
        solution=family.solution,
        gradient=family.gradient,
        constants=family.constants,
        settings={"estimator": "aid-cg", "outer_step": 0.1, "max_steps": 100},
    )
