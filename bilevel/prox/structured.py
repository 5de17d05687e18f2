"""What derivatives of several terms are made of: products for y as one vector, and for groups of its entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor

from bilevel._tree import Tree, ravel
from bilevel.prox.derivative import Parts, ProxDerivative
from bilevel.prox.term import below, tiny

Product = Callable[[Parts, Tensor], Tensor]


def on_vector(product: Product) -> Callable[[Parts, Tree], Tree]:
    """The same product for structures, taken as one vector."""
    return partial(_on_vector, product)


def _on_vector(product: Product, parts: Parts, w: Tree) -> Tree:
    flat, structure = ravel(w, "w")
    return structure.unravel(product(parts, flat))


def centered(parts: Parts, w: Tensor) -> Tensor:
    """(I - s s' / s's) w on the support of s, entries of which are signs or zero; zero off it."""
    (s,) = parts
    on = s.abs() * w
    return on - s * ((s * w).sum() / s.abs().sum().clamp_min(1))


def same_sides(parts: Parts, w: Tensor) -> Tensor:
    """s s' w / s's on the support of s, entries of which are signs or zero; w off it."""
    return w - centered(parts, w)


@final
@dataclass(frozen=True, eq=False)
class Shrinkage:
    """v_g -> max(1 - r_g / |v_g|, 0) v_g for groups g of the entries of a vector.

    Attributes:
        factors: max(1 - r_g / |v_g|, 0), a number for each group `(k,)`; 1 where r_g is zero.
        norms: |v_g|.
        unit: v / |v_g|, zero where that is.
        dead: whether |v_g| <= r_g.
    """

    factors: Tensor
    norms: Tensor
    unit: Tensor
    dead: Tensor


def norms_of(v: Tensor, labels: Tensor, count: int) -> Tensor:
    """|v_g| for each group `(k,)`; its derivative at zero is zero."""
    with torch.no_grad():
        scale = v.abs().max()
        scale = torch.where((scale > 0) & scale.isfinite(), scale, torch.ones_like(scale))
    squares = summed((v / scale).square(), labels, count)
    return scale * torch.where(squares == 0, squares, torch.where(squares == 0, 1.0, squares).sqrt())


def summed(v: Tensor, labels: Tensor, count: int) -> Tensor:
    """The sums over groups `(k,)`."""
    if count == 1:
        return v.sum().reshape(1)
    return torch.zeros(count, dtype=v.dtype, device=v.device).index_add(0, labels, v)


def shrinkage(v: Tensor, radii: Tensor | float, labels: Tensor, count: int) -> Shrinkage:
    """How v shrinks by radii, `(k,)` or one number."""
    norms = norms_of(v, labels, count)
    dead = below(norms, radii)
    safe = torch.where(norms == 0, 1.0, norms)
    factors = torch.where(dead, 0.0, 1 - radii / safe)
    unit = torch.where(norms[labels] < tiny(v), 0.0, v / safe[labels])
    return Shrinkage(factors, norms, unit, dead)


def group_derivative(shrunk: Shrinkage, labels: Tensor, count: int) -> ProxDerivative:
    """P = c_g I + (1 - c_g) e_g e_g' in each group that is alive, zero in others; c the factors, e the unit vectors."""
    alive = (~shrunk.dead).to(shrunk.factors.dtype)
    parts = (shrunk.factors, torch.where(shrunk.dead[labels], 0.0, shrunk.unit), alive)

    def product(kind: str, parts: Parts, w: Tensor) -> Tensor:
        c, e, alive = parts
        along = e * summed(e * w, labels, count)[labels]
        across = w - along
        if kind == "times":
            return c[labels] * across + alive[labels] * along
        if kind == "inverse":
            return _reciprocal(c)[labels] * across + alive[labels] * along
        rest = torch.where(alive > 0, _reciprocal(1 - c), torch.ones_like(c))
        return rest[labels] * across + (1 - alive)[labels] * along

    return ProxDerivative(parts, *(on_vector(partial(product, kind)) for kind in ("times", "inverse", "co_inverse")))


def _reciprocal(c: Tensor) -> Tensor:
    return torch.where(c > 0, 1 / torch.where(c > 0, c, 1.0), 0.0)
