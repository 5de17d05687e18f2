"""Minimization under many constraints on many y, all of them known by products alone."""

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
from bilevel._numerics.rows import matrix_times
from bilevel._result import Solved
from bilevel._tree import Structure, Tree, ravel
from bilevel.inner_problems.by_products import ByProducts
from bilevel.inner_problems.kind import AbstractInnerProblem
from bilevel.inner_problems.margins import default_margin
from bilevel.inner_problems.multipliers import Multipliers
from bilevel.inner_problems.nonlinear_constraints import FlatConstraints, demand_affine
from bilevel.inner_problems.polytope import FlatPolytope, Polytope
from bilevel.requirements.properties import DoesNotApply, Feature, Property


@final
@dataclass(frozen=True, eq=False)
class ManyConstraints(AbstractInnerProblem):
    """y*(x) = argmin_y {g(x, y) : c(x, y) <= 0, e(x, y) = 0, y in a polytope} where no matrix of gradients is formed.

    The problem and its derivative are those of `NonlinearlyConstrained`; the difference is in what is held. With C and
    E the gradients of c and e, products C u, E u, C's and E's are backward passes through c and e, so that memory is
    that of c, e and g, whatever their number is: a sparse matrix in `inequalities=lambda x, y: G @ y - h(x)`, or
    differences of neighbors, `y[1:] - y[:-1] - x`. On what holds, with L = g + z'c + nu'e,

        [[L_yy, C', E'], [C, 0, 0], [E, 0, 0]] (u, s) = (grad_y f, 0)

    is symmetric and indefinite, of as many unknowns as there are entries of y, c and e. Two ways lead through it, and
    `"kkt"` takes the one that applies:

    - constraints as functions: `AID(ProximalMultipliers(), MINRES())`, products alone; tasks are solved side by side;
    - all constraints as rows of a `Polytope`, of which some are sparse tensors: `AID(SparseInteriorPoint(),
      SparseSaddle())`, with factors of the sparse rows by scipy. Where constraints join entries in chains this is by
      far the faster one.

    Valid where multipliers of what holds are positive ("active bounds"), the constraints that hold do not move apart
    with x ("independence of active constraints": the part of a motion of them that no y can follow), and L_yy is
    positive definite along them, which is measured up to 2,000 entries of y.

    Source: Fiacco, "Sensitivity analysis for nonlinear programming using penalty methods", Math. Programming 10 (1976).

    Args:
        objective_function: g, `g(x, y) -> scalar`, or `g(x, y, data)`; twice differentiable.
        inequalities: c, `c(x, y) -> tensors` of any structure, or `c(x, y, data)`, convex in y; None: none.
        equalities: e, likewise, affine in y.
        constraints: `constraints(x) -> Polytope`, or `constraints(x, data)`: bounds, and rows, where there are many as
            sparse tensors, whose entries may depend on x. These are for one problem, without tasks.

    Raises:
        TypeError: if one of them cannot be called.
        ValueError: if there is no constraint at all.

    Example:
        >>> from bilevel import BilevelProblem, hypergradient
        >>> rising = ManyConstraints(
        ...     lambda x, y: (y - x).square().sum() / 2, lambda x, y: y[:-1] - y[1:]
        ... )
        >>> problem = BilevelProblem(lambda x, y: y[0], inner=rising)  # the mean of what would fall
        >>> hypergradient(
        ...     problem, torch.tensor([3.0, 1.0, 5.0]).double(), torch.zeros(3).double()
        ... ).grad
        tensor([0.5000, 0.5000, 0.0000], dtype=torch.float64)
    """

    objective_function: Callable[..., Tensor]
    inequalities: Callable[..., Tree] | None = None
    equalities: Callable[..., Tree] | None = None
    constraints: Callable[..., Polytope] | None = None

    def __post_init__(self) -> None:
        for name, function in (("objective_function", self.objective_function), *self._given.items()):
            if not callable(function):
                raise TypeError(f"`ManyConstraints({name}=...)` must be a function. Got {type(function).__name__}.")
        if not self._given:
            raise ValueError(
                "`ManyConstraints(inequalities=..., equalities=..., constraints=...)` needs one of them. Got none."
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
            "y is constrained, so that grad_y g(x, y*) need not be zero, and the constraints are known by products"
            " only. Use 'kkt', which stands for `AID(ProximalMultipliers(), MINRES())` or, with sparse rows,"
            " `AID(SparseInteriorPoint(), SparseSaddle())`, or `ESJ` or `FiniteDifference`."
        )

    @property
    def g(self) -> Callable[..., Tensor]:
        return self.objective_function

    @property
    def functions(self) -> Mapping[str, tuple[Callable[..., Any], tuple[str, ...]]]:
        return {n: (f, ("x",) if n == "constraints" else ("x", "y")) for n, f in self._given.items()}

    @property
    def features(self) -> frozenset[Feature]:
        return frozenset({Feature.many_constraints})

    @property
    def operator(self) -> OperatorProperties:
        return SYMMETRIC

    @property
    def implicit(self) -> str:
        return "kkt"

    def parts(
        self, problem: FlatProblem, x: Tensor, structures: dict[str, Structure] | None = None
    ) -> tuple[FlatConstraints, FlatPolytope, tuple[int, int]]:
        """All rows at x as functions of y, those of the polytope first; its bounds; how many rows it has of A and G."""
        given = self.constraints

        def polytope(x: Tree, *data: Any) -> Polytope:
            return Polytope() if given is None else called("constraints(x, data)", given, x, *data)

        seen: dict[str, Structure] = {} if structures is None else structures
        c = self._flat(problem, x, "inequalities", self.inequalities, seen)
        e = self._flat(problem, x, "equalities", self.equalities, seen)
        alone = _alone(problem, x, polytope)
        if alone is not None and alone.is_sparse:
            S, b, lower, upper, G, h = alone.sparse_parts(problem.y)
            own = self.inequalities is None and self.equalities is None
            rows = FlatConstraints(
                lambda y: torch.cat([G.times(y) - h, c(y)], -1),
                lambda y: torch.cat([S.times(y) - b, e(y)], -1),
                (G, S) if own else None,
            )
            return rows, _bounds(lower, upper), (S.shape[0], G.shape[0])
        if alone is None:
            parts = problem.map(lambda x, *data: polytope(x, *data).parts(problem.y), "g", x)  # type: ignore[arg-type]
        else:
            parts = alone.parts(problem.y)  # type: ignore[assignment]
        A, b, lower, upper, F, h = parts

        def stacked(rows: Tensor, side: Tensor, own: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda y: torch.cat([matrix_times(rows, y) - side, own(y)], -1) if rows.shape[-2] else own(y)

        rows = FlatConstraints(stacked(F, h, c), stacked(A, b, e))
        return rows, _bounds(lower, upper), (A.shape[-2], F.shape[-2])

    def _flat(
        self,
        problem: FlatProblem,
        x: Tensor,
        name: str,
        function: Callable[..., Tree] | None,
        seen: dict[str, Structure],
    ) -> Callable[[Tensor], Tensor]:
        if function is None:
            return lambda y: y[..., :0]

        def one(x: Tree, y: Tensor, *data: Any) -> Tensor:
            values = called(f"{name}(x, y, data)", function, x, problem.y.unravel(y), *data)
            vector, structure = ravel(values, f"{name}(x, y)")
            if structure.dtype != problem.y.dtype or structure.device != problem.y.device:
                raise ValueError(
                    f"`{name}(x, y)` must be {problem.y.dtype} on {problem.y.device}, as y is. Got {structure.dtype} on"
                    f" {structure.device}. Convert it with `.to(...)`."
                )
            seen[name] = structure
            return vector

        return lambda y: problem.map(one, "g", x, y)

    def objective(self, problem: FlatProblem, x: Tensor, products: AbstractProducts | None) -> Objective:
        rows, bounds, _ = self.parts(problem, x)
        return smooth_objective(problem, x, products, constraints=bounds, nonlinear=rows)

    def linearize(
        self, problem: FlatProblem, x: Tensor, solved: Solved, smooth: Callable[[], Linearization], margin: float | None
    ) -> Linearization:
        at, y = smooth(), solved.value
        found: dict[str, Structure] = {}
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            rows, bounds, counts = self.parts(problem, leaf, found)
        if self.equalities is not None:
            demand_affine(rows, y)
        curved, in_x = at.products(y)
        system = ByProducts.at_solution(at, rows, bounds, leaf, y, curved, solved.multipliers)
        if in_x is None and not system.moves and problem.problem.init is not None:
            raise DoesNotApply(
                "neither g nor the constraints depend on x, so y depends on x only through its start `init(x)`, which"
                " the optimality conditions do not see. Use `ESJ`."
            )
        report = system.report(default_margin(y) if margin is None else margin)
        return system.linearization((report,), self._multipliers(problem, system, found, counts))

    def _multipliers(
        self, problem: FlatProblem, system: ByProducts, structures: dict[str, Structure], counts: tuple[int, int]
    ) -> Multipliers:
        """In the structures of the constraints."""
        z, nu = system.z, system.nu
        m, k = counts
        c, e = structures.get("inequalities"), structures.get("equalities")
        below, above = system.pushes
        bounds = system.bounds
        return Multipliers(
            inequalities=None if c is None else c.unravel(z[..., k:]),
            equalities=None if e is None else e.unravel(nu[..., m:]),
            linear_inequalities=z[..., :k] if k else None,
            linear_equalities=nu[..., :m] if m else None,
            lower=problem.y.unravel(below) if bool(bounds.lower.isfinite().any()) else None,
            upper=problem.y.unravel(above) if bool(bounds.upper.isfinite().any()) else None,
        )


def _alone(problem: FlatProblem, x: Tensor, polytope: Callable[..., Polytope]) -> Polytope | None:
    """The polytope of one problem at one x, whose rows may be sparse; None: there are several."""
    if problem.tasks is not None or x.dim() > 1:
        return None
    found: Any = problem.map(polytope, "g", x)  # type: ignore[arg-type]
    assert isinstance(found, Polytope)
    return found


def _bounds(lower: Tensor, upper: Tensor) -> FlatPolytope:
    """Bounds alone."""
    return FlatPolytope(lower.new_zeros(*lower.shape[:-1], 0, lower.shape[-1]), lower[..., :0], lower, upper)
