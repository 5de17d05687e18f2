"""Runs side by side: which row of a state belongs to which of them."""

from __future__ import annotations

import abc
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor


class AbstractRows(abc.ABC):
    """A memory of several runs side by side that has them along another axis than the first."""

    @abc.abstractmethod
    def of_run(self, k: int) -> Any:
        """That of run k."""


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
