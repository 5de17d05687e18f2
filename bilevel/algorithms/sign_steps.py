"""Learning rates of Adam, which moves every entry by about one rate a step, from the curvature along its first step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bilevel._inner import Objective
from bilevel._result import Tally
from bilevel.algorithms.step_lengths import hypergradient_at, is_convex
from bilevel.named.setting import Setting

RATE = 0.01  # where there is no curvature to go by: entries that matter are about 1, and move by a hundredth of that
# Of the way to the minimum along the signs: momentum goes on for ten steps, and the noise of batches is of its size.
_SHARE = 0.01


def adam_rates(s: Setting, weight: float) -> tuple[float, float]:
    """The learning rates of y and x for Adam on g + f / weight and on Phi, from the curvature along its first step.

    Adam's first step is s = -sign(d) times its rate, d the gradient. Along it a quadratic is least after

        |d|_1 / s'B s,    B its second derivative,

    and the rate is a hundredth of that: for y with d = grad_y g + grad_y f / weight at y0, means over the batches that
    are known; for x with d = grad Phi(x0), on the first batch, where g is convex in y. That of y is at least what y*(x)
    moves by, at most, as x takes a step. RATE where a curvature is not positive, as of a network, whose Phi has none
    to go by; or where the gradient is zero.

    Cost: two gradients of g and f for each batch, and two inner and two linear solves where g is convex in y.
    """
    inner = _inner(s, weight)
    found = _outer(s)
    if found is None:
        return inner, RATE
    outer, moves = found
    return max(inner, outer * moves), outer


def _inner(s: Setting, weight: float) -> float:
    problems = [problem.with_tally(Tally()) for problem in (s.problem, *s.others)]
    objectives = [
        Objective(lambda y, one=one: one.g(s.x, y) + one.f_each(s.x, y) / weight, one.tally)  # type: ignore[misc]
        for one in problems
    ]
    y = problems[0].start(s.x, s.y0).detach()
    gradients = [each.gradient(y) for each in objectives]
    d = torch.stack(gradients).mean(0)
    signs, length = d.sign(), _length(y)
    moved = torch.stack([each.gradient(y + length * signs) for each in objectives]).mean(0)
    slope, bend = float(d.abs().sum()), float((signs * (moved - d)).sum() / length)
    return _rate(slope, bend)


def _outer(s: Setting) -> tuple[float, float] | None:
    """The rate of x, and how far an entry of y* moves for a unit of it; None where y* is not known as a minimizer."""
    quiet = s.problem.with_tally(Tally())
    try:
        if not is_convex(s):
            return None
        y, h = hypergradient_at(s, quiet, s.x, quiet.start(s.x, s.y0).detach())
        signs, length = h.sign(), _length(s.x)
        there, after = hypergradient_at(s, quiet, s.x + length * signs, y)
    except NotImplementedError:  # no second derivatives
        return None
    bend = float((signs * (after - h)).sum().abs() / length)
    moves = float((there - y).abs().max() / length)
    rate = _rate(float(h.abs().sum()), bend)
    return (rate, moves) if math.isfinite(rate * moves) else None


def _rate(slope: float, bend: float) -> float:
    found = _SHARE * slope / bend if bend > 0 else math.nan
    return found if 0 < found < math.inf else RATE


def _length(point: Tensor) -> float:
    return float(torch.finfo(point.dtype).eps ** (1 / 3) * point.abs().max().clamp_min(1.0))
