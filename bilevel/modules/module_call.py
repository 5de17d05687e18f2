"""Calling a module with other tensors in the place of its parameters, at little cost."""

from __future__ import annotations

from collections.abc import Mapping
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
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        parts = list(module.modules())
        self._parameters: list[tuple[dict[str, Any], str, str]] = [
            (part._parameters, key, names[id(parameter)])
            for part in parts
            for key, parameter in part._parameters.items()
            if parameter is not None
        ]
        self._buffers: list[tuple[dict[str, Any], str]] = [
            (part._buffers, key) for part in parts for key, buffer in part._buffers.items() if buffer is not None
        ]
        self._places = [(slot, key) for slot, key, _ in self._parameters] + self._buffers
        self._is_plain = all(type(part).__setattr__ is nn.Module.__setattr__ for part in parts)
        self.is_deterministic = all(_is_deterministic(part) for part in parts)
        for part in parts:
            if type(part) is nn.Linear and "forward" not in part.__dict__:
                part.forward = partial(_linear, part)  # type: ignore[method-assign]

    def call(self, params: Mapping[str, Tensor], inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """The module's output with these parameters; buffers are copies, so that what a layer writes is lost."""
        if not self._is_plain:
            buffers = {name: buffer.clone() for name, buffer in self._module.named_buffers()}
            return torch.func.functional_call(self._module, {**params, **buffers}, inputs, keywords)
        held = [(slot, key, slot[key]) for slot, key in self._places]
        try:
            for slot, key, name in self._parameters:
                if name in params:
                    slot[key] = params[name]
            copies: dict[int, Tensor] = {}
            for slot, key in self._buffers:
                slot[key] = copies.setdefault(id(slot[key]), slot[key].clone())
            return self._module(*inputs, **keywords)
        finally:
            for slot, key, tensor in held:
                slot[key] = tensor


def _linear(part: nn.Linear, input: Tensor) -> Tensor:
    return linear(input, part.weight, part.bias)


def _is_deterministic(part: nn.Module) -> bool:
    hooks = (part._forward_hooks, part._forward_pre_hooks)
    return type(part) in _DETERMINISTIC and "forward" not in part.__dict__ and not any(hooks)
