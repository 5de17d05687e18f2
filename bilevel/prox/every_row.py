"""Computations whose course depends on values, inside of `torch.vmap`: for all of its rows at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def for_every_row(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function(*tensors) for a function of tensors with leading axes, which are independent rows; not differentiated.

    Inside of `torch.vmap` it is given the tensors of all rows, plain ones, so that it may branch on their values, once
    for each level. Tensors that are the same for all rows are expanded.

    Example:
        >>> torch.vmap(lambda row: for_every_row(lambda rows: rows * len(rows), row))(
        ...     torch.ones(3, 2)
        ... ).sum()
        tensor(18.)
    """
    apply: Callable[..., Tensor] = _EveryRow.apply
    return apply(function, *[each.detach() for each in tensors])


class _EveryRow(torch.autograd.Function):
    @staticmethod
    def forward(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]  (torch declares it without arguments of its own)
        info: Any, in_dims: tuple[Any, ...], function: Any, *tensors: Tensor
    ) -> tuple[Tensor, int]:
        rows = [
            each.expand(info.batch_size, *each.shape) if dim is None else each.movedim(dim, 0)
            for each, dim in zip(tensors, in_dims[1:], strict=True)
        ]
        return for_every_row(function, *rows), 0
