"""Implicit differentiation of a constrained inner problem through its optimality conditions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from bilevel._calculus import AbstractProducts, Exact
from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver
from bilevel._linear import AbstractLinearSolver
from bilevel._validate import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, demand_ranges
from bilevel.hypergrad.aid import AID
from bilevel.requirements.properties import Property
from bilevel.solvers.saddle_cholesky import SaddleCholesky


@final
@dataclass(frozen=True)
class KKT(AbstractEstimator):
    """KKT: the hypergradient of y*(x) = argmin_y {g(x, y) : A y = b, G y <= h, lower <= y <= upper}.

    Inequalities count as equalities with slacks s = h - G y >= 0, which are entries of y. With F those that no bound
    holds, u = 0 off F, and [[H_FF, A_F'], [A_F, 0]] (u, s) = (grad_F f, 0):

        h = grad_x f - (d2g/dxdy) u - d/dx [nu'A u + s'(A y - b) + t'(y - bound)],

    nu the multipliers of the equalities, t = grad_y f - H u - A's on the held entries; the last bracket is zero where
    the constraints do not depend on x. Without constraints it is the dense implicit gradient.

    An entry is held where its multiplier exceeds its distance from the bound, both relative to the largest entries.
    Where neither exceeds `weak`, strict complementarity fails and y*(x) has a kink: `Status.weakly_active`. A reduced
    Hessian that is not positive definite on the null space of A_F is `Status.not_positive_definite`. The formula
    is that of the minimizer: after too few steps of the inner solver it is not valid, and the status is the solver's.

    This is `AID` with a linear solver for such systems: `AID(inner, SaddleCholesky(), margin=weak)`.

    Cost: the inner solver's, one gradient of f, q + 2 Hessian products, a factorization of q + m equations, two cross
    products. Memory q^2 a problem. Where A_F is rank deficient, as when all entries of a row are held, u is unique.

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
        >>> import torch
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
        demand_ranges(self, weak=AT_LEAST_0)

    @property
    def implicit(self) -> AID:
        """The same as an `AID`."""
        return AID(self.inner, SaddleCholesky(), products=self.products, margin=self.weak)

    @property
    def forgets_start(self) -> bool:
        return self.inner.forgets_start

    @property
    def requires(self) -> frozenset[Property]:
        return self.implicit.requires

    @property
    def solves_with(self) -> tuple[AbstractLinearSolver, ...]:
        return (SaddleCholesky(),)

    @property
    def takes_encoding(self) -> bool:
        return True

    @property
    def accurate(self) -> bool:
        return self.implicit.accurate

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        return self.implicit.estimate(problem, x, start)
