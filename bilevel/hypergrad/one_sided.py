"""Slopes to two sides: whether they keep differing, which tells of a kink of Phi, and the way to either side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

UNEVEN = 0.1  # slopes to both sides that differ by less are one
FARTHER = 4.0  # to the second look
_KEPT = 2.0  # by less than this factor a kept difference changes there; that of a smooth function by four


def one_sided(right: float, left: float, farther: Callable[[], tuple[float, float]], rounding: float) -> bool:
    """Whether Phi has a kink between two slopes.

    They differ by t Phi'' where Phi is smooth, and by the same at any t where it is not. So a second look is taken,
    four times as far, where rounding shows less, but only where there is doubt.

    Args:
        right: the slope to one side.
        left: to the other.
        farther: makes both at four times the distance.
        rounding: what a difference of slopes may be by rounding alone.

    Example:
        >>> one_sided(1.0, -1.0, lambda: (1.0, -1.0), 1e-12)  # |x|
        True
        >>> one_sided(0.1, -0.1, lambda: (0.4, -0.4), 1e-12)  # x^2
        False
    """
    gap = right - left
    if not abs(gap) > max(UNEVEN * max(abs(right), abs(left)), rounding):
        return False
    right, left = farther()
    return 1 / _KEPT < (right - left) / gap < _KEPT


def moved_to(x: Tensor, side: Literal["left", "right"]) -> tuple[Tensor, float]:
    """X with each entry moved to a side by eps^0.45 max(1, |x_i|), and the most that any has moved.

    Of a function that is smooth on each side of x, the derivative there is that of the side, to as much: the exponent
    leaves a kink at a distance that solvers to nearly full accuracy tell from none.
    """
    distance = torch.finfo(x.dtype).eps ** 0.45 * x.abs().clamp_min(1.0)
    return (x + distance if side == "right" else x - distance), float(distance.max()) if x.numel() else 0.0
