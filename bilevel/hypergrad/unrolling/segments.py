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
from bilevel.hypergrad.unrolling.lacking import LOOSE, lacking

if TYPE_CHECKING:
    from bilevel._inner import State
    from bilevel.hypergrad.unrolling.walk import Walk

Segment: TypeAlias = "Callable[[], tuple[State, State, int]]"  # () -> its first state (leaves), its last, its steps


def pulled_back(
    walk: Walk, end: State, segments: Sequence[Segment], from_start: bool, measured: bool = True
) -> Unrolled:
    """df/dx + J_N' df/dy, J_N = dy_N/dx, the second term pulled back through the segments, the last one first.

    Where the iteration is to converge, what is lacking is measured at its end; where the condition that y solves is not
    known to first order it is what reaches the start, |(dy_N/dy_0)' df/dy| / |df/dy|.

    Args:
        walk: the iteration.
        end: the state after the last step, without a graph.
        segments: each from leaves that stand for the state where the one before it ends.
        from_start: whether the first of them begins at the start.
        measured: whether to ask what is lacking.
    """
    end = tuple(s.detach() for s in end)
    value, fx, fy = outer_gradients(walk.problem, walk.x, end[0])
    measured = measured and from_start and walk.checked
    probe = walk.probe if measured else None
    reaches = from_start and (walk.has_init or (measured and not walk.is_smooth))
    total, v, left, allowed = torch.zeros_like(walk.x), torch.zeros_like(fy), None, LOOSE
    adjoint: tuple[Tensor | None, ...] = (fy,)
    for number in reversed(range(len(segments))):
        leaves, last, length = segments[number]()
        through = number > 0 or reaches
        inputs = (walk.x, *(() if probe is None else (probe,)), *(leaves if through else ()))
        in_x, *rest = _pull_back(last, adjoint, inputs)
        del last
        total = total if in_x is None else total + in_x
        if probe is not None:
            in_gradients = rest.pop(0)
            v = v if in_gradients is None else v - in_gradients
        adjoint = tuple(rest)
        if walk.needs_gradient:
            count_products(walk.problem.tally, walk.rows, length, through)
    if measured:
        found = None if probe is None else lacking(walk, end[0], fx, fy, total, v)
        left, allowed = (_reached(adjoint, fy), LOOSE) if found is None else found
    if from_start and walk.has_init:
        with torch.enable_grad():
            begun = walk.inner.begin(walk.start)
        in_x = _pull_back(begun, adjoint, (walk.x,))[0]
        total = total if in_x is None else total + in_x
    return Unrolled(fx + total, value, end, left, allowed)


def _reached(adjoint: tuple[Tensor | None, ...], fy: Tensor) -> float:
    """|(dy_N/dy_0)' df/dy| / |df/dy|."""
    whole, reached = torch.linalg.vector_norm(fy), adjoint[0] if adjoint else None
    return float(torch.linalg.vector_norm(reached) / whole) if reached is not None and whole > 0 else 0.0


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
