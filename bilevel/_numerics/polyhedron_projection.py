"""Projection onto {w : A w = b, lower <= w <= upper} with few equalities, by Newton's method on their multipliers."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel._numerics.rows import matrix_times, positive_or_one, row_moduli

_STEPS = 60
_HALVINGS = 30
_DAMPING = 1e-13  # of the size of the matrix: where hardly an entry is free


def projected(
    v: Tensor, A: Tensor, b: Tensor, lower: Tensor, upper: Tensor, start: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest point w `(rows, n)`, the multipliers of A w = b, and what is left of A w - b, relative: `(rows,)`.

    w(nu) = clip(v - A'nu) for the nu at which A w(nu) = b: the maximum of a concave function that is quadratic on
    pieces. A step costs a product with A diag(free) A', and is halved until that function grows: O(n m^2) a step, some
    ten of them, whatever n.

    Args:
        v: `(rows, n)`.
        A: `(rows, m, n)`.
        b: `(rows, m)`.
        lower: `(rows, n)`.
        upper: `(rows, n)`.
        start: multipliers to start from.
    """

    def at(nu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w = (v - matrix_times(A.mT, nu)).clamp(lower, upper)
        left = matrix_times(A, w) - b
        return w, left, ((w - v).square() / 2).sum(-1) + (nu * left).sum(-1)

    nu = v.new_zeros(b.shape) if start is None else start
    w, left, value = at(nu)
    if not b.shape[-1]:
        return w, nu, torch.zeros_like(value)
    size = positive_or_one(torch.maximum(row_moduli(b), row_moduli(matrix_times(A.abs(), w.abs()))))
    eye = torch.eye(b.shape[-1], dtype=v.dtype, device=v.device)
    for _ in range(_STEPS):
        far = (left.abs() / size).amax(-1)
        if not bool((far > 4 * torch.finfo(v.dtype).eps).any()):
            break
        inside = ((w > lower) & (w < upper)).to(v)
        M = (A * inside.unsqueeze(-2)) @ A.mT
        scale = positive_or_one(
            torch.maximum(torch.diagonal(M, dim1=-2, dim2=-1).amax(-1), A.square().sum(-1).amax(-1) * 1e-3)
        )
        step = torch.linalg.solve_ex(M + _DAMPING * scale[:, None, None] * eye, left.unsqueeze(-1))[0].squeeze(-1)
        slope, t = (step * left).sum(-1), torch.ones_like(value)
        better = torch.zeros_like(value, dtype=torch.bool)
        for _ in range(_HALVINGS):
            ahead = at(nu + t.unsqueeze(-1) * step)
            less = (ahead[1].abs() / size).amax(-1) < far
            enough = ahead[2] >= value + 1e-4 * t * slope
            better = (less | (enough & (ahead[2] > value))) & (far > 0)
            if bool((better | ~(far > 4 * torch.finfo(v.dtype).eps)).all()):
                break
            t = torch.where(better, t, t / 2)
        if not bool(better.any()):
            break
        row = better.unsqueeze(-1)
        nu = torch.where(row, nu + t.unsqueeze(-1) * step, nu)
        w, left, value = at(nu)
    return w, nu, (left.abs() / size).amax(-1)


def separates(nu: Tensor, A: Tensor, b: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Whether nu proves that no w is feasible: nu'b is above, or below, all nu'A w on the box: `(rows,)`."""
    pull, side = matrix_times(A.mT, nu), (nu * b).sum(-1)
    most, least = (
        torch.where(sign * pull > 0, upper * pull, torch.where(pull == 0, 0.0, lower * pull)).sum(-1)
        for sign in (1.0, -1.0)
    )
    size = 1e-9 * (nu.abs() * b.abs()).sum(-1)
    return (side > most + size) | (side < least - size) | (lower > upper).any(-1)
