"""Training on a loss of outputs: y*(x) = argmin_y loss(x, outputs(x, y)) + regularizer(x, y)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from bilevel._calculus import AbstractProducts, Linearization
from bilevel._flat import FlatProblem
from bilevel._inner import Objective, smooth_objective
from bilevel._linear import POSITIVE_DEFINITE, OperatorProperties
from bilevel._result import Solved
from bilevel._tree import Tree
from bilevel.inner_problems.declarations import Composition
from bilevel.inner_problems.kind import AbstractInnerProblem
from bilevel.requirements.properties import Property


@final
@dataclass(frozen=True, eq=False)
class SupervisedTraining(AbstractInnerProblem):
    """y*(x) = argmin_y g(x, y), g = loss(x, outputs(x, y)) + regularizer(x, y): a smooth minimization that says how.

    To most estimators it is `SmoothMinimization(g)`. `GaussNewton()` products, and "network", read the parts: with
    a loss that is convex in the outputs and a regularizer that is convex in y, H is replaced by what is positive
    semidefinite.

    Args:
        outputs: `outputs(x, y) -> tensor`, or `outputs(x, y, data)`: of a network, for all samples.
        loss: `loss(x, z) -> scalar`, or `loss(x, z, data)`, convex in the outputs z.
        regularizer: `regularizer(x, y) -> scalar`, or `regularizer(x, y, data)`, convex in y; None: none.

    Raises:
        TypeError: if one of them cannot be called.

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem, hypergradient
        >>> A, t = torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 3.0])
        >>> ridge = SupervisedTraining(
        ...     outputs=lambda x, y: A @ y,
        ...     loss=lambda x, z: (z - t).square().sum() / 2,
        ...     regularizer=lambda x, y: x * y.square().sum() / 2,
        ... )
        >>> problem = BilevelProblem(lambda x, y: y.sum(), inner=ridge)  # y* = 7 / (5 + x)
        >>> hypergradient(problem, torch.tensor(2.0), torch.zeros(1)).grad.round(decimals=3)
        tensor(-0.1430)
    """

    outputs: Callable[..., Tensor]
    loss: Callable[..., Tensor]
    regularizer: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        self.composition.demand_callable("SupervisedTraining")

    @property
    def composition(self) -> Composition:
        return Composition(self.outputs, self.loss, self.regularizer)

    @property
    def offers(self) -> frozenset[Property]:
        return frozenset({Property.stationary, Property.minimum, Property.smooth, Property.steps})

    @property
    def refusal(self) -> str:
        return "the start of y does not depend on x. Give the problem `init=lambda x: x`, or use `ITD` or `AID`."

    @property
    def g(self) -> Callable[..., Tensor]:
        return self._g

    def _g(self, x: Tree, y: Tree, *data: Any) -> Tensor:
        value = self.loss(x, self.outputs(x, y, *data), *data)
        return value if self.regularizer is None else value + self.regularizer(x, y, *data)

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
