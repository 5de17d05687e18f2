"""What Krylov solvers share: safe norms, systems scaled to |b| = 1, and runs from the true residual of the last."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from bilevel._linear import LinearOperator
from bilevel._result import Solved, Status

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

# (operator, right-hand side, residual norm to stop at, most steps, size of A as far as known, zero at first)
# -> (solution, how it ended, steps taken, size of A)
Run: TypeAlias = Callable[[LinearOperator, Tensor, Tensor, int, Tensor], tuple[Tensor, Tensor, int, Tensor]]


def row_norms(v: Tensor) -> Tensor:
    """Euclidean norms of the rows `(*batch, n) -> (*batch,)`, though their squares over- or underflow.

    Example:
        >>> float(row_norms(torch.tensor([3e30, 4e30], dtype=torch.float32)) / 1e30)
        5.0
    """
    norms: Tensor = torch.linalg.vector_norm(v, dim=-1)
    info = torch.finfo(v.dtype)
    if v.shape[-1] == 0 or bool(((norms > math.sqrt(info.tiny) / info.eps) & (norms < math.sqrt(info.max))).all()):
        return norms
    largest = v.abs().amax(-1, keepdim=True)
    scale = torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest))
    scaled: Tensor = torch.linalg.vector_norm(v / scale, dim=-1)
    return scaled * scale.squeeze(-1)


def over(v: Tensor, norm: Tensor, active: Tensor) -> Tensor:
    """Rows v / norm where active, and zero elsewhere, so that NaN does not outlive its row."""
    return torch.where(active.unsqueeze(-1), v / norm.unsqueeze(-1), torch.zeros_like(v))


def check_tolerances(solver: str, rtol: float, atol: float, max_steps: int | None) -> None:
    """Refuse tolerances and numbers of steps that make no sense.

    Raises:
        ValueError: naming the solver's argument.
    """
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not value >= 0:
            raise ValueError(
                f"`{solver}({name}=...)` must be at least 0. Got {value}. Pass 0 to take `max_steps` steps."
            )
    if max_steps is not None and max_steps < 0:
        raise ValueError(
            f"`{solver}(max_steps=...)` must be at least 0. Got {max_steps}. Pass None for ten times the unknowns."
        )


def solve_by_runs(
    run: Run,
    operator: LinearOperator,
    b: Tensor,
    guess: Tensor | None,
    *,
    rtol: float,
    atol: float = 0.0,
    max_steps: int | None = None,
) -> Solved:
    """Solve A v = b by runs of a recurrence, each for the true residual of the one before, until that is small.

    Args:
        run: solves A d = r from zero, for r of norm about 1; it may modify r.
        operator: A.
        b: the right-hand side.
        guess: where the first run starts; None is zero.
        rtol: stop when |b - A v| <= max(rtol |b|, atol).
        atol: the same, absolute.
        max_steps: of all runs together; None is 10 n.
    """
    max_steps = 10 * operator.size if max_steps is None else max_steps
    eps = torch.finfo(b.dtype).eps
    norm_b = row_norms(b)
    target = (rtol * norm_b).clamp_min(atol)
    zero = norm_b == 0
    v, r, norm = torch.zeros_like(b), b, norm_b
    if guess is not None:
        v = torch.where(zero.unsqueeze(-1), v, guess)
        r = torch.where(zero.unsqueeze(-1), b, b - operator.mv(v))
        norm = torch.maximum(norm, row_norms(r))
    # Squared norms of the scaled system neither overflow nor underflow in float32.
    scale = torch.where((norm > 0) & norm.isfinite(), norm, torch.ones_like(norm))
    # Below a tenth of a rounding error of b, it has converged exactly as far as this dtype can tell.
    stop = torch.maximum(target, 0.1 * eps * norm_b) / scale
    column = scale.unsqueeze(-1)

    codes, steps, fresh = torch.full_like(norm_b, CONVERGED, dtype=torch.int64), 0, guess is None
    running, before, norm_A = ~zero, torch.full_like(norm_b, math.inf), torch.zeros_like(norm_b)
    while True:
        correction, new, used, norm_A = run(operator, r / column, stop, max_steps - steps, norm_A)
        v = correction.mul_(column) if fresh else torch.addcmul(v, column, correction)
        steps, fresh = steps + used, False
        codes = torch.where(running, new, codes)
        last = steps >= max_steps or not bool((codes == RESTART).any())
        r = operator.residual(b, v) if last else b - operator.mv(v)
        residual = row_norms(r)
        codes = torch.where(running & ~residual.isfinite(), NONFINITE, codes)
        met = (target > 0) & (residual <= target)
        codes = torch.where((codes == RESTART) & met, CONVERGED, codes)
        missed = running & (codes == CONVERGED) & (target > 0) & ~met
        # What claims to have converged must at least halve the true residual, anything else must lower it.
        codes = torch.where(missed & (residual > 0.5 * before), STALLED, codes)
        codes = torch.where((codes == RESTART) & (residual >= (1 - 10 * eps) * before), STALLED, codes)
        running = (missed & (codes == CONVERGED)) | (codes == RESTART)
        if steps >= max_steps or not bool(running.any()):
            break
        r, before = torch.where(running.unsqueeze(-1), r, torch.zeros_like(r)), residual
    if not last:
        r = operator.residual(b, v)
        residual = row_norms(r)
    codes = torch.where(running, OUT_OF_STEPS, codes)
    unmet = (codes != CONVERGED) & ~((target > 0) & (residual <= target))
    if bool(unmet.any()):
        # A solution so large that rounding errors of A v are of the size of b: A is singular to this precision.
        unmet = unmet & ((codes == OUT_OF_STEPS) | (codes == STALLED))
        codes = torch.where(unmet & (eps * norm_A * row_norms(v) > 0.1 * norm_b), BREAKDOWN, codes)
    # Steps that run out or no longer help are a failure only for those who gave a tolerance, and did not meet it.
    idle = (codes == OUT_OF_STEPS) | (codes == STALLED)
    codes = torch.where(idle & ((target == 0) | (residual <= target)), CONVERGED, codes)
    return Solved(v, tuple(_STATUS[code] for code in codes.reshape(-1).tolist()), residual, steps)
