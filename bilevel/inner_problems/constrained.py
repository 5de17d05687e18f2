"""Minimization under linear constraints: y*(x) = argmin_y {g(x, y) : A y = b, G y <= h, lower <= y <= upper}."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._calculus import AbstractProducts, Linearization
from bilevel._flat import FlatProblem
from bilevel._inner import Objective, smooth_objective
from bilevel._linear import SYMMETRIC, LinearOperator, OperatorProperties, SaddleBlocks
from bilevel._numerics.misfits import called
from bilevel._numerics.rows import matrix_times
from bilevel._result import Solved
from bilevel._tree import Tree
from bilevel.inner_problems.activity import Activity
from bilevel.inner_problems.kind import AbstractInnerProblem
from bilevel.inner_problems.margins import default_margin
from bilevel.inner_problems.polytope import FlatPolytope, Polytope, padded
from bilevel.requirements.properties import DoesNotApply, Feature, Property


@final
@dataclass(frozen=True, eq=False)
class LinearlyConstrained(AbstractInnerProblem):
    """y*(x) = argmin_y {g(x, y) : A y = b, G y <= h, lower <= y <= upper}; all of it may depend on x.

    Inequalities are equalities with slacks, G y + s = h, s >= 0, which stand among the entries of y in what follows; g
    and f know nothing of them. F are the optimality conditions on the entries that no bound holds. With u = 0 on the
    others, the unknowns are (u, s) of q + m entries (k inequalities: q + m + 2 k), b = (grad_F f, 0), and

        (dF/dy)' = [[H_FF, A_F'], [A_F, 0]],  (dF/dx)'(u, s) = G u + d/dx [nu'A u + s'(A y - b) + t'(y - bound)],

    nu the multipliers of the equalities and t = grad_y f - H u - A's on the held entries. The matrix is symmetric and
    indefinite: `KKT` factors it, `MINRES`, `GMRES` and `Dense` solve with it. Where strict complementarity fails, y*(x)
    has a kink, which a report says (`Status.weakly_active`).

    Source: Fiacco, "Sensitivity analysis for nonlinear programming using penalty methods", Math. Programming 10 (1976).

    Args:
        objective_function: g, `g(x, y) -> scalar`, or `g(x, y, data)`; twice differentiable.
        constraints: `constraints(x) -> Polytope`, or `constraints(x, data)`.

    Example:
        >>> from bilevel import BilevelProblem, hypergradient
        >>> nearest = LinearlyConstrained(lambda x, y: (y - x).square().sum(), lambda x: Polytope(lower=0.0))
        >>> problem = BilevelProblem(lambda x, y: y.sum(), inner=nearest)
        >>> hypergradient(problem, torch.tensor([1.0, -1.0]), torch.zeros(2)).grad
        tensor([1., 0.])
    """

    objective_function: Callable[..., Tensor]
    constraints: Callable[..., Polytope]

    def __post_init__(self) -> None:
        for name, function in (("objective_function", self.objective_function), ("constraints", self.constraints)):
            if not callable(function):
                raise TypeError(f"`LinearlyConstrained({name}=...)` must be a function. Got {type(function).__name__}.")

    @property
    def offers(self) -> frozenset[Property]:
        return frozenset({Property.stationary, Property.minimum})

    @property
    def refusal(self) -> str:
        return (
            "y is constrained, so that grad_y g(x, y*) need not be zero. Use `KKT`, which differentiates the optimality"
            " conditions with the constraints, or `ESJ` or `FiniteDifference`."
        )

    @property
    def g(self) -> Callable[..., Tensor]:
        return self.objective_function

    @property
    def functions(self) -> Mapping[str, tuple[Callable[..., Any], tuple[str, ...]]]:
        return {"constraints": (self.constraints, ("x",))}

    @property
    def features(self) -> frozenset[Feature]:
        return frozenset({Feature.constraints})

    @property
    def operator(self) -> OperatorProperties:
        return SYMMETRIC

    @property
    def implicit(self) -> str:
        return "kkt"

    def polytope(self, problem: FlatProblem, x: Tensor) -> FlatPolytope:
        """The constraints on y at x, one row for each problem of the batch; differentiable."""

        def flat(x: Tree, *data: Any) -> Any:
            polytope = called("constraints(x, data)", self.constraints, x, *data)
            return polytope.flat(problem.y).tensors()

        return FlatPolytope(*problem.map(flat, "g", x))

    def objective(self, problem: FlatProblem, x: Tensor, products: AbstractProducts | None) -> Objective:
        return smooth_objective(problem, x, products, constraints=self.polytope(problem, x))

    def linearize(
        self, problem: FlatProblem, x: Tensor, solved: Solved, smooth: Callable[[], Linearization], margin: float | None
    ) -> Linearization:
        at, y = smooth(), solved.value
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            moving = self.polytope(problem, leaf)
        moves = any(part.requires_grad for part in moving.tensors())
        polytope = FlatPolytope(*(part.detach() for part in moving.tensors()))
        curved, in_x = at.products(y)
        y, gradient = polytope.with_slacks(y), at.gradient  # what follows is of (y, s), of whose s g knows nothing
        gradient, curved = padded(gradient, y), padded(curved, y)
        if in_x is None and not moves and problem.problem.init is not None:
            raise DoesNotApply(
                "neither g nor the constraints depend on x, so y depends on x only through its start `init(x)`, which"
                " the optimality conditions do not see. Use `ESJ`."
            )
        activity = Activity.of(polytope, y, gradient, curved, solved.multipliers)
        free = activity.free
        A = polytope.A.expand(*y.shape[:-1], *polytope.A.shape[-2:])
        A_F, (m, n), q = A * free.unsqueeze(-2), A.shape[-2:], solved.value.shape[-1]
        seen: list[tuple[Tensor, int, Tensor]] = []  # the latest (u, s), and H u there

        def inside(u: Tensor, hu: Tensor) -> Tensor:
            return torch.where(free, hu, u)  # the identity where a bound holds

        def products(v: Tensor) -> tuple[Tensor, Tensor | None]:
            u, s = torch.where(free, v[..., :n], 0.0), v[..., n:]
            hu, gu = at.products(u[..., :q])
            hu = padded(hu, u)
            seen[:] = [(v, v._version, hu)]
            top = inside(v[..., :n], hu) + matrix_times(A_F.mT, s)
            return torch.cat([top, matrix_times(A_F, u)], dim=-1), gu

        def leading(u: Tensor) -> Tensor:
            return inside(u, padded(at.operator.mv(torch.where(free, u, 0.0)[..., :q]), u))

        def mv(v: Tensor) -> Tensor:
            top = leading(v[..., :n]) + matrix_times(A_F.mT, v[..., n:])
            return torch.cat([top, matrix_times(A_F, v[..., :n])], dim=-1)

        def pull(v: Tensor) -> Tensor | None:
            return at.cross(torch.where(free, v[..., :n], 0.0)[..., :q])

        def moved(v: Tensor, fy: Tensor) -> Tensor:
            if not moves:
                return torch.zeros_like(x)
            u, s = torch.where(free, v[..., :n], 0.0), v[..., n:]
            known = bool(seen) and seen[0][0] is v and seen[0][1] == v._version
            hu = seen[0][2] if known else padded(at.operator.mv(u[..., :q]), u)
            t = (padded(fy, u) - hu - matrix_times(A.mT, s)) * ~free
            A_x, b, lower, upper = moving.tensors()
            bound = torch.where(free, y, torch.where(activity.upper, upper, lower))
            total = (activity.multipliers * matrix_times(A_x, u)).sum() + (s * (matrix_times(A_x, y) - b)).sum()
            total = total + (t * (y - bound)).sum()
            found: Tensor = torch.autograd.grad(
                total, leaf, retain_graph=True, allow_unused=True, materialize_grads=True
            )[0]
            return found

        def right_hand_side(fy: Tensor) -> Tensor:
            return torch.cat([padded(fy, y) * free, fy.new_zeros(*fy.shape[:-1], m)], dim=-1)

        blocks = SaddleBlocks(LinearOperator(leading, n), A_F, free)
        return Linearization(
            solved.value,
            at.gradient,
            mv,
            products,
            pull,
            operator=LinearOperator(mv, n + m, blocks=blocks),
            right_hand_side=right_hand_side,
            moved=moved,
            reports=(activity.report(default_margin(y) if margin is None else margin),),
        )
