"""What the points of a penalty estimate tell of its error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import inner_gradients, outer_gradients
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver, Objective
from bilevel._numerics.rows import row_dots, safe_row_norms
from bilevel._result import Tally

_NOISE = 100.0  # rounding units of g: what differences of its values are not believed below
_SIDE = 1e-2  # of |a| |d|: a slope against the displacement that is more than noise
_LEAST = 1e-6  # of |b|: what a residual is taken for at least, so that the probe moves y by more than rounding
_ABOVE = 1e3  # times its tolerance: the gradient that a probe is to follow
_SETTLED = 1e-4  # of v: near a stationary x the implicit gradient cancels, though v is as accurate as ever
_FEW = 4.0  # rounding units of a gradient
_CLEAR = 30.0  # times what rounding of y makes of a gradient: what a probe is to move it by
_CANCELS = 1e-2  # of a: a residual that what it becomes in h is small beside, where nothing cancels


@final
@dataclass(frozen=True, eq=False)
class Point:
    """F and g at a point y `(*tasks, q)`, with their gradients; in x they are summed over tasks."""

    y: Tensor
    g: Tensor
    gx: Tensor | None
    gy: Tensor
    f: Tensor
    fx: Tensor
    fy: Tensor

    @staticmethod
    def at(problem: FlatProblem, x: Tensor, y: Tensor) -> Point:
        """One gradient of f and one of g."""
        f, fx, fy = outer_gradients(problem, x, y)
        return Point(y, *inner_gradients(problem, x, y), f, fx, fy)


@final
@dataclass(frozen=True, eq=False)
class Difference:
    """Differences of g's gradients between y and y_w, times w: a system H v = a solved, and J'a with J = dy*/dx.

    With two weights, twice that of the second less that of the first, or `apart` one less the other. Vectors are made
    when they are asked for, since mostly their sizes are.

    Attributes:
        y: y.
        points: (w, y_w), one or two.
    """

    y: Point
    points: Sequence[tuple[float, Point]]

    def a(self, apart: bool = False) -> Tensor:
        """w [grad_y g(y) - grad_y g(y_w)] `(*tasks, q)`: H v, to first order; grad_y f(y_w) where y_w is exact."""
        return self._of(lambda y_w, w: w * (self.y.gy - y_w.gy), apart)

    def v(self, apart: bool = False) -> Tensor:
        """w (y - y_w)."""
        return self._of(lambda y_w, w: w * (self.y.y - y_w.y), apart)

    def image(self, apart: bool = False) -> Tensor:
        """w [grad_x g(y_w) - grad_x g(y)] / tasks `(p,)`: -G v = J'a, to first order."""
        rows = self.y.y.shape[:-1].numel()

        def of(y_w: Point, w: float) -> Tensor:
            assert self.y.gx is not None and y_w.gx is not None
            return w / rows * (y_w.gx - self.y.gx)

        return self._of(of, apart)

    def _of(self, part: Callable[[Point, float], Tensor], apart: bool) -> Tensor:
        w, y_w = self.points[0]
        if len(self.points) == 1:
            return part(y_w, w)
        w_2, y_w2 = self.points[1]
        second = part(y_w2, w_2)
        return (second if apart else 2.0 * second) - part(y_w, w)


@final
@dataclass(frozen=True)
class PenaltyError:
    """How wrong a penalty estimate is, as far as its points tell.

    Attributes:
        bias: of the weight: an estimate of |h_w - h|.
        noise: of rounding, times the weight.
        inexact: of the residuals of the inner solutions, times the weight; infinite where y_w is y to the last digit
            though f pulls, and nothing tells what was lost.
        rounded: the part of `inexact` that is rounding of y, where a solver was asked for steps and no more.
        size: what they are compared with: the largest of |h|, |grad_x f| and |h - grad_x f|.
        settled: whether v is accurate, so that errors above `size` mean that the two parts cancel.
        descends: whether g falls from y to some y_w, or bends down in between: y is no minimum of it.
    """

    bias: float = 0.0
    noise: float = 0.0
    inexact: float = 0.0
    rounded: float = 0.0
    size: float = 0.0
    settled: bool = True
    descends: bool = False


def descends(y: Point, y_w: Point) -> bool:
    """Whether g lies below its tangent at y somewhere, beyond rounding: convex functions do not, nor strict minima."""
    d = y_w.y - y.y
    noise = _NOISE * torch.finfo(d.dtype).eps * (y.g.abs() + y_w.g.abs())
    below = y_w.g - y.g - row_dots(y.gy, d) < -noise
    change = y_w.gy - y.gy
    concave = row_dots(change, d) < -_SIDE * safe_row_norms(change) * safe_row_norms(d)
    rounded = safe_row_norms(change) <= _NOISE * torch.finfo(d.dtype).eps * safe_row_norms(y.gy + y_w.gy)
    return bool((below | concave & ~rounded & (y_w.g + noise < y.g + y_w.g.abs() * _SIDE)).any())


def _size(t: Tensor) -> float:
    return float(safe_row_norms(t.reshape(-1)))


def _over(a: float, b: float) -> float:
    return a / b if b > 0 else 0.0


def error_of(
    problem: FlatProblem,
    x: Tensor,
    y: Point,
    points: Sequence[tuple[float, Point]],
    h: Tensor,
    inner: AbstractInnerSolver,
    first: bool,
) -> PenaltyError:
    """The error of h_w, or of 2 h_2w - h_w, from what is at hand, and at the first estimate from one more inner solve.

    The estimate has the implicit gradient's form with a in the place of b = grad_y f(y). Its error is therefore that of
    a residual r = a - b, J'r, beside that of grad_x f at y_w. How much J' makes of r is estimated by what it makes of a
    and of the difference of two a; or it is measured, by the minimizer of g + <r, y> / w, which has no f to be biased
    by. That one starts a little off y, and does not come back where y is no minimum. What is left out is what third
    derivatives of g do at this w: with two weights, |h_2w - h_w|^2 / |h|.

    A part of r is rounding of y, whose shift to y_w is |v| / w. What that becomes in h is at most what moving every
    entry of y by its last digit makes of w grad_x g, a gradient more. Where nothing is left of the shift there is no v,
    and the solve that measures J' is made at later estimates as well.

    Args:
        problem: where nothing is counted.
        x: the outer variable.
        y: the inner solution.
        points: (w, y_w), for one weight or for w and 2w.
        h: the estimate.
        inner: minimizes g + <r, y> / w.
        first: whether the estimate is the first of a run.
    """
    rows, eps = y.y.shape[:-1].numel(), torch.finfo(x.dtype).eps
    whole, two, top = Difference(y, points), len(points) == 2, points[-1][0]
    size_a, size_v, implicit = _size(whole.a()), _size(whole.v()), _size(whole.image())
    gain, stretch, between, factor = _over(implicit, size_a), _over(size_v, size_a), 0.0, 1.0
    if two:
        apart, between, factor = _size(whole.a(apart=True)), _size(whole.image(apart=True)), 2.5
        gain, stretch = max(gain, _over(between, apart)), max(stretch, _over(_size(whole.v(apart=True)), apart))

    def missed(b: Tensor) -> Tensor:
        """What is left of a system with grad_y f of some point on its right."""
        return whole.a().sub_(_times(rows, b))

    right = 2 * points[1][1].fy - points[0][1].fy if two else points[0][1].fy
    inexact, shifted = _size(missed(right)), _size(_times(rows, right) - _times(rows, y.fy))
    del right
    r, norm_b = missed(y.fy), _size(_times(rows, y.fy))
    lost = _size(r)
    moved = (2 * points[1][1].fx - points[0][1].fx if two else points[0][1].fx) - y.fx
    bias, off = _size(moved) + gain * shifted, stretch * lost
    down = any(descends(y, y_w) for _, y_w in points)
    rounded = 0.0
    if (first or size_v == 0) and norm_b > 0 and math.isfinite(lost) and not down:
        quiet = problem.with_tally(Tally())
        signs = _random_signs(y.y)
        _, beside_x, beside_y = inner_gradients(quiet, x, y.y * (1 + eps * signs))
        assert beside_x is not None and y.gx is not None
        rounded, unit = factor * top / rows * _size(beside_x - y.gx), _size(beside_y - y.gy)
        least = max(lost, _LEAST * norm_b)
        w = top * least / norm_b
        # It must move y by more than what is not looked at, and than what is lost.
        for unseen in (_ABOVE * (inner.tolerance or 0.0), _CLEAR * unit):
            w = min(w, least / unseen) if unseen > 0 else w
        reach = safe_row_norms(points[-1][1].y - y.y).unsqueeze(-1) / math.sqrt(y.y.shape[-1])
        tilted = Objective(lambda z: quiet.g(x, z) + row_dots(r, z) / w, quiet.tally)
        solved = inner.solve(tilted, signs.mul_(reach).add_(y.y))
        at = Point(solved.value, *inner_gradients(quiet, x, solved.value), y.f, y.fx, y.fy)  # of f nothing is asked
        down = descends(y, at)
        refined = Difference(y, [(w, at)])
        bias, off = _size(moved + refined.image()), max(off, _size(refined.v()))
        gain, size_a = max(gain, _over(_size(refined.image()), _size(refined.a()))), max(size_a, _size(refined.a()))
    size = max(_size(h), _size(y.fx), implicit)
    bias += _over(between, implicit) * between
    assert y.gx is not None
    digits = max(_over(_size(y.y), _size(y_w.y - y.y)) for _, y_w in points)
    noise = eps * (factor * _FEW * top * _size(y.gx) / rows + digits * implicit)
    unsolved = gain * inexact if size_a > 0 or inexact == 0 else math.inf
    settled = off < _SETTLED * size_v and inexact <= _CANCELS * size_a
    return PenaltyError(bias, noise, unsolved, min(unsolved, rounded), size, settled, down)


def _times(count: int, gradient: Tensor) -> Tensor:
    """A multiple of a gradient; itself where that is 1."""
    return gradient if count == 1 else count * gradient


def _random_signs(like: Tensor) -> Tensor:
    """Entries 1 and -1, the same ones on every device and in every call."""
    signs = torch.randint(0, 2, like.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(like)
    return signs.mul_(2).sub_(1)
