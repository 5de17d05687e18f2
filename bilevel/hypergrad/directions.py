"""Random directions in the space of x."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Distribution: TypeAlias = Literal["gaussian", "rademacher", "sphere", "orthonormal"]


def demand_distribution(call: str, distribution: str) -> None:
    """Refuse a distribution that there is none of.

    Raises:
        ValueError: naming the call.
    """
    if distribution not in get_args(Distribution):
        raise ValueError(
            f"`{call}(distribution=...)` must be one of {', '.join(get_args(Distribution))}. Got {distribution!r}."
        )


def directions(call: str, distribution: Distribution, k: int, x: Tensor, seed: int) -> tuple[Tensor, float]:
    """Directions u `(k, p)` and the factor c with E[c u u'] = I; drawn on the CPU: every device sees the same.

    Args:
        call: whose `directions` they are, for the message.
        distribution: "gaussian" N(0, I), "rademacher" signs, "sphere" uniform on the unit sphere with c = p,
            "orthonormal" k <= p rows of a random rotation with c = p.
        k: how many.
        x: a vector `(p,)`, whose dtype and device they get.
        seed: of all of them.

    Raises:
        ValueError: if more orthonormal ones than outer variables are asked for.
    """
    p = x.shape[-1]
    generator = torch.Generator("cpu").manual_seed(seed)
    if distribution == "orthonormal" and k > p:
        raise ValueError(
            f"`{call}(directions=..., distribution='orthonormal')` must be at most the number of outer variables, {p}."
            f" Got {k}. Use fewer directions, or 'rademacher'."
        )
    if distribution == "rademacher":
        u = torch.randint(0, 2, (k, p), generator=generator, dtype=torch.float64, device="cpu") * 2 - 1
        return u.to(x), 1.0
    u = torch.randn(k, p, generator=generator, dtype=torch.float64, device="cpu")
    if distribution == "gaussian":
        return u.to(x), 1.0
    if distribution == "sphere":
        return (u / torch.linalg.vector_norm(u, dim=-1, keepdim=True)).to(x), float(p)
    q, r = torch.linalg.qr(u.T)  # its signs make q uniform over rotations (Mezzadri 2007)
    return (q * torch.diagonal(r).sign()).T.to(x), float(p)
