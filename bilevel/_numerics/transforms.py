"""Whether torch lets one differentiate: not in inference mode, nor inside of the transforms of `torch.func`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def inside_transform() -> bool:
    """Whether a transform is at work: it forbids `requires_grad_`, and is not to be asked otherwise."""
    try:
        torch.empty(0).requires_grad_()
    except RuntimeError:
        return True
    return False


def plain(value: Any) -> Any:
    """What a transform wraps; of a tensor that `vmap` goes over some entries in the shape of one row, to try with."""
    if not isinstance(value, Tensor):
        return value
    inside = torch.func.debug_unwrap(value).detach()
    return inside if inside.shape == value.shape else inside.reshape(-1)[: value.numel()].reshape(value.shape)


def is_transformed(value: Tensor) -> bool:
    """Whether a transform differentiates, or goes over, something in a value that was made of `plain` arguments."""
    dual: Any = torch.autograd.forward_ad.unpack_dual(value)  # type: ignore[no-untyped-call]
    return value.requires_grad or dual.tangent is not None or torch.func.debug_unwrap(value).shape != value.shape


def demand_autograd(call: str) -> None:
    """Refuse to differentiate where torch does not let anybody: in inference mode, and inside of a functorch transform.

    Raises:
        ValueError: naming the call and what to do.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError(
            f"`{call}` differentiates f and g, which `torch.inference_mode()` forbids. Call it outside, or under"
            f" `torch.no_grad()`, which does not matter to it."
        )
    if inside_transform():
        raise ValueError(
            f"`{call}` differentiates f and g itself, which `torch.func` transforms (grad, vjp, jvp, vmap, ...) around"
            f" it forbid. Transform `hyperobjective(problem, y0)`, which they differentiate, or call `{call}` outside."
        )
