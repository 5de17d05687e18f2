"""The weighted L1 norm, and its conjugate, the ball of the L-infinity norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._tree import Tree, tree_leaves
from bilevel.arguments.fits import demand_type
from bilevel.prox.derivative import ProxDerivative, diagonal
from bilevel.prox.term import (
    AbstractProxTerm,
    above,
    below,
    codes,
    least,
    on_leaves,
    outside,
    piece_rows,
    relative_gap,
    total,
)


@final
@dataclass(frozen=True, eq=False)
class L1(AbstractProxTerm):
    """h(y) = sum_i w_i |y_i|, w_i >= 0; prox_{t h}(v)_i = sign(v_i) max(|v_i| - t w_i, 0), soft thresholding.

    The derivative in v is 1 where |v_i| > t w_i and 0 where it is less; that in w is -t sign(v_i) there. At equality
    the map has a kink, and the derivative taken is 0. Entries of weight zero stay as they are: no kink.

    Args:
        weight: w: a number or tensor for all entries, or a structure like y; leaves broadcast against those of y. An
            estimate at a negative weight ends with `Status.nonfinite`.

    Example:
        >>> L1(1.0).prox(torch.tensor([3.0, -0.5, -2.0]), 0.5)
        tensor([ 2.5000,  0.0000, -1.5000])
    """

    weight: Tree

    def __post_init__(self) -> None:
        for leaf in tree_leaves(self.weight, "`L1(weight=...)`"):
            demand_type("L1", "weight", leaf, float | Tensor)

    def value(self, y: Tree) -> Tensor:
        return total(on_leaves(lambda leaf, w: w * leaf.abs(), y, self.weight))

    def prox(self, v: Tree, step: Tensor | float) -> Tree:
        return on_leaves(lambda leaf, w: soft(leaf, step * w), v, self.weight)

    def margin(self, v: Tree, step: Tensor | float) -> Tensor:
        return least(on_leaves(lambda leaf, w: relative_gap(leaf.abs(), step * w), v, self.weight))

    def pieces(self, y: Tree) -> Tensor | None:
        return piece_rows(y, a=self.weight)

    def derivative(self, v: Tree, step: Tensor | float) -> ProxDerivative:
        return diagonal(on_leaves(lambda leaf, w: (~below(leaf.abs(), step * w)).to(leaf.dtype), v, self.weight))

    def active(self, v: Tree, step: Tensor | float) -> Tensor:
        return codes(on_leaves(lambda leaf, w: leaf.sign() * ~below(leaf.abs(), step * w), v, self.weight))

    def conjugate(self) -> LInfBall:
        return LInfBall(self.weight)

    @property
    def separable(self) -> bool:
        return True


@final
@dataclass(frozen=True, eq=False)
class LInfBall(AbstractProxTerm):
    """h(y) = 0 where |y_i| <= r_i for all i, infinite elsewhere; prox_{t h}(v)_i = min(max(v_i, -r_i), r_i).

    The projection, whatever t. Its derivative in v is 1 inside and 0 outside; that in r is sign(v_i) outside.

    Args:
        radius: r: a number or tensor for all entries, or a structure like y; leaves broadcast against those of y.

    Example:
        >>> LInfBall(1.0).prox(torch.tensor([3.0, -0.5]), 0.1)
        tensor([ 1.0000, -0.5000])
    """

    radius: Tree

    def __post_init__(self) -> None:
        for leaf in tree_leaves(self.radius, "`LInfBall(radius=...)`"):
            demand_type("LInfBall", "radius", leaf, float | Tensor)

    def value(self, y: Tree) -> Tensor:
        return total(on_leaves(lambda leaf, r: outside(leaf.abs() - r, r, 8), y, self.radius))

    def prox(self, v: Tree, step: Tensor | float) -> Tree:
        return on_leaves(lambda leaf, r: torch.where(above(leaf.abs(), r), leaf.sign() * r, leaf), v, self.radius)

    def margin(self, v: Tree, step: Tensor | float) -> Tensor:
        return least(on_leaves(lambda leaf, r: relative_gap(leaf.abs(), r), v, self.radius))

    def pieces(self, y: Tree) -> Tensor | None:
        if not isinstance(self.radius, Tensor | float | int):
            return None
        return piece_rows(y, lower=-self.radius, upper=self.radius)

    def derivative(self, v: Tree, step: Tensor | float) -> ProxDerivative:
        return diagonal(on_leaves(lambda leaf, r: below(leaf.abs(), r).to(leaf.dtype), v, self.radius))

    def active(self, v: Tree, step: Tensor | float) -> Tensor:
        return codes(on_leaves(lambda leaf, r: leaf.sign() * ~below(leaf.abs(), r), v, self.radius))

    def conjugate(self) -> L1:
        return L1(self.radius)

    @property
    def separable(self) -> bool:
        return True


def soft(v: Tensor, threshold: Tensor | float) -> Tensor:
    """sign(v) max(|v| - threshold, 0), entry by entry: soft thresholding; v where the threshold is zero."""
    return torch.where(below(v.abs(), threshold), 0.0, v - v.sign() * threshold)
