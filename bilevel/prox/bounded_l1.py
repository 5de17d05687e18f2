"""The L1 norm on a box."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._tree import Tree, tree_map
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import NUMBERS, demand_range
from bilevel.prox.box import Box
from bilevel.prox.conjugate import Conjugate
from bilevel.prox.derivative import ProxDerivative, diagonal
from bilevel.prox.l1 import L1
from bilevel.prox.term import AbstractProxTerm, on_leaves, piece_rows, total


@final
@dataclass(frozen=True, eq=False)
class BoundedL1(AbstractProxTerm):
    """h(y) = sum_i w_i |y_i| where |y_i| <= r_i, infinite elsewhere; prox_{t h}(v)_i = soft(v_i, t w_i) within +-r_i.

    What the dual of support vector regression has: w is the width of the tube, r the cost C. The conjugate is
    sum_i r_i max(|u_i| - w_i, 0).

    Args:
        weight: w: a number or tensor for all entries; it broadcasts against y.
        radius: r: the same. An estimate at negative ones ends with `Status.nonfinite`.

    Example:
        >>> BoundedL1(1.0, 1.5).prox(torch.tensor([3.0, -2.0, 0.5]), 1.0)
        tensor([ 1.5000, -1.0000,  0.0000])
    """

    weight: float | Tensor
    radius: float | Tensor

    def __post_init__(self) -> None:
        demand_types(self)
        for name, value in (("weight", self.weight), ("radius", self.radius)):
            if not isinstance(value, Tensor):
                demand_range("BoundedL1", name, value, NUMBERS)

    @property
    def _parts(self) -> tuple[L1, Box]:
        return L1(self.weight), Box(-self.radius, self.radius)

    def value(self, y: Tree) -> Tensor:
        inside, bounds = self._parts
        return inside.value(y) + bounds.value(y)

    def prox(self, v: Tree, step: Tensor | float) -> Tree:
        inside, bounds = self._parts
        return bounds.prox(inside.prox(v, step), step)

    def margin(self, v: Tree, step: Tensor | float) -> Tensor:
        inside, bounds = self._parts
        return torch.minimum(inside.margin(v, step), bounds.margin(inside.prox(v, step), step))

    def derivative(self, v: Tree, step: Tensor | float) -> ProxDerivative:
        inside, bounds = self._parts
        ones = tree_map(torch.ones_like, v)
        first, second = inside.derivative(v, step), bounds.derivative(inside.prox(v, step), step)
        return diagonal(second.times(second.parts, first.times(first.parts, ones)))

    def active(self, v: Tree, step: Tensor | float) -> Tensor:
        inside, bounds = self._parts
        return inside.active(v, step) + 2 * bounds.active(inside.prox(v, step), step)

    def conjugate(self) -> Conjugate:
        return Conjugate(self)

    def conjugate_value(self, u: Tree) -> Tensor:
        excess = on_leaves(lambda leaf, w: (leaf.abs() - w).relu(), u, self.weight)
        return total(on_leaves(lambda leaf, r: leaf * r, excess, self.radius))

    def pieces(self, y: Tree) -> Tensor | None:
        return piece_rows(y, a=self.weight, lower=-self.radius, upper=self.radius)

    @property
    def separable(self) -> bool:
        return True
