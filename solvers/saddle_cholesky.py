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
    Where M is not, `Status.not_positive_definite`. An operator without such blocks is all M, and has to be declared
    positive definite.

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
        u, s = (part.to(b.dtype) for part in system.solve(widened(r), widened(t)))
        u = torch.where(alone(A, free).any(-2), b[..., :own] * 0, u)  # A u = 0: exactly 0 where it is alone
        if blocks.slacks:
            left = (b[..., q:] - matrix_times(blocks.A[..., :own], u))[..., -blocks.slacks :]
            u = torch.cat([u, torch.where(off, left, b[..., own:q])], -1)
            s = torch.where(loose, pushed, s)
        v = torch.cat([u, s], dim=-1) if s.shape[-1] else u
        residual = safe_row_norms(operator.residual(b, v)[..., :q])
        return Solved(v, first_statuses((~system.definite, Status.not_positive_definite)), residual, 1)

    def relative_error(self, constants: Constants, damping: float) -> float:
        return 0.0
