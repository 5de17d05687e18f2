"""The largest eigenvalue of a symmetric operator, with a stated confidence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bilevel._linear import LinearOperator
from bilevel._tree import row_dots


def largest_eigenvalue(
    operator: LinearOperator, like: Tensor, *, overshoot: float = 0.1, failure: float = 0.01, seed: int = 0
) -> Tensor:
    """An upper bound on lambda_max(A), A symmetric positive semidefinite, that fails with probability `failure`.

    k Lanczos steps with full reorthogonalization from a uniformly random start give a Ritz value theta below
    lambda_max; then P[lambda_max > theta / (1 - e)] <= 1.648 sqrt(n) exp(-sqrt(e) (2k - 1)) over the start. With k
    chosen for that to be `failure`, theta / (1 - e) is returned, e = `overshoot`. After n steps theta is exact.

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
        The bound: `()` or `(*batch,)`.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 5.0]))
        >>> round(float(largest_eigenvalue(LinearOperator(lambda v: v @ A, 3), torch.zeros(3))), 4)
        5.0
    """
    n = like.shape[-1]
    wanted = 0.5 * (1 + math.log(1.648 * math.sqrt(n) / failure) / math.sqrt(overshoot))
    steps = min(n, math.ceil(wanted))
    generator = torch.Generator(device="cpu").manual_seed(seed)
    start = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
    basis = [start / torch.linalg.vector_norm(start, dim=-1, keepdim=True)]
    tiny = torch.finfo(like.dtype).tiny
    tridiagonal = torch.zeros(*like.shape[:-1], steps, steps, dtype=torch.float64)
    for k in range(steps):
        w = operator.mv(basis[k])
        tridiagonal[..., k, k] = row_dots(w, basis[k]).double().cpu()
        for _ in range(2):  # twice is enough
            for q in basis:
                w = w - row_dots(w, q).unsqueeze(-1) * q
        beta = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        if k + 1 < steps:
            # An exhausted Krylov space leaves w at rounding level: the row is decoupled by a zero, not divided by.
            scale = torch.linalg.vector_norm(operator_scale(tridiagonal), dim=-1).to(beta).unsqueeze(-1)
            alive = beta > 10 * torch.finfo(like.dtype).eps * scale
            tridiagonal[..., k, k + 1] = tridiagonal[..., k + 1, k] = (
                torch.where(alive, beta, torch.zeros_like(beta)).squeeze(-1).double().cpu()
            )
            basis.append(torch.where(alive, w / beta.clamp_min(tiny), torch.zeros_like(w)))
    if not torch.isfinite(tridiagonal).all():
        return torch.full(like.shape[:-1], math.nan, dtype=like.dtype, device=like.device)
    theta = torch.linalg.eigvalsh(tridiagonal)[..., -1]
    exact = steps == n
    return (theta if exact else theta / (1 - overshoot)).to(like)


def operator_scale(tridiagonal: Tensor) -> Tensor:
    """The diagonal of a (partly filled) tridiagonal matrix: a scale for its entries."""
    return torch.diagonal(tridiagonal, dim1=-2, dim2=-1)
