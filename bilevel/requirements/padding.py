"""Tasks of different sizes in one batch: the rows that pad a task must not change its values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor

from bilevel._calculus import grad
from bilevel._flat import FlatProblem
from bilevel._numerics.batched import RANDOM, random_state, set_random_state
from bilevel._problem import BilevelProblem, Split
from bilevel._result import Tally
from bilevel.inner_problems.constrained import LinearlyConstrained
from bilevel.inner_problems.kinds import inner_problem

_SIDES = ("support", "query")

Level: TypeAlias = Literal["f", "g"]
Change: TypeAlias = Callable[[str, Tensor, Tensor], Tensor]  # (name, entry, mask), of one task -> the entry to use


def demand_padding_unseen(problem: FlatProblem, x: Tensor, y: Tensor, functions: Sequence[Level] = ("f", "g")) -> None:
    """Refuse f and g that depend on what pads a task, or whose loss of a padded task is not that of its examples.

    Where a batch of tasks has masks with zeros (`support_mask`, `query_mask`, as `bilevel.tasks.pad` makes them), the
    values of f and g at the most padded task, and their gradients in x, must not change when other numbers are put into
    the padding, where y starts and after a step along grad_y g: they do where batch normalization, or anything else
    that mixes the examples of a task, sees it. And side by side the loss of a masked task is made of losses of single
    samples; at one task without padding that must be what it is when the task is evaluated by itself: it is not where a
    loss given as a function weighs classes, or is no mean.

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
    with RANDOM:
        state = random_state(x)

        def measured(one: FlatProblem, start: Tensor, like: _Measured | None = None) -> _Measured:
            set_random_state(state)  # whatever f and g draw is the same each time
            return _measured(one, functions, x, start, None if like is None else like.length)

        try:
            for task in worst:
                one, start = _task(problem, y, task)
                seen = measured(one, start)
                others = measured(_changed(one, _with_others), start, seen)
                if not others.is_finite:  # numbers outside of a domain
                    others = measured(_changed(one, _with_copies), start, seen)
                for name, change in _changes(seen, others):
                    raise ValueError(_leak(name, change, problem.problem.tasks))
            for task in _tasks_by_examples(problem.data, most=True) if problem.problem.tasks is True else []:
                one, start = _task(problem, y, task)
                whole = _changed(one, _without_padding)
                try:
                    together = measured(whole, start)
                    alone = measured(_by_itself(whole), start, together)
                except Exception:  # it can be evaluated side by side only, or in this size
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


def _task(problem: FlatProblem, y: Tensor, task: int) -> tuple[FlatProblem, Tensor]:
    """The problem of one task, uncounted, and where its y starts if it has no `init`."""
    return problem.part(slice(task, task + 1)).with_tally(Tally()), y if y.dim() == 1 else y[task]


@final
@dataclass(frozen=True, eq=False)
class _Measured:
    """Values of functions and their gradients in x, each as one vector, and the length of the step in y on the way."""

    values: Mapping[str, Tensor]
    length: float

    @property
    def is_finite(self) -> bool:
        return all(bool(value.isfinite().all()) for value in self.values.values())


def _measured(
    one: FlatProblem, functions: Sequence[Level], x: Tensor, y: Tensor, length: float | None = None
) -> _Measured:
    """The functions where y starts and after a step along grad_y g, within its bounds; of that length, if it is given.

    A solver goes this way: what it never sees, such as the entries of y that belong to padding, may depend on padding.
    """
    with torch.no_grad():
        start = one.start(x, y)
    points, has_g = [start], inner_problem(one.problem).g is not None
    if has_g:
        with torch.enable_grad():
            leaf = start.detach().requires_grad_()
            gradient = grad(one.g(x.detach(), leaf).sum(), leaf)
        if length is None:
            norm = float(torch.linalg.vector_norm(gradient))
            length = 0.3 * (1 + float(torch.linalg.vector_norm(start))) / norm if 0 < norm < math.inf else 0.0
        points.append(_within_bounds(one, x, start - length * gradient))
    found: dict[str, Tensor] = {}
    for name in (name for name in functions if has_g or name == "f"):
        parts = []
        for point in points:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                value = (one.f if name == "f" else one.g)(leaf, point).sum()
                parts += [value.detach().reshape(1)]
                if value.requires_grad:
                    parts += [grad(value, leaf)]
        found[name] = torch.cat(parts)
    return _Measured(found, 0.0 if length is None else length)


def _within_bounds(one: FlatProblem, x: Tensor, y: Tensor) -> Tensor:
    kind = inner_problem(one.problem)
    if not isinstance(kind, LinearlyConstrained):
        return y
    with torch.no_grad():
        polytope = kind.polytope(one, x)
    return torch.minimum(torch.maximum(y, polytope.lower), polytope.upper)


def _changes(wanted: _Measured, found: _Measured) -> list[tuple[str, float]]:
    """The functions that differ by more than rounding, and how much."""
    changes = []
    for name, vector in wanted.values.items():
        size = torch.linalg.vector_norm(torch.stack((vector, found.values[name])), dim=1).max()
        off = torch.linalg.vector_norm(vector - found.values[name])
        change = float(off / size.clamp_min(torch.finfo(size.dtype).tiny))
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
    problem = BilevelProblem(given.f, given.g, init=given.init, encode=given.encode, tasks="loop")
    return FlatProblem(problem, one.x, one.y, one.data, one.tally)


def _percent(change: float) -> str:
    return f"{100 * change:.2g} %"
