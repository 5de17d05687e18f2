"""Minimization under convex constraints: y*(x) = argmin_y {g(x, y) : c(x, y) <= 0, e(x, y) = 0, y in a polytope}."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._calculus import AbstractProducts, Linearization
from bilevel._flat import FlatProblem
from bilevel._inner import Objective, smooth_objective
from bilevel._linear import SYMMETRIC, OperatorProperties
from bilevel._numerics.misfits import called
from bilevel._result import Solved
from bilevel._tree import Structure, Tree, ravel
from bilevel.inner_problems.activity import Activity
from bilevel.inner_problems.kind import AbstractInnerProblem
from bilevel.inner_problems.lagrange import in_structures
from bilevel.inner_problems.margins import default_margin
from bilevel.inner_problems.nonlinear_constraints import FlatConstraints, demand_affine, split, tangent
from bilevel.inner_problems.optimality import Optimality
from bilevel.inner_problems.polytope import FlatPolytope, Polytope, padded, polytope_at
from bilevel.requirements.properties import DoesNotApply, Feature, Property


@final
@dataclass(frozen=True, eq=False)
class NonlinearlyConstrained(AbstractInnerProblem):
    """y*(x) = argmin_y {g(x, y) : c(x, y) <= 0, e(x, y) = 0, y in a polytope}; all of it may depend on x.

    c is convex in y, entry by entry, and e affine in y. With multipliers z >= 0 and nu, and L = g + z'c + nu'e,

        grad_y L = 0,  z c = 0,  e = 0.

    With C and E the gradients of the entries of c that hold with equality, and of e, the implicit gradient solves

        [[L_yy, C', E'], [C, 0, 0], [E, 0, 0]] (u, s) = (grad_y f, 0),

    which is symmetric and indefinite: `KKT` factors it, `MINRES`, `GMRES` and `Dense` solve with it. In vectors an
    entry of c is an equality with a slack, and the system is that of `LinearlyConstrained` with L_yy in the place of
    d2g/dy2. Only L_yy on the null space of C and E has to be positive definite.

    Valid where the gradients of what holds are independent (LICQ), multipliers of what holds are positive (strict
    complementarity), and L_yy is positive definite there (second-order sufficiency).

    Cost: beside that of `LinearlyConstrained` a backward pass for each entry of c and e, and one a product.

    Source: Fiacco, "Sensitivity analysis for nonlinear programming using penalty methods", Math. Programming 10 (1976).

    Args:
        objective_function: g, `g(x, y) -> scalar`, or `g(x, y, data)`; twice differentiable.
        inequalities: c, `c(x, y) -> tensors` of any structure, or `c(x, y, data)`; None: none.
        equalities: e, likewise.
        constraints: `constraints(x) -> Polytope`, or `constraints(x, data)`: linear constraints beside them.

    Raises:
        TypeError: if one of them cannot be called.
        ValueError: if there is neither an inequality nor an equality.

    Example:
        >>> from bilevel import BilevelProblem, hypergradient
        >>> ball = NonlinearlyConstrained(
        ...     lambda x, y: (y - x).square().sum(), lambda x, y: y.square().sum() - 1
        ... )
        >>> problem = BilevelProblem(lambda x, y: y[0], inner=ball)  # y* = x / |x|
        >>> hypergradient(
        ...     problem, torch.tensor([3.0, 4.0]).double(), torch.zeros(2).double()
        ... ).grad.round(decimals=6)
        tensor([ 0.1280, -0.0960], dtype=torch.float64)
    """

    objective_function: Callable[..., Tensor]
    inequalities: Callable[..., Tree] | None = None
    equalities: Callable[..., Tree] | None = None
    constraints: Callable[..., Polytope] | None = None

    def __post_init__(self) -> None:
        parts = (("objective_function", self.objective_function), *self._given.items())
        for name, function in parts:
            if not callable(function):
                raise TypeError(
                    f"`NonlinearlyConstrained({name}=...)` must be a function. Got {type(function).__name__}."
                )
        if self.inequalities is None and self.equalities is None:
            raise ValueError(
                "`NonlinearlyConstrained(inequalities=..., equalities=...)` needs one of them. Got neither."
                " Linear constraints alone are `LinearlyConstrained`."
            )

    @property
    def _given(self) -> dict[str, Callable[..., Any]]:
        parts = {"inequalities": self.inequalities, "equalities": self.equalities, "constraints": self.constraints}
        return {name: function for name, function in parts.items() if function is not None}

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
        return {n: (f, ("x",) if n == "constraints" else ("x", "y")) for n, f in self._given.items()}

    @property
    def features(self) -> frozenset[Feature]:
        linear = frozenset() if self.constraints is None else frozenset({Feature.constraints})
        return linear | {Feature.nonlinear_constraints}

    @property
    def operator(self) -> OperatorProperties:
        return SYMMETRIC

    @property
    def implicit(self) -> str:
        return "kkt"

    def polytope(self, problem: FlatProblem, x: Tensor) -> FlatPolytope | None:
        """The linear constraints on y at x, differentiable; None: there are none."""
        return None if self.constraints is None else polytope_at(problem, x, self.constraints)

    def nonlinear(
        self, problem: FlatProblem, x: Tensor, structures: dict[str, Structure] | None = None
    ) -> FlatConstraints:
        """The others at x, as functions of y; differentiable in both. `structures` takes those of their values."""
        seen: dict[str, Structure] = {} if structures is None else structures

        def flat(name: str, function: Callable[..., Tree] | None) -> Callable[[Tensor], Tensor]:
            if function is None:
                return lambda y: y.new_zeros(*y.shape[:-1], 0)

            def one(x: Tree, y: Tensor, *data: Any) -> Tensor:
                values = called(f"{name}(x, y, data)", function, x, problem.y.unravel(y), *data)
                vector, structure = ravel(values, f"{name}(x, y)")
                if structure.dtype != problem.y.dtype or structure.device != problem.y.device:
                    raise ValueError(
                        f"`{name}(x, y)` must be {problem.y.dtype} on {problem.y.device}, as y is. Got"
                        f" {structure.dtype} on {structure.device}. Convert it with `.to(...)`."
                    )
                seen[name] = structure
                return vector

            return lambda y: problem.map(one, "g", x, y)

        return FlatConstraints(flat("inequalities", self.inequalities), flat("equalities", self.equalities))

    def objective(self, problem: FlatProblem, x: Tensor, products: AbstractProducts | None) -> Objective:
        return smooth_objective(
            problem, x, products, constraints=self.polytope(problem, x), nonlinear=self.nonlinear(problem, x)
        )

    def linearize(
        self, problem: FlatProblem, x: Tensor, solved: Solved, smooth: Callable[[], Linearization], margin: float | None
    ) -> Linearization:
        at, y = smooth(), solved.value
        found: dict[str, Structure] = {}
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            nonlinear = self.nonlinear(problem, leaf, found)
            if self.equalities is not None:
                demand_affine(nonlinear, y)
            tangents = nonlinear.tangents(y)
            moving = tangent(self.polytope(problem, leaf), tangents)
        polytope = FlatPolytope(*(part.detach() for part in moving.tensors()))
        curved, in_x = at.products(y)
        whole = polytope.with_slacks(y)
        if in_x is None and not any(part.requires_grad for part in moving.tensors()) and problem.problem.init:
            raise DoesNotApply(
                "neither g nor the constraints depend on x, so y depends on x only through its start `init(x)`, which"
                " the optimality conditions do not see. Use `ESJ`."
            )
        activity = Activity.of(polytope, whole, padded(at.gradient, whole), padded(curved, whole), solved.multipliers)
        z, nu = split(tangents, activity.multipliers, whole.shape[-1] - y.shape[-1])
        bend = tangents.curvature(z, nu).mv
        report = activity.report(default_margin(y) if margin is None else margin)
        optimality = Optimality(y, at, leaf, moving, activity, bend)
        own = (z, found.get("inequalities")), (nu, found.get("equalities"))
        multipliers = in_structures(problem, x, optimality, self.constraints, own)
        return optimality.linearization((report,), multipliers)
