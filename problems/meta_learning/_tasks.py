"""The loss of one task: a mean over its samples, those that pad it left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, huber_loss, l1_loss, mse_loss, smooth_l1_loss

from bilevel._numerics.batched import is_batched
from bilevel.few_shot.likelihood import AbstractLikelihood

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) -> the mean over samples, as torch's losses
Side: TypeAlias = Literal["support", "query"]

_ELEMENTWISE = (mse_loss, l1_loss, smooth_l1_loss, huber_loss)
_ELEMENTWISE_MODULES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)


def task_loss(loss: Loss, output: Tensor, task: Mapping[str, Tensor], side: Side) -> Tensor:
    """sum_i m_i l(output_i, target_i) / sum_i m_i, the loss on one side of a task with mask m; without one, the mean.

    The cost is that of the loss. Where tasks come one at a time (`tasks="loop"`), the loss is called with the examples
    alone, and may be of any kind; side by side, where all tasks have one shape, with one sample at a time: it must be a
    plain mean then, which is looked at before the first estimate of a run. Targets `(n,)` of a regression with outputs
    `(n, 1)` are taken as its one column, where torch would compare every output with every target.

    Args:
        loss: (outputs `(n, ...)`, targets) -> their mean over samples: `F.cross_entropy`, `F.mse_loss`, or any other.
        output: the model's outputs on this side `(n, ...)`.
        task: the task, with `{side}_y` and optionally `{side}_mask`.
        side: "support" or "query".

    Raises:
        KeyError: if the task has no targets on this side.
        ValueError: if torch would spread targets of another shape over the outputs, targets of the cross-entropy are no
            numbers of classes, or, with a mask and tasks side by side, the loss is known to be no plain mean.

    Example:
        >>> task = {
        ...     "query_y": torch.tensor([1.0, 5.0, 0.0]),
        ...     "query_mask": torch.tensor([1.0, 1.0, 0.0]),
        ... }
        >>> task_loss(mse_loss, torch.zeros(3, 1), task, "query")
        tensor(13.)
    """
    target, mask = _target(loss, output, task, side), task.get(f"{side}_mask")
    if mask is None:
        return loss(output, target)
    if loss is not cross_entropy and loss is not mse_loss and not (is_batched(mask) or is_batched(output)):
        kept = mask > 0
        if bool((mask == kept).all()):  # and no weights
            return loss(output[kept], target[kept])
    return (sample_losses(loss, output, target) * mask).sum() / mask.sum()


def _target(loss: Loss, output: Tensor, task: Mapping[str, Tensor], side: Side) -> Tensor:
    """The targets of one side, in the shape that the loss of these outputs takes.

    Raises:
        ValueError: if they do not fit.
    """
    target = task[f"{side}_y"]
    if target.is_floating_point() and output.shape == (*target.shape, 1):
        target = target.unsqueeze(-1)
    if target.shape != output.shape and (loss in _ELEMENTWISE or isinstance(loss, _ELEMENTWISE_MODULES)):
        raise ValueError(
            f"{side}_y of a task must have the shape of the outputs, {tuple(output.shape)}, or be numbers of its one"
            f" column. Got {tuple(target.shape)}, {target.dtype}. Change the last layer, or convert the targets."
        )
    if is_cross_entropy(loss) and target.is_floating_point() and target.dim() < output.dim():
        raise ValueError(
            f"{side}_y of a task must be numbers of classes, integers, for the cross-entropy (or probabilities"
            f" {tuple(output.shape)}). Got {target.dtype} {tuple(target.shape)}. Convert it by `.long()`, or take"
            f" another loss."
        )
    return target


def sample_losses(loss: Loss, output: Tensor, target: Tensor) -> Tensor:
    """The loss of each sample `(n,)`: of a batch of one, whose mean it is.

    Raises:
        ValueError: if the loss weighs classes or is a sum, so that it is not the mean of these.

    Example:
        >>> sample_losses(mse_loss, torch.zeros(2, 1), torch.tensor([[1.0], [2.0]]))
        tensor([1., 4.])
    """
    if loss is cross_entropy:
        return cross_entropy(output, target, reduction="none")
    if loss is mse_loss:
        return mse_loss(output, target, reduction="none").reshape(len(output), -1).mean(1)
    uneven = _setting(loss, "weight") is not None or _setting(loss, "ignore_index") not in (None, -100)
    if uneven or _setting(loss, "reduction") not in (None, "mean"):
        raise ValueError(
            "with masks, and with `outer_loss='predictive'`, the loss must be a mean over samples, each of the same"
            f" weight. Got {loss!r}, with `weight`, `ignore_index` or another `reduction`. Leave these out,"
            " or train on tasks of one size, or one task after the other (`learner.looped()`), by the expected loss."
        )
    return torch.vmap(lambda o, t: loss(o.unsqueeze(0), t.unsqueeze(0)))(output, target)


def mixture_loss(loss: Loss, outputs: Tensor, task: Mapping[str, Tensor], side: Side) -> Tensor:
    """-log mean_s exp(-l(output_si, target_i)), the mean over samples i: the loss of averaged probabilities.

    Args:
        loss: as for `task_loss`; minus the log-probability of a target.
        outputs: of each draw s of the model, `(draws, n, ...)`.
        task: the task, with `{side}_y` and optionally `{side}_mask`.
        side: "support" or "query".

    Raises:
        ValueError: if the loss weighs classes or is a sum, the targets do not fit the outputs, or there are several
            numbers a sample.

    Example:
        >>> task = {"query_y": torch.tensor([0])}
        >>> logits = torch.tensor([[[0.0, 0.0]], [[100.0, 0.0]]])  # probabilities 1/2 and 1
        >>> round(float(mixture_loss(cross_entropy, logits, task, "query").neg().exp()), 3)
        0.75
    """
    target, mask = _target(loss, outputs[0], task, side), task.get(f"{side}_mask")
    if is_of_numbers(loss) and outputs[0].numel() != len(outputs[0]):
        raise ValueError(
            f"`outer_loss='predictive'` needs targets that are classes, or one number a sample: a loss averages over"
            f" columns, which is no -log p of them together. Got outputs {tuple(outputs.shape[1:])} a draw. Take"
            f" 'expected'."
        )
    losses = torch.stack([sample_losses(loss, output, target) for output in outputs])
    mixed = math.log(len(losses)) - (-losses).logsumexp(0)
    return mixed.mean() if mask is None else (mixed * mask).sum() / mask.sum()


def is_cross_entropy(loss: Loss) -> bool:
    """Whether it is torch's cross-entropy of logits: the function, also with settings, or the module.

    Example:
        >>> is_cross_entropy(nn.CrossEntropyLoss(label_smoothing=0.1)), is_cross_entropy(mse_loss)
        (True, False)
    """
    inside = loss.func if isinstance(loss, partial) else loss
    return inside is cross_entropy or isinstance(inside, nn.CrossEntropyLoss)


def is_of_numbers(loss: Loss) -> bool:
    """Whether it is known to compare numbers: one of torch's elementwise losses, or a likelihood of numbers.

    Example:
        >>> is_of_numbers(nn.MSELoss()), is_of_numbers(cross_entropy)
        (True, False)
    """
    return loss in _ELEMENTWISE or isinstance(loss, (*_ELEMENTWISE_MODULES, AbstractLikelihood))


def _setting(loss: Loss, name: str) -> Any:
    """A setting of one of torch's losses; None where it is not one of them, or has none."""
    if isinstance(loss, partial):
        return loss.keywords.get(name)
    return getattr(loss, name, None) if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss | nn.MSELoss) else None
