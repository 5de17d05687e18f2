"""A cone program whose numbers are affine functions of parameters, and the inner problem that it is at a fixed x."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._numerics.cone_programs import ConeProgram, Sparse
from bilevel._numerics.cones import Cone


@final
@dataclass(frozen=True, eq=False)
class AffineMap:
    """A sparse matrix T and a vector: p -> T p + offset, for rows of a batch.

    Attributes:
        i: the row of each entry of T.
        j: its column.
        values: the entry.
        offset: `(size,)`.
    """

    i: Tensor
    j: Tensor
    values: Tensor
    offset: Tensor

    def __call__(self, p: Tensor) -> Tensor:
        """T p + offset: `(*batch, columns) -> (*batch, size)`; differentiable."""
        start = self.offset.to(p).expand(*p.shape[:-1], -1)
        return start.index_add(-1, self.i.to(p.device), self.values.to(p) * p[..., self.j.to(p.device)])

    def pulled(self, r: Tensor, columns: int) -> Tensor:
        """T'r: `(rows, size) -> (rows, columns)`."""
        i, j = self.i.to(r.device), self.j.to(r.device)
        return r.new_zeros(len(r), columns).index_add_(1, j, self.values.to(r) * r[:, i])


@final
@dataclass(frozen=True, eq=False)
class Pattern:
    """Where the entries of a sparse matrix are, and its numbers as functions of the parameters."""

    i: Tensor
    j: Tensor
    shape: tuple[int, int]
    numbers: AffineMap

    def at(self, p: Tensor) -> Sparse:
        """The matrices at parameters `(rows, columns)`."""
        return Sparse(self.i.to(p.device), self.j.to(p.device), self.numbers(p), self.shape)


@final
@dataclass(frozen=True, eq=False)
class ConeForm:
    """Min z'P(p)z / 2 + c(p)'z  s.t.  A(p) z + s = b(p), s in K, and y = E z + e.

    Attributes:
        P: symmetric, all of its entries.
        A: the rows.
        c: `(n,)`.
        b: `(m,)`.
        cones: K.
        y: z -> y, for one y as a vector.
        parameters: how many p there are.
    """

    P: Pattern
    A: Pattern
    c: AffineMap
    b: AffineMap
    cones: tuple[Cone, ...]
    y: AffineMap
    parameters: int

    def at(self, p: Tensor) -> ConeProgram:
        """The programs at p `(rows, parameters)`."""
        return ConeProgram(self.P.at(p), self.A.at(p), self.c(p), self.b(p), self.cones)

    def pulled(self, program: ConeProgram, z: Tensor, w: Tensor, u: Tensor, r: Tensor) -> Tensor:
        """The derivative in p of u'(P z + c + A'w) + r'(A z - b), all vectors fixed: `(rows, parameters)`."""
        P, A = program.P, program.A
        parts = (
            (self.P.numbers, u[:, P.i] * z[:, P.j]),
            (self.A.numbers, u[:, A.j] * w[:, A.i] + r[:, A.i] * z[:, A.j]),
            (self.c, u),
            (self.b, -r),
        )
        found = torch.zeros(len(z), self.parameters, dtype=z.dtype, device=z.device)
        for affine, weights in parts:
            found += affine.pulled(weights, self.parameters)
        return found


@final
@dataclass(frozen=True, eq=False)
class FlatConeProgram:
    """The cone programs of an inner problem at x, side by side in float64, for inner solvers: `Objective.cones`.

    Attributes:
        program: one row for each problem of the batch.
        recover: z -> y, in the order of the vectors y that solvers return.
        parameters: p at x `(*batch, parameters)`, with a graph from x where that has one.
    """

    program: ConeProgram
    recover: AffineMap
    parameters: Tensor
