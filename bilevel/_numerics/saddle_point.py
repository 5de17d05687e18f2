"""Saddle-point systems: the optimality conditions of equality-constrained quadratics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._numerics.rows import matrix_times, row_maxima

_REGULAR = 1e-6  # pivots of a matrix with ones on its diagonal, above which no row is near a combination of others


@final
@dataclass(frozen=True, eq=False)
class SaddlePoint:
    """[[M, A'], [A, 0]] (p, s) = (r, t) for M symmetric, positive definite on the null space of A; a batch of them.

    By the Cholesky factor of M + w A'A, which has the same solution, and the pseudo-inverse of the small matrix
    A (M + w A'A)^-1 A', so that A may be rank deficient: s is then one of many, p unique; two refinement steps.

    Cost: q^3 / 3 + q^2 m + O(m^3) flops for the factors, q^2 for a solution. Memory q^2 + m^2.

    Source: Golub, Greif, "On solving block-structured indefinite linear systems", SIAM J. Sci. Comput. 24 (2003).

    Attributes:
        definite: which rows of the batch have a Cholesky factor; the solutions of the others are NaN.

    Example:
        >>> system = SaddlePoint.factor(torch.eye(2), torch.ones(1, 2))
        >>> y, multipliers = system.solve(torch.tensor([1.0, 3.0]), torch.tensor([0.0]))
        >>> y.round(decimals=4), multipliers
        (tensor([-1.,  1.]), tensor([2.]))
    """

    M: Tensor
    A: Tensor
    weight: Tensor
    L: Tensor
    inverse: Tensor
    definite: Tensor

    @staticmethod
    def factor(M: Tensor, A: Tensor, scale: Tensor | None = None, eps: float | None = None) -> SaddlePoint:
        """The factors of M `(*batch, q, q)` and A `(*batch, m, q)`.

        Args:
            M: the matrix.
            A: the equalities.
            scale: the size of M that w A'A is given, `(*batch,)`; None: the largest diagonal entry.
            eps: the relative rounding of the entries of M; None: that of their dtype.
        """
        size = row_maxima(torch.diagonal(M, dim1=-2, dim2=-1)) if scale is None else scale
        rows = row_maxima(A.square().sum(-1))
        weight = torch.where(rows > 0, size / rows, torch.zeros_like(rows))[..., None, None]
        shifted = M + weight * (A.mT @ A)
        L, info = torch.linalg.cholesky_ex(shifted)
        pivots = torch.diagonal(L, dim1=-2, dim2=-1).square()
        diagonal = torch.diagonal(shifted, dim1=-2, dim2=-1)
        level = 10 * M.shape[-1] ** 0.5 * (torch.finfo(M.dtype).eps if eps is None else eps)
        definite = (info == 0) & (pivots > level * diagonal).all(-1)  # each pivot against its own entry: any scaling
        L = torch.where(definite[..., None, None], L, torch.eye(M.shape[-1], dtype=M.dtype, device=M.device))
        return SaddlePoint(M, A, weight, L, pseudo_inverse(A @ torch.cholesky_solve(A.mT, L)), definite)

    def solve(self, r: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The solution: p `(*batch, q)` and s `(*batch, m)`."""
        p, s = self._once(r, t)
        for _ in range(2):
            left = r - matrix_times(self.M, p) - matrix_times(self.A.mT, s), t - matrix_times(self.A, p)
            dp, ds = self._once(*left)
            p, s = p + dp, s + ds
        lost = torch.where(self.definite, 0.0, torch.nan).to(p).unsqueeze(-1)
        return p + lost, s + lost

    def _once(self, r: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        free = self._inverse(r + self.weight.squeeze(-1) * matrix_times(self.A.mT, t))
        s = matrix_times(self.inverse, matrix_times(self.A, free) - t)
        return free - self._inverse(matrix_times(self.A.mT, s)), s

    def _inverse(self, r: Tensor) -> Tensor:
        return torch.cholesky_solve(r.unsqueeze(-1), self.L).squeeze(-1)


def pseudo_inverse(S: Tensor) -> Tensor:
    """Of symmetric positive semidefinite matrices `(*batch, m, m)`, after scaling their diagonals to one."""
    diagonal = torch.diagonal(S, dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).rsqrt()
    scale = torch.where(diagonal > 0, scale, torch.zeros_like(scale))
    scaled = scale.unsqueeze(-1) * S * scale.unsqueeze(-2)
    lost = ~scaled.isfinite().all(-1).all(-1)
    scaled = torch.where(lost[..., None, None], torch.zeros_like(scaled), scaled)
    scaled = (scaled + scaled.mT) / 2
    L, info = torch.linalg.cholesky_ex(scaled)
    precise = S.dtype in (torch.float32, torch.float64)  # torch inverts no factor in half precision
    if precise and bool((info == 0).all()) and bool((torch.diagonal(L, dim1=-2, dim2=-1).square() > _REGULAR).all()):
        regular: Tensor = scale.unsqueeze(-1) * torch.cholesky_inverse(L) * scale.unsqueeze(-2)
        return regular
    values, vectors = torch.linalg.eigh(scaled)
    kept = values > 100 * S.shape[-1] * torch.finfo(S.dtype).eps
    inverse = torch.where(kept, values, torch.ones_like(values)).reciprocal() * kept
    found: Tensor = scale.unsqueeze(-1) * (vectors * inverse.unsqueeze(-2)) @ vectors.mT * scale.unsqueeze(-2)
    return found


def restricted(M: Tensor, A: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """M and A on the free entries `(*batch, q)` only: the others decoupled, with ones on their diagonal."""
    keep = free.to(M)
    inside = M * keep.unsqueeze(-1) * keep.unsqueeze(-2)
    return inside + torch.diag_embed(1 - keep), A * keep.unsqueeze(-2)


def alone(A: Tensor, free: Tensor) -> Tensor:
    """Which free entry each row of A determines, where there is one only: `(*batch, m, q)`."""
    present = (A != 0) & free.unsqueeze(-2)
    return present & (present.sum(-1, keepdim=True) == 1)
