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
from bilevel._linear import POSITIVE_DEFINITE, LinearOperator, OperatorProperties
from bilevel._numerics.misfits import called
from bilevel._result import Solved
from bilevel._tree import Tree
from bilevel.inner_problems.activity import default_margin, kink_report
from bilevel.inner_problems.kind import AbstractInnerProblem
from bilevel.inner_problems.linear_model import LinearModel
from bilevel.inner_problems.separable import SeparableObjective
from bilevel.prox.term import AbstractProxTerm
from bilevel.requirements.properties import DoesNotApply, Feature, Property


class _NoPiecesError(Exception):
    """A term is not of the form that coordinate descent reads."""


@final
@dataclass(frozen=True, eq=False)
class Composite(AbstractInnerProblem):
    """y*(x) = argmin_y g(x, y) + h_x(y), g smooth, h convex with a proximal map.

    It is the fixed point, for any t > 0, of

        y = prox_{t h}(v), v = y - t grad_y g(x, y).

    For a separable h the derivative P of the map at v is diagonal, with entries in [0, 1]. On the support S, where
    P_ii > 0, with u = 0 off S, the condition F(x, y) = 0 has to first order

        (dF/dy)' u = (H + h'')_SS u = grad_S f,  h''_ii = (1 / P_ii - 1) / t,
        (dF/dx)' u = G u - (d prox / dx)' w,  w = u / (t P) on S, w = grad_y f - H u off S,

    symmetric, and positive definite where y* is locally unique, so that conjugate gradients apply. The naive system
    with the derivative of the fixed-point map itself is not symmetric, and conjugate gradients on it are wrong
    without a word.

    Valid where v is at no kink of the map (strict complementarity): the support is then locally constant. How far it
    is from one is reported (`Status.weakly_active`). Before the inner solver has found the support the gradient is
    wrong by O(1); afterwards its error is O(|y - y*|).

    Source: Bertrand et al., "Implicit differentiation for fast hyperparameter selection in non-smooth convex learning",
    JMLR 23 (2022).

    Raises:
        DoesNotApply: from `linearize`, if the term is not separable.

    Args:
        objective_function: g, `g(x, y) -> scalar`, or `g(x, y, data)`; twice differentiable.
        prox: `prox(x) -> term`, such as `L1(x.exp())`, or `prox(x, data)`.

    Example:
        >>> from bilevel import AID, BilevelProblem, hypergradient
        >>> from bilevel.prox import L1
        >>> from bilevel.solvers import CG, ProximalGradient
        >>> a = torch.tensor([3.0, 0.5])
        >>> lasso = Composite(lambda x, y: (y - a).square().sum() / 2, lambda x: L1(x))
        >>> problem = BilevelProblem(lambda x, y: y.square().sum() / 2, inner=lasso)  # y* = (3 - x, 0) at x = 1
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
        return frozenset({Property.stationary, Property.steps})

    @property
    def refusal(self) -> str:
        return (
            "the inner problem has a non-smooth term, so that grad_y g(x, y*) is not zero. Use `AID` with an inner"
            " solver that heeds it, such as `ProximalGradient`, or `ITD`, `ESJ` or `FiniteDifference`."
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
        return POSITIVE_DEFINITE  # on the support of a separable term; others are refused where they are met

    @property
    def implicit(self) -> str:
        return "aid-cg"

    def objective(self, problem: FlatProblem, x: Tensor, products: AbstractProducts | None) -> Objective:
        def prox(v: Tensor, step: Tensor | float) -> Tensor:
            return self._prox(problem, x, v, step)

        return smooth_objective(problem, x, products, prox=prox, separable=self._separable(problem, x))

    def _separable(self, problem: FlatProblem, x: Tensor) -> SeparableObjective | None:
        """What coordinate descent reads: a linear model and the pieces of the term, where they are that."""
        model = self.objective_function
        if not isinstance(model, LinearModel) or len(problem.y.shapes) != 1:
            return None
        y = model.X.new_zeros(()).expand(problem.y.shapes[0])

        def pieces(x: Tree, *data: Any) -> Tensor:
            found = self._term(x, *data).pieces(y)
            if found is None:
                raise _NoPiecesError
            return found

        with torch.no_grad():
            try:
                rows = problem.map(pieces, "g", x)
            except _NoPiecesError:
                return None
            targets = problem.map(lambda _, *data: model.sample_targets(*data), "g", x)
            weights = problem.map(lambda _, *data: model.sample_weights(*data), "g", x)
        return SeparableObjective(model, targets, weights, rows, problem.tally)

    def _term(self, x: Tree, *data: Any) -> AbstractProxTerm:
        found = called("prox(x, data)", self.prox, x, *data)
        if not isinstance(found, AbstractProxTerm):
            raise TypeError(
                f"`prox(x)` must return a term with a proximal map, such as `bilevel.prox.L1(x.exp())`."
                f" Got {type(found).__name__}."
            )
        return found

    def _prox(self, problem: FlatProblem, x: Tensor, v: Tensor, step: Tensor | float) -> Tensor:
        """prox_{step h_x}(v) in vectors, for each row of the batch; differentiable in x, v and the step."""
        structure = problem.y

        def one(x: Tree, v: Tensor, step: Tensor, *data: Any) -> Tensor:
            found = self._term(x, *data).prox(structure.unravel(v), step.squeeze(-1))
            return structure.ravel(found, "prox(x).prox(v, step)")

        steps = torch.as_tensor(step, dtype=v.dtype, device=v.device).expand(*v.shape[:-1], 1)
        return problem.map(one, "g", x, v, steps)

    def _margin(self, problem: FlatProblem, x: Tensor, v: Tensor, step: Tensor) -> Tensor:
        def one(x: Tree, v: Tensor, step: Tensor, *data: Any) -> Tensor:
            return self._term(x, *data).margin(problem.y.unravel(v), step.squeeze(-1))

        return problem.map(one, "g", x, v, step)

    def _demand_separable(self, problem: FlatProblem, x: Tensor) -> None:
        found: list[AbstractProxTerm] = []

        def one(x: Tree, *data: Any) -> Tensor:
            found.append(self._term(x, *data))
            return torch.zeros((), device="cpu")

        problem.map(one, "g", x)
        if not found[-1].separable:
            raise DoesNotApply(
                f"the proximal map of `{type(found[-1]).__name__}` is not separable: its optimality condition is not"
                f" differentiated implicitly. Use `ITD(ProximalGradient(...))`, `ESJ` or `FiniteDifference`."
            )

    def linearize(
        self, problem: FlatProblem, x: Tensor, solved: Solved, smooth: Callable[[], Linearization], margin: float | None
    ) -> Linearization:
        at, y = smooth(), solved.value
        # Any t gives the same derivative; this one makes both terms of v alike in size, so that kinks are seen best.
        sizes = y.abs().amax(-1, keepdim=True) / at.gradient.abs().amax(-1, keepdim=True)
        t = torch.where(sizes.isfinite() & (sizes > 0), sizes, torch.ones_like(sizes))
        with torch.enable_grad():
            leaf, v = x.detach().requires_grad_(), (y - t * at.gradient).detach().requires_grad_()
            self._demand_separable(problem, leaf)
            image = self._prox(problem, leaf, v, t)
            in_v, in_x = torch.autograd.grad(image.sum(), (v, leaf), retain_graph=True, allow_unused=True)
        P = torch.zeros_like(v) if in_v is None else in_v
        S, safe = P > 0, P.clamp_min(torch.finfo(P.dtype).tiny)
        stiffness = torch.where(S, (1 / safe - 1) / t, 0.0)  # h''

        def on(u: Tensor) -> Tensor:
            return torch.where(S, u, 0.0)

        def whole(u: Tensor, hu: Tensor) -> Tensor:
            return torch.where(S, hu + stiffness * u, u)  # the identity off the support

        seen: list[tuple[Tensor, int, Tensor]] = []  # the latest u, and H u there

        on_support = None if at.on is None else at.on(S)

        def products(u: Tensor) -> tuple[Tensor, Tensor | None]:
            hu, gu = at.products(on(u))
            seen[:] = [(u, u._version, hu)]
            return whole(u, hu), gu

        def moved(u: Tensor, fy: Tensor) -> Tensor:
            known = bool(seen) and seen[0][0] is u and seen[0][1] == u._version
            hu = seen[0][2] if known else at.operator.mv(on(u))
            weights = torch.where(S, u / (safe * t), fy - hu)  # off the support y moves as the map itself does
            return -torch.autograd.grad(image, leaf, weights, retain_graph=True)[0]

        def mv(u: Tensor) -> Tensor:
            return whole(u, at.operator.mv(on(u)) if on_support is None else on_support(on(u)))

        margins = self._margin(problem, x, v.detach(), t)
        return Linearization(
            y,
            at.gradient,
            mv,
            products,
            operator=LinearOperator(mv, y.shape[-1], positive_definite=True),
            right_hand_side=on,
            moved=None if in_x is None else moved,
            reports=(kink_report("support", margins, default_margin(y) if margin is None else margin),),
            start_in_x=problem.problem.init is not None,
        )
