"""The ends of a spectrum: the largest eigenvalue, with a stated confidence, and the least."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bilevel._linear import LinearOperator
from bilevel._numerics.rows import row_dots, safe_row_norms


def largest_eigenvalue(
    operator: LinearOperator, like: Tensor, *, overshoot: float = 0.1, failure: float = 0.01, seed: int = 0
) -> Tensor:
    """An upper bound on lambda_max(A), A symmetric positive semidefinite, that fails with probability `failure`.

    k Lanczos steps with full reorthogonalization from a uniformly random start give a Ritz value theta below
    lambda_max; then P[lambda_max > theta / (1 - e)] <= 1.648 sqrt(n) exp(-sqrt(e) (2k - 1)) over the start. With k
    chosen for that to be `failure`, theta / (1 - e) is returned, e = `overshoot`. After n steps theta is exact.
    Rows of a batch share the start, so that the failure probability holds for each of them, not for all at once.

    Cost: k = ceil((1 + ln(1.648 sqrt(n) / failure) / sqrt(e)) / 2) products, 14 for n = 300 and the defaults.
    Memory k n.

    Source: Kuczynski, Wozniakowski, "Estimating the largest eigenvalue by the power and Lanczos algorithms with a
    random start", SIAM J. Matrix Anal. Appl. 13 (1992), theorem 4.2.

    Args:
        operator: A.
        like: a vector `(n,)` or `(*batch, n)` of the right shape, dtype and device; its values do not matter.
        overshoot: e in (0, 1): by how much the bound may exceed lambda_max, relatively.
        failure: the probability that the bound is too low.
        seed: of the random start.

    Returns:
        The bound: `()` or `(*batch,)`; NaN where a product is not finite.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 5.0]))
        >>> round(float(largest_eigenvalue(LinearOperator(lambda v: v @ A, 3), torch.zeros(3))), 4)
        5.0
    """
    return eigenvalue_ends(operator, like, overshoot=overshoot, failure=failure, seed=seed)[0]


def eigenvalue_ends(
    operator: LinearOperator, like: Tensor, *, overshoot: float = 0.1, failure: float = 0.01, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """:func:`largest_eigenvalue`, and the least Ritz value of the same steps, which is above lambda_min of any A.

    The latter is lambda_min after n steps, and of fewer what most vectors see of it.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 5.0]))
        >>> [
        ...     round(float(end), 4)
        ...     for end in eigenvalue_ends(LinearOperator(lambda v: v @ A, 3), torch.zeros(3))
        ... ]
        [5.0, 1.0]
    """
    n = like.shape[-1]
    eps, tiny = torch.finfo(like.dtype).eps, torch.finfo(like.dtype).tiny
    wanted = 0.5 * (1 + math.log(1.648 * math.sqrt(n) / failure) / math.sqrt(overshoot))
    steps = min(n, math.ceil(wanted))
    generator = torch.Generator(device="cpu").manual_seed(seed)
    start = torch.randn(n, generator=generator, dtype=torch.float64, device="cpu")
    # The same start for all rows: what is found for a system does not depend on its neighbours.
    basis = [(start / torch.linalg.vector_norm(start)).to(like).expand_as(like).contiguous()]
    tridiagonal = torch.zeros(*like.shape[:-1], steps, steps, dtype=torch.float64, device="cpu")
    first, alive = (
        like.new_zeros(like.shape[:-1]),
        torch.ones(like.shape[:-1], dtype=torch.bool, device=like.device),
    )
    for k in range(steps):
        w = operator.mv(basis[k])
        alpha = row_dots(w, basis[k])
        first = alpha if k == 0 else first  # repeated where the row is decoupled: never above the others
        tridiagonal[..., k, k] = torch.where(alive, alpha, first).double().cpu()
        if k + 1 == steps:
            break
        for _ in range(2):  # twice is enough
            for q in basis:
                w = w - row_dots(w, q).unsqueeze(-1) * q
        beta = safe_row_norms(w)
        # An exhausted Krylov space leaves w at rounding level: the row is decoupled by a zero, not divided by.
        alive = alive & (beta > 10 * eps * tridiagonal.abs().amax((-2, -1)).to(beta))
        beta = torch.where(alive, beta, torch.zeros_like(beta))
        tridiagonal[..., k, k + 1] = tridiagonal[..., k + 1, k] = beta.double().cpu()
        column = beta.clamp_min(tiny).unsqueeze(-1)
        basis.append(torch.where(alive.unsqueeze(-1), w / column, torch.zeros_like(w)))
    finite = tridiagonal.isfinite().all(-1).all(-1)
    safe = torch.where(finite[..., None, None], tridiagonal, torch.zeros_like(tridiagonal))
    ritz = torch.linalg.eigvalsh(safe).masked_fill(~finite.unsqueeze(-1), math.nan)
    theta = ritz[..., -1]
    return (theta if steps == n else theta / (1 - overshoot)).to(like), ritz[..., 0].to(like)


def least_eigenvalue(matrix: Tensor) -> Tensor:
    """The least eigenvalue of a symmetric matrix, or of several, less the rounding of its entries."""
    eigenvalues = torch.linalg.eigvalsh(((matrix + matrix.mT) / 2).double())
    least: Tensor = eigenvalues[..., 0] - matrix.shape[-1] * torch.finfo(matrix.dtype).eps * eigenvalues.abs().amax(-1)
    return least
