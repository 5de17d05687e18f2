"""The loss of one task: a mean over its samples, those that pad it left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) -> the mean over samples, as torch's losses
Side: TypeAlias = Literal["support", "query"]


def task_loss(loss: Loss, output: Tensor, task: Mapping[str, Tensor], side: Side) -> Tensor:
    """sum_i m_i l(output_i, target_i) / sum_i m_i, the loss on one side of a task with mask m; without one, the mean.

    The cost is that of the loss. Targets `(n,)` of a regression with outputs `(n, 1)` are taken as its one column,
    where torch would compare every output with every target.

    Args:
        loss: (outputs `(n, ...)`, targets) -> their mean over samples: `F.cross_entropy`, `F.mse_loss`, or any other.
        output: the model's outputs on this side `(n, ...)`.
        task: the task, with `{side}_y` and optionally `{side}_mask`.
        side: "support" or "query".

    Raises:
        KeyError: if the task has no targets on this side.

    Example:
        >>> task = {"query_y": torch.tensor([1.0, 5.0, 0.0]), "query_mask": torch.tensor([1.0, 1.0, 0.0])}
        >>> task_loss(mse_loss, torch.zeros(3, 1), task, "query")
        tensor(13.)
    """
    target, mask = task[f"{side}_y"], task.get(f"{side}_mask")
    if target.is_floating_point() and output.shape == (*target.shape, 1):
        target = target.unsqueeze(-1)
    if mask is None:
        return loss(output, target)
    return (sample_losses(loss, output, target) * mask).sum() / mask.sum()


def sample_losses(loss: Loss, output: Tensor, target: Tensor) -> Tensor:
    """The loss of each sample `(n,)`: of a batch of one, whose mean it is.

    Example:
        >>> sample_losses(mse_loss, torch.zeros(2, 1), torch.tensor([[1.0], [2.0]]))
        tensor([1., 4.])
    """
    if loss is cross_entropy:
        return cross_entropy(output, target, reduction="none")
    if loss is mse_loss:
        return mse_loss(output, target, reduction="none").reshape(len(output), -1).mean(1)
    return torch.vmap(lambda o, t: loss(o.unsqueeze(0), t.unsqueeze(0)))(output, target)
