"""Convex quadratics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._tree import Structure, Tree, ravel, tree_leaves
from bilevel.arguments.fits import demand_type, demand_types
from bilevel.arguments.shapes import Shape, demand_shapes
from bilevel.prox.conjugate import Conjugate
from bilevel.prox.derivative import Parts, ProxDerivative, diagonal
from bilevel.prox.structured import on_vector
from bilevel.prox.term import AbstractProxTerm, demand_number


@final
@dataclass(frozen=True, eq=False)
class Quadratic(AbstractProxTerm):
    """h(y) = y' Q y / 2 + c' y, Q positive semidefinite; prox_{t h}(v) = (I + t Q)^-1 (v - t c).

    The derivative in v is (I + t Q)^-1; derivatives in Q and c are those of autograd, of any order. There is no kink.
    The conjugate is (u - c)' Q^+ (u - c) / 2 where u - c is in the range of Q, else infinite.

    y is taken as one vector `(q,)`. Cost: O(q^3) for a matrix Q, once an evaluation; O(q) for a diagonal one.

    Args:
        Q: a matrix `(q, q)`, its diagonal `(q,)`, or a number q for q I. An estimate where it is not positive
            semidefinite ends with `Status.nonfinite`.
        c: a number, a vector `(q,)`, or a structure like y.

    Example:
        >>> Quadratic(torch.diag(torch.tensor([1.0, 3.0]))).prox(torch.tensor([2.0, 4.0]), 1.0)
        tensor([1., 1.])
    """

    Q: float | Tensor
    c: Tree = 0.0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_number("Quadratic", "Q", self.Q)
        for leaf in tree_leaves(self.c, "`Quadratic(c=...)`"):
            demand_type("Quadratic", "c", leaf, float | Tensor)
        if isinstance(self.Q, Tensor):
            axes = ("", "q", "q q")
            shape = Shape(axes[min(self.Q.dim(), 2)] if self.Q.dim() < 2 else "q r", kind="number", finite=False)
            demand_shapes("Quadratic", {"Q": shape}, vars(self))
            if self.Q.dim() == 2 and self.Q.shape[0] != self.Q.shape[1]:
                raise ValueError(f"`Quadratic(Q=...)` must be square. Got shape {tuple(self.Q.shape)}.")

    def value(self, y: Tree) -> Tensor:
        flat, structure = ravel(y, "y")
        Q, c = self._tensors(structure)
        return flat @ (Q @ flat if Q.dim() == 2 else Q * flat) / 2 + c @ flat

    def prox(self, v: Tree, step: Tensor | float) -> Tree:
        flat, structure = ravel(v, "v")
        Q, c = self._tensors(structure)
        b = flat - step * c
        if Q.dim() < 2:
            return structure.unravel(b / (1 + step * Q))
        identity = torch.eye(len(flat), dtype=flat.dtype, device=flat.device)
        return structure.unravel(torch.linalg.solve_ex(identity + step * Q, b.unsqueeze(-1)).result.squeeze(-1))

    def margin(self, v: Tree, step: Tensor | float) -> Tensor:
        flat, structure = ravel(v, "v")
        Q, _ = self._tensors(structure)
        q = torch.linalg.eigvalsh(torch.where(Q.isfinite(), Q, 0.0)) if Q.dim() == 2 else Q.reshape(-1)
        good = (q.min() >= -_rounding(q)) & Q.isfinite().all()
        return torch.where(good, torch.ones_like(flat[0]), torch.nan)

    def derivative(self, v: Tree, step: Tensor | float) -> ProxDerivative:
        flat, structure = ravel(v, "v")
        Q, _ = self._tensors(structure)
        if Q.dim() < 2:
            return diagonal(structure.unravel(1 / (1 + step * Q.expand(len(flat)))))
        q, V = torch.linalg.eigh(torch.where(Q.isfinite(), Q, 0.0))
        p = 1 / (1 + step * q)
        rest = torch.where(q.abs() > _rounding(q), step * q * p, 0.0)
        return ProxDerivative((V, p, rest), on_vector(_times), on_vector(_inverse), on_vector(_co_inverse))

    def shift(self, v: Tree, step: Tensor | float) -> Tree:
        """t c, as a structure like v."""
        structure = ravel(v, "v")[1]
        return structure.unravel(step * self._tensors(structure)[1])

    def conjugate(self) -> Conjugate:
        return Conjugate(self)

    def conjugate_value(self, u: Tree) -> Tensor:
        flat, structure = ravel(u, "u")
        Q, c = self._tensors(structure)
        q, along = Q.expand(len(flat)) if Q.dim() < 2 else Q, flat - c
        if Q.dim() == 2:
            q, V = torch.linalg.eigh(Q)
            along = V.mT @ along
        in_range = q > _rounding(q)
        off = torch.where(in_range, 0.0, along.abs()).max() > len(flat) ** 0.5 * _rounding(flat.abs() + c.abs())
        found = (along.square() / torch.where(in_range, q, torch.inf)).sum() / 2
        return torch.where(off, torch.inf, found)

    @property
    def separable(self) -> bool:
        return not isinstance(self.Q, Tensor) or self.Q.dim() < 2

    def _tensors(self, y: Structure) -> tuple[Tensor, Tensor]:
        """Q as a number, a vector or a symmetric matrix, and c as a vector."""
        Q = torch.as_tensor(self.Q, dtype=y.dtype, device=y.device)
        if Q.dim() and Q.shape[-1] != y.size:
            raise ValueError(f"`Quadratic(Q=...)` must be for the {y.size} entries of y. Got shape {tuple(Q.shape)}.")
        return (Q + Q.mT) / 2 if Q.dim() == 2 else Q, as_vector(self.c, y, "Quadratic(c=...)")


def as_vector(value: Tree, y: Structure, name: str) -> Tensor:
    """A number, a vector, or a structure like y, as a vector `(q,)`.

    Raises:
        ValueError: if it is none of them.
    """
    if isinstance(value, float | int) or (isinstance(value, Tensor) and not value.dim()):
        return torch.as_tensor(value, dtype=y.dtype, device=y.device).expand(y.size)
    if isinstance(value, Tensor) and value.shape == (y.size,):
        return value.to(y.dtype)
    return y.ravel(value, name)


def _rounding(numbers: Tensor) -> Tensor:
    return 8 * len(numbers) * torch.finfo(numbers.dtype).eps * numbers.abs().max()


def _times(parts: Parts, w: Tensor) -> Tensor:
    V, p, _ = parts
    return V @ (p * (V.mT @ w))


def _inverse(parts: Parts, w: Tensor) -> Tensor:
    V, p, _ = parts
    return V @ ((V.mT @ w) / p)


def _co_inverse(parts: Parts, w: Tensor) -> Tensor:
    V, _, rest = parts
    return V @ torch.where(rest > 0, (V.mT @ w) / torch.where(rest > 0, rest, 1.0), 0.0)
