"""Whether a user's function takes a tensor from around it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def captured_by(function: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether one of these very tensors is among what the function's own code takes from around it.

    Its closure, the globals that it names and the defaults of its arguments are looked at, and what these hold in a
    list, a tuple or a dict; not what they hold as attributes.

    Example:
        >>> import torch
        >>> x = torch.ones(2)
        >>> captured_by(lambda z: (z - x).sum(), [x]), captured_by(lambda x: x.sum(), [x])
        (True, False)
    """
    function = inspect.unwrap(function) if callable(function) else function
    function = getattr(function, "__func__", function)  # of a method
    if not inspect.isfunction(function):
        return False
    try:
        around = inspect.getclosurevars(function)
    except (TypeError, ValueError):  # an empty cell
        return False
    held = [*around.nonlocals.values(), *around.globals.values()]
    held += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return any(_holds(each, tensors) for each in held)


def _holds(value: Any, tensors: Sequence[Tensor]) -> bool:
    if isinstance(value, Tensor):
        return any(value is tensor for tensor in tensors)
    if isinstance(value, dict):
        return any(_holds(each, tensors) for each in value.values() if isinstance(each, Tensor))
    if isinstance(value, list | tuple):
        return any(_holds(each, tensors) for each in value if isinstance(each, Tensor))
    return False
