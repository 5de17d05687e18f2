"""Draws that depend on their seed only: generators, the seed of a step, and subsets without replacement."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 2**32 - 1  # words of 32 bits: torch's `manual_seed` heeds no more of a seed on the CPU


def generator(seed: int) -> torch.Generator:
    """A generator on the CPU, so that draws do not depend on the device; all 64 bits of the seed count.

    torch's own `manual_seed` looks at the lower 32 bits on the CPU.

    Raises:
        TypeError: if the seed is not an integer.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"`seed` must be an integer. Got {seed!r}.")
    low, high = seed & _MASK, (seed >> 32) & _MASK
    return torch.Generator().manual_seed(low ^ _scrambled(high))


def seed_of_step(seed: int, step: int) -> int:
    """The seed of a step's batch: different for different steps (below 2^32), unrelated for different seeds.

    A bijection of the step whose rounds are keyed by the seed: a hash of both would repeat a batch now and then.
    """
    low, high = seed & _MASK, (seed >> 32) & _MASK
    return _scrambled(_scrambled(step & _MASK ^ _scrambled(low + 1 & _MASK)) ^ _scrambled(high ^ low))


def _scrambled(word: int) -> int:
    """A bijection of 32-bit words without structure, with 0 -> 0: the finalizer of MurmurHash3 (Appleby)."""
    word = (word ^ word >> 16) * 0x85EBCA6B & _MASK
    word = (word ^ word >> 13) * 0xC2B2AE35 & _MASK
    return word ^ word >> 16


def uniform(low: float, high: float, *shape: int, generator: torch.Generator) -> Tensor:
    """Independent draws from U[low, high), in float64: a result that is rounded later depends on its dtype no more."""
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    """Independent draws from N(0, 1), in float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def subsets(sizes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """In row i, `count` different numbers out of 0, ..., sizes[i] - 1, every ordered choice equally likely.

    O(rows count^2), whatever the sizes (R. Floyd's algorithm, in Bentley, Comm. ACM 30(9), 1987; all rows at once).

    Args:
        sizes: `(rows,)` integers, each at least `count`.
        count: how many.
        generator: of the draws.
    """
    rows = len(sizes)
    last = sizes.unsqueeze(1) - count + torch.arange(count, device="cpu")
    draws = torch.rand(rows, count, generator=generator, dtype=torch.float64, device="cpu")
    chosen = (draws * (last + 1)).long()  # below last + 1 also after rounding
    for k in range(1, count):
        taken = (chosen[:, :k] == chosen[:, k : k + 1]).any(1)
        chosen[:, k] = torch.where(taken, last[:, k], chosen[:, k])
    return chosen.gather(1, orders(rows, count, generator))


def orders(rows: int, count: int, generator: torch.Generator) -> Tensor:
    """In each row a random order of 0, ..., count - 1."""
    return torch.rand(rows, count, generator=generator, dtype=torch.float64, device="cpu").argsort(1)
