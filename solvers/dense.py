"""Factorization of the dense matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._linear import ANY, AbstractLinearSolver, LinearOperator, OperatorProperties
from bilevel._numerics.half import widened
from bilevel._numerics.rows import safe_row_norms
from bilevel._result import Solved, Status, first_statuses
from bilevel.certificates.certificate import Constants

# A residual above this part of |b| is no solution. Factorizations are backward stable: a residual is some rounding
# errors of |A| |v|, which comes near |b| only where |v| is as large as a matrix singular to rounding makes it.
_FAR = 1e-3


@final
@dataclass(frozen=True)
class Dense(AbstractLinearSolver):
    """A^-1 b from the dense matrix: by Cholesky if A is declared positive definite, by LU otherwise.

    Backward stable, with one step of iterative refinement. A matrix declared positive definite without a Cholesky
    factorization is reported by `Status.not_positive_definite` and solved by LU all the same. Any other matrix that is
    singular to rounding is reported by `Status.singular`, and answered by the least squares solution of least norm. One
    that is not symmetric though declared to be, and a residual above 1e-3 |b| although the matrix is regular, so that
    products are not those of the matrix, are reported by `Status.breakdown`.

    In half precision the factorization is one in float32, of a matrix whose entries are as rounded as the products are.

    Cost: n products for the matrix, one for the true residual; n^2 memory, n^3 / 3 flops (LU: 2 n^3 / 3). For up to
    some thousand unknowns.

    Source: Golub, Van Loan, "Matrix computations" (2013), chapters 3 and 4.

    Example:
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> operator = LinearOperator(lambda v: v @ A, size=2, positive_definite=True)
        >>> bool(
        ...     torch.allclose(
        ...         Dense().solve(operator, torch.tensor([3.0, 3.0])).value, torch.ones(2)
        ...     )
        ... )
        True
    """

    @property
    def demands(self) -> OperatorProperties:
        return ANY

    @property
    def forgets_start(self) -> bool:
        return True

    def solve(self, operator: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Solved:
        """Solve A v = b; `guess` is not needed."""
        norm_b = safe_row_norms(b)
        zero = norm_b == 0
        if bool(zero.all()):
            v = torch.zeros_like(b)
            residual = safe_row_norms(operator.residual(b, v))
            return Solved(v, (Status.successful,) * zero.numel(), residual, 0)
        A = widened(operator.dense(b))
        finite = A.isfinite().all(-1).all(-1) & norm_b.isfinite()
        # Factorizations of NaN raise or hang on some devices: such rows solve I v = NaN.
        A = torch.where(finite[..., None, None], A, torch.eye(operator.size, dtype=A.dtype, device=b.device))
        rhs = torch.where(finite.unsqueeze(-1), widened(b), math.nan)

        symmetric = operator.symmetric or operator.positive_definite
        eps = torch.finfo(b.dtype).eps
        skewed = _asymmetric(A, eps) if symmetric else torch.zeros_like(zero)
        v, indefinite, singular = _solve(A, rhs, skewed, operator.positive_definite, eps)
        v = torch.where(zero.unsqueeze(-1), torch.zeros_like(v), v).to(b.dtype)
        residual = safe_row_norms(operator.residual(b, v))
        unlike = residual > max(_FAR, _level(eps, operator.size)) * norm_b
        statuses = first_statuses(
            (~residual.isfinite(), Status.nonfinite),
            (zero, Status.successful),
            (indefinite, Status.not_positive_definite),
            (skewed, Status.breakdown),
            (singular, Status.singular),
            (unlike, Status.breakdown),
        )
        return Solved(v, statuses, residual, 1)

    def relative_error(self, constants: Constants, damping: float) -> float:
        return 0.0


def _level(eps: float, n: int) -> float:
    """The rounding of a factorization of n rows, relative to the largest entry, for matrices with rounding eps."""
    return max(10.0, math.sqrt(n)) * eps


def _asymmetric(A: Tensor, eps: float) -> Tensor:
    """Whether A - A' is beyond rounding, and beyond the error of finite-difference products."""
    largest = A.abs().amax((-2, -1))
    return (A - A.mT).abs().amax((-2, -1)) > 10 * math.sqrt(eps) * largest


def _solve(A: Tensor, b: Tensor, skewed: Tensor, positive_definite: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """A^-1 b, refined once; which rows have no Cholesky factorization though they should; which are singular."""
    n, column = A.shape[-1], b.unsqueeze(-1)
    level = _level(eps, n)
    eye = torch.eye(n, dtype=A.dtype, device=A.device)
    indefinite = torch.zeros_like(skewed)
    if positive_definite:
        A = torch.where(skewed[..., None, None], A, 0.5 * (A + A.mT))
        L, info = torch.linalg.cholesky_ex(A)
        pivots = torch.diagonal(L, dim1=-2, dim2=-1)
        # A pivot at rounding level says nothing: the matrix may as well be singular or indefinite.
        rounding = level * torch.diagonal(A, dim1=-2, dim2=-1).abs().amax(-1)
        indefinite = ((info != 0) | (pivots.square() <= rounding.unsqueeze(-1)).any(-1)) & ~skewed
        if not bool((indefinite | skewed).any()):
            v = torch.cholesky_solve(column, L)
            v = v + torch.cholesky_solve(column - A @ v, L)
            indefinite = _missed(A, column, v)
            if not bool(indefinite.any()):
                return v.squeeze(-1), indefinite, indefinite
    LU, pivot, info = torch.linalg.lu_factor_ex(A)
    diagonal = torch.diagonal(LU, dim1=-2, dim2=-1).abs()
    singular = (info != 0) | (diagonal.amin(-1) <= level * diagonal.amax(-1))
    LU = torch.where(singular[..., None, None], eye, LU)
    v = torch.linalg.lu_solve(LU, pivot, column)
    v = v + torch.linalg.lu_solve(LU, pivot, column - A @ v)
    singular = singular | _missed(A, column, v)
    if bool(singular.any()):
        v = torch.where(singular[..., None, None], torch.linalg.pinv(A) @ column, v)
    return v.squeeze(-1), indefinite, singular & ~indefinite


def _missed(A: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """Whether a factorization was of a matrix singular to rounding: its solution is far from solving A v = b."""
    return safe_row_norms((b - A @ v).squeeze(-1)) > _FAR * safe_row_norms(b.squeeze(-1))
