"""What Krylov solvers share: systems scaled to |b| = 1, and runs from the true residual of the last."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bilevel._linear import LinearOperator
from bilevel._numerics.rows import row_norm_numbers, row_norms, row_norms_and_numbers
from bilevel._result import Solved, Status
from bilevel.arguments.ranges import AT_LEAST_0, BELOW_1, demand_range
from bilevel.arguments.unchecked import unchecked

# How a run of a recurrence ended, as a number for each row; RESTART is not an end.
CONVERGED, OUT_OF_STEPS, STALLED, CURVATURE, BREAKDOWN, NONFINITE, RESTART = range(7)
_STATUS = (
    Status.successful,
    Status.max_steps,
    Status.stagnated,
    Status.negative_curvature,
    Status.breakdown,
    Status.nonfinite,
    Status.max_steps,
)

_solved = unchecked(Solved)

# (operator, right-hand side, residual norm to stop at, most steps, size of A as far as known, zero at first)
# -> (solution, how each row ended, steps taken, size of A); numbers are `(*batch,)`, or floats for one system, where
# the run says that it takes them so
Run: TypeAlias = Callable[[LinearOperator, Tensor, Any, int, Any], tuple[Tensor, list[int], int, Any]]


def check_tolerances(solver: str, rtol: float, atol: float, max_steps: int | None) -> None:
    """Refuse tolerances and numbers of steps that make no sense.

    Raises:
        ValueError: naming the solver's argument.
    """
    all_steps, default = "Pass 0 to take `max_steps` steps.", "Pass None for ten times the unknowns."
    demand_range(solver, "rtol", rtol, BELOW_1, all_steps)
    demand_range(solver, "atol", atol, AT_LEAST_0, all_steps)
    demand_range(solver, "max_steps", max_steps, AT_LEAST_0, default)


def relative(tol: float, size: float) -> float:
    """The relative tolerance that an absolute one is for a right-hand side of norm `size`; at most 1/2.

    Zero meets an absolute tolerance of that norm or more; a solver that knows relative ones only goes on to one digit.
    """
    return min(tol / size, 0.5) if size > 0 else 0.0


def solve_by_runs(
    run: Run,
    operator: LinearOperator,
    b: Tensor,
    guess: Tensor | None,
    *,
    rtol: float | Sequence[float],
    atol: float = 0.0,
    max_steps: int | None = None,
    floats: bool = False,
) -> Solved:
    """Solve A v = b by runs of a recurrence, each for the true residual of the one before, until that is small.

    Args:
        run: solves A d = r from zero, for r of norm about 1; it may modify r.
        operator: A.
        b: the right-hand side.
        guess: where the first run starts; None is zero.
        rtol: stop when |b - A v| <= max(rtol |b|, atol); one number, or one for each row.
        atol: the same, absolute.
        max_steps: of all runs together; None is 10 n.
        floats: whether the run takes the numbers of one system as floats: a tensor of one takes as long as a product
            with a small matrix.
    """
    max_steps = 10 * operator.size if max_steps is None else max_steps
    eps = torch.finfo(b.dtype).eps
    v, r, norms, targets, scales, stops = _scaled(operator, b, guess, rtol, atol)
    scale, one = _factor(scales, b), floats and b.dim() == 1
    stop: Any = stops[0] if one else _column(stops, b)
    norm_A: Any = 0.0 if one else torch.zeros_like(stop)
    steps = 0
    running, before, codes = [norm != 0 for norm in norms], [math.inf] * len(norms), [CONVERGED] * len(norms)
    while True:
        # Handed over without a name, so that a run that needs it no more can let go of it.
        correction, ends, used, norm_A = run(
            operator, r / scale if r is b else r.div_(scale), stop, max_steps - steps, norm_A
        )
        v = correction.mul_(scale) if v is None else correction.mul_(scale).add_(v)
        del correction
        steps += used
        codes = [new if ran else old for ran, new, old in zip(running, ends, codes, strict=True)]
        last = steps >= max_steps or RESTART not in codes
        r = operator.residual(b, v) if last else b - operator.mv(v)
        residual, residuals = row_norms_and_numbers(r)
        rows = zip(running, codes, residuals, targets, before, norms, strict=True)
        codes = [_judged(code, res, aim, old, norm, eps) if ran else code for ran, code, res, aim, old, norm in rows]
        running = [code == RESTART for code in codes]
        if steps >= max_steps or RESTART not in codes:
            break
        if not all(running):
            r = torch.where(b.new_tensor(running, dtype=torch.bool).unsqueeze(-1), r, torch.zeros_like(r))
        before = residuals
    if not last:
        residual, residuals = row_norms_and_numbers(operator.residual(b, v))
    if any(code != CONVERGED for code in codes):
        sizes = (norm_A * row_norms(v)).reshape(-1).tolist()
        blurs = [eps * size for size in sizes]
        codes = [_ended(*row) for row in zip(codes, residuals, targets, blurs, norms, strict=True)]
    return _solved(v, tuple([_STATUS[code] for code in codes]), residual, steps)


def solve_by_one_run(
    run: Run,
    operator: LinearOperator,
    b: Tensor,
    guess: Tensor | None,
    *,
    rtol: float | Sequence[float],
    atol: float = 0.0,
    max_steps: int | None = None,
) -> Solved:
    """Solve A v = b by one run, whose own residual, left in its argument, is taken at its word: no product more."""
    max_steps = 10 * operator.size if max_steps is None else max_steps
    v, r, _, targets, scales, stops = _scaled(operator, b, guess, rtol, atol)
    scale, stop = _factor(scales, b), _column(stops, b)
    r = r / scale if r is b else r.div_(scale)
    correction, codes, steps, _ = run(operator, r, stop, max_steps, torch.zeros_like(stop))
    v = correction.mul_(scale) if v is None else correction.mul_(scale).add_(v)
    residual_norms, residuals = row_norms_and_numbers(r.mul_(scale))
    statuses = []
    for code, residual, target in zip(codes, residuals, targets, strict=True):
        if not math.isfinite(residual):
            code = NONFINITE
        elif code == OUT_OF_STEPS and (target == 0 or residual <= target):
            code = CONVERGED
        statuses.append(_STATUS[code])
    return _solved(v, tuple(statuses), residual_norms, steps)


def _scaled(
    operator: LinearOperator, b: Tensor, guess: Tensor | None, rtol: float | Sequence[float], atol: float
) -> tuple[Tensor | None, Tensor, list[float], list[float], list[float], list[float]]:
    """Where to start: v, b - A v, |b|, the targets, the scales that make residuals of norm 1, where to stop then.

    Without a guess v is None, for zero, and b - A v is b itself.
    """
    eps = torch.finfo(b.dtype).eps
    norms = row_norm_numbers(b)
    rtols = [rtol] * len(norms) if isinstance(rtol, float | int) else rtol
    targets = [max(own * norm, atol) for own, norm in zip(rtols, norms, strict=True)]
    v, r, sizes = None, b, norms
    if guess is not None:
        v = guess
        if 0.0 in norms:  # zero has the solution zero, whatever the guess
            zero = _column(norms, b).unsqueeze(-1) == 0
            v = torch.where(zero, 0.0, guess)
            r = torch.where(zero, b, b - operator.mv(v))
        else:
            r = b - operator.mv(v)
        sizes = [max(norm, size) for norm, size in zip(norms, row_norm_numbers(r), strict=True)]
    # Squared norms of the scaled system neither overflow nor underflow in float32.
    scales = [size if 0 < size < math.inf else 1.0 for size in sizes]
    # Below a tenth of a rounding error of b, it has converged exactly as far as this dtype can tell.
    stops = [max(t, 0.1 * eps * norm) / scale for t, norm, scale in zip(targets, norms, scales, strict=True)]
    return v, r, norms, targets, scales, stops


def _factor(numbers: list[float], like: Tensor) -> Tensor | float:
    """What multiplies each row by its number: `(*batch, 1)`; of one system a float."""
    return numbers[0] if like.dim() == 1 else _column(numbers, like).unsqueeze(-1)


def _column(numbers: list[float], like: Tensor) -> Tensor:
    """A number a row, as a tensor `(*batch,)`."""
    if like.dim() == 1:  # half as long as by a list, and a solve of few steps feels it
        return like.new_full((), numbers[0])
    return like.new_tensor(numbers).reshape(like.shape[:-1])


def _judged(code: int, residual: float, target: float, before: float, norm: float, eps: float) -> int:
    """How a run ended in the light of the true residual; RESTART if another one is to follow."""
    if not math.isfinite(residual):
        return NONFINITE
    if code not in (CONVERGED, RESTART):
        return code
    if residual <= target:
        return CONVERGED
    if code == CONVERGED and target == 0:
        return CONVERGED if residual <= math.sqrt(eps) * norm else STALLED
    # What claims to have converged must at least halve the true residual, anything else must lower it.
    progress = 0.5 if code == CONVERGED else 1 - 10 * eps
    return RESTART if residual < progress * before else STALLED


def _ended(code: int, residual: float, target: float, blur: float, norm: float) -> int:
    """Why a row stopped: no further steps, or none that help, fail only those who gave a tolerance and missed it."""
    if code not in (OUT_OF_STEPS, STALLED, RESTART):
        return code
    if residual <= target:
        return CONVERGED
    # A solution so large that rounding errors of A v are of the size of b: A is singular to this precision.
    if blur > 0.1 * norm:
        return BREAKDOWN
    if target == 0:
        return CONVERGED
    return STALLED if code == STALLED else OUT_OF_STEPS
