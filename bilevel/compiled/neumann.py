"""The Neumann series within a program."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bilevel.compiled.conjugate import Solution, System
from bilevel.compiled.norms import column, count, row_norm
from bilevel.compiled.tracing import Tracing
from bilevel.solvers.neumann import Neumann

ENDS = ("successful", "nonfinite", "diverged", "max_steps")  # statuses by their codes
_GROWTH = 10.0


def neumann(tracing: Tracing, solver: Neumann, system: System) -> Solution:
    """`Neumann(step, terms).solve`, step by step the same; for a system that is symmetric."""
    assert solver.step is not None
    length, b, norms = solver.step, system.b, row_norm(system.b)
    target = solver.rtol * norms
    v, r, extra = torch.zeros_like(b), b, 0
    if system.guess is not None:
        zero = column(norms == 0)
        v = torch.where(zero, 0.0, system.guess)
        r, extra = torch.where(zero, b, b - system.mv(v, *system.kept)[0]), 1
    first = row_norm(r)
    floors = torch.maximum(first, norms) * math.sqrt(torch.finfo(b.dtype).eps)

    def goes(k: Tensor, *carried: Tensor) -> Tensor:
        return (k < solver.terms) & carried[2].any()

    def step(carried: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        k, v, r, going, best, least, diverged = carried
        (b, target, floors), kept = fixed[:3], fixed[3:]
        v = torch.where(column(going), v + length * r, v)
        r = b - system.mv(v, *kept)[0]
        norm = row_norm(r)
        most = _GROWTH * torch.maximum(least, floors)
        diverged = diverged | (going & (norm > most))
        better = going & (norm < least)
        best, least = torch.where(column(better), v, best), torch.where(better, norm, least)
        going = going & (norm <= most) & (norm > target) & (norm < math.inf)
        return k + 1, v, r, going, best, least, diverged

    # All steps but the last, whose residual is measured with the cross product.
    going = (first > target) & (first < math.inf)
    start = (count() + 1, v, r, going, v, first, first < 0)
    fixed = (b, target, floors, *system.kept)
    k, v, r, going, best, _, diverged = tracing.loop(goes, step, start, fixed)
    steps = k - 1 + going.any()
    v = torch.where(column(going), v + length * r, v)
    Av, cross = system.both(v, *system.kept)
    residual = row_norm(b - Av)
    diverged = diverged | (residual > 1.01 * torch.maximum(first, floors))  # the last step took it above its start
    v = torch.where(column(diverged), best, v)

    def measured(carried: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        v, b, kept = fixed[0], fixed[1], fixed[2:]
        Av, cross = system.both(v, *kept)
        return ~carried[0], cross, row_norm(b - Av), carried[3] + 1

    late = (diverged.any(), cross, residual, count())
    _, cross, residual, again = tracing.loop(lambda goes_back, *_: goes_back, measured, late, (v, b, *system.kept))
    codes = torch.where((residual > target) & (target > 0), 3, 0)
    codes = torch.where(diverged, 2, codes)
    codes = torch.where(residual.isfinite(), codes, 1)
    return Solution(v, cross, residual, codes, steps, k + again + extra, again + 1)
