"""Forward mode: the tangents of the state for each outer variable, carried along with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, final

import torch
from torch import Tensor

from bilevel._calculus import outer_gradients
from bilevel._numerics.second_derivatives import explained, refuse_dropped_terms
from bilevel.hypergrad.unrolling.form import AbstractUnrolling, Unrolled
from bilevel.hypergrad.unrolling.lacking import LOOSE, allowed, norm, nudged, ratio

if TYPE_CHECKING:
    from bilevel._inner import State
    from bilevel.hypergrad.unrolling.walk import Walk

Along: TypeAlias = Callable[[Tensor | None, Tensor | None], Tensor]


@final
@dataclass(frozen=True)
class Forward(AbstractUnrolling):
    """Forward mode: Z_{k+1} = (dT_k/dstate) Z_k + dT_k/dx, h = df/dx + Z_N' df/dy, with p tangents side by side.

    For few outer variables and many steps: nothing is kept of the steps that were taken.

    A step takes x, y and grad_y g. The tangents of the gradient are H Z + G', one backward pass a direction since H is
    symmetric; those of the rest of the step, arithmetic and perhaps a prox or an iteration of the user's, come from two
    reverse passes: J t is the derivative of w -> J'w along t. That asks that its first derivative is differentiable.

    Cost for N steps: N + 1 gradients, p N Hessian products and p N cross products; with a tolerance a gradient and p
    products of each kind more, to measure what the derivative lacks. Memory: that of one gradient's graph
    and of 3 p states, 2 p while a gradient is formed, whatever N.

    Source: Franceschi et al., "Forward and reverse gradient-based hyperparameter optimization", ICML 2017.

    Example:
        >>> from bilevel import ITD, BilevelProblem, hypergradient
        >>> from bilevel.solvers import GradientDescent, Iterate
        >>> problem = BilevelProblem(
        ...     lambda x, y: y.square().sum() / 2, lambda x, y: (y - x).square().sum() / 2
        ... )
        >>> itd = ITD(Iterate(GradientDescent(0.5), max_steps=2), Forward())
        >>> hypergradient(problem, torch.ones(1), torch.zeros(1), estimator=itd).grad  # 0.75 * 0.75
        tensor([0.5625])
    """

    def differentiate(self, walk: Walk) -> Unrolled:
        units = torch.eye(walk.x.shape[-1], dtype=walk.x.dtype, device=walk.x.device)
        end, moved = _carry(walk, units)
        value, fx, fy = outer_gradients(walk.problem, walk.x, end[0])
        left, allowed = _lacking(walk, end, moved, units) if walk.checked else (None, LOOSE)
        return Unrolled(fx + (moved[0] * fy).flatten(1).sum(1), value, end, left, allowed)


def _carry(walk: Walk, units: Tensor) -> tuple[State, State]:
    """The last state and its tangents, J_N' `(p, *tasks, q)` first."""
    tangents = torch.stack([_init_tangent(walk.start, walk.x, unit) for unit in units])
    state, moved = _push(lambda y: walk.inner.begin(y), (_leaf(walk.start),), (tangents,))
    del tangents
    while walk.steps < walk.inner.max_steps:
        value, gradient, along = _gradient(walk, state[0])
        moving: Tensor | None = None
        if walk.length is None:
            assert gradient is not None
            moving = walk.moving(gradient, value, walk.steps, state[0])
            if walk.is_over(moving):
                break
        # H Z + G', which vanishes where Z has converged; one row for each outer variable
        change = torch.stack([along(unit, z) for unit, z in zip(units, moved[0], strict=True)])
        del along  # and the graph with it
        new, new_moved = _step(walk, state, moved, gradient, change, units)
        if walk.length is not None:
            moving = walk.moving(walk.moved(state, new), value, walk.steps, state[0])
            if walk.is_over(moving):
                break
        state, moved = walk.hold(moving, new, state), walk.hold(moving, new_moved, moved)
        del gradient, change, new, new_moved  # not to be held while the next gradient is formed
        walk.steps += 1
    return state, moved


def _lacking(walk: Walk, state: State, moved: State, units: Tensor) -> tuple[float, float]:
    """What Z_N = dy_N/dx lacks at y_N, |H Z_N + G'| / |G'| there, and how much it may.

    Where the residual is the length of a step, |Z_{N+1} - Z_N| and the step's own derivative in x take their places.
    Where G vanishes, it is seen relative to what G becomes as y moves by the part of it that may be wrong.
    """
    y, still = state[0], tuple(torch.zeros_like(z) for z in moved)
    _, gradient, along = _gradient(walk, y)
    hz = torch.stack([along(None, z) for z in moved[0]])

    def driven(along: Along, gradient: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor]:
        """G' at y, and the part of x in the next y where that is what counts."""
        own = torch.stack([along(unit, None) for unit in units])
        return own, own if walk.length is None else _step(walk, (y, *state[1:]), still, gradient, own, units)[1][0]

    own, force = driven(along, gradient, y)
    length = 1.0 if walk.length is None else float(walk.length)  # of a step: what a force is, times this
    change = own + hz
    if walk.length is not None:
        change = _step(walk, state, moved, gradient, change, units)[1][0] - moved[0]
    size = norm(force)
    limit = allowed(walk, y, norm(moved[0]) * length, size, size / length)
    if norm(change) > limit * size:
        near = nudged(y, limit)
        _, gradient, along = _gradient(walk, near)
        larger = norm(driven(along, gradient, near)[1] - force) / limit
        size = larger if norm(change) <= limit * larger else size
    return ratio(norm(change), size), limit


def _gradient(walk: Walk, y: Tensor) -> tuple[Tensor, Tensor | None, Along]:
    """G, grad_y g, both without a graph, and (u, z) -> G'u + H z, the gradient's tangent; zero, None and zeros.

    A u or a z that is None is zero, and its product is not formed.
    """
    if not walk.needs_gradient:
        return *walk.gradient(y, with_graph=False), lambda *_: torch.zeros_like(y)
    tally = walk.problem.tally
    tally.gradients += walk.rows
    with torch.enable_grad():
        leaf = _leaf(y)
        value = walk.objective.function(leaf)
        total = value.sum()
        if not walk.steps:
            refuse_dropped_terms(total, leaf)
        with explained():
            gx, gy = torch.autograd.grad(
                total, (walk.x, leaf), create_graph=True, allow_unused=True, materialize_grads=True
            )

    def along(u: Tensor | None, z: Tensor | None) -> Tensor:
        tally.hvps += walk.rows if z is not None else 0
        tally.cross_products += walk.rows if u is not None else 0
        pairs = [(part, w) for part, w in ((gx, u), (gy, z)) if w is not None and part.requires_grad]
        if not pairs:
            return torch.zeros_like(y)
        outputs, weights = zip(*pairs, strict=True)
        with explained():  # one backward pass, as H is symmetric
            return torch.autograd.grad(
                outputs, leaf, weights, retain_graph=True, allow_unused=True, materialize_grads=True
            )[0]

    return value.detach(), gy.detach(), along


def _step(
    walk: Walk, state: State, moved: State, gradient: Tensor | None, d_gradient: Tensor, units: Tensor
) -> tuple[State, State]:
    """The next state and its tangents: those of x, of the gradient and of the state pushed through a step."""
    slopes = () if gradient is None else (_leaf(gradient),)
    leaves = (*slopes, *map(_leaf, state), walk.x)
    tangents = (*(() if gradient is None else (d_gradient,)), *moved, units)

    def advance(*given: Tensor) -> State:  # the leaf x is where walk.objective was taken
        slope = given[0] if slopes else None
        new = walk.inner.advance(walk.objective, slope, given[len(slopes) : -1], walk.steps)
        if not walk.steps:
            for entry in new:
                refuse_dropped_terms(entry)
        return new

    return _push(advance, leaves, tangents)


def _init_tangent(start: Tensor, x: Tensor, unit: Tensor) -> Tensor:
    """The derivative of init(x) along a unit vector, as the derivative of its vector-Jacobian product."""
    if not start.requires_grad:
        return torch.zeros_like(start)
    w = torch.zeros_like(start, requires_grad=True)
    with torch.enable_grad():
        pulled = torch.autograd.grad(start, x, w, create_graph=True, allow_unused=True)[0]
        if pulled is None or not pulled.requires_grad:
            return torch.zeros_like(start)
        return torch.autograd.grad(pulled @ unit, w, retain_graph=True)[0]


def _push(
    function: Callable[..., State], leaves: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[State, State]:
    """function(*leaves) and its derivatives along p tangents of the leaves, stacked in front.

    J t is the derivative of w -> J'w along t: two reverse passes, the second one for each t. Torch's own forward mode
    loads its rules with TorchScript, which takes a second and warns of its deprecation; its batched reverse mode leaves
    cycles of references behind at each call.
    """
    with torch.enable_grad():
        value = function(*leaves)
        weights = tuple(torch.zeros_like(v, requires_grad=True) for v in value)
        moved: tuple[Tensor | None, ...] = tuple(None for _ in value)
        live = [(v, w) for v, w in zip(value, weights, strict=True) if v.requires_grad]
        if live:
            outputs, cotangents = zip(*live, strict=True)
            pulled = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True, allow_unused=True)
            along = [(g, t) for g, t in zip(pulled, tangents, strict=True) if g is not None and g.requires_grad]
            if along:
                sources, directions = zip(*along, strict=True)
                pushed = [
                    torch.autograd.grad(sources, weights, rows, retain_graph=True, allow_unused=True)
                    for rows in zip(*directions, strict=True)
                ]
                moved = tuple(None if rows[0] is None else torch.stack(rows) for rows in zip(*pushed, strict=True))
    count = len(tangents[0])
    return (
        tuple(v.detach() for v in value),
        tuple(v.new_zeros(count, *v.shape) if m is None else m for m, v in zip(moved, value, strict=True)),
    )


def _leaf(entry: Tensor) -> Tensor:
    return entry.detach().requires_grad_()
