"""Norms of rows within a program, where no value can be looked at."""

from __future__ import annotations

import torch
from torch import Tensor


def row_norm(a: Tensor) -> Tensor:
    """Euclidean norms `(*batch, n) -> (*batch,)`, though squares over- or underflow.

    Example:
        >>> float(row_norm(torch.tensor([3e30, 4e30], dtype=torch.float32)) / 1e30)
        5.0
    """
    largest = a.abs().amax(-1)
    unit = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    norms: Tensor = torch.linalg.vector_norm(a / unit.unsqueeze(-1), dim=-1) * unit
    return norms


def count() -> Tensor:
    """A counter of steps at zero."""
    return torch.zeros((), dtype=torch.int64)


def column(a: Tensor) -> Tensor:
    """A number a row as a factor of rows."""
    return a.unsqueeze(-1)
