"""ESJ-S: the evolution-strategy Jacobian along a stochastic inner iteration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._estimate import FlatEstimate
from bilevel._optimizer import OptimizerState
from bilevel.algorithms.algorithm import AbstractAlgorithm, Evaluated
from bilevel.algorithms.engine.direction import residual_report, rows_of_outer_gradients
from bilevel.algorithms.engine.slopes import arrival, demand_own_steps, slope
from bilevel.algorithms.engine.steps import RowStep, Schedule, are_alike, begun, moved
from bilevel.algorithms.oracle import Draws, Oracle
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, POSITIVE, demand_ranges
from bilevel.hypergrad.directions import Distribution, demand_distribution, directions
from bilevel.hypergrad.radius import fitting
from bilevel.requirements.properties import Property


@final
@dataclass(frozen=True, eq=False)
class Perturbed:
    """Everything that the rest of a run depends on: x `(p,)`, y `(*tasks, q)`, and the state of the optimizer of x."""

    x: Tensor
    y: Tensor
    outer: OptimizerState | None = None


@final
@dataclass(frozen=True)
class ESJS(AbstractAlgorithm[Perturbed]):
    """ESJ-S: h = grad_x f + (c/Q) sum_j <[y_N(x + r u_j) - y_N(x)] / r, grad_y f> u_j, y_N by N stochastic steps.

    y_N(x) is made of the same start by the same N = `inner_steps` steps on the *same batches* for all Q + 1 runs, which
    go side by side: what batches differ by cancels, instead of being divided by r. The start is the y_N of the outer
    step before, or `init(x)`. The directions and c are those of `ESJ`, new ones at each step, drawn from (seed, step).

    Where y_N is affine in x (g quadratic) the mean of h over directions is grad_x f + J_N' grad_y f, J_N = dy_N/dx
    along the batches, whatever r; for orthonormal directions, Q = p, h is that itself. `ESJ` is the same for any inner
    solver on one batch, with an estimate of its errors.

    `Estimate.y` is y_N(x), `Estimate.value` f there. `tol` is compared with |(h, grad_y g)|, the latter of the last
    step; fewer directions than p leave h noisy of the order of |J_N' grad_y f| sqrt(p / Q), so that it need not fall.

    Cost: (Q + 1) N + 1 calls for each sample of a batch, first derivatives only. Memory: (Q + 1) q.

    Converges: for g strongly convex, its Jacobian Lipschitz, N of the order of log(1/e) and Q of that of p, to
    E |grad Phi|^2 <= e after O(p / e^2) outer steps, with bias of the order of (1 - rho mu)^N left by the truncation.

    Source: Sow, Ji, Liang, "On the convergence theory for Hessian-free bilevel algorithms", NeurIPS 2022, PZOBO-S.

    Args:
        inner_step: rho, of y, or an optimizer, which begins anew at each outer step.
        outer_step: gamma, of x, or an optimizer.
        inner_steps: N.
        directions: Q.
        radius: r; None: eps^(1/3) max(1, the root mean square of x), eps the rounding unit.
        distribution: "rademacher", "gaussian", "sphere" or "orthonormal" (Q <= p).
        seed: of the directions; one for each of several runs side by side.
        schedule: step -> the factor of both steps; None: constant.
        outer_schedule: the same of gamma alone, where it is another one.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a number is out of range, or there is no such distribution; from `minimize`, if more orthonormal
            directions than outer variables are asked for, there are several seeds for one run, or y is constrained or
            no minimizer of g.

    Example:
        >>> from bilevel import BilevelProblem, minimize
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (y - x).square().sum() / 2
        ... )
        >>> x0 = torch.zeros(2, dtype=torch.float64)
        >>> algorithm = ESJS(0.5, 0.3, inner_steps=3, directions=2, distribution="orthonormal")
        >>> minimize(problem, x0, x0, algorithm=algorithm, max_steps=80).x.round(decimals=3)
        tensor([3., 3.], dtype=torch.float64)
    """

    inner_step: RowStep
    outer_step: RowStep
    inner_steps: int = 10
    directions: int = 20
    radius: float | None = None
    distribution: Distribution = "rademacher"
    seed: int | tuple[int, ...] = 0
    schedule: Schedule | None = None
    outer_schedule: Schedule | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_own_steps(self, inner_step=self.inner_step, outer_step=self.outer_step)
        demand_ranges(self, inner_steps=AT_LEAST_1, directions=AT_LEAST_1, radius=POSITIVE)
        demand_distribution("ESJS", self.distribution)

    @property
    def requires(self) -> frozenset[Property]:
        return frozenset({Property.stationary, Property.minimum, Property.smooth, Property.outer_gradient})

    @property
    def draws(self) -> Draws:
        return Draws(f=1, g=self.inner_steps)

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> Perturbed:
        x = oracle.project(x)
        return Perturbed(x, oracle.problem().start(x, y).detach(), begun(self.outer_step, x))

    def evaluate(self, oracle: Oracle, state: Perturbed) -> Evaluated:
        x, runs = state.x, state.x.dim() - 1  # 1: of several runs side by side, whose axis comes first
        u, c = self._directions(oracle.step, x)
        r = self._radius(x)
        moves = torch.cat([torch.zeros_like(u[..., :1, :]), u], dim=-2)  # the unperturbed one comes first
        points = x.unsqueeze(-2) + r * moves
        several, flat = points.shape[:-1], points.flatten(0, -2)
        beside = oracle.of_runs(torch.arange(len(x)).repeat_interleave(several[-1])) if runs else oracle
        rho = 1.0 if self.schedule is None else self.schedule(oracle.step)
        if oracle.like.problem.init is None:
            y = state.y.unsqueeze(runs).expand(*several, *state.y.shape[runs:])
        else:
            begin = beside.problem().start(flat, state.y).detach()
            y = begin.reshape(*several, *begin.shape[1:])
        memory, d = begun(self.inner_step, y), torch.zeros_like(y)
        for number in range(self.inner_steps):
            of_g = beside.block("g", number).scale
            d = slope(beside.problem(g=number), flat, y.flatten(0, runs), of_g).reshape(y.shape)
            y, memory = moved(self.inner_step, rho, d, y, memory)
        middle = y.select(runs, 0).clone()  # and not a view, which would hold all of them
        value, fx, fy = rows_of_outer_gradients(oracle.problem(), x, middle)
        apart = y.narrow(runs, 1, u.shape[-2]) - middle.unsqueeze(runs)
        slopes = (apart * fy.unsqueeze(runs)).flatten(runs + 1).sum(-1, keepdim=True) / r
        h = oracle.block("f").scale * (fx + c / u.shape[-2] * (slopes * u).sum(-2))
        left = d.select(runs, 0)
        return Evaluated(FlatEstimate(h, value, middle, (residual_report("inner iterate", left),)), left)

    def _directions(self, step: int, x: Tensor) -> tuple[Tensor, float]:
        """U `(Q, p)`, or where each of several runs has a seed `(runs, Q, p)`, and c."""
        seeds = self.seed if isinstance(self.seed, tuple) else (self.seed,)
        if isinstance(self.seed, tuple) and (x.dim() == 1 or len(seeds) != len(x)):
            raise ValueError(f"`ESJS(seed=...)` must be one number for a run, or one for each of several. Got {seeds}.")
        like = x.reshape(-1, x.shape[-1])[0]
        drawn = [
            directions("ESJS", self.distribution, self.directions, like, seed * 1_000_003 + step) for seed in seeds
        ]
        (u, c), *others = drawn
        return (torch.stack([u, *(u for u, _ in others)]) if isinstance(self.seed, tuple) else u), c

    def _radius(self, x: Tensor) -> float | Tensor:
        """R; where it follows the size of x, for each of several runs `(runs, 1, 1)`."""
        if self.radius is not None:
            return self.radius
        return fitting(x) if x.dim() == 1 else x.new_tensor([fitting(row) for row in x]).reshape(-1, 1, 1)

    def step(self, oracle: Oracle, state: Perturbed, found: Evaluated) -> Perturbed:
        rho = 1.0 if self.schedule is None else self.schedule(oracle.step)
        gamma = rho if self.outer_schedule is None else self.outer_schedule(oracle.step)
        x, outer = moved(self.outer_step, gamma, found.estimate.grad, state.x, state.outer)
        return Perturbed(oracle.project(x), found.estimate.y, outer)

    def beside(self, inner_step: RowStep, outer_step: RowStep) -> AbstractAlgorithm[Perturbed] | None:
        if not are_alike(self, inner_step, outer_step):
            return None
        return replace(self, inner_step=inner_step, outer_step=outer_step)

    def of_seeds(self, seeds: tuple[int, ...]) -> AbstractAlgorithm[Perturbed]:
        return replace(self, seed=seeds)

    def stationarity(self, oracle: Oracle, state: Perturbed, found: Evaluated) -> Tensor:
        return arrival(oracle.residual(state.x, found.estimate.grad), found.kept)

    def point(self, state: Perturbed) -> tuple[Tensor, Tensor]:
        return state.x, state.y
