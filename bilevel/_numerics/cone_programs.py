"""Cone programs: min z'Pz / 2 + c'z  s.t.  A z + s = b, s in K; their residual, its derivative, and Newton's method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._numerics.cones import Cone, Faces
from bilevel._numerics.rows import matrix_times, positive_or_one, row_moduli
from bilevel._numerics.saddle_point import SaddlePoint

_LESS = 0.5  # what a Newton step must reduce the violation to: it converges quadratically, or has arrived
_PROXIMAL = 1e-9  # of the size of the matrix: added where variables are not unique
# Below it an eigenvalue of D Pi counts as zero: its weight in the matrix, its inverse, would leave no digit beside it.
_HELD = 1e-12
_NOTHING = 1e-11  # absolute, as tolerances of interior-point methods are


@final
@dataclass(frozen=True, eq=False)
class Sparse:
    """Matrices with one pattern, a row of values each.

    Attributes:
        i: the row of each entry.
        j: its column.
        values: `(rows, entries)`.
        shape: of one matrix.
    """

    i: Tensor
    j: Tensor
    values: Tensor
    shape: tuple[int, int]

    def times(self, u: Tensor) -> Tensor:
        """A u for u `(rows, columns)`."""
        return u.new_zeros(len(u), self.shape[0]).index_add_(1, self.i, self.values * u[:, self.j])

    def transposed_times(self, r: Tensor) -> Tensor:
        """A'r."""
        return r.new_zeros(len(r), self.shape[1]).index_add_(1, self.j, self.values * r[:, self.i])

    def dense(self) -> Tensor:
        """`(rows, *shape)`."""
        found = self.values.new_zeros(len(self.values), self.shape[0] * self.shape[1])
        return found.index_add_(1, self.i * self.shape[1] + self.j, self.values).reshape(len(self.values), *self.shape)


@final
@dataclass(frozen=True, eq=False)
class ConeProgram:
    """A batch of cone programs with one pattern: P symmetric, vectors `(rows, n)` and `(rows, m)`."""

    P: Sparse
    A: Sparse
    c: Tensor
    b: Tensor
    cones: tuple[Cone, ...]

    def row(self, k: int) -> ConeProgram:
        """One of them, as a batch of one."""
        P, A = (replace(each, values=each.values[k : k + 1]) for each in (self.P, self.A))
        return ConeProgram(P, A, self.c[k : k + 1], self.b[k : k + 1], self.cones)


@final
@dataclass(frozen=True, eq=False)
class ConePoint:
    """A primal-dual point: z, and v with s = Pi(v) and w = (Pi(v) - v) / t, so that s'w = 0 by construction.

    Attributes:
        program: the program.
        z: `(rows, n)`.
        v: `(rows, m)`.
        t: the ratio of the sizes of what s is a difference of, and of w `(rows, 1)`.
    """

    program: ConeProgram
    z: Tensor
    v: Tensor
    t: Tensor

    @staticmethod
    def of(program: ConeProgram, z: Tensor, w: Tensor) -> ConePoint:
        """From the variables and the multipliers of the rows, w in the dual cone."""
        image = program.A.times(z)
        primal, dual = _size(program.b, image), _size(program.c, program.P.times(z), w)
        s, t = program.b - image, (primal / dual).unsqueeze(-1)
        return ConePoint(program, z, s - t * w, t)

    @property
    def faces(self) -> Faces:
        """The projection at v."""
        return Faces.at(self.program.cones, self.v)

    def multipliers(self, faces: Faces) -> Tensor:
        """W."""
        return (faces.projection - self.v) / self.t

    def residuals(self, faces: Faces) -> tuple[Tensor, Tensor]:
        """P z + c + A'w and A z + s - b."""
        p = self.program
        stationarity = p.P.times(self.z) + p.c + p.A.transposed_times(self.multipliers(faces))
        return stationarity, p.A.times(self.z) + faces.projection - p.b

    def violation(self, faces: Faces) -> Tensor:
        """The largest entry of the residuals, relative to the largest of what cancels in them: `(rows,)`."""
        p = self.program
        first, second = self.residuals(faces)
        pulls = (p.P.times(self.z), p.c, p.A.transposed_times(self.multipliers(faces)))
        reaches = (p.A.times(self.z), faces.projection, p.b)
        worst = torch.maximum(
            row_moduli(first).squeeze(-1) / _size(*pulls), row_moduli(second).squeeze(-1) / _size(*reaches)
        )
        return torch.where(worst.isnan(), torch.inf, worst)

    def newton(self, steps: int) -> tuple[ConePoint, Tensor]:
        """After Newton steps on the residuals, as long as they gain, row by row; and the violation there."""
        best, faces = self, self.faces
        error = best.violation(faces)
        for _ in range(steps):
            moved = Reduced.at(best, faces).step()
            there = moved.faces
            now = moved.violation(there)
            better = now < error
            if not bool(better.any()):
                break
            gained = bool((now[better] < _LESS * error[better]).any())
            row = better.unsqueeze(-1)
            best = replace(best, z=torch.where(row, moved.z, best.z), v=torch.where(row, moved.v, best.v))
            error = torch.where(better, now, error)
            faces = best.faces
            if not gained:
                break
        return best, error


@final
@dataclass(frozen=True, eq=False)
class Reduced:
    """The derivative of the residuals in z and in the multipliers of the directions Q in which D Pi(v) = Q diag(d) Q'.

    Where d = 1 the multiplier does not move, where 0 < d < 1 it is eliminated, with weight w = (1 - d) / (t d), and

        [[M, B'], [B, 0]],  M = P + A'Q diag(w) Q'A over 0 < d < 1,  B = the rows of Q'A with d = 0,

    is left: the optimality conditions of an equality-constrained quadratic, symmetric. M is definite on the null space
    of B where z is locally unique.

    Attributes:
        point: where.
        faces: the projection there.
        held: where d = 0 `(rows, m)`.
        weight: w, zero where d is 0 or 1 `(rows, m)`.
    """

    point: ConePoint
    faces: Faces
    held: Tensor
    weight: Tensor

    @staticmethod
    def at(point: ConePoint, faces: Faces) -> Reduced:
        """At a point."""
        d = faces.d
        held = d < _HELD
        weight = torch.where(held, 0.0, (1 - d) / (point.t * torch.where(held, 1.0, d)))
        return Reduced(point, faces, held, weight)

    def rows_times(self, u: Tensor) -> Tensor:
        """Q'A u."""
        return self.faces.turned(self.point.program.A.times(u))

    def rows_transposed(self, r: Tensor) -> Tensor:
        """A'Q r."""
        return self.point.program.A.transposed_times(self.faces.turned(r, back=True))

    def leading(self, u: Tensor) -> Tensor:
        """M u."""
        return self.point.program.P.times(u) + self.rows_transposed(self.weight * self.rows_times(u))

    def blocks(self) -> tuple[Tensor, Tensor]:
        """M `(rows, n, n)` and B `(rows, m, n)`, zero where d is not."""
        program = self.point.program
        rows = self.faces.turned(program.A.dense())
        M = program.P.dense() + rows.mT @ (self.weight.unsqueeze(-1) * rows)
        return (M + M.mT) / 2, torch.where(self.held.unsqueeze(-1), rows, 0.0)

    def step(self) -> ConePoint:
        """The point after a Newton step, a proximal one where z is not unique."""
        at, d = self.point, self.faces.d
        first, second = at.residuals(self.faces)
        turned = self.faces.turned(second)
        M, B = self.blocks()
        size = positive_or_one(torch.diagonal(M, dim1=-2, dim2=-1).amax(-1))
        lost = ~(M.isfinite().flatten(1).all(-1) & B.isfinite().flatten(1).all(-1))
        eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
        M, B = torch.where(lost[:, None, None], eye, M), torch.where(lost[:, None, None], 0.0, B)
        system = SaddlePoint.factor(M, B, size)
        if not bool(system.definite.all()):
            M = torch.where(system.definite[:, None, None], M, M + _PROXIMAL * size[:, None, None] * eye)
            system = SaddlePoint.factor(M, B, size)
        z, held = system.solve(
            -first - self.rows_transposed(self.weight * turned), torch.where(self.held, -turned, 0.0)
        )
        free = (-turned - self.rows_times(z)) / torch.where(self.held, 1.0, d)
        v = self.faces.turned(torch.where(self.held, -at.t * held, free), back=True)
        return replace(at, z=at.z + z, v=at.v + v)


def _size(*parts: Tensor) -> Tensor:
    """The largest entry of all `(rows,)`; 1 where it is no more than solvers leave of a zero."""
    size = torch.cat([row_moduli(part) for part in parts], -1).amax(-1)
    return torch.where(size > _NOTHING, size, 1.0)


def unreached(M: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Z and W: the directions in which neither M nor B acts, as columns, and Z'W = I for those; zero beyond these.

    Found after the unknowns were scaled so that the diagonal of M + B'B is one. `(rows, n, n)` each.
    """
    whole = M + B.mT @ B
    scale = positive_or_one(torch.diagonal(whole, dim1=-2, dim2=-1)).rsqrt().unsqueeze(-1)
    values, vectors = torch.linalg.eigh(scale * whole * scale.mT)
    null = (values <= 100 * M.shape[-1] * torch.finfo(M.dtype).eps).unsqueeze(-2)
    return torch.where(null, scale * vectors, 0.0), torch.where(null, vectors / scale, 0.0)


def dependent(B: Tensor, like: Tensor) -> Tensor:
    """The part r with B'r = 0 of a vector like the rows `(rows, m)`, scaled; zero where the rows are independent."""
    length = positive_or_one(torch.linalg.vector_norm(B, dim=-1))
    U, values, _ = torch.linalg.svd(B / length.unsqueeze(-1), full_matrices=False)
    kept = U * (values > 100 * max(B.shape[-2:]) * torch.finfo(B.dtype).eps * values[..., :1]).unsqueeze(-2)
    left = like - matrix_times(kept, matrix_times(kept.mT, like))
    return (left - matrix_times(kept, matrix_times(kept.mT, left))) / length
