"""One function for many problems: side by side (`torch.vmap` for tensors, without its cost a call), or in a loop."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

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


def looped(function: Callable[..., Any], size: int, in_dims: tuple[int | None, ...]) -> Callable[..., Any]:
    """What `batched` is, by one call of the function for each problem: for functions that `torch.vmap` cannot take.

    Results are stacked, so that derivatives taken outside are those of independent rows. Random numbers that the
    function draws are the same for every problem, as they are side by side.
    """

    def call(*args: Tensor) -> Any:
        rows = [a if dim is None else a.unbind(dim) for a, dim in zip(args, in_dims, strict=True)]
        found = []
        with RANDOM:
            state = random_state(*args)
            for k in range(size):
                if k:
                    set_random_state(state)
                found.append(function(*(row[k] if isinstance(row, tuple) else row for row in rows)))
        if isinstance(found[0], tuple):
            return tuple(torch.stack(each) for each in zip(*found, strict=True))
        return torch.stack(found)

    return call


# Torch's generators are those of the process: whoever sets one back holds this, so that no two threads do at a time.
RANDOM = threading.RLock()
if hasattr(os, "register_at_fork"):  # a thread that held it is not there in the child
    os.register_at_fork(after_in_child=getattr(RANDOM, "_at_fork_reinit", None) or (lambda: None))


def random_state(*args: Tensor) -> list[tuple[torch.Generator, Tensor]]:
    """The default generators of the CPU and of the devices of these tensors, and where they are."""
    devices = {a.device.index for a in args if a.device.type == "cuda"}
    generators = [torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)]
    return [(generator, generator.get_state()) for generator in generators]


def set_random_state(state: list[tuple[torch.Generator, Tensor]]) -> None:
    """Put generators back to where they were."""
    for generator, at in state:
        generator.set_state(at)


def is_batched(tensor: Tensor) -> bool:
    """Whether this stands for many tensors side by side: whether one is inside of a `torch.vmap` over it."""
    functorch: Any = getattr(torch._C, "_functorch", None)
    if hasattr(functorch, "is_batchedtensor"):
        return bool(functorch.is_batchedtensor(tensor))
    try:
        bool(tensor.detach().reshape(-1)[:1].sum() == 0)  # a number of one's own: there is none side by side
    except RuntimeError:
        return True
    return False


def every_row(tensor: Tensor) -> Tensor:
    """The values of a tensor for all problems side by side, their axes in front; outside of a `torch.vmap` itself."""
    functorch: Any = getattr(torch._C, "_functorch", None)
    while functorch is not None and functorch.is_batchedtensor(tensor):
        tensor = functorch.get_unwrapped(tensor).movedim(functorch.maybe_get_bdim(tensor), 0)
    return tensor


@cache
def _primitives() -> tuple[Callable[..., Any], ...] | None:
    functorch = getattr(torch._C, "_functorch", None)
    if not all(hasattr(functorch, name) for name in _PRIMITIVES):
        return None
    torch.vmap(torch.sin)(torch.ones(1, device="cpu"))  # loads the rules that some operations need
    return tuple(getattr(functorch, name) for name in _PRIMITIVES)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear`; inside a `batched` call with a weight for each problem, one batched product.

    Torch's rule for that case is a chain of views around the same product, each of which every derivative repeats.
    """
    rows = _rows_of(x, weight, bias)
    if rows is None:
        return functional.linear(x, weight, bias)
    level, inputs, weights, biases = rows
    functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009  (type checkers do not know it)
    found: Tensor = functorch._add_batch_dim(torch.baddbmm(biases.unsqueeze(1), inputs, weights.mT), 0, level)
    return found


def _rows_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, Tensor, Tensor, Tensor] | None:
    """The level of the vmap and the three tensors, the problems in front; None where that is not the case at hand."""
    functorch: Any = getattr(torch._C, "_functorch", None)
    if bias is None or not hasattr(functorch, "is_batchedtensor") or not functorch.is_batchedtensor(weight):
        return None
    level, found = functorch.maybe_get_level(weight), []
    for tensor, dim in ((x, 3), (weight, 3), (bias, 2)):
        if not functorch.is_batchedtensor(tensor) or functorch.maybe_get_level(tensor) != level:
            return None
        inside, place = functorch.get_unwrapped(tensor), functorch.maybe_get_bdim(tensor)
        if functorch.is_batchedtensor(inside) or inside.dim() != dim:  # several vmaps, or more axes of samples
            return None
        found.append(inside.movedim(place, 0) if place else inside)
    return level, found[0], found[1], found[2]
