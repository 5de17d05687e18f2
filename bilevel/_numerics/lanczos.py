"""Both ends of a spectrum, as far as a few Lanczos steps see them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bilevel._linear import LinearOperator
from bilevel._numerics.rows import row_dots, safe_row_norms


def ritz_ends(operator: LinearOperator, like: Tensor, *, steps: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The least and the largest Ritz value of A, symmetric, after k Lanczos steps from a random start.

    Both are Rayleigh quotients, up to rounding, so that lambda_min <= least and largest <= lambda_max: a least value
    below zero *proves* a direction of negative curvature, one above zero is evidence only. The start sees every
    eigenvector, and gaps close fast: ends that are a fraction e of the spectrum apart from the rest are met to e after
    about 1 / sqrt(e) steps. Nothing is orthogonalized again: lost orthogonality repeats Ritz values, and moves no end.

    Cost: min(k, 2n) products. Memory 3n, whatever k.

    Args:
        operator: A.
        like: a vector `(n,)` or `(*batch, n)` of the right shape, dtype and device; its values do not matter.
        steps: k.
        seed: of the start, which rows of a batch share.

    Returns:
        Two tensors in float64 on the CPU, `()` or `(*batch,)`; NaN where a product is not finite.

    Example:
        >>> A = torch.diag(torch.tensor([-1.0, 2.0, 5.0]))
        >>> [
        ...     round(float(end), 4)
        ...     for end in ritz_ends(LinearOperator(lambda v: v @ A, 3), torch.zeros(3))
        ... ]
        [-1.0, 5.0]
    """
    n = like.shape[-1]
    eps, tiny = torch.finfo(like.dtype).eps, torch.finfo(like.dtype).tiny
    generator = torch.Generator(device="cpu").manual_seed(seed)
    start = torch.randn(n, generator=generator, dtype=torch.float64, device="cpu")
    now = (start / torch.linalg.vector_norm(start)).to(like).expand_as(like).contiguous()
    before, beta = torch.zeros_like(now), like.new_zeros(like.shape[:-1])
    alive = torch.ones(like.shape[:-1], dtype=torch.bool, device=like.device)
    size = min(steps, 2 * n)
    matrix = torch.zeros(*like.shape[:-1], size, size, dtype=torch.float64, device="cpu")
    first = like.new_zeros(like.shape[:-1])
    for k in range(size):
        w = operator.mv(now) - beta.unsqueeze(-1) * before
        alpha = row_dots(w, now)
        first = alpha if k == 0 else first  # repeated where nothing is left to be seen: it is inside the spectrum
        matrix[..., k, k] = torch.where(alive, alpha, first).double().cpu()
        if k + 1 == size:
            break
        w = w - alpha.unsqueeze(-1) * now
        beta = safe_row_norms(w)
        alive = alive & (beta > 10 * eps * matrix.abs().amax((-2, -1)).to(beta))
        beta = torch.where(alive, beta, torch.zeros_like(beta))
        matrix[..., k, k + 1] = matrix[..., k + 1, k] = beta.double().cpu()
        before, now = now, torch.where(alive.unsqueeze(-1), w / beta.clamp_min(tiny).unsqueeze(-1), 0.0)
    finite = matrix.isfinite().all(-1).all(-1)
    values = torch.linalg.eigvalsh(torch.where(finite[..., None, None], matrix, torch.zeros_like(matrix)))
    lost = torch.full_like(values[..., 0], math.nan)
    return torch.where(finite, values[..., 0], lost), torch.where(finite, values[..., -1], lost)
