"""SAMA: one difference of gradients of g along the inner optimizer's own preconditioner."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import inner_gradient_in_x
from bilevel._estimate import FlatEstimate
from bilevel._optimizer import AbstractOptimizer, OptimizerState
from bilevel.algorithms.algorithm import AbstractAlgorithm, Evaluated
from bilevel.algorithms.engine.direction import residual_report, rows_of_outer_gradients
from bilevel.algorithms.engine.slopes import REQUIRES, arrival, demand_in_g, demand_own_steps, slope
from bilevel.algorithms.engine.steps import RowStep, Schedule, are_alike, begun, entry_by_entry, moved
from bilevel.algorithms.oracle import Draws, Oracle
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, POSITIVE, demand_ranges
from bilevel.requirements.properties import DoesNotApply, Property


@final
@dataclass(frozen=True, eq=False)
class Adapted:
    """Everything that the rest of a run depends on: x `(p,)`, y `(*tasks, q)`, and their optimizers' states."""

    x: Tensor
    y: Tensor
    outer: OptimizerState | None = None
    inner: OptimizerState | None = None


@final
@dataclass(frozen=True)
class SAMA(AbstractAlgorithm[Adapted]):
    """SAMA: h = grad_x f - [grad_x g(x, y + t s) - grad_x g(x, y - t s)] / 2t, s = D grad_y f, t = radius / |s|.

    y takes `inner_steps` steps of its optimizer, warm-started, each on a batch of its own; D is the diagonal of the
    derivative of the *last* step's update with respect to its gradient, so that h is the derivative of f through that
    step alone, with the inverse of H replaced by D: about G s = G D grad_y f. For a number as `inner_step` D is the
    identity, as in the paper. For an optimizer of this library it is exact, by one backward pass through its step; for
    Adam with moments m, v after a gradient u, in its k-th step, with bias corrections a = 1 - beta1^k, b = 1 - beta2^k

        D = step [ (1 - beta1) / a / (sqrt(v / b) + eps)
                   - (m / a) (1 - beta2) u / b / (sqrt(v / b) (sqrt(v / b) + eps)^2) ]

    No second derivatives, no linear system, no memory: and no bound on its bias, which is O(1). The direction need not
    even be one of descent for Phi. Where it is good enough is where the inner problem is well conditioned in the
    optimizer's metric.

    `Estimate.y` is y after its steps, `Estimate.value` f there. `tol` is compared with |(h, grad_y g)|, which is zero
    at a fixed point of the algorithm, and not at a stationary point of Phi.

    Cost: inner_steps + 3 calls for each sample of a batch: two gradients of g in x and one of f. Memory: none.

    Source: Choe, Mehta, Ahn, Neiswanger, Xie, Strubell, Xing, "Making scalable meta learning practical", NeurIPS 2023.
    Its code ignores Adam's bias correction and takes eps as zero in parts.

    Args:
        inner_step: of y, or an optimizer of this library.
        outer_step: gamma, of x, or an optimizer.
        inner_steps: of y.
        radius: how far y is moved to both sides for the difference.
        schedule: step -> the factor of both steps; None: constant. D is that of the optimizer, without the factor.
        outer_schedule: the same of gamma alone, where it is another one.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a step or the radius is not positive or `inner_steps` below 1; from `minimize`, if the inner
            optimizer's step is not differentiable (`TorchOptim`), or y is constrained or no minimizer of g.

    Example:
        >>> from bilevel import BilevelProblem, minimize
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> solution = minimize(
        ...     problem, x0, x0, algorithm=SAMA(0.5, 0.1), max_steps=300
        ... )  # here H is the identity
        >>> round(float(solution.x), 3)
        3.0
    """

    inner_step: RowStep
    outer_step: RowStep
    inner_steps: int = 1
    radius: float = 0.01
    schedule: Schedule | None = None
    outer_schedule: Schedule | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_own_steps(self, inner_step=self.inner_step, outer_step=self.outer_step)
        demand_ranges(self, inner_steps=AT_LEAST_1, radius=POSITIVE)

    @property
    def requires(self) -> frozenset[Property]:
        return REQUIRES

    @property
    def draws(self) -> Draws:
        return Draws(f=1, g=self.inner_steps + 1)

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> Adapted:
        x = oracle.project(x)
        y = oracle.problem().start(x, y).detach()
        demand_in_g(oracle, x, y)
        return Adapted(x, y, begun(self.outer_step, x), begun(self.inner_step, y))

    def evaluate(self, oracle: Oracle, state: Adapted) -> Evaluated:
        x, y, inner = state.x, state.y, state.inner
        rho = 1.0 if self.schedule is None else self.schedule(oracle.step)
        d, diagonal = torch.zeros_like(y), torch.ones_like(y)
        for number in range(self.inner_steps):
            d = slope(oracle.problem(g=number), x, y, oracle.block("g", number).scale)
            if number == self.inner_steps - 1 and inner is not None:
                assert isinstance(self.inner_step, AbstractOptimizer)
                diagonal = update_diagonal(self.inner_step, d, y, inner)
            y, inner = moved(self.inner_step, rho, d, y, inner)
        last = self.inner_steps  # not the number of f: their product is unbiased where one source serves both
        problem, of_f, of_g = oracle.problem(g=last), oracle.block("f").scale, oracle.block("g", last).scale
        value, fx, fy = rows_of_outer_gradients(problem, x, y)  # of the mean over tasks: so is what follows
        s = diagonal * fy
        size = problem.row_norms(s.flatten(x.dim() - 1))
        t = self.radius / torch.where(size > 0, size, torch.ones_like(size))
        of_y = t.reshape(*t.shape, *(1 for _ in s.shape[t.dim() :]))
        up, down = (inner_gradient_in_x(problem, x, y + sign * of_y * s) for sign in (1.0, -1.0))
        h = of_f * fx
        if up is not None and down is not None:
            h = h - of_f * of_g * (up - down) / (2 * t.unsqueeze(-1))
        reports = (residual_report("inner iterate", d),)
        return Evaluated(FlatEstimate(h, value, y, reports), (y, inner, d))

    def step(self, oracle: Oracle, state: Adapted, found: Evaluated) -> Adapted:
        y, inner, _ = found.kept
        rho = 1.0 if self.schedule is None else self.schedule(oracle.step)
        gamma = rho if self.outer_schedule is None else self.outer_schedule(oracle.step)
        x, outer = moved(self.outer_step, gamma, found.estimate.grad, state.x, state.outer)
        return Adapted(oracle.project(x), y, outer, inner)

    def beside(self, inner_step: RowStep, outer_step: RowStep) -> AbstractAlgorithm[Adapted] | None:
        if not are_alike(self, inner_step, outer_step):
            return None
        return replace(self, inner_step=inner_step, outer_step=outer_step)

    @property
    def takes_shards(self) -> bool:
        return entry_by_entry(self.inner_step)

    def stationarity(self, oracle: Oracle, state: Adapted, found: Evaluated) -> Tensor:
        return arrival(oracle.residual(state.x, found.estimate.grad), found.kept[2], problem=oracle.like)

    def point(self, state: Adapted) -> tuple[Tensor, Tensor]:
        return state.x, state.y


def update_diagonal(optimizer: AbstractOptimizer, grad: Tensor, point: Tensor, state: OptimizerState) -> Tensor:
    """D = -d step(grad, point, state) / d grad, entry by entry, of a step that acts so: `(*tasks, q)`.

    Raises:
        DoesNotApply: if the step is not differentiable.
    """
    with torch.enable_grad():
        leaf = grad.detach().requires_grad_()
        there = optimizer.step(leaf, point.detach(), state)[0]
        if not there.requires_grad:
            raise DoesNotApply(
                f"`{type(optimizer).__name__}` as `inner_step=` has a step that is not differentiable, and SAMA needs"
                " its derivative. Use an optimizer of `bilevel.solvers`, such as `Adam`, or a number."
            )
        return -torch.autograd.grad(there.sum(), leaf)[0]
