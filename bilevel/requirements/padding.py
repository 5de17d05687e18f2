"""Tasks of different sizes in one batch: the rows that pad a task must not change its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from bilevel._flat import FlatProblem
from bilevel._numerics.batched import random_state, set_random_state
from bilevel._problem import BilevelProblem, Split
from bilevel._result import Tally

_SIDES = ("support", "query")

Level: TypeAlias = Literal["f", "g"]
Change: TypeAlias = Callable[[str, Tensor, Tensor], Tensor]  # (name, entry, mask), of one task -> the entry to use


def demand_padding_unseen(problem: FlatProblem, x: Tensor, y: Tensor, functions: Sequence[Level] = ("f", "g")) -> None:
    """Refuse f and g that depend on what pads a task, or whose loss of a padded task is not that of its examples.

    Where a batch of tasks has masks with zeros (`support_mask`, `query_mask`, as `bilevel.tasks.pad` makes them), the
    values and gradients of f and g at the most padded task must not change when other numbers are put into the padding:
    they do where batch normalization, or anything else that mixes the examples of a task, sees it. And side by side the
    loss of a masked task is made of losses of single samples; at one task without padding that must be what it is when
    the task is evaluated by itself: it is not where a loss given as a function weighs classes, or is no mean.

    Cost: some ten evaluations of f and g on one task, with gradients, not counted; for the first estimate of a run.
    Nothing where there is no padding.

    Args:
        problem: f and g at the batch.
        x: where `(p,)`.
        y: the start of the inner iteration, of one task `(q,)` or of all `(tasks, q)`.
        functions: which of the two.

    Raises:
        ValueError: saying what changes by how much, and what to do.
    """
    worst = _tasks_by_examples(problem.data, most=False) if problem.tasks is not None else []
    if not worst:
        return
    state = random_state(x)

    def derivatives(one: FlatProblem, at: Tensor) -> dict[str, Tensor]:
        set_random_state(state)  # whatever f and g draw is the same each time
        return _derivatives(one, functions, x, at)

    try:
        for task in worst:
            one, at = _task(problem, functions, x, y, task)
            others = derivatives(_changed(one, _with_others), at)
            if not all(bool(found.isfinite().all()) for found in others.values()):  # numbers outside of a domain
                others = derivatives(_changed(one, _with_copies), at)
            for name, change in _changes(derivatives(one, at), others):
                raise ValueError(_leak(name, change, problem.problem.tasks))
        for task in _tasks_by_examples(problem.data, most=True) if problem.problem.tasks is True else []:
            one, at = _task(problem, functions, x, y, task)
            whole = _changed(one, _without_padding)
            together = derivatives(whole, at)
            try:
                alone = derivatives(_by_itself(whole), at)
            except Exception:  # it can be evaluated side by side only
                return
            for name, change in _changes(alone, together):
                raise ValueError(_uneven(name, change))
    finally:
        set_random_state(state)


_REMEDY = (
    "Take one task after the other, where padding is left out: `learner.looped()` of a few-shot learner; in a"
    ' `BilevelProblem(..., tasks="loop")` of your own, `task["support_x"][task["support_mask"] > 0]`.'
)


_FROZEN = (
    "For batch normalization there is also `functional(module, batch_norm='frozen')`, and `nn.GroupNorm` in its place."
)


def _leak(name: str, change: float, tasks: Any) -> str:
    remedy = _REMEDY
    if tasks == "loop":
        remedy = "Leave out the rows whose mask is 0: `task['support_x'][task['support_mask'] > 0]`."
    return (
        f"the tasks are padded, and {name} of a task changes by {_percent(change)} with what is in the padding: batch"
        f" normalization, or something else that mixes the examples of a task, sees rows whose mask is 0. {remedy}"
        f" {_FROZEN}"
    )


def _uneven(name: str, change: float) -> str:
    return (
        f"the tasks are padded, and {name} of a task is not the mean over its samples ({_percent(change)} off): a loss"
        f" that weighs classes, or is no plain mean, cannot be masked while all tasks are evaluated at once. {_REMEDY}"
        f" Or draw tasks of one size, or take a loss without weights."
    )


def is_padded(batch: Any) -> bool:
    """Whether a batch of tasks has rows that are padding."""
    return bool(_tasks_by_examples(batch, most=False))


def _tasks_by_examples(data: Any, *, most: bool) -> list[int]:
    """For each side that is padded somewhere: the task with the most, or the fewest, examples on it."""
    found = []
    for batch in (data.f, data.g) if isinstance(data, Split) else (data,):
        for side in _SIDES:
            mask = _mask(batch, side)
            if mask is not None and not bool((mask > 0).all()):
                counts = (mask > 0).sum(1)
                found.append(int(counts.argmax() if most else counts.argmin()))
    return sorted(set(found))


def _mask(batch: Any, side: str) -> Tensor | None:
    """The mask of a side `(tasks, examples)`, where the batch has one that is what `pad` makes."""
    if not isinstance(batch, Mapping):
        return None
    mask, x = batch.get(f"{side}_mask"), batch.get(f"{side}_x")
    fits = isinstance(mask, Tensor) and isinstance(x, Tensor) and mask.dim() == 2 and x.shape[:2] == mask.shape
    return mask if fits else None


def _task(
    problem: FlatProblem, functions: Sequence[Level], x: Tensor, y: Tensor, task: int
) -> tuple[FlatProblem, Tensor]:
    """The problem of one task, uncounted, and a point of y near its start that is special in nothing."""
    one = problem.part(slice(task, task + 1)).with_tally(Tally())
    with torch.no_grad():
        start = one.start(x, y if y.dim() == 1 else y[task])
    wave = torch.arange(1, start.shape[-1] + 1, dtype=start.dtype, device=start.device).cos()
    moved = start + 0.1 * (1 + start.abs()) * wave
    with torch.no_grad():
        values = [one.f(x, moved) if name == "f" else one.g(x, moved) for name in functions]
    return one, moved if all(bool(value.isfinite().all()) for value in values) else start


def _derivatives(one: FlatProblem, functions: Sequence[Level], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """F and g of one task, each with its gradients, as vectors."""
    found: dict[str, Tensor] = {}
    for name in functions:
        function = one.f if name == "f" else one.g
        with torch.enable_grad():
            xs, ys = x.detach().requires_grad_(), y.detach().requires_grad_()
            value = function(xs, ys).sum()
            parts = [value.detach().reshape(1)]
            if value.requires_grad:
                grads = torch.autograd.grad(value, (xs, ys), allow_unused=True)
                parts += [part.reshape(-1) for part in grads if part is not None]
        found[name] = torch.cat(parts)
    return found


def _changes(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[tuple[str, float]]:
    """The functions that differ by more than rounding, and how much."""
    changes = []
    for name, vector in wanted.items():
        size = torch.linalg.vector_norm(torch.stack((vector, found[name])), dim=1).max()
        change = float(torch.linalg.vector_norm(vector - found[name]) / size.clamp_min(torch.finfo(size.dtype).tiny))
        if change > torch.finfo(vector.dtype).eps ** 0.5:
            changes.append((name, change))
    return changes


def _changed(one: FlatProblem, change: Change) -> FlatProblem:
    """The problem of one task with its entries changed; those are its examples' that the mask belongs to."""

    def of(batch: Any) -> Any:
        if not isinstance(batch, Mapping):
            return batch
        changed = dict(batch)
        for side in _SIDES:
            mask = _mask(batch, side)
            if mask is not None:
                for name, entry in batch.items():
                    own = name.startswith(f"{side}_") and name != f"{side}_noise" and isinstance(entry, Tensor)
                    if own and entry.shape[:2] == mask.shape:
                        changed[name] = change(name, entry[0], mask[0] > 0).unsqueeze(0)
        return changed

    data = Split(of(one.data.f), of(one.data.g)) if isinstance(one.data, Split) else of(one.data)
    return FlatProblem(one.problem, one.x, one.y, data, one.tally)


def _with_copies(name: str, entry: Tensor, kept: Tensor) -> Tensor:
    """Examples of the task, the last first, in the place of its padding."""
    if name.endswith("_mask"):
        return entry
    own = entry[kept].flip(0)
    changed = entry.clone()
    changed[~kept] = own[torch.arange(int((~kept).sum()), device=entry.device) % len(own)]
    return changed


def _with_others(name: str, entry: Tensor, kept: Tensor) -> Tensor:
    """The same, numbers moved and stretched: other ones also where a task was padded by copies."""
    changed = _with_copies(name, entry, kept)
    if entry.is_floating_point() and not name.endswith("_mask"):
        changed[~kept] = 1.5 * changed[~kept] + 0.5
    return changed


def _without_padding(name: str, entry: Tensor, kept: Tensor) -> Tensor:  # noqa: ARG001
    return entry[kept]


def _by_itself(one: FlatProblem) -> FlatProblem:
    """The same task, not side by side with others."""
    given = one.problem
    problem = BilevelProblem(given.f, given.g, encode=given.encode, tasks="loop")
    return FlatProblem(problem, one.x, one.y, one.data, one.tally)


def _percent(change: float) -> str:
    return f"{100 * change:.2g} %"
