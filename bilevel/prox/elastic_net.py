"""The elastic net: the L1 norm and half the squared Euclidean norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._tree import Tree, tree_leaves, tree_map
from bilevel.arguments.fits import demand_type
from bilevel.prox.conjugate import Conjugate
from bilevel.prox.derivative import ProxDerivative, diagonal
from bilevel.prox.l1 import L1, soft
from bilevel.prox.term import AbstractProxTerm, least, on_leaves, piece_rows, total


@final
@dataclass(frozen=True, eq=False)
class ElasticNet(AbstractProxTerm):
    """h(y) = sum_i a_i |y_i| + b_i y_i^2 / 2, a, b >= 0; prox_{t h}(v)_i = soft(v_i, t a_i) / (1 + t b_i).

    The derivative in v is 1 / (1 + t b_i) where |v_i| > t a_i, else 0. The conjugate is sum_i max(|u_i| - a_i, 0)^2 /
    (2 b_i).

    Source: Zou and Hastie, "Regularization and variable selection via the elastic net", JRSS B 67 (2005).

    Args:
        l1: a: a number or tensor for all entries, or a structure like y; leaves broadcast against those of y.
        l2: b: the same. An estimate at negative ones ends with `Status.nonfinite`.

    Example:
        >>> ElasticNet(1.0, 2.0).prox(torch.tensor([3.0, -0.5]), 0.5)
        tensor([1.2500, 0.0000])
    """

    l1: Tree
    l2: Tree

    def __post_init__(self) -> None:
        for name, value in (("l1", self.l1), ("l2", self.l2)):
            for leaf in tree_leaves(value, f"`ElasticNet({name}=...)`"):
                demand_type("ElasticNet", name, leaf, float | Tensor)

    def value(self, y: Tree) -> Tensor:
        return L1(self.l1).value(y) + total(on_leaves(lambda leaf, b: b * leaf.square(), y, self.l2)) / 2

    def prox(self, v: Tree, step: Tensor | float) -> Tree:
        shrunk = on_leaves(lambda leaf, a: soft(leaf, step * a), v, self.l1)
        return on_leaves(lambda leaf, b: leaf / (1 + step * b), shrunk, self.l2)

    def margin(self, v: Tree, step: Tensor | float) -> Tensor:
        convex = least(on_leaves(lambda leaf, b: _one_if(torch.as_tensor(b) >= 0, leaf), v, self.l2))
        return L1(self.l1).margin(v, step) * convex

    def derivative(self, v: Tree, step: Tensor | float) -> ProxDerivative:
        support = L1(self.l1).derivative(v, step)
        ones = support.times(support.parts, tree_map(torch.ones_like, v))
        return diagonal(on_leaves(lambda leaf, b: leaf / (1 + step * b), ones, self.l2))

    def active(self, v: Tree, step: Tensor | float) -> Tensor:
        return L1(self.l1).active(v, step)

    def pieces(self, y: Tree) -> Tensor | None:
        return piece_rows(y, a=self.l1, c=self.l2)

    def conjugate(self) -> Conjugate:
        return Conjugate(self)

    def conjugate_value(self, u: Tree) -> Tensor:
        def squared(leaf: Tensor, b: Tensor | float) -> Tensor:
            b = torch.as_tensor(b, dtype=leaf.dtype, device=leaf.device)
            return torch.where(b > 0, leaf.square() / (2 * torch.where(b > 0, b, 1.0)), _infinite_but_at_zero(leaf))

        excess = on_leaves(lambda leaf, a: (leaf.abs() - a).relu(), u, self.l1)
        return total(on_leaves(squared, excess, self.l2))

    @property
    def separable(self) -> bool:
        return True


def _one_if(holds: Tensor, like: Tensor) -> Tensor:
    return torch.where(holds.to(like.device), torch.ones_like(like), torch.nan)


def _infinite_but_at_zero(excess: Tensor) -> Tensor:
    return torch.where(excess == 0, torch.zeros_like(excess), torch.inf)
