"""The algorithm of NestedMAML: the weights move along what one step of the inner problem would do to f."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import grad, outer_gradients, total
from bilevel._estimate import FlatEstimate
from bilevel._optimizer import AbstractOptimizer, OptimizerState
from bilevel.algorithms.algorithm import AbstractAlgorithm, Evaluated
from bilevel.algorithms.engine.direction import residual_report
from bilevel.algorithms.engine.slopes import REQUIRES, arrival, demand_in_g, demand_own_steps, slope
from bilevel.algorithms.engine.steps import LoopState, Step, begun, moved
from bilevel.algorithms.oracle import Oracle
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import POSITIVE, demand_ranges
from bilevel.requirements.properties import Property


@final
@dataclass(frozen=True)
class Lookahead(AbstractAlgorithm[LoopState]):
    """h = grad_x f(x, z) - eta (d grad_y g(x, y) / dx)' grad_y f(x, z),  z = y - eta grad_y g(x, y): one step ahead.

    That is the derivative of f(x, z(x)) at the current y: a Neumann series of one term, eta I for the inverse of the
    Hessian, with f where one step leads. Then x takes a step along h, and y one along grad_y g(x, y) with the new x,
    both on the batch at hand. eta is not the step of y: h is proportional to it where it is short, and y may be moved
    by an optimizer with a memory, which h does not look through.

    `Estimate.value` is f at z, `Estimate.y` y. `tol` is compared with |(h, grad_y g)|, which is zero at a fixed point
    of the algorithm, and not at a stationary point of Phi. The bias is O(1): it is that of a solve of one step.

    Cost: two gradients of g, one of f and one cross product for each sample of a batch. Memory: one graph of a gradient
    of g.

    Source: Killamsetty et al., "A nested bi-level optimization framework for robust few shot learning", AAAI 2022,
    equations 5, 8 and 9. In the tasks' weights, h_i = -(eta / m) <grad f(z), grad L_i>.

    Args:
        ahead: eta.
        inner_step: of y, or an optimizer.
        outer_step: of x, or an optimizer. One that remembers gradients (`Adam`) moves weights of tasks that are not in
            the batch as well; `GradientDescent` and `ByLargest` do not.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a step is not positive; from `minimize`, if y is constrained or no minimizer of g.

    Example:
        >>> from bilevel import BilevelProblem, minimize
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> solution = minimize(problem, x0, x0, algorithm=Lookahead(0.5, 0.5, 0.2), max_steps=300)
        >>> round(float(solution.x), 3)
        3.0
    """

    ahead: float
    inner_step: Step
    outer_step: Step

    def __post_init__(self) -> None:
        demand_types(self)
        demand_own_steps(self, inner_step=self.inner_step, outer_step=self.outer_step)
        demand_ranges(self, ahead=POSITIVE)

    @property
    def requires(self) -> frozenset[Property]:
        return REQUIRES | {Property.second_derivatives}

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> LoopState:
        x = oracle.project(x)
        y = oracle.problem().start(x, y).detach()
        demand_in_g(oracle, x, y)
        return LoopState(x, y, None, None, begun(self.outer_step, x), begun(self.inner_step, y))

    def evaluate(self, oracle: Oracle, state: LoopState) -> Evaluated:
        problem, of_f, of_g = oracle.problem(), oracle.block("f").scale, oracle.block("g").scale
        rows = state.y.shape[:-1].numel()
        problem.tally.gradients += rows
        with torch.enable_grad():
            x, y = state.x.detach().requires_grad_(), state.y.detach().requires_grad_()
            d = grad(total(problem.by_itself().g(x, y)), y, create_graph=True, checked=oracle.step > 0)
        there = y.detach() - self.ahead * of_g * d.detach()
        value, fx, fy = outer_gradients(problem, state.x, there)
        h = of_f * fx
        if d.requires_grad:
            problem.tally.cross_products += rows
            (seen,) = torch.autograd.grad(d, x, fy, allow_unused=True)
            h = h if seen is None else h - self.ahead * of_f * of_g * seen
        return Evaluated(FlatEstimate(h, value, state.y, (residual_report("inner iterate", d.detach()),)), d.detach())

    def step(self, oracle: Oracle, state: LoopState, found: Evaluated) -> LoopState:
        x, outer = moved(self.outer_step, 1.0, found.estimate.grad, state.x, state.outer)
        x = oracle.project(x)
        d = slope(oracle.problem(), x, state.y, oracle.block("g").scale)
        y, inner = moved(self.inner_step, 1.0, d, state.y, state.inner)
        return LoopState(x, y, None, None, outer, inner)

    def stationarity(self, oracle: Oracle, state: LoopState, found: Evaluated) -> Tensor:
        return arrival(oracle.residual(state.x, found.estimate.grad), found.kept)

    def point(self, state: LoopState) -> tuple[Tensor, Tensor]:
        return state.x, state.y


@final
@dataclass(frozen=True)
class ByLargest(AbstractOptimizer):
    """x - step h / max_i |h_i|: the entry that matters most moves by `step`, and entries with h_i = 0 stay.

    Args:
        step: how far; of weights that begin at 1, a tenth.

    Raises:
        ValueError: if the step is not positive.

    Example:
        >>> ByLargest(0.1).step(torch.tensor([4.0, -2.0, 0.0]), torch.ones(3), {})[0]
        tensor([0.9000, 1.0500, 1.0000])
    """

    length: float

    def __init__(self, step: float) -> None:
        object.__setattr__(self, "length", step)
        demand_types(self)
        demand_ranges(self, length=POSITIVE)

    def init(self, point: Tensor) -> OptimizerState:
        return {}

    def step(self, grad: Tensor, point: Tensor, state: OptimizerState) -> tuple[Tensor, OptimizerState]:
        largest = grad.abs().amax(-1, keepdim=True)
        return point - self.length * grad / torch.where(largest > 0, largest, 1.0), state

    @property
    def needs_curvature(self) -> bool:
        return False

    def tuned(self, largest_curvature: Tensor) -> AbstractOptimizer:
        return self

    def with_step(self, step: float) -> ByLargest:
        return ByLargest(step)
