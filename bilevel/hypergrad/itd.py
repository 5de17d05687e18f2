"""Iterative differentiation: through the steps of the inner solver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import Exact, Linearization
from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver, AbstractUnrollable
from bilevel._numerics.second_derivatives import explained
from bilevel._result import Report, Solved, Status, report
from bilevel._validate import demand_type, demand_types
from bilevel.bounds.beforehand import Beforehand
from bilevel.bounds.bound import Bound
from bilevel.bounds.unrolled import itd, one_step, truncated_itd
from bilevel.hypergrad.unrolling.checkpointed import Checkpointed
from bilevel.hypergrad.unrolling.ending import carried, solved
from bilevel.hypergrad.unrolling.form import AbstractUnrolling, Unrolled
from bilevel.hypergrad.unrolling.forward import Forward
from bilevel.hypergrad.unrolling.reverse import Reverse
from bilevel.hypergrad.unrolling.truncated import Truncated
from bilevel.hypergrad.unrolling.walk import Walk
from bilevel.inner_problems.kinds import inner_problem
from bilevel.requirements.properties import Property
from bilevel.solvers._on_the_way import is_time_to_give_up, lost_its_way


@final
@dataclass(frozen=True, init=False)
class ITD(AbstractEstimator):
    """ITD: h = d/dx f(x, y_N(x)), y_N(x) the N-th iterate of the inner solver, differentiated step by step.

    For gradient descent, h = grad_x f - step sum_t G(y_t) prod_{s>t} (I - step H(y_s)) grad_y f(y_N), the inner
    start taken as constant unless the problem has an `init` (MAML), which is differentiated as well.

    Three forms of unrolling give the same number: `Reverse()`; `Checkpointed()`, reverse mode that keeps only every
    sqrt(N)-th state, recomputes the others, and builds the graph of one step at a time; `Forward()`, tangents of the p
    outer variables carried along. `Truncated(K)`, reverse mode through the last K steps only, gives another, biased
    number (K = 1 is the one-step or Jacobian-free gradient). Each has its cost in its own documentation.

    Where the inner solver has a tolerance, and y a condition to solve, the derivative is to be that of y*(x). It may be
    another although y is accurate: a warm start at the solution would take no step, and a step of 1 / L that leads
    straight to y* has taken G and H where it began. Its distance from the implicit gradient at y_N is measured, and
    above 1e-4 (1e-2 in float32 or where the tolerance leaves as much of an error in y) reported as
    `Status.truncated`. With a `min_steps` of at least 1, such as the names have, it is prevented instead: the steps
    start again from y_N, twice as many, until the derivative is right or `max_steps` are taken. Nothing of it is asked
    where there is no tolerance or an `init`: the steps are then what is to be differentiated.

    Settings of the steps may be functions of x (`GradientDescent(step=lambda x: x["log_step"].exp())`): learned ones.
    They are differentiated as part of the steps, and y is then what the steps make of a start.

    Where a step length that was left open fails (it is 1 / L at the start), the steps are taken again with one that
    suits the curvature all along the way.

    Cost for N steps: N + 1 gradients (the last for the residual that is reported; not with an `init` and no tolerance,
    where the residual is that before the last step), one of f, and what the form takes; with a tolerance one gradient,
    one Hessian product and one cross product more, in forward mode p of each product.

    Error with gradient descent where f and g are quadratic, P = I - step H, d = y_N - y*, J = dy*/dx: exactly
    (d2f/dxdy) d + J'(d2f/dy2) d - J' P^N grad_y f(y_N); truncated to K: P^K in place of P^N in the last term, a
    bias that does not vanish as N grows.

    Source: Franceschi et al., "Forward and reverse gradient-based hyperparameter optimization", ICML 2017.

    Args:
        inner: an iteration of differentiable steps: `Iterate(GradientDescent(...) | HeavyBall(...) | Adam(...))`.
        unrolling: the form: `Reverse()`, `Truncated(K)`, `Checkpointed()` or `Forward()`.
        truncate: the old way to write `unrolling=Truncated(truncate)`; kept for a release.
        forward: the old way to write `unrolling=Forward()`.
        checkpoint: the old way to write `unrolling=Checkpointed()`.

    Raises:
        TypeError: if the inner solver cannot be unrolled.
        ValueError: if more than one form is given, or `truncate` is less than 1.

    Example:
        >>> from bilevel import ITD, BilevelProblem, hypergradient
        >>> from bilevel.solvers import GradientDescent, Iterate
        >>> problem = BilevelProblem(
        ...     lambda x, y: y.square().sum() / 2, lambda x, y: (y - x).square().sum() / 2
        ... )
        >>> itd = ITD(Iterate(GradientDescent(0.5), max_steps=2), unrolling=Checkpointed())
        >>> hypergradient(problem, torch.ones(1), torch.zeros(1), estimator=itd).grad  # 0.75 * 0.75
        tensor([0.5625])
    """

    inner: AbstractInnerSolver
    unrolling: AbstractUnrolling

    def __init__(
        self,
        inner: AbstractInnerSolver,
        unrolling: AbstractUnrolling = Reverse(),
        *,
        truncate: int | None = None,
        forward: bool = False,
        checkpoint: bool = False,
    ) -> None:
        object.__setattr__(self, "inner", inner)
        object.__setattr__(self, "unrolling", unrolling)
        if not isinstance(inner, AbstractUnrollable):
            raise TypeError(
                f"`ITD(inner=...)` must be an iteration of differentiable steps. Got {type(inner).__name__}."
                f" Use `Iterate(GradientDescent(step), max_steps=N)`, or `AID`, which works with any inner solver."
            )
        demand_types(self)
        given = _old_form(truncate, forward, checkpoint)
        if given is not None and unrolling != Reverse():
            raise ValueError(
                f"`ITD` takes at most one of `unrolling`, `truncate`, `forward` and `checkpoint`. Got {unrolling!r} and"
                f" the keyword for {given!r}. Leave the keyword out."
            )
        if given is not None:
            object.__setattr__(self, "unrolling", given)

    @property
    def forgets_start(self) -> bool:
        assert isinstance(self.inner, AbstractUnrollable)
        return self.inner.forgets_start and self.inner.min_steps > 0  # the derivative needs steps of its own

    @property
    def requires(self) -> frozenset[Property]:
        return frozenset({Property.steps, Property.second_derivatives, Property.outer_gradient})

    @property
    def takes_encoding(self) -> bool:
        return True

    @property
    def accurate(self) -> bool:
        return self.forgets_start and not isinstance(self.unrolling, Truncated)

    def error_bound(self, about: Beforehand) -> Bound:
        step, steps = self.inner.as_gradient_descent("bounds.itd")
        known, d, b = about.constants, about.distance, about.outer_gradient_norm
        if not isinstance(self.unrolling, Truncated):
            return itd(known, step=step, steps=steps, distance=d, outer_gradient_norm=b)
        last = self.unrolling.steps
        if last == 1 and steps:
            return one_step(known, step=step, steps=steps, distance=d, outer_gradient_norm=b)
        return truncated_itd(known, step=step, steps=steps, truncate=last, distance=d, outer_gradient_norm=b)

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        assert isinstance(self.inner, AbstractUnrollable)
        fixed_x, leaf = x.detach(), x.detach().requires_grad_()
        kind = inner_problem(problem.problem)
        objective, fixed = kind.objective(problem, leaf, None), kind.objective(problem, fixed_x, None)

        def linearized(y: Tensor) -> Linearization:
            at = Solved(y, (Status.successful,), torch.zeros(()), 0)
            return kind.linearize(problem, fixed_x, at, lambda: Exact().linearize(problem, fixed_x, y), None)

        def begun() -> Tensor:
            with torch.enable_grad(), explained():
                return problem.start(leaf, start.y)

        def walked(inner: AbstractUnrollable, y0: Tensor, least: int | None = None, gives_up: bool = False) -> _Walked:
            to_converge = bool(inner.tol) and Property.stationary in kind.offers and not inner.why_iteration
            walk = Walk(problem, inner, objective, fixed, leaf, y0, to_converge, linearized, least, gives_up)
            unrolled = self.unrolling.differentiate(walk)
            verdict = solved(walk, unrolled.end)
            return _Walked(unrolled, verdict, walk.norms, carried(walk, unrolled, verdict.status.ok))

        y0 = begun()
        inner = self.inner.tuned(fixed, y0.detach())
        found = walked(inner, y0, gives_up=inner is not self.inner)
        if inner is not self.inner and any(lost_its_way(status, found.norms) for status in found.verdict.statuses):
            safer = self.inner.tuned_on_the_way(fixed, y0.detach())
            if safer is not None or is_time_to_give_up(found.norms):
                inner = inner if safer is None else safer
                found = walked(inner, begun())
        while inner.min_steps and found.lacks and found.verdict.steps < inner.max_steps:
            least = min(2 * max(found.verdict.steps, 1), inner.max_steps)
            found = walked(inner, found.unrolled.end[0], least)
        reports = report("inner solver", found.verdict), found.derivative
        unrolled, made = found.unrolled, tuple(each for each in reports if each is not None)
        return FlatEstimate(unrolled.grad, unrolled.value, unrolled.end[0], made)


@final
@dataclass(frozen=True, eq=False)
class _Walked:
    """A walk along the steps: its derivative, the verdict on y_N, the residuals on its way, that on the derivative."""

    unrolled: Unrolled
    verdict: Solved
    norms: list[Tensor]
    derivative: Report | None

    @property
    def lacks(self) -> bool:
        """Whether y is accurate, and its derivative is not."""
        return self.derivative is not None and self.derivative.status is Status.truncated


def _old_form(truncate: int | None, forward: bool, checkpoint: bool) -> AbstractUnrolling | None:
    """The form that the keywords name; None: none of them was given."""
    demand_type("ITD", "truncate", truncate, int | None)
    demand_type("ITD", "forward", forward, bool)
    demand_type("ITD", "checkpoint", checkpoint, bool)
    if (truncate is not None) + forward + checkpoint > 1:
        raise ValueError("`ITD` takes at most one of `truncate`, `forward` and `checkpoint`.")
    if truncate is not None and truncate < 1:
        raise ValueError(f"`ITD(truncate=...)` must be at least 1. Got {truncate}.")
    if truncate is not None:
        return Truncated(truncate)
    return Forward() if forward else Checkpointed() if checkpoint else None
