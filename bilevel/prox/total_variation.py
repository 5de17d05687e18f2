"""Total variation along a chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._tree import Tree, ravel
from bilevel.arguments.fits import demand_types
from bilevel.arguments.shapes import Shape, demand_shapes
from bilevel.prox.conjugate import Conjugate
from bilevel.prox.derivative import Parts, ProxDerivative, projection
from bilevel.prox.every_row import for_every_row
from bilevel.prox.structured import on_vector
from bilevel.prox.taut_string import jumps
from bilevel.prox.term import AbstractProxTerm, demand_number, outside, tiny


@final
@dataclass(frozen=True, eq=False)
class TV1D(AbstractProxTerm):
    """h(y) = sum_k w_k |y_{k+1} - y_k|, w >= 0.

    With (D y)_k = y_{k+1} - y_k and s = sign(D y) the map is

        prox_{t h}(v) = M (v - t D' (w o s)), M: the means over the pieces on which y is constant.

    The pieces are found exactly, by dynamic programming, so that the error is that of a sum. On them the derivative in
    v is M, and that in w is -t M D' diag(s).

    y is taken as one vector. Cost: O(q), in Python, on the CPU.

    Source: Johnson, "A dynamic programming algorithm for the fused lasso and L0-segmentation", JCGS 22 (2013).

    Args:
        weight: w: a number for all differences, or a tensor `(q - 1,)`. An estimate at a negative weight ends with
            `Status.nonfinite`.

    Example:
        >>> TV1D(1.0).prox(torch.tensor([0.0, 0.0, 4.0]), 1.0)
        tensor([0.5000, 0.5000, 3.0000])
    """

    weight: float | Tensor = 1.0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_number("TV1D", "weight", self.weight)
        if isinstance(self.weight, Tensor):
            axes = "k" if self.weight.dim() else ""
            demand_shapes("TV1D", {"weight": Shape(axes, kind="number", finite=False)}, vars(self))

    def value(self, y: Tree) -> Tensor:
        flat = ravel(y, "y")[0]
        return (self._weights(flat) * flat.diff().abs()).sum()

    def prox(self, v: Tree, step: Tensor | float) -> Tree:
        flat, structure = ravel(v, "v")
        s, labels = self._pieces(flat, step)
        return structure.unravel(means((labels,), flat - pulled_back(step * self._weights(flat) * s)))

    def margin(self, v: Tree, step: Tensor | float) -> Tensor:
        flat = ravel(v, "v")[0]
        y, w = ravel(self.prox(v, step))[0], step * self._weights(flat)
        force = (y - flat).cumsum(0)[:-1].abs()
        size = (flat.max() - flat.min()).clamp_min(tiny(flat))
        gaps = torch.where(y.diff() != 0, y.diff().abs() / size, (w - force) / torch.where(w > 0, w, 1.0))
        gaps = torch.where(w > 0, gaps, torch.where(w < 0, torch.nan, torch.ones_like(gaps)))
        return torch.cat([gaps, torch.ones_like(flat[:1])]).min()

    def derivative(self, v: Tree, step: Tensor | float) -> ProxDerivative:
        return projection((self._pieces(ravel(v, "v")[0], step)[1],), on_vector(means))

    def active(self, v: Tree, step: Tensor | float) -> Tensor:
        return self._pieces(ravel(v, "v")[0], step)[0]

    def conjugate(self) -> Conjugate:
        return Conjugate(self)

    def conjugate_value(self, u: Tree) -> Tensor:
        flat = ravel(u, "u")[0]
        sums, size = flat.cumsum(0), flat.abs().sum()
        w = torch.cat([self._weights(flat), torch.zeros_like(flat[:1])])
        return outside(sums.abs() - w, size, len(flat)).sum()

    def _weights(self, flat: Tensor) -> Tensor:
        w = torch.as_tensor(self.weight, dtype=flat.dtype, device=flat.device)
        if w.dim() and len(w) != len(flat) - 1:
            raise ValueError(
                f"`TV1D(weight=...)` must be a number, or hold {len(flat) - 1}, one for each difference. Got {len(w)}."
            )
        return w.expand(len(flat) - 1)

    def _pieces(self, flat: Tensor, step: Tensor | float) -> tuple[Tensor, Tensor]:
        """The signs of the jumps `(q - 1,)`, and the number of the piece of each entry; weight zero ties none."""
        w = step * self._weights(flat)
        s = for_every_row(jumps, flat, w)
        return s, torch.cat([s.new_zeros(1), ((s != 0) | (w == 0)).long().cumsum(0)])


def pulled_back(z: Tensor) -> Tensor:
    """D' z `(q,)`, with (D y)_k = y_{k+1} - y_k."""
    zero = z.new_zeros(1)
    return torch.cat([zero, z]) - torch.cat([z, zero])


def means(parts: Parts, w: Tensor) -> Tensor:
    """The means of w over the pieces, for labels below q, at each entry."""
    (labels,) = parts
    zero = torch.zeros_like(w)
    sums, counts = zero.scatter_add(0, labels, w), zero.scatter_add(0, labels, torch.ones_like(w))
    return (sums / counts.clamp_min(1)).gather(0, labels)
