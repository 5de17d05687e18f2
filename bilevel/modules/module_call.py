"""Calling a module with other tensors in the place of its parameters, at little cost."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from bilevel._numerics.batched import linear

# Layers that draw no random number, in train mode either.
_DIMENSIONED = ("Conv", "ConvTranspose", "BatchNorm", "InstanceNorm", "MaxPool", "AvgPool", "AdaptiveAvgPool")
_DETERMINISTIC = frozenset(
    [getattr(nn, f"{name}{d}d") for name in (*_DIMENSIONED, "AdaptiveMaxPool") for d in (1, 2, 3)]
    + [nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity, nn.Flatten, nn.Unflatten, nn.Linear, nn.Bilinear]
    + [nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU]
    + [nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Softmax, nn.LogSoftmax, nn.Softmin]
    + [nn.LogSigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Tanhshrink]
)


@final
class Slots:
    """Where a module keeps its parameters and buffers, found once; a call puts others there and takes them out again.

    `torch.func.functional_call` does the same and looks for the places at each call, which takes longer than a small
    network does. It remains in charge where a layer keeps other references to its parameters (recurrent layers).

    Not for two calls at a time, be it in threads or one inside of the other.
    """

    def __init__(self, module: nn.Module, mutable: Collection[tuple[str, str]] = ()) -> None:
        """Find the places.

        Args:
            module: what is called.
            mutable: plain attributes whose value a call changes in place, by layer and name: a call gets a copy of it.
        """
        self.module = module
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        parts = dict(module.named_modules())
        self._parameters: list[tuple[dict[str, Any], str, str]] = [
            (part._parameters, key, names[id(parameter)])
            for part in parts.values()
            for key, parameter in part._parameters.items()
            if parameter is not None
        ]
        self._buffers: list[tuple[dict[str, Any], str]] = [
            (part._buffers, key)
            for part in parts.values()
            for key, buffer in part._buffers.items()
            if buffer is not None
        ]
        self._places = [(slot, key) for slot, key, _ in self._parameters] + self._buffers
        self._is_plain = all(type(part).__setattr__ is nn.Module.__setattr__ for part in module.modules())
        self.is_deterministic = all(_is_deterministic(part) for part in parts.values())
        for part in parts.values():
            if type(part) is nn.Linear and "forward" not in part.__dict__:
                part.forward = partial(_linear, part)  # type: ignore[method-assign]
        # What a call binds anew is forgotten after it: every call finds the attributes that the first one found.
        self._attributes = [(part.__dict__, dict(part.__dict__)) for part in parts.values() if _may_bind(part)]
        self._mutable = [(parts[name].__dict__, key, parts[name].__dict__[key]) for name, key in mutable]
        shared = (module, *parts.values(), *module.parameters(), *module.buffers())
        self._shared = {id(each): each for each in shared} if mutable else {}

    def call(self, params: Mapping[str, Tensor], inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """The module's output with these parameters; what a layer writes to buffers and plain attributes is lost."""
        if self._mutable:
            memo = dict(self._shared)
            for attributes, key, value in self._mutable:
                attributes[key] = copy.deepcopy(value, memo)
        held = [(slot, key, slot[key]) for slot, key in self._places] if self._is_plain else []
        try:
            if not self._is_plain:
                buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
                return torch.func.functional_call(self.module, {**params, **buffers}, inputs, keywords)
            for slot, key, name in self._parameters:
                if name in params:
                    slot[key] = params[name]
            copies: dict[int, Tensor] = {}
            for slot, key in self._buffers:
                slot[key] = copies.setdefault(id(slot[key]), slot[key].clone())
            return self.module(*inputs, **keywords)
        finally:
            for slot, key, tensor in held:
                slot[key] = tensor
            for attributes, before in self._attributes:
                attributes.clear()
                attributes.update(before)


def _linear(part: nn.Linear, input: Tensor) -> Tensor:
    return linear(input, part.weight, part.bias)


def _is_deterministic(part: nn.Module) -> bool:
    return type(part) in _DETERMINISTIC and "forward" not in part.__dict__ and not _has_hooks(part)


def _may_bind(part: nn.Module) -> bool:
    """Whether a call may bind an attribute: torch's own layers do not, but recurrent ones."""
    own = type(part).__module__.startswith("torch.nn.modules.") and not isinstance(part, nn.RNNBase)
    return not own or _has_hooks(part)


def _has_hooks(part: nn.Module) -> bool:
    return bool(part._forward_hooks or part._forward_pre_hooks)
