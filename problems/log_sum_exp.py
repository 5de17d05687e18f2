"""An inner problem of the form log-sum-exp, whose entries are coupled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem
from bilevel.arguments.checked import checked, fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import SEED, SIZE
from bilevel.arguments.shapes import Shape, demand_shapes
from bilevel.certificates.certificate import Constants
from bilevel.problems._constants import RADIUS, structural

SOFTMAX_THIRD = math.sqrt(2) / (3 * math.sqrt(3))  # the greatest third derivative of log-sum-exp along a unit vector


@final
@dataclass(frozen=True, eq=False)
class LogSumExp:
    """g = log sum exp(y) + (1'y)^2 / 2 - x'y,  f = |y - t|^2 / 2.

    Stationarity reads softmax(y) + (1'y) 1 = x. Its sum gives s = 1'y = (1'x - 1) / q, then pi = x - s 1 must be
    positive (a condition on x), and y* = log pi - mean(log pi) + s / q. x* = softmax(t) + (1't) 1.

    mu, L and M_yy hold for |y - y*(x)| <= 1.

    Args:
        t: the outer target `(q,)`.
    """

    t: Tensor

    def __post_init__(self) -> None:
        demand_types(self)
        demand_shapes("LogSumExp", {"t": Shape("q")}, vars(self))

    @fitting
    def f(self, _: Tensor, y: Tensor) -> Tensor:
        """The outer objective."""
        return (y - self.t).square().sum() / 2

    @fitting
    def g(self, x: Tensor, y: Tensor) -> Tensor:
        """The inner objective."""
        return torch.logsumexp(y, dim=-1) + y.sum().square() / 2 - (x * y).sum()

    @fitting
    def probabilities(self, x: Tensor) -> Tensor:
        """softmax(y*(x)) = x - s 1."""
        return x - (x.sum() - 1) / x.numel()

    @fitting
    def solution(self, x: Tensor) -> Tensor:
        """y*(x)."""
        logs = self.probabilities(x).log()
        return logs - logs.mean() + (x.sum() - 1) / x.numel() ** 2

    @fitting
    def gradient(self, x: Tensor) -> Tensor:
        """The hypergradient at x: H^-1 (y* - t) with H = diag(pi) - pi pi' + 11'."""
        pi = self.probabilities(x)
        H = torch.diag(pi) - torch.outer(pi, pi) + 1
        h: Tensor = torch.linalg.solve(H, self.solution(x) - self.t)
        return h

    @fitting
    def constants(self, x: Tensor) -> Constants:
        """The constants for |y - y*(x)| <= 1.

        1 is an eigenvector of H with the eigenvalue q; for u orthogonal to it, u'Hu is the variance of u under pi,
        which is at least (min pi) |u|^2 and at most |u|^2 / 2. A shift of y by a vector of norm 1 changes
        log pi_i by a difference of two entries, at most sqrt 2.
        """
        q = self.t.numel()
        least = float(self.probabilities(x).min()) * math.exp(-math.sqrt(2) * RADIUS)
        L = float(q) if q > 1 else 1.0
        return structural(mu=least if q > 1 else 1.0, L=L, L_fyy=1.0, M_yy=SOFTMAX_THIRD, C_G=1.0, radius=RADIUS)


@checked(q=SIZE, seed=SEED)
def log_sum_exp(*, q: int = 5, seed: int = 0) -> Instance:
    """The coupled problem of :class:`LogSumExp` at a random target.

    Args:
        q: number of inner and of outer variables.
        seed: of the draw.

    Raises:
        ValueError: if q < 1.

    Example:
        >>> instance = log_sum_exp(q=3)
        >>> instance.value(instance.minimizer) < 1e-20
        True
    """
    t = 0.5 * torch.randn(q, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    family = LogSumExp(t)
    return Instance(
        problem=BilevelProblem(family.f, family.g),
        x0=torch.softmax(torch.linspace(-0.5, 0.5, q, dtype=torch.float64, device="cpu"), 0),
        y0=torch.zeros_like(t),
        description="log-sum-exp inner problem: coupled, not quadratic",
        solution=family.solution,
        gradient=family.gradient,
        constants=family.constants,
        minimizer=torch.softmax(t, 0) + t.sum(),
        settings={"estimator": "aid-cg", "outer_step": 0.01, "max_steps": 300},
    )
