"""The simplex."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._tree import Tree, ravel
from bilevel.arguments.fits import demand_types
from bilevel.arguments.shapes import Shape, demand_shapes
from bilevel.prox.conjugate import Conjugate
from bilevel.prox.derivative import ProxDerivative, projection
from bilevel.prox.structured import centered, on_vector
from bilevel.prox.term import AbstractProxTerm, demand_number, outside, tiny


@final
@dataclass(frozen=True, eq=False)
class Simplex(AbstractProxTerm):
    """h(y) = 0 where y >= 0 and sum_i y_i = s, infinite elsewhere; prox_{t h}(v)_i = max(v_i - theta, 0).

    The projection, whatever t, with the theta that makes the sum s. On the support S the derivative is I - 1 1' / |S|,
    and 0 off it; that in s is 1 / |S| on S. The conjugate is s max_i u_i.

    y is taken as one vector. Cost: one sort.

    Source: Held, Wolfe and Crowder, "Validation of subgradient optimization", Math. Prog. 6 (1974).

    Args:
        total: s > 0, a number. An estimate at a negative one ends with `Status.nonfinite`.

    Example:
        >>> Simplex().prox(torch.tensor([1.0, 0.5, -2.0]), 0.1)
        tensor([0.7500, 0.2500, 0.0000])
    """

    total: float | Tensor = 1.0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_number("Simplex", "total", self.total)
        demand_shapes("Simplex", {"total": Shape("", kind="number", finite=False)}, vars(self))

    def value(self, y: Tree) -> Tensor:
        flat = ravel(y, "y")[0]
        total = _number(self.total, flat)
        off = (flat.sum() - total).abs()
        return outside(off, flat.abs().max() + total.abs(), len(flat)) + outside(-flat.min(), 0.0, 1)

    def prox(self, v: Tree, step: Tensor | float) -> Tree:
        flat, structure = ravel(v, "v")
        return structure.unravel((flat - threshold(flat, self.total)).relu())

    def margin(self, v: Tree, step: Tensor | float) -> Tensor:
        flat = ravel(v, "v")[0]
        distance = (flat - threshold(flat, self.total)).abs()
        total = _number(self.total, flat)
        gap = distance.min() / distance.max().clamp_min(tiny(flat))
        return torch.where(total > 0, gap, torch.where(total < 0, torch.nan, torch.ones_like(gap)))

    def derivative(self, v: Tree, step: Tensor | float) -> ProxDerivative:
        flat = ravel(self.prox(v, step))[0]
        return projection(((flat > 0).to(flat.dtype),), on_vector(centered))

    def active(self, v: Tree, step: Tensor | float) -> Tensor:
        return (ravel(self.prox(v, step))[0] > 0).long()

    def conjugate(self) -> Conjugate:
        return Conjugate(self)

    def conjugate_value(self, u: Tree) -> Tensor:
        return self.total * ravel(u, "u")[0].max()


def threshold(v: Tensor, total: Tensor | float) -> Tensor:
    """The theta with sum_i max(v_i - theta, 0) = total; differentiable in both, the support being what it is."""
    total = _number(total, v)
    with torch.no_grad():
        ordered = v.sort(descending=True).values
        sums, counts = ordered.cumsum(0), torch.arange(1, len(v) + 1, dtype=v.dtype, device=v.device)
        last = (ordered * counts > sums - total).sum()
        theta = torch.take_along_dim((sums - total) / counts, last.clamp_min(1).reshape(1) - 1, 0).squeeze(0)
        S = (v > theta).to(v.dtype)
        none = S.sum() == 0  # a total of zero
        S = torch.where(none, (v == ordered[0]).to(v.dtype), S)
    return (torch.where(S > 0, v, 0.0).sum() - total) / S.sum()


def _number(value: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)
