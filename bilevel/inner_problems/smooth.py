"""Smooth minimization: y*(x) = argmin_y g(x, y)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from torch import Tensor

from bilevel._calculus import AbstractProducts, Linearization
from bilevel._flat import FlatProblem
from bilevel._inner import Objective, smooth_objective
from bilevel._linear import POSITIVE_DEFINITE, OperatorProperties
from bilevel._result import Solved
from bilevel.inner_problems.kind import AbstractInnerProblem
from bilevel.requirements.properties import Property

_OFFERS = frozenset({Property.stationary, Property.minimum, Property.smooth, Property.steps})


@final
@dataclass(frozen=True, eq=False)
class SmoothMinimization(AbstractInnerProblem):
    """y*(x) = argmin_y g(x, y) with F = grad_y g, (dF/dy)' = H = d2g/dy2 and (dF/dx)' = G = d2g/dxdy.

    H is symmetric, and declared positive definite: so it is near a strict minimum. Solvers report where it is not.
    `BilevelProblem(f, g)` is of this kind, and offers all that an estimator can require.

    Args:
        objective_function: g, `g(x, y) -> scalar`, or `g(x, y, data)`; twice differentiable.

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem, hypergradient
        >>> nearest = SmoothMinimization(lambda x, y: (y - x).square().sum())
        >>> problem = BilevelProblem(lambda x, y: y.sum(), inner=nearest)
        >>> hypergradient(problem, torch.ones(2), torch.zeros(2)).grad.round(decimals=3)
        tensor([1., 1.])
    """

    objective_function: Callable[..., Tensor]

    def __post_init__(self) -> None:
        for name, function in (("objective_function", self.objective_function),):
            if not callable(function):
                raise TypeError(f"`SmoothMinimization({name}=...)` must be a function. Got {type(function).__name__}.")

    @property
    def offers(self) -> frozenset[Property]:
        return _OFFERS

    @property
    def refusal(self) -> str:
        return "the start of y does not depend on x. Give the problem `init=lambda x: x`, or use `ITD` or `AID`."

    @property
    def g(self) -> Callable[..., Tensor]:
        return self.objective_function

    @property
    def operator(self) -> OperatorProperties:
        return POSITIVE_DEFINITE

    @property
    def implicit(self) -> str:
        return "aid-cg"

    def objective(self, problem: FlatProblem, x: Tensor, products: AbstractProducts | None) -> Objective:
        return smooth_objective(problem, x, products)

    def linearize(
        self, problem: FlatProblem, x: Tensor, solved: Solved, smooth: Callable[[], Linearization], margin: float | None
    ) -> Linearization:
        return smooth()
