"""Tasks of different sizes as one batch, and what a batch has to look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import SIZE
from bilevel.tasks.source import Batch

_SIDES = ("support", "query")
_REQUIRED = tuple(f"{side}_{part}" for side in _SIDES for part in "xy")


@checked()
def pad(tasks: Sequence[Mapping[str, Tensor]]) -> Batch:
    """One batch of tasks of different sizes: zeros at the end, and masks `support_mask` and `query_mask` that tell.

    A mask is 1 at an example and 0 at padding, `(tasks, largest size)`; losses weigh by it. Other entries of the tasks
    must be of equal shapes, and are stacked.

    Args:
        tasks: one dict a task, without a task axis: `support_x` `(n, ...)`, `support_y` `(n,)` or `(n, outputs)`,
            `query_x`, `query_y`.

    Raises:
        ValueError: if there is no task, or one is malformed or does not fit the others.

    Example:
        >>> import torch
        >>> def task(shots):
        ...     x = torch.ones(shots, 2)
        ...     return {
        ...         "support_x": x,
        ...         "support_y": x.sum(1),
        ...         "query_x": x[:1],
        ...         "query_y": x[:1].sum(1),
        ...     }
        >>> batch = pad([task(1), task(3)])
        >>> batch["support_mask"]
        tensor([[1., 0., 0.],
                [1., 1., 1.]])
        >>> batch["support_x"].shape
        torch.Size([2, 3, 2])
    """
    if not tasks:
        raise ValueError("`pad(tasks)` needs at least one task.")
    for number, task in enumerate(tasks):
        missing = [name for name in _REQUIRED if name not in task]
        if missing:
            raise ValueError(f"`pad(tasks)`: task {number} has no {' and no '.join(missing)}. It has {_shapes(task)}.")
        if set(task) != set(tasks[0]):
            raise ValueError(
                f"`pad(tasks)`: all tasks must have the same entries. Task 0 has {sorted(tasks[0])}, task {number} has"
                f" {sorted(task)}."
            )
    padded = {name: _stacked(name, [task[name] for task in tasks]) for name in tasks[0]}
    for side in _SIDES:
        if f"{side}_mask" not in tasks[0]:
            ones = [_mask_for(task[f"{side}_x"]) for task in tasks]
            padded[f"{side}_mask"] = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True)
    check_batch(padded)
    return padded


@checked(tasks=SIZE)
def check_batch(batch: Any, tasks: int | None = None) -> None:
    """Refuse what is not a batch of tasks, saying what arrived.

    Args:
        batch: a mapping with `support_x`, `support_y`, `query_x` and `query_y`, whose first axes are tasks and then
            examples; masks, if any, are `(tasks, examples)` zeros and ones, with a one in every task.
        tasks: how many tasks there should be; None: any number.

    Raises:
        TypeError: if it is not a mapping of tensors.
        ValueError: if an entry is missing, or shapes or masks do not fit.

    Example:
        >>> import torch
        >>> x, y = torch.zeros(4, 5, 2), torch.zeros(4, 6)
        >>> check_batch({"support_x": x, "support_y": y, "query_x": x, "query_y": y[:, :5]})
        Traceback (most recent call last):
        ValueError: support_x and support_y must agree in tasks and examples: support_x (4, 5, 2), support_y (4, 6).
        In `check_batch(batch=...)`.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"a batch of tasks must be a mapping from names to tensors. Got {type(batch).__name__}.")
    others = [f"{name} is {type(value).__name__}" for name, value in batch.items() if not isinstance(value, Tensor)]
    if others:
        raise TypeError(f"every entry of a batch of tasks must be a tensor: {', '.join(others)}.")
    missing = [name for name in _REQUIRED if name not in batch]
    if missing:
        raise ValueError(f"a batch of tasks needs {', '.join(_REQUIRED)}. Got {_shapes(batch) or 'nothing'}.")
    flat = [name for name, value in batch.items() if value.ndim < (2 if name.startswith(_SIDES) else 1)]
    if flat:
        raise ValueError(f"the first axes of {flat[0]} must be tasks and examples. Got {_shapes(batch)}.")
    counts = {name: len(value) for name, value in batch.items()}
    wanted = counts["support_x"] if tasks is None else tasks
    if set(counts.values()) != {wanted} or not wanted:
        raise ValueError(
            f"the first axis of every entry must be tasks, {wanted or 'at least 1'} of them. Got {_shapes(batch)}."
        )
    for side in _SIDES:
        _check_side(side, batch)


def _check_side(side: str, batch: Mapping[str, Tensor]) -> None:
    x, y, mask = batch[f"{side}_x"], batch[f"{side}_y"], batch.get(f"{side}_mask")
    if x.shape[:2] != y.shape[:2]:
        raise ValueError(
            f"{side}_x and {side}_y must agree in tasks and examples:"
            f" {side}_x {tuple(x.shape)}, {side}_y {tuple(y.shape)}."
        )
    if not x.shape[1]:
        raise ValueError(f"a task needs examples: {side}_x {tuple(x.shape)} has none.")
    if mask is None:
        return
    if mask.shape != x.shape[:2]:
        raise ValueError(f"{side}_mask must be {tuple(x.shape[:2])}, as {side}_x. Got {tuple(mask.shape)}.")
    if not bool(((mask == 0) | (mask == 1)).all()) or not bool(mask.any(1).all()):
        bad = int((~mask.any(1)).nonzero().flatten()[0]) if not bool(mask.any(1).all()) else None
        why = "a value is neither" if bad is None else f"task {bad} has no example"
        raise ValueError(f"{side}_mask must be 0 at padding and 1 at examples, of which every task needs one: {why}.")


def _mask_for(x: Tensor) -> Tensor:
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    return torch.ones(len(x), dtype=dtype, device=x.device)


def _stacked(name: str, entries: Sequence[Tensor]) -> Tensor:
    ragged = name.startswith(_SIDES)
    shapes = [tuple(entry.shape) for entry in entries]
    if {len(shape) for shape in shapes} != {len(shapes[0])} or (ragged and not shapes[0]):
        raise ValueError(
            f"`pad(tasks)`: {name} must have equally many axes in every task, examples first. Got {shapes}."
        )
    if {shape[1:] if ragged else shape for shape in shapes} != {shapes[0][1:] if ragged else shapes[0]}:
        what = "examples of one shape" if ragged else "one shape"
        raise ValueError(f"`pad(tasks)`: {name} must be of {what} in every task. Got {shapes}.")
    return torch.nn.utils.rnn.pad_sequence(list(entries), batch_first=True) if ragged else torch.stack(list(entries))


def _shapes(entries: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in entries.items() if isinstance(value, Tensor))
