"""Results that were computed by any means, with the derivative that they are known to have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Pull = Callable[[tuple[Tensor, ...], Tensor], tuple[Tensor, ...]]


def differentiated(value: Tensor, inputs: Sequence[Tensor], parts: Sequence[Tensor], pull: Pull) -> Tensor:
    """The value, as a function of the inputs whose vector-Jacobian products `pull(parts, w)` gives.

    It may be called inside of `torch.vmap`, with derivatives taken outside. The derivative is once differentiable in w
    (products with the Jacobian by the double-backward trick); a second derivative in the inputs is an error.

    Args:
        value: what was computed, without a graph.
        inputs: the tensors that it depends on.
        parts: tensors that the products are made of, without a graph.
        pull: (parts, w) -> one tensor like each input, linear in w; it closes over no tensor that depends on inputs.

    Raises:
        NotImplementedError: from autograd, if a second derivative is asked for.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> y = differentiated(
        ...     torch.tensor(9.0), [x], [torch.tensor(6.0)], lambda parts, w: (parts[0] * w,)
        ... )
        >>> torch.autograd.grad(y, x)
        (tensor(6.),)
    """
    apply: Callable[..., Tensor] = _Differentiated.apply
    return apply(pull, len(inputs), value.detach(), *inputs, *[part.detach() for part in parts])


class _Differentiated(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(pull: Pull, count: int, value: Tensor, *tensors: Tensor) -> Tensor:  # noqa: ARG004
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.pull, ctx.count = inputs[:2]
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> Any:
        inputs, parts = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        apply: Callable[..., Tensor] = _Refusal.apply
        refusal = apply(*inputs)
        products = [product + refusal for product in ctx.pull(parts, weights[0])]
        return (None, None, None, *products, *[None] * len(parts))


class _Refusal(torch.autograd.Function):
    """Zero, with a derivative that is refused: without this, autograd would take the parts for constants."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Tensor) -> Tensor:
        return inputs[0].new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> Any:
        raise NotImplementedError(
            "this proximal map has a first derivative only, and a second one was asked for. Take differences of"
            " gradients, or drop `create_graph=True`."
        )
