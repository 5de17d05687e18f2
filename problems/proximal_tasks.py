"""Meta-learning with a Gaussian prior, for linear models: the form of iMAML, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem
from bilevel.arguments.checked import checked, fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, SEED, SIZE
from bilevel.arguments.shapes import Shape, demand_shapes
from bilevel.certificates.certificate import Constants
from bilevel.problems._constants import RADIUS, structural

Prior: TypeAlias = dict[str, Tensor]


@final
@dataclass(frozen=True, eq=False)
class ProximalTasks:
    """g = sum_i |X_i y_i - b_i|^2 / 2n + sum_j exp(l_j) (y_ij - m_j)^2 / 2,  f = mean_i |U_i y_i - c_i|^2 / 2n.

    A task i has its own weights y_i, the maximum a posteriori estimate under the prior N(m, exp(-l)) that all tasks
    share; x holds the prior's `mean` m and `log_precision` l. One scalar l is iMAML's proximal term. With
    A_i = X_i'X_i / n and D = diag(exp l), y_i* = (A_i + D)^-1 (X_i'b_i / n + D m).

    C_G holds for |y - y*(x)| <= 1, the others for every y.

    Args:
        X: training inputs `(tasks, n, q)`.
        b: training targets `(tasks, n)`.
        U: validation inputs, of the same shape as X.
        c: validation targets, of the same shape as b.
    """

    X: Tensor
    b: Tensor
    U: Tensor
    c: Tensor

    def __post_init__(self) -> None:
        demand_types(self)
        axes = {"X": Shape("t n q"), "b": Shape("t n"), "U": Shape("t n q"), "c": Shape("t n")}
        demand_shapes("ProximalTasks", axes, vars(self))

    @fitting
    def f(self, _: Prior, y: Tensor) -> Tensor:
        """The outer objective, at y `(tasks, q)`."""
        return (torch.einsum("inq,iq->in", self.U, y) - self.c).square().mean() / 2

    @fitting
    def g(self, x: Prior, y: Tensor) -> Tensor:
        """The inner objective, at y `(tasks, q)`."""
        fit = (torch.einsum("inq,iq->in", self.X, y) - self.b).square().sum() / (2 * self.X.shape[1])
        return fit + (x["log_precision"].exp() * (y - x["mean"]).square()).sum() / 2

    def _hessians(self, x: Prior) -> Tensor:
        q = self.X.shape[-1]
        D = torch.diag(x["log_precision"].exp().expand(q))
        return self.X.mT @ self.X / self.X.shape[1] + D

    @fitting
    def solution(self, x: Prior) -> Tensor:
        """y*(x): `(tasks, q)`."""
        right = torch.einsum("inq,in->iq", self.X, self.b) / self.X.shape[1] + x["log_precision"].exp() * x["mean"]
        y: Tensor = torch.linalg.solve(self._hessians(x), right)
        return y

    @fitting
    def gradient(self, x: Prior) -> Prior:
        """The hypergradient at x: D sum_i v_i for the mean, -D sum_i (y_i* - m) v_i for log_precision."""
        y, precision = self.solution(x), x["log_precision"].exp()
        residual = torch.einsum("inq,iq->in", self.U, y) - self.c
        v = torch.linalg.solve(self._hessians(x), torch.einsum("inq,in->iq", self.U, residual) / self.c.numel())
        by_entry = -precision * ((y - x["mean"]) * v).sum(0)
        scalar = x["log_precision"].dim() == 0
        return {"mean": precision * v.sum(0), "log_precision": by_entry.sum() if scalar else by_entry}

    @fitting
    def constants(self, x: Prior) -> Constants:
        """The constants at x."""
        eigenvalues = torch.linalg.eigvalsh(self._hessians(x))
        top = float(x["log_precision"].exp().max())
        tasks = self.X.shape[0]
        # The mean's rows of d2g/dxdy are -D once a task; a row of log_precision holds D (y - m), here in the ball.
        shift = x["log_precision"].exp() * (self.solution(x) - x["mean"])
        lengths = shift.norm() if x["log_precision"].dim() == 0 else torch.linalg.vector_norm(shift, dim=0).max()
        return structural(
            mu=float(eigenvalues[:, 0].min()),
            L=float(eigenvalues[:, -1].max()),
            L_fyy=float(torch.linalg.matrix_norm(self.U, 2).square().max()) / self.c.numel(),
            radius=RADIUS,
            M_xy=top,
            C_G=((tasks**0.5 * top) ** 2 + (float(lengths) + RADIUS * top) ** 2) ** 0.5,
        )


@checked(tasks=SIZE, n=SIZE, q=SIZE, noise=AT_LEAST_0, seed=SEED)
def proximal_tasks(
    *, tasks: int = 4, n: int = 5, q: int = 3, per_weight: bool = True, noise: float = 0.3, seed: int = 0
) -> Instance:
    """Several small regressions around a common mean; the prior's mean and log-precision are learned.

    Args:
        tasks: number of tasks.
        n: training samples of a task, and as many for validation.
        q: number of weights of a task.
        per_weight: one log-precision for each weight, else one for all (iMAML).
        noise: standard deviation of the targets' noise.
        seed: of the draw.

    Raises:
        ValueError: if a size is less than 1.

    Example:
        >>> sorted(proximal_tasks().x0)
        ['log_precision', 'mean']
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    truth = normal(q) + torch.linspace(0.1, 1.0, q, dtype=torch.float64, device="cpu") * normal(tasks, q)
    X, U = normal(tasks, n, q), normal(tasks, n, q)
    b, c = ((Z * truth.unsqueeze(1)).sum(-1) + noise * normal(tasks, n) for Z in (X, U))
    family = ProximalTasks(X, b, U, c)
    return Instance(
        problem=BilevelProblem(family.f, family.g),
        x0={
            "mean": torch.zeros(q, dtype=torch.float64, device="cpu"),
            "log_precision": torch.zeros(q if per_weight else (), dtype=torch.float64, device="cpu"),
        },
        y0=torch.zeros((tasks, q), dtype=torch.float64, device="cpu"),
        description="several regressions with a learned prior mean and log-precision, in closed form",
        solution=family.solution,
        gradient=family.gradient,
        constants=family.constants,
        settings={"estimator": "aid-cg", "outer_step": 0.1, "max_steps": 300},
    )
