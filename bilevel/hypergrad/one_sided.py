"""Whether slopes to two sides keep differing: what estimators that see Phi by values can tell of its kinks."""

from __future__ import annotations

from collections.abc import Callable

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
