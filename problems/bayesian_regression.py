"""Bayesian linear regressions under a learned Gaussian prior, all in closed form: the reference for iBaML."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem
from bilevel.arguments.checked import checked, fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import POSITIVE, SEED, SIZE, demand_ranges
from bilevel.problems._variational import normal_noise

Gaussian: TypeAlias = dict[str, Tensor]  # mean and log_variance
Side: TypeAlias = Literal["support", "query"]


@final
@dataclass(frozen=True)
class BayesianRegression:
    """g = E_q[-log p(support)] + w KL(q || p), f = E_q[-log p(query)], for targets X theta + N(0, s) and theta ~ p.

    A task is a dict of `support_x` `(n, q)`, `support_y` `(n,)`, `query_x` and `query_y`, or of several stacked along
    leading axes, over which values have them too. x holds the prior's `mean` m and `log_variance` l, d = exp l, y the
    posterior's, m_t and l_t. With A = X'X / s + w / d and c_j = |X_j|^2 / s,

        E_q[-log p] = (|b - X m_t|^2 + sum_j |X_j|^2 d_tj) / 2 s + n log(2 pi s) / 2,
        m_t* = A^-1 (X'b / s + w m / d),   1 / d_t* = 1 / d + c / w.

    For w = 1, g at y* is at least -log N(b; X m, X D X' + s I), the evidence, with equality where X'X is diagonal.

    Args:
        variance: s, of the targets' noise.
        kl_weight: w.

    Raises:
        ValueError: if one is not positive.

    Example:
        >>> regression = BayesianRegression(variance=1.0)
        >>> task = {"support_x": torch.ones(1, 1), "support_y": torch.ones(1)}
        >>> prior = {"mean": torch.zeros(1), "log_variance": torch.zeros(1)}
        >>> regression.solution(prior, task)["mean"]
        tensor([0.5000])
    """

    variance: float
    kl_weight: float = 1.0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, variance=POSITIVE, kl_weight=POSITIVE)

    @fitting
    def expectation(self, _: Gaussian, y: Gaussian, task: Mapping[str, Tensor], side: Side = "support") -> Tensor:
        """E_q[-log p] of one side."""
        X, b = task[f"{side}_x"], task[f"{side}_y"]
        fit = ((X @ y["mean"].unsqueeze(-1)).squeeze(-1) - b).square().sum(-1)
        spread = (X.square().sum(-2) * y["log_variance"].exp()).sum(-1)
        return (fit + spread) / (2 * self.variance) + b.shape[-1] / 2 * math.log(2 * math.pi * self.variance)

    @fitting
    def divergence(self, x: Gaussian, y: Gaussian) -> Tensor:
        """KL(q || p)."""
        log_r = y["log_variance"] - x["log_variance"]
        square = (y["mean"] - x["mean"]).square() * (-x["log_variance"]).exp()
        return (log_r.exp() - log_r + square - 1).sum(-1) / 2

    @fitting
    def g(self, x: Gaussian, y: Gaussian, task: Mapping[str, Tensor]) -> Tensor:
        """The inner objective."""
        return self.expectation(x, y, task) + self.kl_weight * self.divergence(x, y)

    @fitting
    def f(self, x: Gaussian, y: Gaussian, task: Mapping[str, Tensor]) -> Tensor:
        """The outer objective."""
        return self.expectation(x, y, task, "query")

    @fitting
    def solution(self, x: Gaussian, task: Mapping[str, Tensor]) -> Gaussian:
        """y*(x)."""
        X, b, precision = task["support_x"], task["support_y"], (-x["log_variance"]).exp()
        right = (X.mT @ b.unsqueeze(-1)).squeeze(-1) / self.variance + self.kl_weight * precision * x["mean"]
        norms = X.square().sum(-2)
        return {
            "mean": torch.linalg.solve(self._system(x, X), right),
            "log_variance": -(precision + norms / (self.variance * self.kl_weight)).log(),
        }

    @fitting
    def gradient(self, x: Gaussian, tasks: Mapping[str, Tensor]) -> Gaussian:
        """The hypergradient at x, the mean over stacked tasks; x has one log-variance for each entry."""
        X, U, c = tasks["support_x"], tasks["query_x"], tasks["query_y"]
        y, w, precision = self.solution(x, tasks), self.kl_weight, (-x["log_variance"]).exp()
        residual = (U @ y["mean"].unsqueeze(-1)).squeeze(-1) - c
        in_mean = (U.mT @ residual.unsqueeze(-1)).squeeze(-1) / self.variance
        in_log_variance = U.square().sum(-2) * y["log_variance"].exp() / (2 * self.variance)
        v_m = torch.linalg.solve(self._system(x, X), in_mean)
        v_l = 2 * in_log_variance / w  # H is w / 2 there: c d_t / 2 of the data, w r / 2 of the divergence
        ratio = (y["log_variance"] - x["log_variance"]).exp()
        by_task = {
            "mean": w * precision * v_m,
            "log_variance": w * (precision * (y["mean"] - x["mean"]) * v_m + ratio * v_l / 2),
        }
        return {key: value.reshape(-1, value.shape[-1]).mean(0) for key, value in by_task.items()}

    @fitting
    def negative_log_evidence(self, x: Gaussian, task: Mapping[str, Tensor]) -> Tensor:
        """-log N(b; X m, X D X' + s I)."""
        X, b = task["support_x"], task["support_y"]
        covariance = (X * x["log_variance"].exp()) @ X.mT + self.variance * torch.eye(
            X.shape[-2], dtype=X.dtype, device=X.device
        )
        away = (b - X @ x["mean"]).unsqueeze(-1)
        square = (away * torch.linalg.solve(covariance, away)).sum((-1, -2))
        value: Tensor = (square + torch.linalg.slogdet(covariance)[1] + b.shape[-1] * math.log(2 * math.pi)) / 2
        return value

    def _system(self, x: Gaussian, X: Tensor) -> Tensor:
        return X.mT @ X / self.variance + self.kl_weight * torch.diag_embed((-x["log_variance"]).exp())


@checked(tasks=SIZE, n=SIZE, q=SIZE, variance=POSITIVE, kl_weight=POSITIVE, seed=SEED)
def bayesian_regression(
    *, tasks: int = 4, n: int = 6, q: int = 3, variance: float = 0.25, kl_weight: float = 1.0, seed: int = 0
) -> Instance:
    """Several Bayesian regressions whose prior is learned, by mean and log-variance.

    y holds the posteriors of all tasks, `(tasks, q)` each. For one task at a time, as iBaML has it, use
    `BayesianRegression` with `BilevelProblem(family.f, family.g, tasks=True)`.

    Args:
        tasks: number of tasks.
        n: size of the support set of a task, and of its query set.
        q: number of weights of a task.
        variance: of the targets' noise.
        kl_weight: w.
        seed: of the draw.

    Raises:
        ValueError: if a size is less than 1, or a variance or weight not positive.

    Example:
        >>> sorted(bayesian_regression().y0)
        ['log_variance', 'mean']
    """
    family = BayesianRegression(variance, kl_weight)
    like = torch.zeros((), dtype=torch.float64, device="cpu")
    draw = normal_noise((tasks, 2 * n, q + 1), seed, like, antithetic=False)
    inputs, noise = draw[..., :-1], draw[..., -1] * variance**0.5
    truth = 1 + normal_noise((tasks, q), seed + 1, like, antithetic=False) * torch.linspace(
        0.1, 1, q, dtype=like.dtype, device="cpu"
    )
    targets = (inputs * truth.unsqueeze(1)).sum(-1) + noise
    data = {
        "support_x": inputs[:, :n],
        "support_y": targets[:, :n],
        "query_x": inputs[:, n:],
        "query_y": targets[:, n:],
    }
    own = _OfTasks(family, data)
    return Instance(
        problem=BilevelProblem(own.f, own.g),
        x0={
            "mean": torch.zeros(q, dtype=like.dtype, device="cpu"),
            "log_variance": torch.zeros(q, dtype=like.dtype, device="cpu"),
        },
        y0={key: torch.zeros((tasks, q), dtype=like.dtype, device="cpu") for key in ("mean", "log_variance")},
        description="several Bayesian regressions with a learned prior, in closed form",
        solution=own.solution,
        gradient=own.gradient,
        settings={"estimator": "aid-cg", "outer_step": 0.1, "max_steps": 300},
    )


@final
@dataclass(frozen=True, eq=False)
class _OfTasks:
    """The regressions of several tasks as one problem."""

    family: BayesianRegression
    data: Mapping[str, Tensor]

    def f(self, x: Gaussian, y: Gaussian) -> Tensor:
        return self.family.f(x, y, self.data).mean()

    def g(self, x: Gaussian, y: Gaussian) -> Tensor:
        return self.family.g(x, y, self.data).sum()

    def solution(self, x: Gaussian) -> Gaussian:
        return self.family.solution(x, self.data)

    def gradient(self, x: Gaussian) -> Gaussian:
        return self.family.gradient(x, self.data)
