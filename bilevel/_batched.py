"""One function for many problems side by side: `torch.vmap` for tensors, without its cost a call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_PRIMITIVES = ("_vmap_increment_nesting", "_vmap_decrement_nesting", "_add_batch_dim", "_remove_batch_dim")


def batched(function: Callable[..., Any], size: int, in_dims: tuple[int | None, ...]) -> Callable[..., Any]:
    """`torch.vmap(function, in_dims, randomness="same")` for arguments that are tensors, `size` problems at a time.

    What `torch.vmap` does around the function (nested arguments, checks, messages) takes as long as a small network
    does. Here the primitives are called that it is made of; where torch has no such ones, it is called itself.
    """
    primitives = _primitives()
    if primitives is None:
        return torch.vmap(function, in_dims=in_dims, randomness="same")
    enter, leave, add, remove = primitives

    def call(*args: Tensor) -> Any:
        level = enter(size, "same")
        try:
            rows = [a if dim is None else add(a, dim, level) for a, dim in zip(args, in_dims, strict=True)]
            found = function(*rows)
            if isinstance(found, tuple):
                return tuple(remove(each, level, size, 0) for each in found)
            return remove(found, level, size, 0)
        finally:
            leave()

    return call


@cache
def _primitives() -> tuple[Callable[..., Any], ...] | None:
    functorch = getattr(torch._C, "_functorch", None)
    if not all(hasattr(functorch, name) for name in _PRIMITIVES):
        return None
    torch.vmap(torch.sin)(torch.ones(1))  # loads the rules that some operations need
    return tuple(getattr(functorch, name) for name in _PRIMITIVES)
