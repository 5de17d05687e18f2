"""Nystrom approximations of low rank: as a solver, and as a preconditioner for conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._linear import (
    POSITIVE_DEFINITE,
    SYMMETRIC,
    AbstractLinearSolver,
    AbstractPreconditioner,
    LinearOperator,
    OperatorProperties,
    demand,
)
from bilevel._numerics.half import widened
from bilevel._numerics.rows import row_dots, safe_row_norms
from bilevel._result import Solved, Status, first_statuses
from bilevel._validate import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, POSITIVE, demand_ranges
from bilevel.bounds.implicit import nystrom_error
from bilevel.certificates.certificate import Constants


@final
@dataclass(frozen=True)
class Nystrom(AbstractLinearSolver):
    """Nystrom: (A_k + rho I)^-1 b with A_k = C' M^+ C from k columns C' of A, M the rows of C' with their indices.

    A_k has rank k and A - A_k is positive semidefinite if A is, so that the error to (A + rho I)^-1 b is at most
    |b| e / (rho (rho + e)) with e = |A - A_k|; with all n columns only the damping is left. An approximation
    without a tolerance: finite is successful. Look at the residual, which is that of A v = b.

    Cost: k products, one for the true residual and one for a damping to be derived; memory k n, flops k^2 n. The
    columns are drawn uniformly, without replacement. The inverse is applied in the eigenbasis of A_k, in which small
    rho does not cancel; eigenvalues of M at rounding level are dropped.

    Source: Hataya, Yamada, "Nystrom method for accurate and scalable implicit differentiation", AISTATS 2023.

    Args:
        rank: the number of columns k; at most n are used.
        damping: rho. None is |E z|^2 / (z' E z) for E = A - A_k and random signs z, by one more product: about the
            mean of the eigenvalues left out, weighted by themselves, which makes the expected residual least
            there; at least 1.5e-8 (float32: 3.5e-4) of the smallest positive eigenvalue of A_k.
        seed: of the draw.

    Raises:
        ValueError: if `rank` is less than 1, `damping` not positive, or the operator not declared symmetric.

    Example:
        >>> A = LinearOperator(lambda v: 3 * v, size=2, positive_definite=True)
        >>> Nystrom(rank=2, damping=1.0).solve(A, torch.tensor([4.0, 8.0])).value.round(decimals=4)
        tensor([1., 2.])
    """

    rank: int
    damping: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        demand_types(self)
        _check_rank("Nystrom", self.rank)
        demand_ranges(self, {"damping": "Pass None to derive it."}, damping=POSITIVE)

    @property
    def demands(self) -> OperatorProperties:
        return POSITIVE_DEFINITE  # semidefinite at least: with eigenvalues of both signs it means nothing

    @property
    def forgets_start(self) -> bool:
        return True

    def solve(self, operator: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Solved:
        """Apply the damped inverse of the approximation; `guess` is not needed."""
        demand(operator, "Nystrom", SYMMETRIC)
        norm_b = safe_row_norms(b)
        zero = norm_b == 0
        if bool(zero.all()):
            v = torch.zeros_like(b)
            residual = safe_row_norms(operator.residual(b, v))
            return Solved(v, (Status.successful,) * zero.numel(), residual, 0)
        n, k = operator.size, min(self.rank, operator.size)
        order = torch.randperm(n, generator=torch.Generator("cpu").manual_seed(self.seed), device="cpu")
        drawn = order[:k].clone().to(b.device)
        del order  # as long as two vectors
        C = widened(_products(operator, (_unit(j, b) for j in drawn.tolist()), k, b))  # (*batch, n, k)
        M = C[..., drawn, :]
        M = 0.5 * (M + M.mT)
        eigenvalues, W = torch.linalg.eigh(M)
        largest = eigenvalues.abs().amax(-1)
        kept = eigenvalues > k * torch.finfo(b.dtype).eps * largest.unsqueeze(-1)
        root = torch.where(kept, eigenvalues.rsqrt(), torch.zeros_like(eigenvalues))
        C = C @ (W * root.unsqueeze(-2))
        U, sigma, _ = torch.linalg.svd(C, full_matrices=False)
        del C
        theta = sigma.square()  # A_k = U theta U'

        rho = self._damping(operator, b, U, theta, kept.sum(-1)).unsqueeze(-1)
        column = widened(b).unsqueeze(-1)
        inside = U.mT @ column
        # With all n columns nothing is outside, and rounding errors must not be divided by rho.
        outside = column - U @ inside if k < n else torch.zeros_like(column)
        v = ((U @ (inside / (theta + rho).unsqueeze(-1))) + outside / rho.unsqueeze(-1)).squeeze(-1)
        v = torch.where(zero.unsqueeze(-1), 0.0, v).to(b.dtype)
        del U, column, inside, outside  # not to be held while the last product is formed
        residual = safe_row_norms(operator.residual(b, v))
        indefinite = eigenvalues[..., 0] < -math.sqrt(torch.finfo(b.dtype).eps) * largest
        vanished = (largest == 0) & (self.damping is None)
        statuses = first_statuses(
            (~residual.isfinite(), Status.nonfinite),
            (zero, Status.successful),
            (indefinite, Status.not_positive_definite),
            (vanished, Status.breakdown),
        )
        return Solved(v, statuses, residual, 1)

    @property
    def is_approximate(self) -> bool:
        return True

    @property
    def own_damping(self) -> float:
        return self.damping or 0.0

    def relative_error(self, constants: Constants, damping: float) -> float:
        if self.damping is None or damping:
            raise ValueError(
                "`AID(inner, Nystrom(damping=None))` derives its damping at run time, and `AID(damping=...)` adds"
                " another. Call `bounds.nystrom` with the damping."
            )
        return nystrom_error(constants, damping=self.damping)

    def _damping(self, operator: LinearOperator, like: Tensor, U: Tensor, theta: Tensor, rank: Tensor) -> Tensor:
        """rho of each row, from A_k = U theta U' with theta in descending order, `rank` of them positive."""
        if self.damping is not None:
            return torch.full_like(theta[..., 0], self.damping)
        smallest = theta.gather(-1, (rank - 1).clamp_min(0).unsqueeze(-1)).squeeze(-1)
        rho = math.sqrt(torch.finfo(like.dtype).eps) * smallest
        if theta.shape[-1] < operator.size:
            signs = torch.randint(
                0, 2, like.shape[-1:], generator=torch.Generator().manual_seed(self.seed + 1), device="cpu"
            )
            z = (2 * signs - 1).to(like).expand_as(like).contiguous()
            approximated: Tensor = U @ (theta.unsqueeze(-1) * (U.mT @ widened(z).unsqueeze(-1)))
            left_out = widened(operator.mv(z)) - approximated.squeeze(-1)
            size = safe_row_norms(left_out)
            weighted = size * (size / row_dots(widened(z), left_out))
            rho = torch.where(weighted > rho, weighted, rho)
        return torch.where(rho > 0, rho, torch.ones_like(rho))


@final
@dataclass(frozen=True)
class NystromPreconditioner(AbstractPreconditioner):
    """M^-1 = (theta_k + mu) U (Theta + mu I)^-1 U' + I - U U' with U Theta U' ~ A from a Gaussian sketch of rank k.

    The k largest eigenvalues are brought down to about the k-th, so that CG needs about as many steps as for the
    rest of the spectrum: worth it where few eigenvalues are large and many systems or steps share the cost.

    Cost: k products and k^2 n flops once a solve, 4 k n flops a step. Memory 2 k n. A shift at rounding level
    keeps the sketch positive definite.

    Source: Frangella, Tropp, Udell, "Randomized Nystrom preconditioning", SIAM J. Matrix Anal. Appl. 44 (2023),
    algorithm 2.1.

    Args:
        rank: of the sketch, k.
        damping: mu, for a regularizer mu I that the operator contains and the sketch should not be trusted to see.
        seed: of the sketch.

    Raises:
        ValueError: if `rank` is less than 1 or `damping` negative.

    Example:
        >>> A = LinearOperator(
        ...     lambda v: torch.tensor([100.0, 1.0]) * v, size=2, positive_definite=True
        ... )
        >>> inverse = NystromPreconditioner(rank=2).build(A, torch.zeros(2))
        >>> bool(torch.allclose(inverse(torch.ones(2)), torch.tensor([0.01, 1.0]), atol=1e-4))
        True
    """

    rank: int
    damping: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        demand_types(self)
        _check_rank("NystromPreconditioner", self.rank)
        demand_ranges(self, damping=AT_LEAST_0)

    def build(self, operator: LinearOperator, like: Tensor) -> Callable[[Tensor], Tensor]:
        n, k, eps = operator.size, min(self.rank, operator.size), torch.finfo(like.dtype).eps
        generator = torch.Generator().manual_seed(self.seed)
        sketch = torch.randn(n, k, generator=generator, dtype=torch.float64, device="cpu").to(like)
        sketch = torch.linalg.qr(widened(sketch)).Q.to(like.dtype)
        Y, sketch = widened(_products(operator, sketch.unbind(-1), k, like)), widened(sketch)
        shift = eps * math.sqrt(n) * safe_row_norms(Y.flatten(-2))[..., None, None]
        Y += shift * sketch
        G = sketch.mT @ Y
        del sketch
        eigenvalues, W = torch.linalg.eigh(0.5 * (G + G.mT))
        # Positive but for rounding, and for an operator that is not positive definite: that CG finds out.
        safe = torch.maximum(eigenvalues, shift.squeeze(-1)).clamp_min(torch.finfo(like.dtype).tiny)
        Y = Y @ (W * safe.rsqrt().unsqueeze(-2))
        U, sigma, _ = torch.linalg.svd(Y, full_matrices=False)
        del Y
        theta = torch.maximum(sigma.square() - shift.squeeze(-1), shift.squeeze(-1)) + self.damping
        theta = theta.clamp_min(torch.finfo(like.dtype).tiny)
        gain = theta[..., -1:] / theta - 1

        def apply(r: Tensor) -> Tensor:
            correction: Tensor = U @ (gain.unsqueeze(-1) * (U.mT @ widened(r).unsqueeze(-1)))
            return r + correction.squeeze(-1).to(r.dtype)

        return apply


def _check_rank(name: str, rank: int) -> None:
    if rank < 1:
        raise ValueError(f"`{name}(rank=...)` must be at least 1. Got {rank}. Try 20: each costs one Hessian product.")


def _unit(j: int, like: Tensor) -> Tensor:
    """The unit vector e_j `(n,)`."""
    unit = like.new_zeros(like.shape[-1])
    unit[j] = 1.0
    return unit


def _products(operator: LinearOperator, vectors: Iterable[Tensor], k: int, like: Tensor) -> Tensor:
    """A times k vectors `(n,)` shared by all rows: `(*batch, n, k)`; NaN is for the callers' residuals to report."""
    images = like.new_empty(*like.shape, k)
    finite = torch.ones(like.shape[:-1], dtype=torch.bool, device=like.device)
    for j, vector in enumerate(vectors):
        image = operator.mv(vector.expand_as(like).contiguous())
        images[..., j] = image
        finite = finite & image.isfinite().all(-1)
        del image
    # Factorizations of NaN raise or hang on some devices.
    return images.masked_fill_(~finite[..., None, None], 0.0)
