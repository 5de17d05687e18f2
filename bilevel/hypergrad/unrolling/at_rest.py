"""An unrolled derivative beside the one whose steps all begin where the iteration ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bilevel._numerics.second_derivatives import explained
from bilevel._result import Tally
from bilevel.hypergrad.unrolling.lacking import LOOSE, norm, nudged, ratio

if TYPE_CHECKING:
    from bilevel._inner import State
    from bilevel.hypergrad.unrolling.walk import Walk


def at_rest(walk: Walk, end: State, fx: Tensor, fy: Tensor, total: Tensor) -> tuple[float, float]:
    """What an unrolled derivative lacks where y solves no condition that is known to first order, and what it may lack.

    A fixed point y = T(x, y) moves by sum_k (dT/dy)^k dT/dx, both at the fixed point. `total` is that sum with the
    derivatives of step k where this began; here it is formed again with those at y_N, in as many terms, and returned is

        |total - again| / max(|total|, |again|, |fx + total|) + |((dT/dy)^N)' fy| / |fy|.

    Where both sums are small by cancellation, or as dT/dx vanishes, their distance is seen relative to what they become
    as y moves by the part of it that may be wrong.

    Cost: one gradient, and N Hessian and cross products on its graph; where too much seems to lack, the same again.
    """
    again, reached = _again(walk, end, fy)
    apart, scale = norm(total - again), max(norm(total), norm(again), norm(fx + total))
    if apart > LOOSE * scale:
        larger = norm(_again(walk, (nudged(end[0], LOOSE), *end[1:]), fy)[0] - again) / LOOSE
        scale = larger if apart <= LOOSE * larger else scale
    return ratio(reached, norm(fy)) + ratio(apart, scale), LOOSE


def _again(walk: Walk, state: State, fy: Tensor) -> tuple[Tensor, float]:
    """sum_{k<N} (dT/dx)' ((dT/dy)')^k fy at one state, T the latest step, and |((dT/dy)')^N fy|."""
    if not walk.steps:
        return torch.zeros_like(walk.x), norm(fy)
    leaves = tuple(s.detach().requires_grad_() for s in state)
    _, gradient = walk.gradient(leaves[0], with_graph=True)
    with torch.enable_grad():
        new = walk.inner.advance(walk.objective, gradient, leaves, walk.steps - 1)
    found, adjoint = torch.zeros_like(walk.x), (fy, *(None for _ in new[1:]))
    for _ in range(walk.steps):
        in_x, *rest = pull_back(new, adjoint, (walk.x, *leaves), again=True)
        found = found if in_x is None else found + in_x
        adjoint = tuple(rest)
    if walk.needs_gradient:
        count_products(walk.problem.tally, walk.rows, walk.steps, through=True)
    return found, sum(norm(part) for part in adjoint if part is not None)


def count_products(tally: Tally, rows: int, steps: int, through: bool) -> None:
    """Count what pulling back through `steps` steps takes; one product less if not to the state before the first."""
    tally.hvps += max(steps - (0 if through else 1), 0) * rows
    tally.cross_products += steps * rows


def pull_back(
    end: State, adjoint: tuple[Tensor | None, ...], inputs: tuple[Tensor, ...], again: bool = False
) -> tuple[Tensor | None, ...]:
    """The derivatives of <end, adjoint> in the inputs; `again`: the graph is kept for another time."""
    pairs = [(e, a) for e, a in zip(end, adjoint, strict=False) if a is not None and e.requires_grad]
    if not pairs:
        return tuple(None for _ in inputs)
    outputs, weights = zip(*pairs, strict=True)
    with explained():
        return torch.autograd.grad(outputs, inputs, weights, allow_unused=True, retain_graph=again)
