"""Projections onto convex cones, their derivatives in closed form, and how far a point is from a kink of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor

from bilevel._numerics.exponential_cone import exponential_faces
from bilevel._numerics.rows import matrix_times, positive_or_one

ConeKind: TypeAlias = Literal["zero", "nonnegative", "second-order", "psd", "exponential"]

_HALF = math.sqrt(0.5)


@final
@dataclass(frozen=True)
class Cone:
    """Neighbouring blocks of a vector that are to lie in cones of one kind and size.

    Attributes:
        kind: {0}; y >= 0; |x| <= t for (t, x); symmetric positive semidefinite matrices of this order, as their upper
            triangles column by column with sqrt(2) off the diagonal; the closure of {y > 0, y exp(x / y) <= z}.
        count: how many blocks.
        order: entries of a block; rows of a matrix for "psd"; 1 for the first two.
    """

    kind: ConeKind
    count: int
    order: int

    @property
    def size(self) -> int:
        """Entries of a block."""
        return self.order * (self.order + 1) // 2 if self.kind == "psd" else self.order


@final
@dataclass(frozen=True, eq=False)
class Face:
    """What a projection is at a point v, to first order: Pi(v), and D Pi(v) = Q diag(d) Q', for blocks side by side.

    Attributes:
        projection: Pi(v) `(rows, count, size)`.
        Q: orthogonal matrices `(rows, count, size, size)`; None: the identity.
        d: between 0 and 1 `(rows, count, size)`, exactly 0 and 1 where it is one of them.
        margin: the distance of v from a point where D Pi jumps `(rows, count)`, as far as the order of magnitude goes.
    """

    projection: Tensor
    Q: Tensor | None
    d: Tensor
    margin: Tensor


@final
@dataclass(frozen=True, eq=False)
class Faces:
    """The faces of a product of cones at v `(rows, m)`.

    Attributes:
        cones: the cones, in order.
        parts: a face for each.
        none: no entries of each row `(rows, 0)`.
    """

    cones: tuple[Cone, ...]
    parts: tuple[Face, ...]
    none: Tensor

    @staticmethod
    def at(cones: tuple[Cone, ...], v: Tensor) -> Faces:
        """Those at v."""
        blocks = _blocks(cones, v)
        parts = tuple(_FACES[cone.kind](block, cone) for cone, block in zip(cones, blocks, strict=True))
        return Faces(cones, parts, v[:, :0])

    @property
    def projection(self) -> Tensor:
        """Pi(v) `(rows, m)`."""
        return torch.cat([self.none, *(part.projection.flatten(1) for part in self.parts)], -1)

    @property
    def d(self) -> Tensor:
        """The eigenvalues of D Pi(v) `(rows, m)`."""
        return torch.cat([self.none, *(part.d.flatten(1) for part in self.parts)], -1)

    @property
    def margin(self) -> Tensor:
        """The least margin `(rows,)`; infinite where nothing can jump."""
        endless = self.none.new_full((len(self.none), 1), torch.inf)
        return torch.cat([endless, *(part.margin.flatten(1) for part in self.parts)], -1).amin(-1)

    def turned(self, v: Tensor, back: bool = False) -> Tensor:
        """Q'v, or Q v where `back`, for v `(rows, m)`, or for matrices `(rows, m, k)`."""
        found = [v[:, :0]]
        for part, block in zip(self.parts, _blocks(self.cones, v), strict=True):
            if part.Q is not None:
                Q = part.Q if back else part.Q.mT
                block = matrix_times(Q, block) if v.dim() == 2 else Q @ block
            found.append(block.flatten(1, 2))
        return torch.cat(found, 1)


def _blocks(cones: tuple[Cone, ...], v: Tensor) -> list[Tensor]:
    parts = torch.split(v, [cone.count * cone.size for cone in cones], 1) if cones else ()
    return [part.reshape(len(v), cone.count, cone.size, *v.shape[2:]) for cone, part in zip(cones, parts, strict=True)]


def _zero(v: Tensor, _: Cone) -> Face:
    return Face(torch.zeros_like(v), None, torch.zeros_like(v), torch.full_like(v[..., 0], torch.inf))


def _nonnegative(v: Tensor, _: Cone) -> Face:
    return Face(v.clamp_min(0), None, (v > 0).to(v), v.abs()[..., 0])


def _second_order(v: Tensor, cone: Cone) -> Face:
    """Of (t, x), |x| <= t. Where |t| < |x|, eigenvectors are (1, e), (1, -e) and what is orthogonal, e = x / |x|."""
    t, x = v[..., :1], v[..., 1:]
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    e = x / positive_or_one(length)
    inside, polar = length <= t, length <= -t
    middle = ((t + length) / 2) * torch.cat([torch.ones_like(t), e], -1)
    projection = torch.where(inside, v, torch.where(polar, 0.0, middle))
    share = ((1 + t / positive_or_one(length)) / 2).expand(*v.shape[:-1], max(cone.order - 2, 0))
    d = torch.cat([torch.ones_like(t), torch.zeros_like(t), share], -1)[..., : cone.order]
    d = torch.where(inside, 1.0, torch.where(polar, 0.0, d))
    if cone.order == 1:
        return Face(projection, None, d, v.abs()[..., 0])
    # A reflection that sends the first axis to e, or to -e where that would cancel.
    sign = torch.where(e[..., :1] > 0, -1.0, 1.0).to(v)
    w = -sign * e
    w = torch.cat([w[..., :1] + 1, w[..., 1:]], -1)
    w = w / positive_or_one(torch.linalg.vector_norm(w, dim=-1, keepdim=True))
    k = cone.order - 1
    H = torch.eye(k, dtype=v.dtype, device=v.device) - 2 * w.unsqueeze(-1) * w.unsqueeze(-2)
    along = e.unsqueeze(-1) * _HALF
    bottom = torch.cat([along, -along, H[..., 1:]], -1)
    top = torch.cat([torch.full_like(bottom[..., :1, :2], _HALF), torch.zeros_like(bottom[..., :1, 2:])], -1)
    Q = torch.cat([top, bottom], -2)
    Q = torch.where((inside | polar).unsqueeze(-1), torch.eye(cone.order, dtype=v.dtype, device=v.device), Q)
    return Face(projection, Q, d, (length - t.abs()).abs()[..., 0])


def _psd(v: Tensor, cone: Cone) -> Face:
    """Eigenvalues below zero are cut off; d of the pair i, j is (l_i^+ - l_j^+) / (l_i - l_j)."""
    n = cone.order
    column, row = torch.tril_indices(n, n, device=v.device)  # the upper triangle, column by column
    one = torch.ones((), dtype=v.dtype, device=v.device)
    scale = torch.where(column == row, one, _HALF * one)
    matrix = v.new_zeros(*v.shape[:-1], n, n)
    matrix[..., row, column] = v * scale
    matrix[..., column, row] = v * scale
    values, U = torch.linalg.eigh(matrix)
    kept = values.clamp_min(0)
    projection = (U * kept.unsqueeze(-2)) @ U.mT
    i, j = row, column
    difference = values[..., i] - values[..., j]
    positive = (values > 0).to(v)
    mixed = (kept[..., i] - kept[..., j]) / torch.where(difference == 0, 1.0, difference)
    d = torch.where(positive[..., i] == positive[..., j], positive[..., i], mixed)
    # The columns of Q: the symmetric parts of u_i u_j', of length one, as vectors.
    pairs = U[..., :, None, i] * U[..., None, :, j]
    pairs = (pairs + pairs.transpose(-3, -2)) * torch.where(i == j, 0.5 * one, _HALF * one)
    Q = pairs[..., row, column, :] / scale.unsqueeze(-1)
    return Face(projection[..., row, column] / scale, Q, d, values.abs().amin(-1))


def _exponential(v: Tensor, _: Cone) -> Face:
    return Face(*exponential_faces(v))


_FACES: dict[ConeKind, Callable[[Tensor, Cone], Face]] = {
    "zero": _zero,
    "nonnegative": _nonnegative,
    "second-order": _second_order,
    "psd": _psd,
    "exponential": _exponential,
}
