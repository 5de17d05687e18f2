"""The single loop SOBA: inner, linear and outer iterates move together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import Exact, outer_gradients
from bilevel._estimate import FlatEstimate
from bilevel._numerics.rows import safe_row_norms
from bilevel._result import Report, Status
from bilevel._validate import demand_types
from bilevel.algorithms.algorithm import AbstractAlgorithm, Evaluated
from bilevel.algorithms.oracle import Oracle
from bilevel.arguments.ranges import POSITIVE, demand_ranges
from bilevel.requirements.properties import START_ONLY, DoesNotApply, Property


@final
@dataclass(frozen=True, eq=False)
class SOBAState:
    """The three iterates: x `(p,)`, y and v `(*tasks, q)`."""

    x: Tensor
    y: Tensor
    v: Tensor


@final
@dataclass(frozen=True)
class SOBA(AbstractAlgorithm[SOBAState]):
    """SOBA: y <- y - rho d_y, v <- v - rho' d_v, x <- P(x - gamma d_x), all three at once.

        d_y = grad_y g,   d_v = H v - grad_y f,   d_x = grad_x f - G v,   all at the same (x, y, v)

    with H = d2g/dy2 and G = d2g/dxdy on one batch of g, and f on one of its own. The three are zero at the same time
    where y = y*(x), v = H^-1 grad_y f and grad Phi(x) = 0, and only there; their norm |(d_y, d_v, d_x)| is what `tol`
    is compared with (d_x alone may vanish at the start, where v is zero), with the projection's residual for d_x where
    x is constrained. `Record.grad_norm` is that norm.

    Cost: a step takes one gradient of g with its graph, one backward pass through it for H v and G v together, and one
    gradient of f. Memory: that of a gradient, and 3 q. Nothing is solved at the start: v begins at zero.

    Converges: for g strongly convex in y, with steps of t^-2/5 (rho) and t^-3/5 (gamma) the least E |grad Phi|^2 of T
    steps is O(T^-2/5). With constant steps and the whole data it converges where gamma is small against rho: the inner
    and the linear iterate must follow x. Constant steps and batches leave noise of the order of the steps.

    Source: Dagreou, Ablin, Vaiter, Moreau, "A framework for bilevel optimization that enables stochastic and global
    variance reduction algorithms", NeurIPS 2022, algorithm 1 (their v has the other sign).

    Args:
        inner_step: rho, of y; at most 2 / L with L the largest eigenvalue of H.
        outer_step: gamma, of x.
        linear_step: rho', of v; None: that of y.
        schedule: step -> factor of all three, such as `Power()`; None: constant steps.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a step is not positive; from `minimize`, if y is constrained or no minimizer of g.

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem, minimize
        >>> problem = BilevelProblem(lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2)
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> solution = minimize(problem, x0, x0, algorithm=SOBA(inner_step=0.5, outer_step=0.1), max_steps=300)
        >>> round(float(solution.x), 4), solution.stats.hvps
        (3.0, 301)
    """

    inner_step: float
    outer_step: float
    linear_step: float | None = None
    schedule: Callable[[int], float] | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, inner_step=POSITIVE, outer_step=POSITIVE, linear_step=POSITIVE)

    @property
    def requires(self) -> frozenset[Property]:
        return frozenset({Property.stationary, Property.smooth, Property.second_derivatives, Property.beyond_start})

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> SOBAState:
        x = oracle.project(x)
        y = oracle.problem().start(x, y).detach()
        return SOBAState(x, y, torch.zeros_like(y))

    def evaluate(self, oracle: Oracle, state: SOBAState) -> Evaluated:
        problem = oracle.problem()
        at = Exact().linearize(problem, state.x, state.y)
        hv, gv = at.products(state.v)
        if gv is None and problem.problem.init is not None:
            raise DoesNotApply(START_ONLY)
        value, fx, fy = outer_gradients(problem, state.x, state.y)
        d_y, d_v = at.gradient, hv - fy
        d_x = fx if gv is None else fx - gv
        reports = (_report("inner iterate", d_y), _report("linear iterate", d_v))
        return Evaluated(FlatEstimate(d_x, value, state.y, reports, state.v), (d_y, d_v))

    def step(self, oracle: Oracle, state: SOBAState, found: Evaluated) -> SOBAState:
        d_y, d_v = found.kept
        factor = 1.0 if self.schedule is None else self.schedule(oracle.step)
        linear_step = self.inner_step if self.linear_step is None else self.linear_step
        return SOBAState(
            x=oracle.project(state.x - factor * self.outer_step * found.estimate.grad),
            y=state.y - factor * self.inner_step * d_y,
            v=state.v - factor * linear_step * d_v,
        )

    def stationarity(self, oracle: Oracle, state: SOBAState, found: Evaluated) -> Tensor:
        outer = oracle.residual(state.x, found.estimate.grad)
        norm: Tensor = torch.linalg.vector_norm(torch.cat([outer.reshape(1), *(d.reshape(-1) for d in found.kept)]))
        return norm

    def point(self, state: SOBAState) -> tuple[Tensor, Tensor]:
        return state.x, state.y


def _report(part: str, direction: Tensor) -> Report:
    """How far an iterate is from where it is going; an iterate has no tolerance to miss."""
    residual = float(safe_row_norms(direction.reshape(-1)))
    finite = residual == residual and residual != float("inf")
    return Report(part, Status.successful if finite else Status.nonfinite, residual, 0)
