"""Taylor remainders: whether a function is smooth along a line, and its derivative right."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch

_AGREE = 0.01  # two derivatives nearer than that are the same


@final
@dataclass(frozen=True)
class Slope:
    """How fast |phi(t) - phi(0) - t phi'(0)| vanishes: like t to this power.

    Attributes:
        order: the power; infinite where the remainder is at rounding level throughout.
        remainder: the relative remainder at the smallest t that was used.
        claimed: phi'(0), as claimed.
        measured: phi'(0) by central differences, None where two of them do not agree.
        noise: how far rounding may have moved `measured`.
    """

    order: float
    remainder: float
    claimed: float = 0.0
    measured: float | None = None
    noise: float = 0.0

    @property
    def wrong(self) -> bool:
        """Whether differences agree on another derivative than the claimed one: it is detached, or written wrongly."""
        if self.measured is None:
            return False
        size = max(abs(self.measured), abs(self.claimed))
        return abs(self.measured - self.claimed) > max(_AGREE * size, self.noise)

    @property
    def smooth(self) -> bool:
        """Whether the remainder vanishes at least like t^1.5; a wrong derivative or a kink gives t^1."""
        return self.order > 1.5

    def __str__(self) -> str:
        return f"remainder of order t^{self.order:.2g}"


def slope(phi: Callable[[float], float], derivative: float, size: float, dtype: torch.dtype) -> Slope:
    """Fit the order of the remainder of phi at 0 over steps t that halve, above the rounding level.

    Args:
        phi: t -> phi(t).
        derivative: phi'(0), as claimed.
        size: the norm of the point, to which t is relative.
        dtype: in which phi is computed.

    Example:
        >>> slope(lambda t: (1 + t) ** 3, 3.0, 1.0, torch.float64).smooth
        True
        >>> slope(abs, 1.0, 1.0, torch.float64).smooth  # phi(t) + phi(-t) shows the kink
        False
        >>> slope(lambda t: 3 * t, 0.0, 1.0, torch.float64).wrong
        True
    """
    eps = torch.finfo(dtype).eps
    at_zero = phi(0.0)
    points: list[tuple[float, float]] = []
    t = 0.1 * max(size, 1.0)
    while t > eps**0.5 * max(size, 1.0):
        # Both sides, so that a kink exactly at 0 shows as well.
        ends = [phi(t) - at_zero - t * derivative, phi(-t) - at_zero + t * derivative]
        remainder = max(map(abs, ends))
        level = 50 * eps * (abs(at_zero) + abs(phi(t)) + abs(t * derivative))
        if not math.isfinite(remainder):
            points.clear()
        elif remainder > level:
            points.append((math.log(t), math.log(remainder)))
        t /= 2
    measured, noise = _difference(phi, size, eps)
    if len(points) < 3:
        return Slope(math.inf, 0.0, derivative, measured, noise)
    tail = points[-6:]  # the smallest steps that are still above rounding
    mean_t = sum(a for a, _ in tail) / len(tail)
    mean_r = sum(b for _, b in tail) / len(tail)
    order = sum((a - mean_t) * (b - mean_r) for a, b in tail) / sum((a - mean_t) ** 2 for a, _ in tail)
    return Slope(order, math.exp(tail[-1][1]), derivative, measured, noise)


def _difference(phi: Callable[[float], float], size: float, eps: float) -> tuple[float | None, float]:
    """phi'(0) by central differences of two lengths, if they agree, and how far rounding may have moved it."""
    t = eps ** (1 / 3) * max(size, 1.0)
    ends = [phi(t), phi(-t), phi(t / 2), phi(-t / 2)]
    long, short = (ends[0] - ends[1]) / (2 * t), (ends[2] - ends[3]) / t
    noise = 50 * eps * sum(map(abs, ends)) / t
    alike = abs(long - short) <= max(_AGREE * max(abs(long), abs(short)), noise)
    return (short, noise) if alike and math.isfinite(short) else (None, 0.0)
