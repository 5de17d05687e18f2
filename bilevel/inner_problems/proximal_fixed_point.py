"""The same composite minimization, differentiated as the fixed point of proximal gradient steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._calculus import AbstractProducts, Linearization
from bilevel._flat import FlatProblem
from bilevel._inner import Objective
from bilevel._linear import TRANSPOSED, OperatorProperties
from bilevel._result import Solved
from bilevel.arguments.fits import demand_type
from bilevel.arguments.ranges import POSITIVE, demand_range
from bilevel.inner_problems.composite import Composite
from bilevel.inner_problems.flat_term import FlatTerm
from bilevel.inner_problems.kind import AbstractInnerProblem
from bilevel.inner_problems.stationary_point import StationaryPoint, contracting
from bilevel.prox.term import AbstractProxTerm
from bilevel.requirements.properties import Feature, Property


@final
@dataclass(frozen=True, eq=False)
class ProximalFixedPoint(AbstractInnerProblem):
    """y*(x) = T(x, y*(x)), T(x, y) = prox_{t h_x}(y - t grad_y g(x, y)): `Composite`, differentiated through T.

    With P the derivative of the map, by one backward pass through it, and H = d2g/dy2, the system of u = t P w is

        (I - P (I - t H)) u = t P grad_y f,  h = grad_x f - G u + (d prox / dx)' w,  w = grad_y f + u / t - H u,

    w the adjoint of the fixed point, (I - (dT/dy)') w = grad_y f. The operator is not symmetric, and is declared so:
    `GMRES`, `BiCGStab`, `NormalCG` and `Dense` solve with it, conjugate gradients are refused. Its spectrum is 1 less
    that of dT/dy, whose spectral radius is estimated and reported; `Neumann(step=1.0, ...)` is the series of its
    powers, and converges where that is below 1, as for t < 2 / L and y* locally unique; elsewhere `Neumann` ends with
    `Status.expanding` at once. The gradient is that of `Composite`, whatever t.

    It is what a term without a derivative in closed form gets, and otherwise mainly good for comparison: a product
    takes a backward pass through the map, and the system is not symmetric.

    Cost: beside that of the linear solver 16 products for the spectral radius, and some 14 for the step if it is None.

    Source: Blondel et al., "Efficient and modular implicit differentiation", NeurIPS 2022, section 2.3.

    Args:
        objective_function: g, `g(x, y) -> scalar`, or `g(x, y, data)`; twice differentiable.
        prox: `prox(x) -> term`, or `prox(x, data)`.
        step: t; None: 1 / L, L the largest curvature of g at y*.

    Raises:
        TypeError: if a function cannot be called, or the step is no number.
        ValueError: if the step is not positive and finite.

    Example:
        >>> from bilevel import AID, BilevelProblem, hypergradient
        >>> from bilevel.prox import L1
        >>> from bilevel.solvers import GMRES, ProximalGradient
        >>> a = torch.tensor([3.0, 0.5])
        >>> lasso = ProximalFixedPoint(
        ...     lambda x, y: (y - a).square().sum() / 2, lambda x: L1(x), step=0.5
        ... )
        >>> problem = BilevelProblem(
        ...     lambda x, y: y.square().sum() / 2, inner=lasso
        ... )  # y* = (3 - x, 0) at x = 1
        >>> aid = AID(ProximalGradient(step=1.0), GMRES())
        >>> hypergradient(problem, torch.tensor(1.0), torch.zeros(2), estimator=aid).grad
        tensor(-2.)
    """

    objective_function: Callable[..., Tensor]
    prox: Callable[..., AbstractProxTerm]
    step: float | None = None

    def __post_init__(self) -> None:
        for name, function in (("objective_function", self.objective_function), ("prox", self.prox)):
            if not callable(function):
                raise TypeError(f"`ProximalFixedPoint({name}=...)` must be a function. Got {type(function).__name__}.")
        demand_type("ProximalFixedPoint", "step", self.step, float | None)
        demand_range("ProximalFixedPoint", "step", self.step, POSITIVE)

    @property
    def composite(self) -> Composite:
        """The same problem, differentiated on the active manifold."""
        return Composite(self.objective_function, self.prox)

    @property
    def offers(self) -> frozenset[Property]:
        return self.composite.offers

    @property
    def refusal(self) -> str:
        return (
            "the inner problem has a non-smooth term, and is differentiated as a fixed point, whose system is not"
            " symmetric. Use `AID` with `GMRES`, `BiCGStab` or `NormalCG` and an inner solver that heeds the term, such"
            " as `ProximalGradient`; or `Composite` in its place."
        )

    @property
    def g(self) -> Callable[..., Tensor]:
        return self.objective_function

    @property
    def functions(self) -> Mapping[str, tuple[Callable[..., Any], tuple[str, ...]]]:
        return self.composite.functions

    @property
    def features(self) -> frozenset[Feature]:
        return frozenset({Feature.prox})

    @property
    def operator(self) -> OperatorProperties:
        return TRANSPOSED

    @property
    def implicit(self) -> str:
        return "aid-gmres"

    def term(self, problem: FlatProblem) -> FlatTerm:
        return FlatTerm(problem, self.prox)

    def objective(self, problem: FlatProblem, x: Tensor, products: AbstractProducts | None) -> Objective:
        return self.composite.objective(problem, x, products)

    def linearize(
        self, problem: FlatProblem, x: Tensor, solved: Solved, smooth: Callable[[], Linearization], margin: float | None
    ) -> Linearization:
        at, y = smooth(), solved.value
        t = torch.full_like(y[..., :1], 1.0 if self.step is None else self.step)
        point = StationaryPoint(self.term(problem), x, y, at, t, problem.problem.init is not None, margin)
        return (contracting(point) if self.step is None else point).as_fixed_point()
