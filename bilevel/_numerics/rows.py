"""Row-wise linear algebra: each function treats the rows of a batch as independent vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

_FEW = 64  # rows, whose norms are sooner compared as numbers


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of matching rows: `(*batch, n), (*batch, n) -> (*batch,)`."""
    return (a * b).sum(-1)


def row_norms(a: Tensor) -> Tensor:
    """Euclidean norms of rows: `(*batch, n) -> (*batch,)`; their squares must neither overflow nor underflow."""
    norms: Tensor = torch.linalg.vector_norm(a) if a.dim() == 1 else torch.linalg.vector_norm(a, dim=-1)
    return norms  # the same bits, and without the axis in half the time


def safe_row_norms(a: Tensor) -> Tensor:
    """Euclidean norms of rows `(*batch, n) -> (*batch,)`, though their squares over- or underflow.

    Cost: one transfer from the device more than :func:`row_norms`, to see whether rescaling is called for.

    Example:
        >>> float(safe_row_norms(torch.tensor([3e30, 4e30], dtype=torch.float32)) / 1e30)
        5.0
    """
    norms = row_norms(a)
    low, high = _safe_range(a.dtype)
    if norms.numel() <= _FEW and all([low < norm < high for norm in norms.reshape(-1).tolist()]):
        return norms  # by four operations less
    if a.shape[-1] == 0 or bool(((norms > low) & (norms < high)).all()):
        return norms
    largest = a.abs().amax(-1, keepdim=True)
    scale = torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest))
    return row_norms(a / scale) * scale.squeeze(-1)


def all_finite(a: Tensor) -> bool:
    """Whether every entry is a number: by its sum, unless that overflows, in one pass and without a mask in memory.

    Example:
        >>> (
        ...     all_finite(torch.tensor([3e38, 3e38])),
        ...     all_finite(torch.tensor([torch.inf, -torch.inf])),
        ... )
        (True, False)
    """
    return math.isfinite(a.sum().item()) or bool(a.isfinite().all())


def row_norm_numbers(a: Tensor) -> list[float]:
    """:func:`safe_row_norms` of all rows as floats, which for few rows are cheaper to compare than tensors."""
    found = row_norms(a)
    norms: list[float] = [found.item()] if a.dim() == 1 else found.reshape(-1).tolist()
    low, high = _safe_range(a.dtype)
    return norms if all([low < norm < high for norm in norms]) else safe_row_norms(a).reshape(-1).tolist()


def row_norms_and_numbers(a: Tensor) -> tuple[Tensor, list[float]]:
    """:func:`safe_row_norms` `(*batch,)` and the same as floats, in one look."""
    norms = row_norms(a)
    numbers: list[float] = [norms.item()] if a.dim() == 1 else norms.reshape(-1).tolist()
    low, high = _safe_range(a.dtype)
    if all([low < number < high for number in numbers]):
        return norms, numbers
    norms = safe_row_norms(a)
    return norms, norms.reshape(-1).tolist()


def norms_beside(dtype: torch.dtype, *sizes: float) -> Callable[[Tensor], Tensor]:
    """What to take norms by that are compared with these: :func:`row_norms`, or the safe one where squares may be lost.

    Squares that under- or overflow change no norm that is near a size whose own square does neither.

    Args:
        dtype: of the rows.
        sizes: such as a tolerance; 0 is none.
    """
    low, high = _safe_range(dtype)
    return row_norms if all(low < size < high for size in sizes if size) and any(sizes) else safe_row_norms


@cache
def _safe_range(dtype: torch.dtype) -> tuple[float, float]:
    """Between these, the squares of a norm and of what counts in it are normal numbers of this dtype."""
    info = torch.finfo(dtype)
    return math.sqrt(info.tiny) / info.eps, math.sqrt(info.max)


def row_maxima(entries: Tensor) -> Tensor:
    """The largest entry of each row, with its sign: `(*batch, n) -> (*batch,)`; 0 without entries."""
    return entries.amax(-1) if entries.shape[-1] else entries.sum(-1)


def row_moduli(entries: Tensor) -> Tensor:
    """The largest modulus in each row: `(*batch, n) -> (*batch, 1)`; 0 without entries."""
    if entries.shape[-1] == 0:
        return entries.new_zeros(*entries.shape[:-1], 1)
    return entries.abs().amax(-1, keepdim=True)


def matrix_times(A: Tensor, v: Tensor) -> Tensor:
    """The product of each matrix with its vector: `(*batch, m, n), (*batch, n) -> (*batch, m)`."""
    product: Tensor = (A @ v.unsqueeze(-1)).squeeze(-1)
    return product


def divided_rows(v: Tensor, norms: Tensor, active: Tensor) -> Tensor:
    """Rows v / norm where active, and zero elsewhere, so that NaN does not outlive its row."""
    return torch.where(active.unsqueeze(-1), v / norms.unsqueeze(-1), torch.zeros_like(v))


def chosen_rows(which: Sequence[bool], a: Tensor, b: Tensor) -> Tensor:
    """The rows of a that are marked, and the others of b; without a copy where all or none are."""
    if all(which):
        return a
    return torch.where(torch.tensor(which, device=a.device).unsqueeze(-1), a, b) if any(which) else b


def positive_or_one(sizes: Tensor) -> Tensor:
    """The sizes that are positive, and 1 for the others: what may be divided by."""
    return torch.where(sizes > 0, sizes, torch.ones_like(sizes))
