"""The exact minimizer of squares and total variation along a chain, by dynamic programming."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

import torch
from torch import Tensor


def jumps(v: Tensor, weights: Tensor) -> Tensor:
    """The signs of y_{k+1} - y_k `(*batch, n - 1)`, y = argmin |y - v|^2 / 2 + sum_k w_k |y_{k+1} - y_k|.

    Exact: those that are equal are zero. O(n) a row.

    Args:
        v: `(*batch, n)`.
        weights: w `(*batch, n - 1)`; negative ones count as zero.
    """
    rows, w = v.reshape(-1, v.shape[-1]).double(), weights.reshape(-1, weights.shape[-1]).double()
    w = torch.minimum(w.clamp_min(0), 2 * rows.abs().sum(-1, keepdim=True) + 1)  # no dual variable is larger
    found = [_signs(chain(*each)) for each in zip(rows.tolist(), w.tolist(), strict=True)]
    return torch.tensor(found, dtype=torch.int64, device=v.device).reshape(weights.shape)


def chain(v: list[float], weights: list[float]) -> list[float]:
    """argmin_y |y - v|^2 / 2 + sum_k w_k |y_{k+1} - y_k|.

    With m_k(b) the least cost of y_0 ... y_k where y_k = b, the derivative m_k' is piecewise linear and increasing, and
    m_{k+1}'(b) = min(max(m_k'(b), -w_k), w_k) + b - v_{k+1}. Its knots are kept, with what changes at each: a chain
    enters and leaves at most once. So y_k is y_{k+1}, clipped to where m_k' is between -w_k and w_k.

    Source: Johnson, "A dynamic programming algorithm for the fused lasso and L0-segmentation", JCGS 22 (2013).

    Example:
        >>> chain([0.0, 0.0, 4.0], [1.0, 1.0])
        [0.5, 0.5, 3.0]
    """
    knots: deque[tuple[float, float, float]] = deque()  # where, and by how much slope and intercept change there
    left, right = (1.0, -v[0]), (1.0, -v[0])  # slope and intercept of the first and of the last piece
    bounds = []
    for w, following in zip(weights, v[1:], strict=True):
        (slope, level), low = _from_left(knots, left, -w)
        knots.appendleft((low, slope, level + w))
        slope, level = right
        while len(knots) > 1 and slope * knots[-1][0] + level > w:
            _, change, lift = knots.pop()
            slope, level = slope - change, level - lift
        high = max((w - level) / slope, low)
        knots.append((high, -slope, w - level))
        bounds.append((low, high))
        left, right = (1.0, -w - following), (1.0, w - following)
    y = [_from_left(knots, left, 0.0)[1]]
    for low, high in reversed(bounds):
        y.append(min(max(y[-1], low), high))
    return y[::-1]


def _from_left(
    knots: deque[tuple[float, float, float]], piece: tuple[float, float], target: float
) -> tuple[tuple[float, float], float]:
    """The piece in which the target is attained, and where; knots before that are dropped."""
    slope, level = piece
    while knots and slope * knots[0][0] + level < target:
        _, change, lift = knots.popleft()
        slope, level = slope + change, level + lift
    return (slope, level), (target - level) / slope


def _signs(y: list[float]) -> list[int]:
    return [(after > before) - (after < before) for before, after in pairwise(y)]
