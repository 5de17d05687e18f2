"""Implicit differentiation of a constrained inner problem through its optimality conditions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import AbstractProducts, Exact, outer_gradients
from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver
from bilevel._numerics.saddle_point import SaddlePoint, alone, pseudo_inverse, restricted
from bilevel._result import Report, Status
from bilevel._validate import demand_types
from bilevel.inner_problems.objective import demand_heeded, inner_objective, refuse_iterative, report
from bilevel.inner_problems.polytope import FlatPolytope


@final
@dataclass(frozen=True)
class KKT(AbstractEstimator):
    """KKT: the hypergradient of y*(x) = argmin_y {g(x, y) : A y = b, lower <= y <= upper}.

    With F the entries that no bound holds, u = 0 off F, and [[H_FF, A_F'], [A_F, 0]] (u, s) = (grad_F f, 0):

        h = grad_x f - (d2g/dxdy) u - d/dx [nu'A u + s'(A y - b) + t'(y - bound)],

    nu the multipliers of the equalities, t = grad_y f - H u - A's on the held entries; the last bracket is zero where
    the constraints do not depend on x. Without constraints it is the dense implicit gradient.

    An entry is held where its multiplier exceeds its distance from the bound, both relative to the largest entries.
    Where neither exceeds `weak`, strict complementarity fails and y*(x) has a kink: `Status.weakly_active`. A reduced
    Hessian that is not positive definite on the null space of A_F is `Status.not_positive_definite`. The formula
    is that of the minimizer: after too few steps of the inner solver it is not valid, and the status is the solver's.

    Cost: the inner solver's, one gradient of f, q + 1 Hessian products, a factorization of q + m equations, one cross
    product. Memory q^2 a problem. Where A_F is rank deficient, as when all entries of a row are held, u is unique.

    Source: Fiacco, "Sensitivity analysis for nonlinear programming using penalty methods", Math. Programming 10
    (1976); for quadratics Amos, Kolter, "OptNet: differentiable optimization as a layer in neural networks", ICML 2017.

    Args:
        inner: finds y*(x); one that heeds constraints, such as `QuadraticProgram`.
        weak: the relative margin below which a bound counts as weakly active; None: 1e-10, or 1e-6 in float32.
        products: how second derivatives are formed.

    Raises:
        ValueError: if `weak` is negative; from `estimate`, if there are constraints that the inner solver ignores, or
            y depends on x only through its start (`init=`).

    Example:
        >>> from bilevel import KKT, BilevelProblem, Polytope, hypergradient
        >>> from bilevel.solvers import QuadraticProgram
        >>> problem = BilevelProblem(
        ...     lambda x, y: y[0],
        ...     lambda x, y: (y - x).square().sum() / 2,
        ...     constraints=lambda x: Polytope(A=torch.ones(1, 3), b=1.0, lower=0.0),
        ... )
        >>> x = torch.tensor([0.5, 0.3, -1.0])
        >>> hypergradient(problem, x, torch.zeros(3), estimator=KKT(QuadraticProgram())).grad
        tensor([ 0.5000, -0.5000,  0.0000])
    """

    inner: AbstractInnerSolver
    weak: float | None = None
    products: AbstractProducts = Exact()

    def __post_init__(self) -> None:
        demand_types(self)
        if self.weak is not None and not self.weak >= 0:
            raise ValueError(f"`KKT(weak=...)` must be at least 0. Got {self.weak}.")

    @property
    def takes_encoding(self) -> bool:
        return True

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        demand_heeded(problem, self.inner, "KKT")
        refuse_iterative(problem, "KKT")
        objective = inner_objective(problem, x, self.products)
        solved = self.inner.solve(objective, problem.start(x, start.y).detach())
        y = solved.value
        at = objective.linearization
        if at is None or at.y.data_ptr() != y.data_ptr():
            at = self.products.linearize(problem, x, y)
        value, fx, fy = outer_gradients(problem, x, y)

        polytope = _unbounded(y) if objective.constraints is None else objective.constraints
        H = at.operator.dense(y)
        H = (H + H.mT) / 2
        activity = Activity.of(polytope, y, at.gradient, _times(H, y), solved.multipliers)
        M, A_F = restricted(H, polytope.A, activity.free)
        system = SaddlePoint.factor(M, A_F, torch.diagonal(H, dim1=-2, dim2=-1).abs().amax(-1))
        u, s = system.solve(fy * activity.free, torch.zeros_like(polytope.b))
        u = u * (activity.free & ~alone(polytope.A, activity.free).any(-2))  # A_F u = 0: exactly 0 where it is alone
        left = fy - _times(H, u) - _times(polytope.A.mT, s)

        cross = at.cross(u)
        if cross is None and problem.problem.init is not None and not self._moving(problem, x):
            raise ValueError(
                "`KKT` does not apply: neither g nor the constraints depend on x, so y depends on x only through its"
                " start `init(x)`, which the optimality conditions do not see. Use `ESJ`."
            )
        h = fx if cross is None else fx - cross
        h = h - _through_constraints(problem, x, y, activity, u, s, left * ~activity.free)
        weak = (1e-10 if y.dtype == torch.float64 else 1e-6) if self.weak is None else self.weak
        definite = tuple(
            Status.successful if ok else Status.not_positive_definite for ok in system.definite.reshape(-1).tolist()
        )
        residual = float(torch.linalg.vector_norm(left * activity.free, dim=-1).max())
        batch = definite if y.dim() > 1 else ()
        reports = (
            report("inner solver", solved),
            activity.report(weak, y.dim() > 1),
            Report("optimality conditions", Status.worst(definite), residual, 1, batch),
        )
        return FlatEstimate(h, value, y, reports)

    @staticmethod
    def _moving(problem: FlatProblem, x: Tensor) -> bool:
        with torch.enable_grad():
            polytope = problem.polytope(x.detach().requires_grad_())
        return polytope is not None and any(part.requires_grad for part in polytope.tensors())


@final
@dataclass(frozen=True, eq=False)
class Activity:
    """Which bounds hold at y, and by how much.

    Attributes:
        free: the entries that no bound holds `(*batch, q)`.
        upper: of the others, those on their upper bound.
        multipliers: of the equalities `(*batch, m)`.
        margin: the least, over entries that are not fixed, of the greater of relative distance and relative
            multiplier: `(*batch,)`. Zero where strict complementarity fails.
    """

    free: Tensor
    upper: Tensor
    multipliers: Tensor
    margin: Tensor

    @staticmethod
    def of(polytope: FlatPolytope, y: Tensor, gradient: Tensor, curved: Tensor, multipliers: Tensor | None) -> Activity:
        """From the gradient of g at y, H y (whose size it has cancelled from), and the multipliers where known."""
        A, b, lower, upper = (part.expand(*y.shape[:-1], *part.shape[y.dim() - 1 :]) for part in polytope.tensors())
        finite = torch.stack([torch.where(bound.isfinite(), bound, y) for bound in (lower, upper)])
        primal = _positive(torch.maximum(finite.abs().amax(0), y.abs()).amax(-1, keepdim=True))
        near_lower, near = y - lower < upper - y, torch.minimum(y - lower, upper - y) / primal
        free = near > torch.finfo(y.dtype).eps ** 0.5
        if multipliers is None:
            multipliers = _fitted(A, gradient, free, torch.zeros_like(b))
        force = near
        for _ in range(2):
            pull = gradient + _times(A.mT, multipliers)
            terms = torch.stack([gradient, curved, _times(A.mT, multipliers)]).abs().amax(0)
            force = torch.where(near_lower, pull, -pull) / _positive(terms.amax(-1, keepdim=True))
            free = (near > force.clamp_min(0)) & ~polytope.fixed
            multipliers = _fitted(A, gradient, free, multipliers)
        margin = torch.where(polytope.fixed, torch.inf, torch.where(free, near, force)).amin(-1)
        return Activity(free, ~near_lower, multipliers, margin)

    def report(self, weak: float, batch: bool) -> Report:
        """Strict complementarity, in words; the residual is the least margin."""
        statuses = tuple(
            Status.nonfinite if margin != margin else Status.successful if margin > weak else Status.weakly_active
            for margin in self.margin.reshape(-1).tolist()
        )
        return Report("active bounds", Status.worst(statuses), float(self.margin.min()), 0, statuses if batch else ())


def _through_constraints(
    problem: FlatProblem, x: Tensor, y: Tensor, activity: Activity, u: Tensor, s: Tensor, t: Tensor
) -> Tensor:
    """D/dx [nu'A u + s'(A y - b) + t'(y - bound)]: zero where the constraints do not depend on x."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        polytope = problem.polytope(leaf)
        if polytope is None or not any(part.requires_grad for part in polytope.tensors()):
            return torch.zeros_like(x)
        A, b, lower, upper = polytope.tensors()
        bound = torch.where(activity.free, y, torch.where(activity.upper, upper, lower))
        total = (activity.multipliers * _times(A, u)).sum() + (s * (_times(A, y) - b)).sum() + (t * (y - bound)).sum()
        found: Tensor = torch.autograd.grad(total, leaf, allow_unused=True, materialize_grads=True)[0]
    return found


def _fitted(A: Tensor, gradient: Tensor, free: Tensor, near: Tensor) -> Tensor:
    """The multipliers nearest to given ones that minimize |grad_F g + A_F' nu|."""
    A_F = A * free.unsqueeze(-2)
    left = (gradient + _times(A.mT, near)) * free
    return near - _times(pseudo_inverse(A_F @ A_F.mT), _times(A_F, left))


def _unbounded(y: Tensor) -> FlatPolytope:
    none = torch.full_like(y, torch.inf)
    return FlatPolytope(y.new_zeros(*y.shape[:-1], 0, y.shape[-1]), y.new_zeros(*y.shape[:-1], 0), -none, none)


def _positive(sizes: Tensor) -> Tensor:
    return torch.where(sizes > 0, sizes, torch.ones_like(sizes))


def _times(A: Tensor, v: Tensor) -> Tensor:
    product: Tensor = (A @ v.unsqueeze(-1)).squeeze(-1)
    return product
