"""Layers that are no functions of their parameters and inputs: settled in a working copy, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

BatchNormPolicy = Literal["batch", "frozen", "refuse"]
DropoutPolicy = Literal["fixed", "off", "refuse"]


def refuse_layers(module: nn.Module) -> None:
    """Refuse what has no parameters to be replaced, or writes to them.

    Raises:
        ValueError: if a layer is a TorchScript module, normalizes by a power iteration in train mode, or renormalizes
            its weights.
    """
    for name, layer in module.named_modules():
        where = _where(name, layer)
        if isinstance(layer, torch.jit.ScriptModule):
            raise ValueError(
                f"`functional(module)`: {where} is a TorchScript module, whose parameters cannot be replaced in a call."
                f" Pass the module that was given to `torch.jit.script` or `torch.jit.trace`."
            )
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.max_norm is not None:
            raise ValueError(
                f"`functional(module)`: {where} has `max_norm={layer.max_norm}`, and so writes to its weights in the"
                f" forward. Set `max_norm` to None, and bound the weights by a term of g, or scale them in the forward:"
                f" `weight * (max_norm / weight.norm(dim=1, keepdim=True)).clamp(max=1)`."
            )
        if layer.training and any(_power_iterations(layer)):
            inside = _is_parametrization(layer, "_SpectralNorm")
            owner = name.rpartition("parametrizations")[0].rstrip(".") if inside else name
            raise ValueError(
                f"`functional(module)`: {_where(owner, module.get_submodule(owner))} is spectrally normalized in train"
                f" mode: each call moves its singular vectors by a power iteration, which changes the values and which"
                f" derivatives do not see. Call"
                f" `.eval()` on that layer to keep them as they are (after some calls, so that they have converged), or"
                f" divide the weight by `torch.linalg.matrix_norm(weight, 2)`."
            )


def settle_gradients(working: nn.Module) -> None:
    """Give layers whose first or second derivatives in torch are not those of their values such as are."""
    for layer in working.modules():
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag):  # values do not depend on it
            layer.sparse = layer.scale_grad_by_freq = False
        if _is_parametrization(layer, "_WeightNorm"):
            layer.forward = partial(_weight_norm_of, layer.dim)  # type: ignore[arg-type]
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                setattr(hook, "compute_weight", partial(_computed_weight, hook))  # noqa: B010  (a method, to type checkers)


def _weight_norm_of(dim: int, weight_g: Tensor, weight_v: Tensor) -> Tensor:
    # The second derivative of torch's fused operation takes the norm for a constant.
    return weight_v * (weight_g / torch.norm_except_dim(weight_v, 2, dim))


def _computed_weight(hook: WeightNorm, layer: nn.Module) -> Tensor:
    return _weight_norm_of(hook.dim, getattr(layer, f"{hook.name}_g"), getattr(layer, f"{hook.name}_v"))


def _power_iterations(layer: nn.Module) -> Iterator[bool]:
    yield _is_parametrization(layer, "_SpectralNorm") and bool(layer._buffers)  # of vectors it has none
    yield from (isinstance(hook, SpectralNorm) for hook in layer._forward_pre_hooks.values())


def _is_parametrization(layer: nn.Module, name: str) -> bool:
    return (type(layer).__module__, type(layer).__name__) == ("torch.nn.utils.parametrizations", name)


def settle_normalization(working: nn.Module, policy: BatchNormPolicy) -> None:
    """Batch normalization in train mode, and instance normalization that tracks statistics.

    Raises:
        ValueError: if the policy refuses a layer, or freezes statistics that there are none of.
    """
    for name, layer in working.named_modules():
        if not isinstance(layer, _NormBase) or not layer.training:
            continue
        if not isinstance(layer, _BatchNorm) and not layer.track_running_stats:
            continue  # instance normalization: stateless
        where = _where(name, layer)
        if policy == "refuse":
            raise ValueError(
                f'`functional(batch_norm="refuse")`: {where} is in train mode. Call `.eval()` on it, or choose'
                f' "batch" (statistics of the batch) or "frozen" (running statistics as constants).'
            )
        if policy == "frozen":
            if layer.running_mean is None:
                raise ValueError(f'`functional(batch_norm="frozen")`: {where} has no running statistics. Use "batch".')
            layer.eval()
        else:
            layer.track_running_stats = False
            for buffer in ("running_mean", "running_var", "num_batches_tracked"):
                layer.register_buffer(buffer, None)


def settle_dropout(working: nn.Module, policy: DropoutPolicy) -> None:
    """Layers that draw random numbers in train mode.

    Raises:
        ValueError: if the policy refuses a layer.
    """
    if policy == "fixed":
        return
    for name, layer in working.named_modules():
        if not layer.training:
            continue
        inside = isinstance(layer, nn.MultiheadAttention | nn.RNNBase)
        draws = inside and layer.dropout > 0
        draws = draws or (isinstance(layer, _DropoutNd) and layer.p > 0) or isinstance(layer, nn.RReLU)
        if draws and policy == "refuse":
            raise ValueError(
                f'`functional(dropout="refuse")`: layer {name or "(root)"!r} ({type(layer).__name__}) is in train'
                f' mode and draws random numbers. Call `.eval()` on it, or choose "fixed" (the same ones at each call)'
                f' or "off".'
            )
        if draws and inside:
            layer.dropout = 0.0
        elif draws:
            layer.eval()


def _where(name: str, layer: nn.Module) -> str:
    return f"layer {name or '(root)'!r} ({type(layer).__name__})"
