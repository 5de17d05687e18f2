"""Bounds: boxes, and the nonnegative numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._tree import Tree, tree_leaves, tree_map
from bilevel.arguments.fits import demand_type
from bilevel.prox.conjugate import Conjugate
from bilevel.prox.derivative import ProxDerivative, diagonal
from bilevel.prox.term import AbstractProxTerm, codes, least, on_leaves, outside, piece_rows, tiny, total


@final
@dataclass(frozen=True, eq=False)
class Box(AbstractProxTerm):
    """h(y) = 0 where lower <= y <= upper, infinite elsewhere; prox_{t h}(v)_i = min(max(v_i, lower_i), upper_i).

    The projection, whatever t. Its derivative in v is 1 inside and 0 outside; outside, that in the nearer bound is 1.
    Entries with equal bounds are fixed. The conjugate is sum_i max(lower_i u_i, upper_i u_i).

    Args:
        lower: a number or tensor for all entries, or a structure like y; leaves broadcast against those of y. None: no
            bound.
        upper: the same. An estimate where a lower bound exceeds an upper one ends with `Status.nonfinite`.

    Example:
        >>> Box(0.0, 1.0).prox(torch.tensor([-1.0, 0.5, 2.0]), 0.1)
        tensor([0.0000, 0.5000, 1.0000])
    """

    lower: Tree = None
    upper: Tree = None

    def __post_init__(self) -> None:
        for name, value in (("lower", self.lower), ("upper", self.upper)):
            for leaf in () if value is None else tree_leaves(value, f"`Box({name}=...)`"):
                demand_type("Box", name, leaf, float | Tensor)

    def value(self, y: Tree) -> Tensor:
        size = torch.stack([leaf.abs().max() for leaf in tree_leaves(y)]).max()
        below = on_leaves(lambda leaf, bound: outside(bound - leaf, size, 8), y, self._bound(self.lower, -1))
        above = on_leaves(lambda leaf, bound: outside(leaf - bound, size, 8), y, self._bound(self.upper, 1))
        return total(below) + total(above)

    def prox(self, v: Tree, step: Tensor | float) -> Tree:
        above = on_leaves(lambda leaf, bound: torch.where(leaf < bound, bound, leaf), v, self._bound(self.lower, -1))
        return on_leaves(lambda leaf, bound: torch.where(leaf > bound, bound, leaf), above, self._bound(self.upper, 1))

    def margin(self, v: Tree, step: Tensor | float) -> Tensor:
        return least(self.gaps(v))

    def gaps(self, v: Tree) -> Tree:
        """How far each entry is from a kink, relative to the largest one: a structure like v; for `Sum`."""
        largest = torch.stack([leaf.abs().max() for leaf in tree_leaves(v)]).max()

        def gap(leaf: Tensor, bound: Tensor | float) -> Tensor:
            size = torch.maximum(torch.as_tensor(bound, dtype=leaf.dtype, device=leaf.device).abs(), largest)
            return torch.where(size.isfinite(), (leaf - bound).abs() / size.clamp_min(tiny(leaf)), 1.0)

        gaps = [on_leaves(gap, v, bound) for bound in (self._bound(self.lower, -1), self._bound(self.upper, 1))]
        nearest = on_leaves(torch.minimum, *gaps)
        return on_leaves(lambda leaf, wide: torch.where(wide > 0, leaf, wide.abs()), nearest, self._wide(v))

    def derivative(self, v: Tree, step: Tensor | float) -> ProxDerivative:
        inside = on_leaves(lambda leaf, where: (where == 0).to(leaf.dtype), v, self._where(v))
        return diagonal(on_leaves(lambda leaf, wide: leaf * (wide > 0), inside, self._wide(v)))

    def active(self, v: Tree, step: Tensor | float) -> Tensor:
        return codes(self._where(v))

    def pieces(self, y: Tree) -> Tensor | None:
        return piece_rows(y, lower=self._bound(self.lower, -1), upper=self._bound(self.upper, 1))

    def conjugate(self) -> AbstractProxTerm:
        return Conjugate(self)

    def conjugate_value(self, u: Tree) -> Tensor:
        def support(leaf: Tensor, bound: Tensor | float) -> Tensor:
            return leaf * torch.where(leaf == 0, 0.0, bound)  # 0 times infinity is no cost

        below = on_leaves(support, tree_map(lambda leaf: leaf.clamp_max(0), u), self._bound(self.lower, -1))
        above = on_leaves(support, tree_map(lambda leaf: leaf.clamp_min(0), u), self._bound(self.upper, 1))
        return total(below) + total(above)

    @property
    def separable(self) -> bool:
        return True

    @staticmethod
    def _bound(bound: Tree, side: int) -> Tree:
        return side * torch.inf if bound is None else bound

    def _where(self, v: Tree) -> Tree:
        """-1 below, 0 inside, 1 above."""
        below = on_leaves(lambda leaf, bound: 0 - (leaf < bound).to(leaf.dtype), v, self._bound(self.lower, -1))
        above = on_leaves(lambda leaf, bound: (leaf > bound).to(leaf.dtype), v, self._bound(self.upper, 1))
        return on_leaves(torch.add, below, above)

    def _wide(self, v: Tree) -> Tree:
        """1 where lower < upper, so that there may be a kink; -1 where bounds are equal; NaN where they are crossed."""
        zero = tree_map(torch.zeros_like, v)
        lower = on_leaves(torch.add, zero, self._bound(self.lower, -1))
        upper = on_leaves(torch.add, zero, self._bound(self.upper, 1))

        def wide(low: Tensor, high: Tensor) -> Tensor:
            return torch.where(low < high, 1.0, torch.where(low == high, -1.0, torch.nan)).to(low.dtype)

        return on_leaves(wide, lower, upper)


@final
@dataclass(frozen=True, eq=False)
class Nonnegative(AbstractProxTerm):
    """h(y) = 0 where y >= 0, infinite elsewhere; prox_{t h}(v)_i = max(v_i, 0).

    The projection, whatever t. Its derivative is 1 where v_i >= 0, else 0.

    Example:
        >>> Nonnegative().prox(torch.tensor([-1.0, 0.5]), 0.1)
        tensor([0.0000, 0.5000])
    """

    def value(self, y: Tree) -> Tensor:
        return Box(0.0).value(y)

    def prox(self, v: Tree, step: Tensor | float) -> Tree:
        return Box(0.0).prox(v, step)

    def margin(self, v: Tree, step: Tensor | float) -> Tensor:
        return Box(0.0).margin(v, step)

    def derivative(self, v: Tree, step: Tensor | float) -> ProxDerivative:
        return Box(0.0).derivative(v, step)

    def active(self, v: Tree, step: Tensor | float) -> Tensor:
        return Box(0.0).active(v, step)

    def pieces(self, y: Tree) -> Tensor | None:
        return Box(0.0).pieces(y)

    def conjugate(self) -> Box:
        return Box(None, 0.0)

    @property
    def separable(self) -> bool:
        return True
