"""Composite minimization: y*(x) = argmin_y g(x, y) + h_x(y), h with a proximal map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._calculus import AbstractProducts, Linearization
from bilevel._flat import FlatProblem
from bilevel._inner import Objective, smooth_objective
from bilevel._linear import POSITIVE_DEFINITE, OperatorProperties
from bilevel._result import Solved
from bilevel.inner_problems.flat_term import FlatTerm
from bilevel.inner_problems.kind import AbstractInnerProblem
from bilevel.inner_problems.linear_model import LinearModel
from bilevel.inner_problems.separable import SeparableObjective
from bilevel.inner_problems.stationary_point import StationaryPoint, balanced_step, contracting
from bilevel.prox.term import AbstractProxTerm
from bilevel.requirements.properties import Feature, Property


@final
@dataclass(frozen=True, eq=False)
class Composite(AbstractInnerProblem):
    """y*(x) = argmin_y g(x, y) + h_x(y), g smooth, h convex with a proximal map.

    It is the fixed point, for any t > 0, of

        y = prox_{t h}(v), v = y - t grad_y g(x, y).

    The derivative P of the map at v is symmetric, 0 <= P <= I, and its range is tangent to the manifold that y* moves
    on: the entries of the support, the active groups, the rank. There, with P^+ the pseudo-inverse and u = 0 off the
    range, the condition F(x, y) = 0 has to first order

        (dF/dy)' u = (H + (P^+ - I) / t) u = grad_y f, projected onto the range,
        (dF/dx)' u = G u - (d prox / dx)' w,  w = P^+ u / t on the range, w = grad_y f - H u off it,

    symmetric, and positive definite where y* is locally unique, so that conjugate gradients apply. The naive system
    with the derivative of the fixed-point map itself is not symmetric, and conjugate gradients on it are wrong
    without a word. A term that does not know products with P and P^+ in closed form (`AbstractProxTerm.derivative`),
    and is not separable, gets that system, declared as it is: see `ProximalFixedPoint`. Solvers that need symmetry are
    then refused, and "implicit" stands for "aid-gmres".

    Cost: one Hessian product a step of the linear solver, two products with P and P^+ each, and one backward pass
    through the map for the part of x in it.

    Valid where v is at no kink of the map (strict complementarity): the manifold is then locally constant. How far it
    is from one is reported (`Status.weakly_active`), and its dimension. Before the inner solver has found the manifold
    the gradient is wrong by O(1); afterwards its error is O(|y - y*|).

    Source: Bertrand et al., "Implicit differentiation for fast hyperparameter selection in non-smooth convex learning",
    JMLR 23 (2022); for partly smooth h Lewis, "Active sets, nonsmoothness, and sensitivity", SIAM J. Optim. 13 (2002).

    Args:
        objective_function: g, `g(x, y) -> scalar`, or `g(x, y, data)`; twice differentiable.
        prox: `prox(x) -> term`, such as `L1(x.exp())`, or `prox(x, data)`.

    Example:
        >>> import torch
        >>> from bilevel import AID, BilevelProblem, hypergradient
        >>> from bilevel.prox import L1
        >>> from bilevel.solvers import CG, ProximalGradient
        >>> a = torch.tensor([3.0, 0.5])
        >>> lasso = Composite(lambda x, y: (y - a).square().sum() / 2, lambda x: L1(x))
        >>> problem = BilevelProblem(
        ...     lambda x, y: y.square().sum() / 2, inner=lasso
        ... )  # y* = (3 - x, 0) at x = 1
        >>> aid = AID(ProximalGradient(step=1.0), CG())
        >>> hypergradient(problem, torch.tensor(1.0), torch.zeros(2), estimator=aid).grad
        tensor(-2.)
    """

    objective_function: Callable[..., Tensor]
    prox: Callable[..., AbstractProxTerm]

    def __post_init__(self) -> None:
        for name, function in (("objective_function", self.objective_function), ("prox", self.prox)):
            if not callable(function):
                raise TypeError(f"`Composite({name}=...)` must be a function. Got {type(function).__name__}.")

    @property
    def offers(self) -> frozenset[Property]:
        return frozenset({Property.stationary, Property.steps, Property.valued})

    @property
    def refusal(self) -> str:
        return (
            "the inner problem has a non-smooth term, so that grad_y g(x, y*) is not zero. Use `AID` with an inner"
            " solver that heeds it, such as `FISTA`, or `ITD`, `ESJ` or `FiniteDifference`."
        )

    @property
    def without_symmetry(self) -> str:
        return (
            "the proximal map of the inner problem has no derivative in closed form, so that y* is differentiated as a"
            " fixed point, whose system is not symmetric."
        )

    @property
    def g(self) -> Callable[..., Tensor]:
        return self.objective_function

    @property
    def functions(self) -> Mapping[str, tuple[Callable[..., Any], tuple[str, ...]]]:
        return {"prox": (self.prox, ("x",))}

    @property
    def features(self) -> frozenset[Feature]:
        return frozenset({Feature.prox})

    @property
    def operator(self) -> OperatorProperties:
        return POSITIVE_DEFINITE  # on the manifold; where the term has no derivative, solvers are refused on the way

    @property
    def implicit(self) -> str:
        return "aid-cg"

    def implicit_at(self, problem: FlatProblem, x: Tensor, y: Tensor) -> str:
        known = self.term(problem).derivative(x, y, 1.0) is not None
        return self.implicit if known else "aid-gmres"

    def term(self, problem: FlatProblem) -> FlatTerm:
        return FlatTerm(problem, self.prox)

    def objective(self, problem: FlatProblem, x: Tensor, products: AbstractProducts | None) -> Objective:
        term = self.term(problem)
        return smooth_objective(
            problem,
            x,
            products,
            prox=lambda v, t: term.prox(x, v, t),
            active=lambda v, t: term.active(x, v, t),
            separable=self._separable(problem, x),
            image=lambda: term.image(x),
        )

    def _separable(self, problem: FlatProblem, x: Tensor) -> SeparableObjective | None:
        """What coordinate descent reads: a linear model and the pieces of the term, where they are that."""
        model = self.objective_function
        if not isinstance(model, LinearModel):
            return None
        pieces = self.term(problem).pieces(x.detach())
        if pieces is None:
            return None
        with torch.no_grad():
            targets = problem.map(lambda _, *data: model.sample_targets(*data), "g", x.detach())
            weights = problem.map(lambda _, *data: model.sample_weights(*data), "g", x.detach())
        return SeparableObjective(model, targets, weights, pieces, problem.tally)

    def linearize(
        self, problem: FlatProblem, x: Tensor, solved: Solved, smooth: Callable[[], Linearization], margin: float | None
    ) -> Linearization:
        term, at, y = self.term(problem), smooth(), solved.value
        point = StationaryPoint(
            term, x, y, at, balanced_step(y, at.gradient, solved.residual), problem.problem.init is not None, margin
        )
        P = term.derivative(x, point.v, point.step)
        return contracting(point).as_fixed_point() if P is None else point.on_manifold(P)
