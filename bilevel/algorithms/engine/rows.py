"""Runs side by side: which row of a state belongs to which of them."""

from __future__ import annotations

import abc
import math
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor


class AbstractRows(abc.ABC):
    """A memory of several runs side by side that has them along another axis than the first."""

    @abc.abstractmethod
    def of_run(self, k: int) -> Any:
        """That of run k."""


def is_row(rows: Any, k: int, alone: Any) -> bool:
    """Whether row k of an algorithm for several runs side by side has the settings of the one that runs alone.

    A number of that one is the k-th of a tensor, and an optimizer the k-th of several; all else is the same.
    """
    if isinstance(rows, AbstractRows):
        return is_row(rows.of_run(k), k, alone)
    if isinstance(rows, Tensor) and isinstance(alone, int | float):
        return rows.dim() == 1 and math.isclose(float(rows[k]), alone, rel_tol=1e-6)  # of the dtype of x
    if is_dataclass(rows) and type(rows) is type(alone):
        return all(is_row(getattr(rows, part.name), k, getattr(alone, part.name)) for part in fields(rows))
    try:
        return rows is alone or bool(rows == alone)
    except RuntimeError:  # of tensors
        return False


def row_of(state: Any, k: int) -> Any:
    """Row k of several states side by side, in which every tensor has them along its first axis."""
    if isinstance(state, Tensor):
        return state[k] if state.numel() else state  # what is empty belongs to none
    if isinstance(state, dict):
        return {name: row_of(value, k) for name, value in state.items()}
    if isinstance(state, AbstractRows):
        return state.of_run(k)
    if is_dataclass(state) and not isinstance(state, type):
        return replace(state, **{part.name: row_of(getattr(state, part.name), k) for part in fields(state)})
    return state
