"""A small denoiser that contracts by construction, to be learned."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_type
from bilevel.arguments.ranges import POSITIVE, SEED, SIZE, WEIGHT


@checked(filters=SIZE, size=SIZE, scale=POSITIVE, seed=SEED)
def denoiser_start(filters: int = 8, size: int = 5, scale: float = 0.05, seed: int = 0) -> dict[str, Tensor]:
    """Where the learning of `denoised` begins: random filters, and the logarithms of their scales.

    Args:
        filters: how many.
        size: of each.
        scale: of what counts as noise in the response to a filter.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(filters, size, size, generator=generator, dtype=torch.float64, device="cpu") / size
    return {"filters": w, "log_scales": torch.full((filters,), scale, dtype=torch.float64, device="cpu").log()}


@checked(modulus=WEIGHT)
def denoised(x: Mapping[str, Tensor], v: Tensor, modulus: float = 0.999) -> Tensor:
    """D(v) = m [v - W' psi(W v)], psi_c(t) = s_c tanh(t / s_c): what a bank of filters takes for noise is taken away.

    W is the filters without their means, divided by max(1, |W|_2), where |W|_2^2 = max_k sum_c |F w_c(k)|^2 exactly. As
    0 < psi' <= 1, the derivative of D is symmetric with eigenvalues in [0, m]: whatever the parameters are trained to,
    |D(v) - D(v')| <= m |v - v'|, and a step y - t A'(A y - b), t <= 2 / |A|^2, followed by D contracts by m at least.
    For m = 1 D is the proximal map of a convex function. Below, it takes 1 - m of the mean away too: negligible at
    0.999.

    Images continue periodically. Cost: 2 + 2 C transforms for C filters.

    Source: of residuals by filters with Lipschitz bounds: Ryu, Liu, Wang, Chen, Wang, Yin, "Plug-and-play methods
    provably converge with properly trained denoisers", ICML 2019; gradients of convex ridge functions: Goujon,
    Neumayer, Bohra, Ducotterd, Unser, "A neural-network-based convex regularizer for inverse problems", IEEE TCI 2023.

    Args:
        x: `filters` `(C, k, k)` and `log_scales` `(C,)`, as `denoiser_start` makes them.
        v: images `(*batch, h, w)`, of at least k pixels a side.
        modulus: m, in (0, 1].

    Raises:
        ValueError: if shapes do not fit.

    Example:
        >>> x, v = denoiser_start(3, 3), torch.rand(2, 8, 8, dtype=torch.float64)
        >>> bool((denoised(x, v) - denoised(x, 0 * v)).norm() < v.norm())
        True
    """
    if {"filters", "log_scales"} - set(x):
        raise ValueError(f"`denoised(x=...)` must have `filters` and `log_scales`. Got {sorted(x)}.")
    for name in ("filters", "log_scales"):
        demand_type("denoised", f"x[{name!r}]", x[name], Tensor)
    w, k = x["filters"].to(v), x["filters"].shape[-1:]
    if w.dim() != 3 or x["log_scales"].shape != w.shape[:1] or v.dim() < 2 or any(n < k[0] for n in v.shape[-2:]):
        raise ValueError(
            "`denoised(x, v)` needs filters (C, k, k), log_scales (C,), and images of at least k pixels a side. Got"
            f" {tuple(w.shape)}, {tuple(x['log_scales'].shape)} and {tuple(v.shape)}."
        )
    w = w - w.mean((-1, -2), keepdim=True)
    shape = v.shape[-2:]
    W = torch.fft.rfft2(w, s=shape)
    size = (W.real.square() + W.imag.square()).sum(0).max()
    W = W / size.clamp_min(1.0).sqrt()
    s = x["log_scales"].to(v).exp().reshape(-1, 1, 1)
    responses = torch.fft.irfft2(W * torch.fft.rfft2(v).unsqueeze(-3), s=shape)
    noise = (W.conj() * torch.fft.rfft2(s * (responses / s).tanh())).sum(-3)
    found: Tensor = modulus * (v - torch.fft.irfft2(noise, s=shape))
    return found
