"""Settings of an optimizer that are functions of x, at the x at hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bilevel._numerics.misfits import called
from bilevel._numerics.nesting import flatten
from bilevel._tree import Structure, Tree

if TYPE_CHECKING:
    from bilevel._flat import FlatProblem
    from bilevel._optimizer import Setting


def settings_at(problem: FlatProblem, x: Tensor) -> Callable[[Setting, int], Tensor]:
    """(setting, step) -> its value at x, with the leading axes of y: `(*batch, 1)`, `(*batch, q)`, or one a step.

    Differentiable in x. A value outside of its range is NaN: the steps make NaN of y with it, in that row of a batch
    alone, and so the solve ends with `Status.nonfinite`, not with an exception.

    Args:
        problem: whose x and y the functions are of; those of a problem with an `encode` are of what g is given.
        x: the outer variable `(p,)`, or several `(k, p)`.
    """

    def value(setting: Setting, step: int) -> Tensor:
        form = f"{setting.owner}({setting.name}=function)({'x, k' if setting.of_step else 'x'})"
        function = setting.at(step)

        def one(outer: Tree, *_: object) -> Tensor:
            found = called(f"{setting.name}(x)", function, outer)
            return (
                _series(found, problem.y, form)
                if setting.by_step and not setting.of_step
                else _entries(found, problem.y, form)
            )

        entries = problem.map(one, "g", x)
        return torch.where(setting.allowed.holds(entries), entries, math.nan)

    return value


def _series(found: Tree, y: Structure, form: str) -> Tensor:
    if not isinstance(found, Tensor) or found.dim() > 1 or not found.numel():
        raise ValueError(f"`{form}` must return a vector, one number for each step. Got {_told(found)}.")
    return found.reshape(-1).to(y.dtype)


def _entries(found: Tree, y: Structure, form: str) -> Tensor:
    """A number for all of y `(1,)`; or one for each entry of y `(q,)`, where leaves may be given by one number each."""
    if isinstance(found, int | float):
        return torch.full((1,), found, dtype=y.dtype, device=y.device)
    if isinstance(found, Tensor) and found.numel() == 1:
        return found.reshape(1).to(y.dtype)
    leaves: list[object] = []
    spec = flatten(y.aligned(found), leaves, f"`{form}`")
    parts = [_leaf(leaf, shape, y) for leaf, shape in zip(leaves, y.shapes, strict=False)]
    if spec != y.spec or len(leaves) != len(y.shapes) or any(part is None for part in parts):
        raise ValueError(
            f"`{form}` must return a number, or the structure of y with a number, or one for each entry, in the place"
            f" of each tensor: {y.describe()}. Got {_told(found)}."
        )
    return torch.cat([part for part in parts if part is not None])


def _leaf(leaf: object, shape: torch.Size, y: Structure) -> Tensor | None:
    if isinstance(leaf, int | float):
        return torch.full((shape.numel(),), leaf, dtype=y.dtype, device=y.device)
    if not isinstance(leaf, Tensor):
        return None
    if leaf.numel() == 1:
        leaf = leaf.reshape(())
    elif leaf.shape != shape:
        return None
    return leaf.to(y.dtype).expand(shape).reshape(-1)


def _told(found: Tree) -> str:
    return f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"{found!r:.200}"
