"""Conjugate gradients within a program: the recurrence, and the runs from the true residual of the last."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel._numerics.krylov import BREAKDOWN, CONVERGED, CURVATURE, NONFINITE, OUT_OF_STEPS, RESTART, STALLED
from bilevel.compiled.norms import column, count, row_norm
from bilevel.compiled.tracing import Piece, Tracing
from bilevel.solvers.cg import CG


class Solution(NamedTuple):
    """What a linear solve within a program finds.

    Attributes:
        v: `(*batch, q)`.
        cross: G v `(p,)`.
        residual: |b - A v| `(*batch,)`.
        code: how each system ended, as numbers `(*batch,)`; 0 is success.
        steps: `()`.
        products: A v that were formed, `()`.
        crosses: G v that were formed, `()`.
    """

    v: Tensor
    cross: Tensor
    residual: Tensor
    code: Tensor
    steps: Tensor
    products: Tensor
    crosses: Tensor


class System(NamedTuple):
    """A v = b, as pieces.

    Attributes:
        mv: (v, *kept) -> A v.
        both: (v, *kept) -> A v and G v.
        kept: what they take besides.
        b: `(*batch, q)`.
        guess: where v starts; None: at zero.
        like_x: zeros of the shape of x.
    """

    mv: Piece
    both: Piece
    kept: tuple[Tensor, ...]
    b: Tensor
    guess: Tensor | None
    like_x: Tensor


def conjugate(tracing: Tracing, solver: CG, system: System) -> Solution:
    """`CG.solve`, step by step the same, without looking at a number."""
    b, eps = system.b, torch.finfo(system.b.dtype).eps
    most = 10 * b.shape[-1] if solver.max_steps is None else solver.max_steps
    norms = row_norm(b)
    targets = torch.clamp_min(solver.rtol * norms, solver.atol)
    v, r, sizes, extra = torch.zeros_like(b), b, norms, 0
    if system.guess is not None:
        zero = column(norms == 0)
        v = torch.where(zero, 0.0, system.guess)
        r = torch.where(zero, b, b - system.mv(v, *system.kept)[0])
        sizes, extra = torch.maximum(norms, row_norm(r)), 1
    scale = torch.where((sizes > 0) & sizes.isfinite(), sizes, 1.0)
    stop = torch.maximum(targets, 0.1 * eps * norms) / scale
    if not solver.recompute:
        r, d, codes, steps, _ = _run(tracing, system, r / column(scale), stop, count(), most, norms * 0.0)
        v, residual = v + column(scale) * d, row_norm(r * column(scale))
        done = (codes == OUT_OF_STEPS) & ((targets == 0) | (residual <= targets))
        codes = torch.where(done, CONVERGED, codes)
        codes = torch.where(residual.isfinite(), codes, NONFINITE)
        _, cross = system.both(v, *system.kept)
        return Solution(v, cross, residual, codes, steps, steps + extra, count() + 1)

    def restarts(runs: Tensor, steps: Tensor, *carried: Tensor) -> Tensor:
        return (runs == 0) | ((steps < most) & carried[2].any())

    def again(carried: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        runs, steps, v, r, running, before, codes, _, seen, _ = carried
        (b, scale, stop, norms, targets), kept = fixed[:5], fixed[5:]
        own = system._replace(b=b, kept=kept)
        _, d, ends, steps, seen = _run(tracing, own, r / column(scale), stop, steps, most, seen)
        v = v + column(scale) * d
        codes = torch.where(running, ends, codes)
        Av, cross = own.both(v, *kept)
        r = b - Av
        residual = row_norm(r)
        codes = torch.where(running, _judged(codes, residual, targets, before, norms, eps), codes)
        running = codes == RESTART
        return runs + 1, steps, v, r * column(running), running, residual, codes, residual, seen, cross

    far, zero = torch.full_like(norms, math.inf), torch.zeros_like(norms)
    codes = torch.zeros_like(norms, dtype=torch.int64)
    begun = (count(), count(), v, r, norms != 0, far, codes, zero, zero, torch.zeros_like(system.like_x))
    fixed = (b, scale, stop, norms, targets, *system.kept)
    once = not (solver.rtol or solver.atol)  # without a tolerance nothing is begun again
    ended = again(begun, fixed) if once else tracing.loop(restarts, again, begun, fixed)
    runs, steps, v, _, _, _, codes, residual, seen, cross = ended
    open_end = (codes == OUT_OF_STEPS) | (codes == STALLED) | (codes == RESTART)
    blurred = eps * seen * row_norm(v) > 0.1 * norms
    ends = torch.where(codes == STALLED, STALLED, OUT_OF_STEPS)
    ends = torch.where(targets == 0, CONVERGED, ends)
    ends = torch.where(blurred, BREAKDOWN, ends)
    ends = torch.where(residual <= targets, CONVERGED, ends)
    codes = torch.where(open_end, ends, codes)
    return Solution(v, cross, residual, codes, steps, steps + runs + extra, runs)


def _judged(code: Tensor, residual: Tensor, target: Tensor, before: Tensor, norm: Tensor, eps: float) -> Tensor:
    """How a run ended in the light of the true residual; RESTART if another one is to follow."""
    before = torch.where(code == CONVERGED, 0.5 * before, (1 - 10 * eps) * before)
    found = torch.where(residual < before, RESTART, STALLED)
    exactly = torch.where(residual <= math.sqrt(eps) * norm, CONVERGED, STALLED)
    found = torch.where((code == CONVERGED) & (target == 0), exactly, found)
    found = torch.where(residual <= target, CONVERGED, found)
    found = torch.where((code != CONVERGED) & (code != RESTART), code, found)
    return torch.where(residual.isfinite(), found, NONFINITE)


def _run(
    tracing: Tracing, system: System, r: Tensor, stop: Tensor, begun: Tensor, most: int, seen: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`conjugate_gradients`: the residual, the solution, how each system ended, the steps, the curvature."""
    eps = torch.finfo(r.dtype).eps

    def going_on(rr: Tensor, going: Tensor, stop: Tensor) -> Tensor:
        return going & (rr.sqrt() > stop) & (rr < math.inf) & (rr > 0)

    def goes(k: Tensor, going: Tensor, *_: Tensor) -> Tensor:
        return (k < most) & going.any()

    def step(carried: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        k, going, d, best, r, p, rr, pp, best_rr, largest, concave = carried
        stop, kept = fixed[0], fixed[1:]
        p = torch.where(column(going), p, 0.0)
        (Ap,) = system.mv(p, *kept)
        pAp = (p * Ap).sum(-1)
        curvature = torch.where(going, pAp / pp, 0.0)
        largest = torch.where(curvature > largest, curvature, largest)
        level = eps * largest * pp
        concave = concave | (going & (pAp <= level) & (pAp > -math.inf))
        going = going & (pAp > level) & (pAp < math.inf)
        alpha, before = torch.where(going, rr / pAp, 0.0), rr
        r = torch.where(column(going), r - column(alpha) * Ap, r)
        rr = (r * r).sum(-1)
        rises = going & (before <= best_rr) & (rr > before)
        best, best_rr = torch.where(column(rises), d, best), torch.where(rises, before, best_rr)
        d = torch.where(column(going), d + column(alpha) * p, d)
        beta = torch.where(going, rr / before, 0.0)
        p = r + column(beta) * p
        pp = rr + beta * beta * pp
        return k + 1, going_on(rr, going, stop), d, best, r, p, rr, pp, best_rr, largest, concave

    rr = (r * r).sum(-1)
    zero = torch.zeros_like(r)
    start = (begun, going_on(rr, rr == rr, stop), zero, zero, r, r, rr, rr, rr, seen, rr < 0)
    k, going, d, best, r, _, rr, _, best_rr, seen, concave = tracing.loop(goes, step, start, (stop, *system.kept))
    d = torch.where(column(concave & (best_rr < rr)), best, d)
    ends = torch.where(going, OUT_OF_STEPS, NONFINITE)
    ends = torch.where(concave, CURVATURE, ends)
    ends = torch.where(rr <= 0, BREAKDOWN, ends)
    ends = torch.where(rr.sqrt() <= stop, CONVERGED, ends)
    ends = torch.where(rr < math.inf, ends, NONFINITE)
    return r, d, ends, k, seen
