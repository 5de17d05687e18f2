"""What every few-shot method needs of a user's module: it as a function, its features, and what it predicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from bilevel._numerics.batched import is_batched
from bilevel._tree import Tree
from bilevel.modules.functional import Functional, functional
from bilevel.problems.meta_learning._tasks import Loss, Side, is_cross_entropy

SIDES: tuple[Side, ...] = ("support", "query")


def as_functional(module: nn.Module | Functional) -> Functional:
    """The module as a function of its parameters, with the settings of `functional` unless it is one already.

    Raises:
        TypeError: if it is neither.
    """
    return module if isinstance(module, Functional) else functional(module)


def any_parameter(net: Functional) -> Tensor:
    """One of the parameters, for their dtype and device."""
    return next(iter(net.params.values()))


def on_examples(function: Callable[[Tensor], Tensor], inputs: Tensor, mask: Tensor | None) -> Tensor:
    """function(inputs) `(n, ...)`, with zeros in the rows that the mask says are padding.

    One task at a time, the function sees the examples alone, so that what mixes them (batch normalization) is right.
    Inside of a `torch.vmap` over tasks it sees the padding as well: there is no other way to have one shape.
    """
    if mask is None or is_batched(mask):
        return function(inputs)
    kept = mask > 0
    if bool(kept.all()):
        return function(inputs)
    found = function(inputs[kept])
    place = (kept.cumsum(0) - 1).clamp_min(0)  # of an example among the examples
    return torch.where(kept.reshape(-1, *(1,) * (found.dim() - 1)), found[place], 0.0)


def outputs_of(net: Functional, params: Tree, task: Mapping[str, Any], side: Side) -> Tensor:
    """The module's outputs on one side of a task `(n, ...)`; see `on_examples`."""
    return on_examples(lambda inputs: net(params, inputs), task[f"{side}_x"], task.get(f"{side}_mask"))


def features_of(net: Functional, params: Mapping[str, Tensor], task: Mapping[str, Any], side: Side) -> Tensor:
    """The same as one vector for each sample: `(n, features)`."""
    return outputs_of(net, params, task, side).reshape(len(task[f"{side}_x"]), -1)


def prediction(loss: Loss, output: Tensor) -> Tensor:
    """Log-probabilities where the loss is the cross-entropy of logits; the outputs themselves for any other.

    Example:
        >>> prediction(nn.CrossEntropyLoss(), Tensor([[1.0, 1.0]])).exp()
        tensor([[0.5000, 0.5000]])
    """
    return log_softmax(output, dim=-1) if is_cross_entropy(loss) else output


def weighted(values: Tensor, task: Mapping[str, Tensor], side: Side) -> Tensor:
    """The values of each sample `(n, ...)` times its entry in the mask, where the task has one."""
    mask = task.get(f"{side}_mask")
    return values if mask is None else values * mask.reshape(-1, *(1,) * (values.dim() - 1))


def demand_positive(method: str, **numbers: int) -> None:
    """Refuse a number of things that is less than one.

    Raises:
        ValueError: naming the argument.
    """
    for name, number in numbers.items():
        if not number >= 1:
            raise ValueError(f"`{method}({name}=...)` must be at least 1. Got {number}.")
