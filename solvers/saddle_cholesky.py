"""Direct solution of saddle-point systems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._linear import SYMMETRIC, AbstractLinearSolver, LinearOperator, OperatorProperties, SaddleBlocks
from bilevel._numerics.half import widened
from bilevel._numerics.rows import matrix_times, safe_row_norms
from bilevel._numerics.saddle_point import SaddlePoint, alone
from bilevel._result import Solved, Status, first_statuses
from bilevel.certificates.certificate import Constants


@final
@dataclass(frozen=True)
class SaddleCholesky(AbstractLinearSolver):
    """(u, s) with [[M, A'], [A, 0]] (u, s) = (r, t), by the Cholesky factor of M + w A'A.

    For M symmetric, positive definite on the null space of A; A may be rank deficient: u is unique, and s one of many.
    Where M is not, `Status.not_positive_definite`, and the least squares solution of least norm. An operator without
    such blocks is all M, and has to be declared positive definite.

    Cost: q products for M, one for the true residual; q^3 / 3 + q^2 m flops. Memory q^2 + m^2. The residual that is
    returned is of the first q equations, of what the vector is there for.

    Source: Golub, Greif, "On solving block-structured indefinite linear systems", SIAM J. Sci. Comput. 24 (2003).

    Raises:
        ValueError: if the operator is not declared symmetric, or has no blocks and is not declared positive definite.

    Example:
        >>> A = LinearOperator(lambda v: 2 * v, size=2, positive_definite=True)
        >>> SaddleCholesky().solve(A, torch.tensor([2.0, 4.0])).value
        tensor([1., 2.])
    """

    @property
    def demands(self) -> OperatorProperties:
        return SYMMETRIC

    @property
    def finds_indefinite(self) -> bool:
        return True

    @property
    def forgets_start(self) -> bool:
        return True

    def solve(self, operator: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Solved:
        """Solve A v = b; `guess` is not needed."""
        blocks = operator.blocks
        if blocks is None:
            if not operator.positive_definite:
                raise ValueError(
                    "`SaddleCholesky` needs the blocks of a saddle-point matrix, as linearly constrained problems have"
                    " them, or an operator declared positive definite. Got neither. Use `GMRES` or `Dense`."
                )
            none = b.new_zeros(*b.shape[:-1], 0, operator.size)
            blocks = SaddleBlocks(operator, none, torch.ones_like(b, dtype=torch.bool))
        q = blocks.M.size
        own, r, t = q - blocks.slacks, b[..., :q], b[..., q:]
        A, off = blocks.A[..., :own], blocks.free[..., own:]  # a row with a free slack only says what that is
        loose, pushed = torch.zeros_like(t, dtype=torch.bool), torch.zeros_like(t)
        if blocks.slacks:
            loose = torch.nn.functional.pad(off, (t.shape[-1] - blocks.slacks, 0))
            pushed = torch.nn.functional.pad(torch.where(off, r[..., own:], 0.0), (t.shape[-1] - blocks.slacks, 0))
            r, t = r[..., :own] - matrix_times(A.mT, pushed), torch.where(loose, 0.0, t)
            A = A * ~loose.unsqueeze(-1)
        free = blocks.free[..., :own]
        M = widened(blocks.M.dense(b[..., :q], own)[..., :own, :])
        M = (M + M.mT) / 2
        scale = (torch.diagonal(M, dim1=-2, dim2=-1).abs() * free).amax(-1)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        system = SaddlePoint.factor(M, widened(A), scale, torch.finfo(b.dtype).eps)
        u, s = system.solve(widened(r), widened(t))
        told = M.isfinite().all(-1).all(-1) & A.isfinite().all(-1).all(-1) & b.isfinite().all(-1)
        told = told.expand_as(system.definite)
        if bool((told & ~system.definite).any()):
            u, s = _least((told & ~system.definite).unsqueeze(-1), M, widened(A), (widened(r), widened(t)), (u, s))
        u, s = u.to(b.dtype), s.to(b.dtype)
        u = torch.where(alone(A, free).any(-2), b[..., :own] * 0, u)  # A u = 0: exactly 0 where it is alone
        if blocks.slacks:
            left = (b[..., q:] - matrix_times(blocks.A[..., :own], u))[..., -blocks.slacks :]
            u = torch.cat([u, torch.where(off, left, b[..., own:q])], -1)
            s = torch.where(loose, pushed, s)
        v = torch.cat([u, s], dim=-1) if s.shape[-1] else u
        residual = safe_row_norms(operator.residual(b, v)[..., :q])
        statuses = first_statuses((~told, Status.nonfinite), (~system.definite, Status.not_positive_definite))
        return Solved(v, statuses, residual, 1)

    def relative_error(self, constants: Constants, damping: float) -> float:
        return 0.0


def _least(
    rows: Tensor, M: Tensor, A: Tensor, right: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """For these rows of the batch the least squares solution of least norm, for the others what was found."""
    none = A.new_zeros(*A.shape[:-1], A.shape[-2])
    whole = torch.cat([torch.cat([M.expand(*A.shape[:-2], *M.shape[-2:]), A.mT], -1), torch.cat([A, none], -1)], -2)
    whole = torch.where(rows.unsqueeze(-1), whole, 0.0)
    inverse = torch.linalg.pinv(whole, rtol=torch.finfo(M.dtype).eps ** (2 / 3), hermitian=True)
    least = matrix_times(inverse, torch.where(rows, torch.cat(right, -1), 0.0))
    u, s = least[..., : M.shape[-1]], least[..., M.shape[-1] :]
    return torch.where(rows, u, found[0]), torch.where(rows, s, found[1])
