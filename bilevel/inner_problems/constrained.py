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
from bilevel._linear import SYMMETRIC, OperatorProperties
from bilevel._result import Solved
from bilevel.inner_problems.activity import Activity
from bilevel.inner_problems.kind import AbstractInnerProblem
from bilevel.inner_problems.lagrange import in_structures
from bilevel.inner_problems.margins import default_margin
from bilevel.inner_problems.optimality import Optimality
from bilevel.inner_problems.polytope import FlatPolytope, Polytope, padded, polytope_at
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
        >>> nearest = LinearlyConstrained(
        ...     lambda x, y: (y - x).square().sum(), lambda x: Polytope(lower=0.0)
        ... )
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
        return polytope_at(problem, x, self.constraints)

    def linear_constraints(self, problem: FlatProblem, x: Tensor) -> FlatPolytope:
        return self.polytope(problem, x)

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
        y = polytope.with_slacks(y)  # g knows nothing of slacks
        if in_x is None and not moves and problem.problem.init is not None:
            raise DoesNotApply(
                "neither g nor the constraints depend on x, so y depends on x only through its start `init(x)`, which"
                " the optimality conditions do not see. Use `ESJ`."
            )
        activity = Activity.of(polytope, y, padded(at.gradient, y), padded(curved, y), solved.multipliers)
        report = activity.report(default_margin(y) if margin is None else margin)
        optimality = Optimality(solved.value, at, leaf, moving, activity)
        return optimality.linearization((report,), in_structures(problem, x, optimality, self.constraints))
