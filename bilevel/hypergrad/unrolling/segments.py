"""Adjoints pulled back through segments of an iteration: what the reverse forms have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from bilevel._calculus import outer_gradients
from bilevel.hypergrad.unrolling.at_rest import at_rest, count_products, pull_back
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

    Where the iteration is to converge, what is lacking is measured at its end: by the condition that y solves, or where
    that is not known to first order, by as many steps that all begin where the iteration ended.

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
    reaches = from_start and walk.has_init
    total, left, allowed = None, None, LOOSE
    v = None if probe is None else torch.zeros_like(fy)
    adjoint: tuple[Tensor | None, ...] = (fy,)
    b = fy if measured else None
    del fy  # an adjoint is let go of when there is the one before it
    for number in reversed(range(len(segments))):
        leaves, last, length = segments[number]()
        through = number > 0 or reaches
        inputs = (walk.x, *(() if probe is None else (probe,)), *(leaves if through else ()))
        in_x, *rest = pull_back(last, adjoint, inputs)
        del last
        total = total if in_x is None else in_x if total is None else total + in_x
        del leaves, inputs, in_x
        if v is not None:
            in_gradients = rest.pop(0)
            v = v if in_gradients is None else v.sub_(in_gradients)
            del in_gradients
        adjoint = tuple(rest)
        del rest
        if walk.needs_gradient:
            count_products(walk.problem.tally, walk.rows, length, through)
    total = torch.zeros_like(fx) if total is None else total
    if b is not None:
        found = None if v is None else lacking(walk, end[0], fx, b, total, v)
        left, allowed = at_rest(walk, end, fx, b, total) if found is None else found
    if from_start and walk.has_init:
        with torch.enable_grad():
            begun = walk.inner.begin(walk.start)
        in_x = pull_back(begun, adjoint, (walk.x,))[0]
        total = total if in_x is None else total + in_x
    return Unrolled(fx + total, value, end, left, allowed)
