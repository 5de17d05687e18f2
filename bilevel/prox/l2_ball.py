"""The ball of the Euclidean norm, and its conjugate, that norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from bilevel._tree import Tree
from bilevel.arguments.fits import demand_types
from bilevel.arguments.shapes import Shape, demand_shapes
from bilevel.prox.derivative import ProxDerivative
from bilevel.prox.group_lasso import GroupBall, GroupLasso
from bilevel.prox.term import AbstractProxTerm, demand_number


@final
@dataclass(frozen=True, eq=False)
class L2Ball(AbstractProxTerm):
    """h(y) = 0 where |y| <= r, infinite elsewhere; prox_{t h}(v) = min(1, r / |v|) v.

    The projection, whatever t. Outside, with e = v / |v|, the derivative in v is (r / |v|) (I - e e'), and that in r is
    e; inside they are I and 0. y is taken as one vector.

    Args:
        radius: r >= 0, a number. An estimate at a negative one ends with `Status.nonfinite`.

    Example:
        >>> import torch
        >>> L2Ball(1.0).prox(torch.tensor([3.0, 4.0]), 0.1)
        tensor([0.6000, 0.8000])
    """

    radius: float | Tensor

    def __post_init__(self) -> None:
        demand_types(self)
        demand_number("L2Ball", "radius", self.radius)
        demand_shapes("L2Ball", {"radius": Shape("", kind="number", finite=False)}, vars(self))

    def value(self, y: Tree) -> Tensor:
        return GroupBall(self.radius, "all").value(y)

    def prox(self, v: Tree, step: Tensor | float) -> Tree:
        return GroupBall(self.radius, "all").prox(v, step)

    def margin(self, v: Tree, step: Tensor | float) -> Tensor:
        return GroupBall(self.radius, "all").margin(v, step)

    def derivative(self, v: Tree, step: Tensor | float) -> ProxDerivative:
        return GroupBall(self.radius, "all").derivative(v, step)

    def active(self, v: Tree, step: Tensor | float) -> Tensor:
        return GroupBall(self.radius, "all").active(v, step)

    def conjugate(self) -> L2:
        return L2(self.radius)


@final
@dataclass(frozen=True, eq=False)
class L2(AbstractProxTerm):
    """h(y) = w |y|, the Euclidean norm, not its square; w >= 0; prox_{t h}(v) = max(1 - t w / |v|, 0) v.

    `GroupLasso` with one group.

    Args:
        weight: w >= 0, a number. An estimate at a negative one ends with `Status.nonfinite`.

    Example:
        >>> import torch
        >>> L2(1.0).prox(torch.tensor([3.0, 4.0]), 2.5)
        tensor([1.5000, 2.0000])
    """

    weight: float | Tensor = 1.0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_number("L2", "weight", self.weight)
        demand_shapes("L2", {"weight": Shape("", kind="number", finite=False)}, vars(self))

    def value(self, y: Tree) -> Tensor:
        return GroupLasso(self.weight, "all").value(y)

    def prox(self, v: Tree, step: Tensor | float) -> Tree:
        return GroupLasso(self.weight, "all").prox(v, step)

    def margin(self, v: Tree, step: Tensor | float) -> Tensor:
        return GroupLasso(self.weight, "all").margin(v, step)

    def derivative(self, v: Tree, step: Tensor | float) -> ProxDerivative:
        return GroupLasso(self.weight, "all").derivative(v, step)

    def active(self, v: Tree, step: Tensor | float) -> Tensor:
        return GroupLasso(self.weight, "all").active(v, step)

    def conjugate(self) -> L2Ball:
        return L2Ball(self.weight)
