"""Adjoints pulled back through segments of an iteration: what the reverse forms have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from bilevel._calculus import outer_gradients
from bilevel._numerics.second_derivatives import explained
from bilevel._result import Tally
from bilevel.hypergrad.unrolling.form import Unrolled

if TYPE_CHECKING:
    from bilevel._inner import State
    from bilevel.hypergrad.unrolling.walk import Walk

Segment: TypeAlias = "Callable[[], tuple[State, State, int]]"  # () -> its first state (leaves), its last, its steps


def pulled_back(walk: Walk, end: State, segments: Sequence[Segment], from_start: bool) -> Unrolled:
    """df/dx + J_N' df/dy, J_N = dy_N/dx, the second term pulled back through the segments, the last one first.

    Where the iteration is to converge, what reaches the start, |(dy_N/dy_0)' df/dy| / |df/dy|, is what is left.

    Args:
        walk: the iteration.
        end: the state after the last step, without a graph.
        segments: each from leaves that stand for the state where the one before it ends.
        from_start: whether the first of them begins at the start.
    """
    end = tuple(s.detach() for s in end)
    value, fx, fy = outer_gradients(walk.problem, walk.x, end[0])
    total, left = torch.zeros_like(walk.x), None
    adjoint: tuple[Tensor | None, ...] = (fy,)
    for number in reversed(range(len(segments))):
        leaves, last, length = segments[number]()
        through = number > 0 or (from_start and (walk.has_init or walk.checked))
        in_x, *in_state = _pull_back(last, adjoint, (walk.x, *leaves) if through else (walk.x,))
        del last
        total = total if in_x is None else total + in_x
        adjoint = tuple(in_state)
        if walk.needs_gradient:
            count_products(walk.problem.tally, walk.rows, length, through)
    if from_start and walk.checked:
        whole, reached = torch.linalg.vector_norm(fy), adjoint[0]
        left = float(torch.linalg.vector_norm(reached) / whole) if reached is not None and whole > 0 else 0.0
    if from_start and walk.has_init:
        with torch.enable_grad():
            begun = walk.inner.begin(walk.start)
        in_x = _pull_back(begun, adjoint, (walk.x,))[0]
        total = total if in_x is None else total + in_x
    return Unrolled(fx + total, value, end, left)


def count_products(tally: Tally, rows: int, steps: int, through: bool) -> None:
    """Count what pulling back through `steps` steps takes; one product less if not to the state before the first."""
    tally.hvps += max(steps - (0 if through else 1), 0) * rows
    tally.cross_products += steps * rows


def _pull_back(end: State, adjoint: tuple[Tensor | None, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    pairs = [(e, a) for e, a in zip(end, adjoint, strict=False) if a is not None and e.requires_grad]
    if not pairs:
        return tuple(None for _ in inputs)
    outputs, weights = zip(*pairs, strict=True)
    with explained():
        return torch.autograd.grad(outputs, inputs, weights, allow_unused=True)
