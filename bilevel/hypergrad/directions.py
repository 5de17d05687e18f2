"""Random directions in the space of x."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from bilevel._numerics.seeds import within_64_bits

Distribution: TypeAlias = Literal["gaussian", "rademacher", "sphere", "orthonormal"]

_WHOLE = 2**22  # numbers; what is more is drawn a direction at a time, in the dtype of x


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
    blocks, c = in_blocks(call, distribution, k, x, seed, None)
    return next(blocks), c


def in_blocks(
    call: str, distribution: Distribution, k: int, x: Tensor, seed: int, size: int | None
) -> tuple[Iterator[Tensor], float]:
    """The same directions, the same for any `size`, so many at a time: `(size, p)` each, the last one what is left.

    Where all of them are large, only a block is held, but for orthonormal ones.

    Args:
        call: as in :func:`directions`, as are the others.
        distribution: of them.
        k: how many.
        x: a vector `(p,)`.
        seed: of all of them.
        size: of a block; None: all are one.

    Raises:
        ValueError: as :func:`directions` does.
    """
    if distribution == "orthonormal" or k * x.shape[-1] <= _WHOLE:
        u, c = _at_once(call, distribution, k, x, seed)
        return iter(torch.split(u, size or k)), c
    return _one_by_one(distribution, k, x, seed, size or k), float(x.shape[-1]) if distribution == "sphere" else 1.0


def _one_by_one(distribution: Distribution, k: int, x: Tensor, seed: int, size: int) -> Iterator[Tensor]:
    generator = torch.Generator("cpu").manual_seed(within_64_bits(seed))
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    for begin in range(0, k, size):
        u = torch.empty(min(size, k - begin), x.shape[-1], dtype=dtype, device="cpu")
        for row in u:
            if distribution == "rademacher":
                row.random_(0, 2, generator=generator).mul_(2).sub_(1)
            else:
                row.normal_(generator=generator)
            if distribution == "sphere":
                row.div_(torch.linalg.vector_norm(row))
        yield u.to(x)


def _at_once(call: str, distribution: Distribution, k: int, x: Tensor, seed: int) -> tuple[Tensor, float]:
    p = x.shape[-1]
    generator = torch.Generator("cpu").manual_seed(within_64_bits(seed))
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
