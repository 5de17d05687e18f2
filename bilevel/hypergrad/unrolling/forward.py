"""Forward mode: the tangents of the state for each outer variable, carried along with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from bilevel._calculus import outer_gradients
from bilevel._numerics.second_derivatives import explained, refuse_dropped_terms
from bilevel.hypergrad.unrolling.form import AbstractUnrolling, Unrolled

if TYPE_CHECKING:
    from bilevel._inner import State
    from bilevel.hypergrad.unrolling.walk import Walk


@final
@dataclass(frozen=True)
class Forward(AbstractUnrolling):
    """Forward mode: Z_{k+1} = (dT_k/dstate) Z_k + dT_k/dx, h = df/dx + Z_N' df/dy, with p tangents side by side.

    For few outer variables and many steps: nothing is kept of the steps that were taken.

    A step takes x, y and grad_y g. The tangents of the gradient are H Z + G', one backward pass a direction since H is
    symmetric; those of the rest of the step, arithmetic and perhaps a prox or an iteration of the user's, come from two
    reverse passes: J t is the derivative of w -> J'w along t. That asks that its first derivative is differentiable.

    Cost for N steps: N + 1 gradients, p N Hessian products and p N cross products. Memory: that of one gradient's graph
    and of p states, whatever N.

    Source: Franceschi et al., "Forward and reverse gradient-based hyperparameter optimization", ICML 2017.

    Example:
        >>> from bilevel import ITD, BilevelProblem, hypergradient
        >>> from bilevel.solvers import GradientDescent, Iterate
        >>> problem = BilevelProblem(lambda x, y: y.square().sum() / 2, lambda x, y: (y - x).square().sum() / 2)
        >>> itd = ITD(Iterate(GradientDescent(0.5), max_steps=2), Forward())
        >>> hypergradient(problem, torch.ones(1), torch.zeros(1), estimator=itd).grad  # 0.75 * 0.75
        tensor([0.5625])
    """

    def differentiate(self, walk: Walk) -> Unrolled:
        end, tangents, left = _carry(walk)
        value, fx, fy = outer_gradients(walk.problem, walk.x, end[0])
        return Unrolled(fx + (tangents * fy).flatten(1).sum(1), value, end, left)


def _carry(walk: Walk) -> tuple[State, Tensor, float | None]:
    """The last state, J_N' `(p, *tasks, q)`, and what is left of the derivative where it is to converge."""
    units = torch.eye(walk.x.shape[-1], dtype=walk.x.dtype, device=walk.x.device)
    tangents = torch.stack([_init_tangent(walk.start, walk.x, unit) for unit in units])
    state, moved = _push(lambda y: walk.inner.begin(y), (_leaf(walk.start),), (tangents,))
    first: float | None = None  # the size of the first change
    left = 0.0 if walk.checked else None
    while walk.steps < walk.inner.max_steps:
        value, gradient, along = _gradient(walk, state[0])
        moving: Tensor | None = None
        if walk.length is None:
            assert gradient is not None
            moving = walk.moving(gradient, value, walk.steps)
            if walk.is_over(moving) and not walk.checked:
                break
        # H Z + G', which vanishes where Z has converged; one row for each outer variable
        change = torch.stack([along(unit, z) for unit, z in zip(units, moved[0], strict=True)])
        new, new_moved = state, moved
        if not walk.is_over(moving):
            new, new_moved = _step(walk, state, moved, gradient, change, units)
            if walk.length is not None:
                moving = walk.moving(walk.moved(state, new), value, walk.steps)
                change = new_moved[0] - moved[0]
        if walk.checked:
            size = float(torch.linalg.vector_norm(change))
            first = size if first is None else first
            left = size / first if walk.is_over(moving) and first > 0 else 0.0
        if walk.is_over(moving):
            break
        state, moved = walk.hold(moving, new, state), walk.hold(moving, new_moved, moved)
        walk.steps += 1
    return state, moved[0], left


def _gradient(walk: Walk, y: Tensor) -> tuple[Tensor, Tensor | None, Callable[[Tensor, Tensor], Tensor]]:
    """g, grad_y g, both without a graph, and (u, z) -> G'u + H z, the gradient's tangent; zero, None and zeros."""
    if not walk.needs_gradient:
        return *walk.gradient(y, with_graph=False), lambda _, z: torch.zeros_like(z)
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

    def along(u: Tensor, z: Tensor) -> Tensor:
        tally.hvps += walk.rows
        tally.cross_products += walk.rows
        pairs = [(part, w) for part, w in ((gx, u), (gy, z)) if part.requires_grad]
        if not pairs:
            return torch.zeros_like(z)
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

    J t is the derivative of w -> J'w along t: two reverse passes. Torch's own forward mode loads its rules with
    TorchScript, which takes a second and warns of its deprecation.
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
                moved = torch.autograd.grad(sources, weights, directions, is_grads_batched=True, allow_unused=True)
    zeros = (tangents[0].new_zeros(len(tangents[0]), *v.shape) for v in value)
    return (
        tuple(v.detach() for v in value),
        tuple(z if m is None else m for m, z in zip(moved, zeros, strict=True)),
    )


def _leaf(entry: Tensor) -> Tensor:
    return entry.detach().requires_grad_()
