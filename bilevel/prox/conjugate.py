"""The conjugate of a term, by the equation of Moreau."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from bilevel._tree import Tree, tree_map
from bilevel.arguments.fits import demand_types
from bilevel.prox.derivative import ProxDerivative, complement
from bilevel.prox.term import AbstractProxTerm, on_leaves


@final
@dataclass(frozen=True, eq=False)
class Conjugate(AbstractProxTerm):
    """h*(u) = sup_y <u, y> - h(y); prox_{t h*}(v) = v - t prox_{h/t}(v/t).

    What h knows, this knows: the derivative is I - P, with P that of the other map, kinks and manifolds are the same.

    Args:
        term: h. Its `conjugate_value` is the value, where that has a closed form.

    Example:
        >>> import torch
        >>> from bilevel.prox import Simplex
        >>> largest = Conjugate(Simplex())
        >>> largest.value(torch.tensor([1.0, 3.0, 2.0]))
        tensor(3.)
        >>> largest.prox(torch.tensor([1.0, 3.0, 2.0]), 0.5)
        tensor([1.0000, 2.5000, 2.0000])
    """

    term: AbstractProxTerm

    def __post_init__(self) -> None:
        demand_types(self)

    def value(self, y: Tree) -> Tensor:
        return self.term.conjugate_value(y)

    def conjugate_value(self, u: Tree) -> Tensor:
        return self.term.value(u)

    def prox(self, v: Tree, step: Tensor | float) -> Tree:
        rest = self.term.prox(*_other(v, step))
        return on_leaves(lambda leaf, other: leaf - step * other, v, rest)

    def margin(self, v: Tree, step: Tensor | float) -> Tensor:
        return self.term.margin(*_other(v, step))

    def derivative(self, v: Tree, step: Tensor | float) -> ProxDerivative | None:
        P = self.term.derivative(*_other(v, step))
        return None if P is None or P.co_inverse is None else complement(P)

    def active(self, v: Tree, step: Tensor | float) -> Tensor:
        return self.term.active(*_other(v, step))

    def conjugate(self) -> AbstractProxTerm:
        return self.term

    @property
    def separable(self) -> bool:
        return self.term.separable


def _other(v: Tree, step: Tensor | float) -> tuple[Tree, Tensor | float]:
    return tree_map(lambda leaf: leaf / step, v), 1 / step
