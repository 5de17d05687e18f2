"""Iterative differentiation: through the steps of the inner solver."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import outer_gradients
from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver, AbstractUnrollable
from bilevel._numerics.second_derivatives import explained
from bilevel._result import report
from bilevel._validate import demand_types
from bilevel.bounds.beforehand import Beforehand
from bilevel.bounds.bound import Bound
from bilevel.bounds.unrolled import itd, one_step, truncated_itd
from bilevel.hypergrad.unrolling.unroll import Unroll
from bilevel.inner_problems.kinds import inner_objective
from bilevel.requirements.properties import Property


@final
@dataclass(frozen=True)
class ITD(AbstractEstimator):
    """ITD: h = d/dx f(x, y_N(x)), y_N(x) the N-th iterate of the inner solver, differentiated step by step.

    For gradient descent, h = grad_x f - step sum_t G(y_t) prod_{s>t} (I - step H(y_s)) grad_y f(y_N), the inner
    start taken as constant unless the problem has an `init` (MAML), which is differentiated as well.

    Four forms of the same number: reverse mode; `checkpoint=True`, reverse mode that keeps only every sqrt(N)-th
    state, recomputes the others, and builds the graph of one step at a time; `forward=True`, tangents of the p outer
    variables carried along; and `truncate=K`, reverse mode through the last K steps only, which is another, biased
    number (K = 1 is the one-step or Jacobian-free gradient).

    Where the inner solver has a tolerance, its steps may be too few for the derivative although y is accurate: a
    warm start at the solution would take none. What they lack is measured, and above 1 % reported as
    `Status.truncated`; `Iterate(..., min_steps=)` prevents it.

    Cost for N steps: N + 1 gradients (the last for the residual that is reported; not with an `init` and no tolerance,
    where the residual is that before the last step) and one of f; reverse: N Hessian
    products (N - 1 if the start is constant and there is no tolerance) and N cross products, memory N times that of
    one gradient's graph; checkpointed: less than 2N gradients more, memory that of one graph and of 2 sqrt(N) states;
    forward: p products of each kind a step, memory p q; truncated: K - 1 and K, memory K.

    Error with gradient descent where f and g are quadratic, P = I - step H, d = y_N - y*, J = dy*/dx: exactly
    (d2f/dxdy) d + J'(d2f/dy2) d - J' P^N grad_y f(y_N); truncated to K: P^K in place of P^N in the last term, a
    bias that does not vanish as N grows.

    Source: Franceschi et al., "Forward and reverse gradient-based hyperparameter optimization", ICML 2017;
    Shaban et al., "Truncated back-propagation for bilevel optimization", AISTATS 2019; Bolte, Pauwels, Vaiter,
    "One-step differentiation of iterative algorithms", NeurIPS 2023.

    Args:
        inner: an iteration of differentiable steps: `Iterate(GradientDescent(...) | HeavyBall(...) | Adam(...))`.
        truncate: differentiate the last K steps only.
        forward: forward mode: for few outer variables.
        checkpoint: recompute instead of keeping every step.

    Raises:
        TypeError: if the inner solver cannot be unrolled.
        ValueError: if more than one of the three options is given, or `truncate` is less than 1.

    Example:
        >>> import torch
        >>> from bilevel import ITD, BilevelProblem, hypergradient
        >>> from bilevel.solvers import GradientDescent, Iterate
        >>> problem = BilevelProblem(lambda x, y: y.square().sum() / 2, lambda x, y: (y - x).square().sum() / 2)
        >>> itd = ITD(Iterate(GradientDescent(0.5), max_steps=2))
        >>> hypergradient(problem, torch.ones(1), torch.zeros(1), estimator=itd).grad  # 0.75 * 0.75
        tensor([0.5625])
    """

    inner: AbstractInnerSolver
    truncate: int | None = None
    forward: bool = False
    checkpoint: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.inner, AbstractUnrollable):
            raise TypeError(
                f"`ITD(inner=...)` must be an iteration of differentiable steps. Got {type(self.inner).__name__}."
                f" Use `Iterate(GradientDescent(step), max_steps=N)`, or `AID`, which works with any inner solver."
            )
        demand_types(self)
        if (self.truncate is not None) + self.forward + self.checkpoint > 1:
            raise ValueError("`ITD` takes at most one of `truncate`, `forward` and `checkpoint`.")
        if self.truncate is not None and self.truncate < 1:
            raise ValueError(f"`ITD(truncate=...)` must be at least 1. Got {self.truncate}.")

    @property
    def requires(self) -> frozenset[Property]:
        return frozenset({Property.steps, Property.second_derivatives})

    @property
    def takes_encoding(self) -> bool:
        return True

    def error_bound(self, about: Beforehand) -> Bound:
        step, steps = self.inner.as_gradient_descent("bounds.itd")
        known, d, b = about.constants, about.distance, about.outer_gradient_norm
        if self.truncate is None:
            return itd(known, step=step, steps=steps, distance=d, outer_gradient_norm=b)
        if self.truncate == 1 and steps:
            return one_step(known, step=step, steps=steps, distance=d, outer_gradient_norm=b)
        return truncated_itd(known, step=step, steps=steps, truncate=self.truncate, distance=d, outer_gradient_norm=b)

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        assert isinstance(self.inner, AbstractUnrollable)
        with torch.enable_grad(), explained():
            leaf = x.detach().requires_grad_()
            y0 = problem.start(leaf, start.y)
        unroll = Unroll(problem, self.inner.tuned(inner_objective(problem, x), y0.detach()), leaf, y0)
        if not (self.forward or self.checkpoint or self.truncate is not None or unroll.checked):
            y = unroll.whole()
            value, h = _outer_derivative(problem, leaf, y)
            return FlatEstimate(h, value, y.detach(), (report("inner solver", unroll.solved(y.detach())),))
        if self.forward:
            y, tangents = unroll.forward()
            value, fx, fy = outer_gradients(problem, x, y)
            implicit = (tangents * fy).flatten(1).sum(1)
        else:
            every = math.isqrt(max(unroll.inner.max_steps - 1, 0)) + 1 if self.checkpoint else None
            y, segments, from_start = unroll.segments(self.truncate, every)
            value, fx, fy = outer_gradients(problem, x, y)
            implicit = unroll.reverse(segments, from_start, fy)
        reports = (report("inner solver", unroll.solved(y)),)
        carried = unroll.carried() if self.truncate is None else None
        return FlatEstimate(fx + implicit, value, y, reports if carried is None else (*reports, carried))


def _outer_derivative(problem: FlatProblem, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """f(x, y) `()` and its derivative in the leaf x, on which y depends: one backward pass through all steps."""
    problem.tally.outer_gradients += y.shape[:-1].numel()
    with torch.enable_grad(), explained():
        value = problem.f(x, y)
        if not value.requires_grad:
            return value, torch.zeros_like(x)
        (h,) = torch.autograd.grad(value, x, allow_unused=True, materialize_grads=True)
    return value.detach(), h
