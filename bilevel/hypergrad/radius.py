"""The radius of differences of inner solutions: what fits a dtype, and what it costs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver
from bilevel._numerics.rows import positive_or_one, safe_row_norms
from bilevel._result import Report, Status
from bilevel.inner_problems.kinds import inner_objective

DIGIT = 0.1  # of the estimate: where rounding and tolerances are more than that, hardly a digit is left
_LOOKED_AT = 2**18  # entries
_STEPS = 50  # towards the rounding floor: what would change a digit shows earlier
_PART = 0.1  # of |dy| |grad_y f|: what counts as the size of an estimate whose parts cancel, as they do at an optimum


def fitting(x: Tensor) -> float:
    """eps^(1/3) max(1, the root mean square of x): rounding of y and usual tolerances over it, its truncation in it."""
    size = float(safe_row_norms(x)) / math.sqrt(max(x.shape[-1], 1))
    return math.cbrt(torch.finfo(x.dtype).eps) * (max(1.0, size) if math.isfinite(size) else 1.0)


def distortion(x: Tensor, u: Tensor, radius: float) -> float:
    """The largest relative error of a displacement r u once it has been added to x; infinite where it is lost.

    Of a long x every so many entries are looked at.
    """
    stride = -(-x.shape[-1] // _LOOKED_AT)
    x, u = x[..., ::stride], u[..., ::stride]
    wanted = radius * u
    sizes = safe_row_norms(wanted)
    off = safe_row_norms((x + wanted) - x - wanted) / positive_or_one(sizes)
    return float(torch.where((sizes > 0) | (safe_row_norms(u) == 0), off, math.inf).max())


def spread(moved: Tensor, fy: Tensor, share: float, radius: float) -> float:
    """What the implicit part of an estimate is where nothing cancels: (c / sqrt(Q)) |u| |dy| |grad_y f| / r."""
    length = float(safe_row_norms(moved.flatten(1)).max())
    return share * length * float(safe_row_norms(fy.reshape(-1))) / radius


def rounding(y: Tensor, moved: Tensor, fy: Tensor, share: float, radius: float) -> float:
    """What rounding of y alone makes of the estimate; 0 where y is seen not to move at all."""
    if not bool((moved != 0).any()):
        return 0.0
    return share * 2 * torch.finfo(y.dtype).eps * float(safe_row_norms((y * fy).reshape(-1))) / radius


def bent(moved: Tensor, back: Tensor, fy: Tensor, share: float, radius: float) -> float:
    """Half the second differences along u over r, in the estimate: its truncation, and rounding and tolerances in it.

    Args:
        moved: y(x + r u) - y(x) `(Q, *tasks, q)`, of all directions.
        back: y(x - r u) - y(x), of the first few of them, which tell of all.
        fy: grad_y f.
        share: (c / sqrt(Q)) |u|: what an error of size 1 in each slope, with a sign of its own, is in the estimate.
        radius: r.
    """
    halves = ((moved[: len(back)] + back) * fy).flatten(1).sum(1) / (2 * radius)
    return share * float(safe_row_norms(halves)) / math.sqrt(len(back))


def changed(moved: Tensor, finer: Tensor, fy: Tensor, share: float, radius: float) -> float:
    """What another y(x + r u) - y(x) makes of an estimate, `(k, *tasks, q)` along the first few directions."""
    slopes = ((finer - moved) * fy).flatten(1).sum(1) / radius
    return share * float(safe_row_norms(slopes)) / math.sqrt(len(moved))


def refined(problem: FlatProblem, x: Tensor, y: Tensor, residual: float, inner: AbstractInnerSolver) -> Tensor | None:
    """Where y goes on to from several x, `(k, *tasks, q)`, if no tolerance ends the solves.

    A solver whose tolerance is large beside what moving x makes of grad_y g stops where it begins, in some directions
    or in all, and the differences of such y say nothing: how they change here tells. None: there is nothing to change,
    as the solver takes the steps that were asked for, or y is not to make grad_y g zero.

    Args:
        problem: the problem in vectors.
        x: the points `(k, p)`.
        y: the solutions there.
        residual: the largest that was left at any of them.
        inner: the inner solver.
    """
    solves = inner.forgets_start or inner.tolerance is not None
    if not solves or not residual > 0 or inner.why_iteration:
        return None
    objective = inner_objective(problem, x)
    finer = inner.with_tolerance(math.ulp(0.0))  # 0 would be no tolerance at all
    if not (objective.is_plain and objective.solves) or finer is None:
        return None
    found: Tensor = (finer.with_steps(_STEPS) or finer).solve(objective, y).value
    return found


def verdict(noise: float, measured: float | None, size: float, distorted: float, short: bool, given: bool) -> Report:
    """Whether a digit is left of an estimate, as a report of the part "radius".

    Args:
        noise: of rounding alone.
        measured: by second differences, where it was.
        size: of the estimate.
        distorted: the relative error of displacements, or of how y follows them.
        short: whether the radius is below what fits the dtype.
        given: whether the radius was asked for: its truncation is then reported, and no failure.
    """
    error, status = max(noise, measured or 0.0), Status.successful
    if noise > DIGIT * size or distorted > DIGIT or (short and error > DIGIT * size):
        status = Status.imprecise
    elif not given and error > DIGIT * size:
        status = Status.biased
    return Report("radius", status, max(error / size if size > 0 else 0.0, distorted), 0)


def size_of(parts: tuple[Tensor, ...], uncancelled: float) -> float:
    """What errors of an estimate are compared with: the largest of its parts."""
    return max(*(float(safe_row_norms(part)) for part in parts), _PART * uncancelled)
