"""The ball of the L1 norm, and its conjugate, the L-infinity norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._tree import Tree, ravel
from bilevel.arguments.fits import demand_types
from bilevel.arguments.shapes import Shape, demand_shapes
from bilevel.prox.derivative import ProxDerivative, complement, projection
from bilevel.prox.simplex import threshold
from bilevel.prox.structured import centered, on_vector
from bilevel.prox.term import AbstractProxTerm, below, demand_number, outside, relative_gap


@final
@dataclass(frozen=True, eq=False)
class L1Ball(AbstractProxTerm):
    """h(y) = 0 where sum_i |y_i| <= r, infinite elsewhere; prox_{t h}(v)_i = sign(v_i) max(|v_i| - theta, 0).

    The projection, whatever t: theta = 0 inside; outside, the theta that makes the sum r. There, on the support S, with
    s the signs, the derivative in v is I - s s' / |S|, that in r is s / |S|; off it they are 0.

    y is taken as one vector. Cost: one sort.

    Source: Duchi, Shalev-Shwartz, Singer and Chandra, "Efficient projections onto the l1-ball", ICML 2008.

    Args:
        radius: r >= 0, a number. An estimate at a negative one ends with `Status.nonfinite`.

    Example:
        >>> L1Ball(1.0).prox(torch.tensor([1.0, -0.5, 0.1]), 0.1)
        tensor([ 0.7500, -0.2500,  0.0000])
    """

    radius: float | Tensor

    def __post_init__(self) -> None:
        demand_types(self)
        demand_number("L1Ball", "radius", self.radius)
        demand_shapes("L1Ball", {"radius": Shape("", kind="number", finite=False)}, vars(self))

    def value(self, y: Tree) -> Tensor:
        flat = ravel(y, "y")[0]
        return outside(flat.abs().sum() - self.radius, self.radius, len(flat))

    def prox(self, v: Tree, step: Tensor | float) -> Tree:
        flat, structure = ravel(v, "v")
        return structure.unravel(flat - clipped(flat, self.radius))

    def margin(self, v: Tree, step: Tensor | float) -> Tensor:
        flat = ravel(v, "v")[0]
        size = flat.abs()
        within, at_bound = below(size.sum(), self.radius), relative_gap(size.sum(), self.radius)
        gaps = relative_gap(size, threshold(size, self.radius).clamp_min(0)).min()
        found = torch.where(within, at_bound, torch.minimum(at_bound, gaps))
        return torch.where(torch.as_tensor(self.radius, device=flat.device) == 0, torch.ones_like(found), found)

    def derivative(self, v: Tree, step: Tensor | float) -> ProxDerivative:
        flat = ravel(v, "v")[0]
        within, signs = _face(flat, self.radius)
        return projection((within.to(flat.dtype), signs), on_vector(_times))

    def active(self, v: Tree, step: Tensor | float) -> Tensor:
        flat = ravel(v, "v")[0]
        within, signs = _face(flat, self.radius)
        return torch.where(within, 2, signs.long())

    def conjugate(self) -> LInf:
        return LInf(self.radius)


@final
@dataclass(frozen=True, eq=False)
class LInf(AbstractProxTerm):
    """h(y) = w max_i |y_i|, w >= 0; prox_{t h}(v)_i = sign(v_i) min(|v_i|, theta).

    theta = 0 where sum_i |v_i| <= t w; else that with sum_i max(|v_i| - theta, 0) = t w. On S, where |v_i| > theta,
    with s the signs, the derivative in v is s s' / |S| and that in w is -t s / |S|; off it they are I and 0.

    y is taken as one vector. Cost: one sort.

    Args:
        weight: w >= 0, a number. An estimate at a negative one ends with `Status.nonfinite`.

    Example:
        >>> LInf(1.0).prox(torch.tensor([3.0, -2.5, 0.1]), 0.5)
        tensor([ 2.5000, -2.5000,  0.1000])
    """

    weight: float | Tensor = 1.0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_number("LInf", "weight", self.weight)
        demand_shapes("LInf", {"weight": Shape("", kind="number", finite=False)}, vars(self))

    def value(self, y: Tree) -> Tensor:
        return self.weight * ravel(y, "y")[0].abs().max()

    def prox(self, v: Tree, step: Tensor | float) -> Tree:
        flat, structure = ravel(v, "v")
        return structure.unravel(clipped(flat, step * self.weight))

    def margin(self, v: Tree, step: Tensor | float) -> Tensor:
        return L1Ball(step * self.weight).margin(v, step)

    def derivative(self, v: Tree, step: Tensor | float) -> ProxDerivative:
        return complement(L1Ball(step * self.weight).derivative(v, step))

    def active(self, v: Tree, step: Tensor | float) -> Tensor:
        return L1Ball(step * self.weight).active(v, step)

    def conjugate(self) -> L1Ball:
        return L1Ball(self.weight)


def clipped(v: Tensor, radius: Tensor | float) -> Tensor:
    """v minus its projection onto the ball of the L1 norm: sign(v) min(|v|, theta)."""
    size = v.abs()
    theta = threshold(size, radius)
    outer = torch.where(size > theta, v.sign() * theta, v)
    return torch.where(below(size.sum(), radius), 0.0, outer)


def _face(v: Tensor, radius: Tensor | float) -> tuple[Tensor, Tensor]:
    """Whether v is within the ball, and the signs on the support of its projection."""
    size = v.abs()
    return below(size.sum(), radius), v.sign() * (size > threshold(size, radius))


def _times(parts: tuple[Tensor, ...], w: Tensor) -> Tensor:
    within, signs = parts
    return torch.where(within > 0, w, centered((signs,), w))
