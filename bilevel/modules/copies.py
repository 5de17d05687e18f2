"""Copies of a module: of its tensors too, or sharing them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from bilevel.modules.absent import Absent
from bilevel.modules.attributes import attributes, place, reached


class Left(NamedTuple):
    """A tensor with its graph that an earlier call left in a plain attribute: hooks that compute weights leave such."""

    layer: str
    attribute: str
    where: str


def left_by_calls(module: nn.Module) -> dict[Left, Tensor]:
    """What earlier calls left in plain attributes."""
    registered = [id(part) for part in module.modules()]
    return {
        Left(name, attribute, where): found
        for name, part in module.named_modules()
        for attribute, value in attributes(part).items()
        for where, found in reached(value, attribute, registered)
        if isinstance(found, Tensor) and found.grad_fn is not None
    }


def whole_copy(module: nn.Module, left: Iterable[Tensor]) -> nn.Module:
    """A copy that shares nothing; tensors that were left by calls are without their graphs.

    Raises:
        TypeError: if an attribute cannot be copied, which is named.
    """
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in left}
    try:
        return copy.deepcopy(module, dict(memo))
    except Exception as error:
        raise TypeError(
            f"`functional(module)` works on a copy of the module, and {_uncopied(module, memo)} cannot be copied"
            f" ({type(error).__name__}: {error}). Set it to None before, or keep it outside of the module."
        ) from error


def working_copy(original: nn.Module, left: Iterable[Left]) -> nn.Module:
    """A copy that shares parameters and buffers, to be called. What was left by calls is absent from it.

    Hooks that compute weights write it anew at every call; anything else that reads it would read what is stale.
    """
    memo: dict[int, Any] = {id(t): t for t in (*original.parameters(), *original.buffers())}
    parts = dict(original.named_modules())
    registered = [id(part) for part in parts.values()]
    for part in parts.values():  # leaves cannot be copied under vmap, nor can they be changed in place but on purpose
        found = (each for _, each in reached(attributes(part), "", registered))
        memo |= {id(t): t for t in found if type(t) is Tensor and t.requires_grad}
    for name, attribute, where in left:
        held = dict(reached(attributes(parts[name])[attribute], attribute, registered))[where]
        memo[id(held)] = Absent.like(
            held,
            f"`functional(module)`: {place(name, parts[name], where)} holds a tensor that an earlier call computed, and"
            f" the forward reads it before it writes it. Set it to None before, or compute it in each call.",
        )
    return copy.deepcopy(original, memo)


def vacate(working: nn.Module, names: Collection[str]) -> None:
    """Take the parameters of these names out of a working copy: they are what a call is given."""
    absent: dict[int, Absent] = {}
    for name, parameter in working.named_parameters():
        if name in names:
            absent[id(parameter)] = Absent.like(
                parameter,
                f"`functional(module)`: parameter {name!r} was read when no call was under way, as"
                f" `torch.utils.checkpoint` does, which recomputes a part of the module in the backward pass. Leave it"
                f" out of the module, and recompute the whole:"
                f" `checkpoint(net, params, *inputs, use_reentrant=False)`.",
            )
    for part in working.modules():
        slots: dict[str, Any] = part._parameters
        slots.update({key: absent[id(held)] for key, held in slots.items() if id(held) in absent})


def _uncopied(module: nn.Module, memo: dict[int, Any]) -> str:
    """The attribute that cannot be copied, in words."""
    memo = {**memo, **{id(part): part for part in module.modules()}}
    for name, part in module.named_modules():
        for attribute, value in vars(part).items():
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                return f"{place(name, part, attribute)} of type {type(value).__name__}"
    return f"a layer with a `__deepcopy__` of its own in {type(module).__name__}"
