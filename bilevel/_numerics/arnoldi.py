"""What a few products tell of a matrix without symmetry: its spectral radius, and how near to singular it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._numerics.rows import divided_rows, safe_row_norms

_ROUNDING = 1e2  # units of it: a singular value below that of the largest is none


@final
@dataclass(frozen=True, eq=False)
class Spectrum:
    """A matrix J on a Krylov space: J Q_k = Q_{k+1} H_k with orthonormal columns; one for each row of a batch.

    Attributes:
        radius: the largest modulus of an eigenvalue of the square part of H_k, which the spectral radius of J is
            estimated by: `(*batch,)`. Exact where k is the order of J; NaN where a product was not finite.
        least: the least singular value of I - J on the space, an upper bound on that of I - J itself.
        largest: the largest one, a lower bound.
        steps: k.
    """

    radius: Tensor
    least: Tensor
    largest: Tensor
    steps: int

    def singular(self, eps: float, size: int) -> Tensor:
        """Where I - J maps a vector of the space to zero, up to rounding: `(*batch,)`.

        Args:
            eps: the rounding unit of the products.
            size: the order of J.
        """
        return self.least <= _ROUNDING * eps * size * self.largest.clamp_min(1.0)


def arnoldi(mv: Callable[[Tensor], Tensor], like: Tensor, steps: int) -> Spectrum:
    """Arnoldi's method from a random start, the same for all rows and in every call.

    Ritz values at the ends of a spectrum are the first to be found, and lie within the field of values of J: for a J
    far from normal the estimate of the radius may be too large as well as too small.

    Cost: min(steps, n) products. Memory k n.

    Source: Arnoldi, "The principle of minimized iterations in the solution of the matrix eigenvalue problem", Quart.
    Appl. Math. 9 (1951); Saad, "Numerical Methods for Large Eigenvalue Problems" (2011), chapter 6.

    Args:
        mv: v -> J v, row by row.
        like: a vector `(n,)`, or `(*batch, n)`; its values do not matter.
        steps: k, at most.

    Example:
        >>> J = torch.tensor([[0.0, 2.0], [-0.5, 0.0]], dtype=torch.float64)  # eigenvalues i and -i
        >>> found = arnoldi(lambda v: v @ J.mT, torch.zeros(2, dtype=torch.float64), 10)
        >>> round(float(found.radius), 12), round(float(found.least), 6), found.steps
        (1.0, 0.850781, 2)
    """
    n = like.shape[-1]
    k, eps = min(steps, n), torch.finfo(like.dtype).eps
    if not k:
        none = torch.zeros(like.shape[:-1], dtype=like.dtype, device=like.device)
        return Spectrum(none, none + 1, none + 1, 0)
    start = torch.randn(n, generator=torch.Generator(device="cpu").manual_seed(0), dtype=torch.float64, device="cpu")
    q = (start / torch.linalg.vector_norm(start)).to(like).expand_as(like).contiguous()
    basis = q.unsqueeze(-2)
    H = torch.zeros(*like.shape[:-1], k + 1, k, dtype=torch.float64, device="cpu")
    alive = torch.ones(like.shape[:-1], dtype=torch.bool, device=like.device)
    size = torch.zeros(like.shape[:-1], dtype=like.dtype, device=like.device)
    for j in range(k):
        w = mv(q)
        size = torch.maximum(size, safe_row_norms(w))
        for _ in range(2):  # twice is enough
            h = (basis @ w.unsqueeze(-1)).squeeze(-1)
            H[..., : j + 1, j] += h.double().cpu()
            w = w - (h.unsqueeze(-2) @ basis).squeeze(-2)
        below = safe_row_norms(w)
        alive = alive & ~(below <= 10 * eps * size)  # an exhausted space is left alone; NaN is not hidden
        H[..., j + 1, j] = torch.where(alive, below, 0.0).double().cpu()
        if j + 1 == k:
            break
        q = divided_rows(w, below, alive)
        basis = torch.cat([basis, q.unsqueeze(-2)], dim=-2)
    finite = H.isfinite().all(-1).all(-1)
    H = torch.where(finite[..., None, None], H, 0.0)
    eye = torch.eye(k + 1, k, dtype=H.dtype, device=H.device)
    moduli = torch.linalg.eigvals(H[..., :k, :]).abs().amax(-1)
    values = torch.linalg.svdvals(eye - H)

    def told(found: Tensor) -> Tensor:
        return torch.where(finite, found, math.nan).to(like)

    return Spectrum(told(moduli), told(values[..., -1]), told(values[..., 0]), k)
