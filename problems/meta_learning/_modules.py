"""What every few-shot method needs of a user's module: it as a function, its features, and what it predicts."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.functional import log_softmax

from bilevel.modules.functional import Functional, functional
from bilevel.problems.meta_learning._tasks import Loss, Side, is_cross_entropy


def as_functional(module: nn.Module | Functional) -> Functional:
    """The module as a function of its parameters, with the settings of `functional` unless it is one already.

    Raises:
        TypeError: if it is neither.
    """
    return module if isinstance(module, Functional) else functional(module)


def any_parameter(net: Functional) -> Tensor:
    """One of the parameters, for their dtype and device."""
    return next(iter(net.params.values()))


def features_of(net: Functional, x: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """The module's outputs, one vector for each sample: `(n, features)`."""
    output: Tensor = net(x, inputs)
    return output.reshape(len(inputs), -1)


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
