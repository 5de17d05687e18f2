"""What an unrolled derivative lacks: its distance from the implicit one at the point where the iteration ended."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bilevel._calculus import Exact, Linearization
from bilevel._numerics.rows import safe_row_norms
from bilevel.requirements.properties import DoesNotApply

if TYPE_CHECKING:
    from bilevel.hypergrad.unrolling.walk import Walk

LOOSE = 1e-2  # what may be lacking of a derivative however loose the tolerance of y is
_TIGHT = 1e-4  # the same in float64, where y is as accurate
_LAG = 10.0  # the derivative is behind y: what it lacks declines like N rho^N where y - y* does like rho^N


def lacking(walk: Walk, y: Tensor, fx: Tensor, fy: Tensor, total: Tensor, v: Tensor) -> tuple[float, float] | None:
    """How far an unrolled derivative is from the implicit gradient at y_N, relatively, and how far it may be.

    With w_k the derivative of f(x, y_N) in the gradient of g that step k takes, v = -sum_k w_k and total =
    sum_k G(y_k) w_k, the unrolled derivative is fx + total. Whatever the steps are and wherever they began,

        (fx + total) - (fx - G H^-1 fy) = sum_k (G(y_k) - G) w_k + G H^-1 (fy - H v),

    H and G at y_N: what was taken of G elsewhere, and what v, made of Hessians elsewhere and of finitely many, lacks of
    the solution of H v = fy. Returned is

        |sum_k (G(y_k) - G) w_k| / max(|total|, |G v|, |fx + total|) + |fy - H v| / |fy|,

    for other kinds of inner problem the same with their own optimality condition. None: there is none at y_N.

    Where total and G v are small by cancellation, or as G vanishes, the first term is seen relative to what G v is
    with its terms in random signs, or to what it becomes as y moves by the part of it that may be wrong.

    Cost: one gradient, one Hessian product and one cross product; where too much seems to lack, one gradient and three
    products more.
    """
    assert walk.linearized is not None
    if not bool(torch.stack([part.isfinite().all() for part in (y, fy, v, total)]).all()):
        return math.nan, LOOSE
    try:
        at = walk.linearized(y)
    except DoesNotApply:
        return None
    b = at.right_hand_side(fy)
    sizes, shorts = (safe_row_norms(part) for part in (b, at.operator.residual(b, v)))
    short = float(torch.where(sizes > 0, shorts / sizes, 0.0).max())  # with tasks, that of the worst
    cross = at.cross(v, fy)
    if cross is None:  # x does not reach y
        return 0.0, LOOSE
    limit = allowed(walk, y, norm(v), norm(b), ratio(norm(cross), norm(v)))
    apart, scale = norm(total + cross), max(norm(total), norm(cross), norm(fx + total))
    if apart > limit * scale:
        larger = _without_cancellation(walk, y, at, v, limit)
        scale = larger if apart <= limit * larger else scale
    return short + ratio(apart, scale), limit


def allowed(walk: Walk, y: Tensor, response: float, force: float, gain: float) -> float:
    """What may be lacking: 10 times the relative error that the tolerance leaves in y, between 1e-4 and 1e-2.

    In float32 it is 1e-2. Relative to y or, where that is more, to what x, moved by its own size, makes of it.

    Args:
        walk: whose tolerance it is.
        y: y_N.
        response: how far y moves under a force, a gradient.
        force: the size of that.
        gain: the size of the force that x exerts, for each unit by which it moves.
    """
    if y.dtype != torch.float64:
        return LOOSE
    tol, reach = (walk.inner.tol or 0.0) * math.sqrt(walk.rows), max(float(walk.x.detach().abs().max()), 1.0)
    moved = ratio(response, force)
    return min(max(_LAG * min(ratio(tol * moved, norm(y)), ratio(tol, gain * reach)), _TIGHT), LOOSE)


def nudged(y: Tensor, part: float) -> Tensor:
    """Y with each entry moved up or down by a part of their root mean square."""
    return y + part * y.square().mean().sqrt() * _signs(y)


def _without_cancellation(walk: Walk, y: Tensor, at: Linearization, v: Tensor, limit: float) -> float:
    """The size of G v as it would be if its terms did not cancel, and if G did not vanish at y."""
    aligned, here = at.products(_signs(v) * v)[1], at.products(v)[1]
    there = Exact().linearize(walk.problem, walk.x, nudged(y, limit)).cross(v)
    if aligned is None or here is None or there is None:
        return 0.0
    return max(norm(aligned), norm(there - here) / limit)


def _signs(like: Tensor) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randint(0, 2, like.shape, generator=generator, device="cpu").to(like) * 2 - 1


def norm(vector: Tensor) -> float:
    """The 2-norm of all entries."""
    return float(safe_row_norms(vector.reshape(-1)))


def ratio(part: float, whole: float) -> float:
    """The part of the whole; nothing of nothing is 0."""
    return part / whole if whole > 0 else math.inf if part > 0 else 0.0
