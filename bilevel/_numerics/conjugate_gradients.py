"""The recurrence of conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from bilevel._linear import LinearOperator
from bilevel._numerics.krylov import BREAKDOWN, CONVERGED, CURVATURE, NONFINITE, OUT_OF_STEPS
from bilevel._numerics.rows import row_moduli
from bilevel._numerics.side_by_side import systems_of

Precondition: TypeAlias = Callable[[Tensor], Tensor] | None


def conjugate_gradients(
    operator: LinearOperator,
    r: Tensor,
    stop: Tensor | float,
    max_steps: int,
    largest_seen: Tensor | float,
    precondition: Precondition = None,
) -> tuple[Tensor, list[int], int, Tensor | float]:
    """Solve A d = r from d = 0 by conjugate gradients; a run, in the sense of `solve_by_runs`.

    A step is d <- d + alpha p, r <- r - alpha A p, p <- M^-1 r + beta p with alpha = r'M^-1 r / p'A p and beta the
    ratio of r'M^-1 r after to that before. Where p'A p is not above rounding, the curvature is not positive, and the d
    of least |r| so far is returned.

    Cost: one product a step, memory 4n. Beside it a step takes some 7 microseconds for one small system on a CPU, of
    which 1 is that the same lines serve many.

    Args:
        operator: A.
        r: the right-hand sides `(n,)` or `(*batch, n)`, of norm about 1; at the end the residuals.
        stop: the norm of r to stop at, `()` or `(*batch,)`; of one system it may be a float.
        max_steps: at most this many.
        largest_seen: the largest p'A p / p'p met so far, zero at first; likewise.
        precondition: r -> M^-1 r; None is the identity.

    Returns:
        The solutions, how each system ended, the steps taken, and the largest p'A p / p'p.

    Example:
        >>> double = LinearOperator(lambda v: 2 * v, size=2)
        >>> conjugate_gradients(
        ...     double, torch.tensor([0.6, 0.8]), torch.tensor(1e-6), 10, torch.tensor(0.0)
        ... )[0]
        tensor([0.3000, 0.4000])
    """
    at, eps, given = systems_of(r), torch.finfo(r.dtype).eps, r
    target, largest = at.numbers(stop), at.numbers(largest_seen)
    d = best = torch.zeros_like(r)  # best is d itself until a residual rises
    if precondition is not None:
        precondition = _of_order_one(precondition, r)
    z = r if precondition is None else precondition(r)
    p, rr, steps = z.clone(), at.dot(r, r), 0
    rz, pp = (rr, rr) if precondition is None else (at.dot(r, z), at.dot(p, p))
    best_rr, going, concave = rr, rr == rr, rr < 0
    while True:
        # NaN compares false. What has ended stands still, so that why it did can be read from its numbers at the end.
        going = going & (rr**0.5 > target) & (rr < math.inf) & (rz > 0) & (rz < math.inf)
        if steps == max_steps or not at.any(going):
            break
        p = at.or_zero(going, p)
        Ap = operator.mv(p)
        steps += 1
        pAp = at.dot(p, Ap)
        curvature = at.ratio(going, pAp, pp)
        largest = at.either(curvature > largest, curvature, largest)
        level = eps * largest * pp
        concave = concave | going & (pAp <= level) & (pAp > -math.inf)
        going = going & (pAp > level) & (pAp < math.inf)
        alpha, before = at.ratio(going, rz, pAp), rr
        r = at.add(going, r, -alpha, Ap)
        del Ap  # not to be held while the next product is formed
        rr = at.dot(r, r)
        rises = going & (before <= best_rr) & (rr > before)  # a least residual is kept when it is about to be left
        best, best_rr = at.kept(rises, d, best), at.either(rises, before, best_rr)
        d = at.add(going, d, alpha, p)
        if precondition is None:
            beta, rz = at.ratio(going, rr, rz), rr
            p = at.add_to(r, beta, p)
            pp = rr + beta * beta * pp  # the new residual is orthogonal to the old direction
        else:
            z, before = precondition(r), rz
            rz = at.dot(r, z)
            p = at.add_to(z, at.ratio(going, rz, before), p)
            pp = at.dot(p, p)
    d = at.kept(concave & (best_rr < rr), best, d)
    if given is not r:
        given.copy_(r)
    ends = at.either(going, OUT_OF_STEPS, NONFINITE)
    for test, why in ((concave, CURVATURE), (rz <= 0, BREAKDOWN), (rr**0.5 <= target, CONVERGED)):
        ends = at.either(test, why, ends)
    ends = at.either((rr < math.inf) & (abs(rz) < math.inf), ends, NONFINITE)
    return d, at.listed(ends), steps, largest + torch.zeros_like(stop) if isinstance(stop, Tensor) else largest


def _of_order_one(precondition: Callable[[Tensor], Tensor], r: Tensor) -> Callable[[Tensor], Tensor]:
    """A multiple of M^-1, to which the iteration is blind, that leaves r of order 1, so that no square is lost."""
    size = row_moduli(precondition(r))
    info = torch.finfo(r.dtype)
    lost = ((size < info.tiny**0.25) | (size > info.max**0.25)) & (size > 0) & size.isfinite()
    if not bool(lost.any()):
        return precondition
    factor = torch.where(lost, 1 / torch.where(lost, size, 1.0).clamp(info.tiny, 1 / info.tiny), 1.0)
    return lambda r: factor * precondition(r)
