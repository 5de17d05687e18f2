"""The entries that every checkpoint has: whether each is what this library writes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from bilevel._result import Stats
from bilevel.outer.randomness import is_drawn

# What is raised where an entry is used that is not what was written.
MISREAD = (AttributeError, TypeError, LookupError, RuntimeError, ArithmeticError, ValueError)


def unreadable(path: str | os.PathLike[str], why: str = "") -> str:
    """What to say of a file that is no checkpoint; torch's own words are long and about something else."""
    return (
        f"{str(path)!r} is not a readable checkpoint: it is damaged, or is none{f' ({why})' if why else ''}. Run"
        f" without `resume`, or name another file."
    )


def fault(content: Mapping[str, Any]) -> str | None:
    """What is wrong with the entries of a checkpoint that every run has, in words; None: nothing.

    Example:
        >>> import torch
        >>> fault({"x": torch.ones(1), "y": torch.ones(1), "step": -1})
        "its 'step' is no number of steps"
    """
    for name, (is_sound, what) in _ENTRIES.items():
        if name in content and not is_sound(content[name]):
            return f"its {name!r} is {what}"
    return None


def is_count(value: Any) -> bool:
    """Whether this is a whole number from 0 on, of 63 bits."""
    return type(value) is int and 0 <= value < 2**63


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)


def _is_settings(value: Any) -> bool:
    return isinstance(value, dict) and _are_texts([*value]) and _are_texts([*value.values()])


def _is_journal(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("run"), str) and is_count(value.get("entries"))


def is_calls(value: Any) -> bool:
    """Whether these are counts of oracle calls, by name."""
    names = {field.name for field in fields(Stats)}
    return isinstance(value, dict) and value.keys() <= names and all(map(is_count, value.values()))


def _are_positions(value: Any) -> bool:
    return value is None or (
        isinstance(value, list | tuple)
        and len(value) <= 2  # of f and of g
        and all(
            each is None or (isinstance(each, dict) and is_count(each.get("first")) and is_drawn(each.get("drawn")))
            for each in value
        )
    )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


_ENTRIES: Mapping[str, tuple[Any, str]] = {
    "format": (is_count, "no number"),
    "x": (_is_tensor, "no vector"),
    "y": (_is_tensor, "no vector"),
    "step": (is_count, "no number of steps"),
    "kept": (is_count, "no number of records"),
    "look": (is_count, "no number of calls"),
    "settings": (_is_settings, "no dict of texts"),
    "changing": (_are_texts, "no list of names"),
    "journal": (_is_journal, "no place of records"),
    "calls": (is_calls, "no counts of oracle calls"),
    "loaders": (_are_positions, "no place in the data"),
    "random": (is_drawn, "no state of random numbers"),
    "begun": (is_drawn, "no state of random numbers"),
    "history": (lambda value: isinstance(value, list | tuple), "no list of records"),
    "evaluations": (lambda value: isinstance(value, list | tuple), "no list of evaluations"),
}
