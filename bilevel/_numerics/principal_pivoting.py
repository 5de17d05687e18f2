"""Block principal pivoting: strictly convex quadratic programs with few constraints, in batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._numerics.interior_point import Program
from bilevel._numerics.rows import matrix_times, positive_or_one, row_moduli
from bilevel._numerics.saddle_point import pseudo_inverse

_FULL = 3  # exchanges of all violated rows that may fail to lower their number, before one at a time
_ROUNDING = 1e-14  # relative: what counts as zero
_STRICT = 1e-8  # relative: what is well above it
_STEPS = 50  # almost all programs take fewer than ten


@final
@dataclass(frozen=True, eq=False)
class Pivoted:
    """What pivoting ended with: (y, slacks), multipliers of the rows of A, which rows of the batch ended, exchanges."""

    y: Tensor
    multipliers: Tensor
    done: Tensor
    steps: Tensor


def pivoted(program: Program, max_steps: int) -> Pivoted | None:
    """Which constraints hold, by exchanging violated ones; None where there are too many for that.

    With all constraints as rows R y <= r, equalities always held, S = R Q^-1 R' and d = r + R Q^-1 q, the multipliers
    l and the distances s solve s = d + S l, s >= 0, l >= 0, s'l = 0. Of a set of held rows l is S_HH^-1 (-d_H); rows
    with l < 0 leave, rows with s < 0 enter: all of them, or, where that has not lowered their number three times, the
    last one, which ends after finitely many steps for S positive definite.

    A step factors as many equations as there are constraints, in one batch; exact to rounding for well-conditioned Q.
    Programs whose Q has no Cholesky factor, that hold dependent rows, or have fixed entries, are not done.

    Source: Judice, Pires, "A block principal pivoting algorithm for large-scale strictly monotone linear
    complementarity problems", Computers Oper. Res. 21 (1994).
    """
    k, (m, n) = program.slacks, program.A.shape[-2:]
    q = n - k
    A, G, b, h = program.A[:, : m - k, :q], program.A[:, m - k :, :q], program.b[:, : m - k], program.b[:, m - k :]
    h = torch.where(program.lower[:, q:] == -torch.inf, torch.inf, h)
    eye = torch.eye(q, dtype=program.q.dtype, device=program.q.device).expand(len(program.q), q, q)
    sides, bounds = ([A, G], [b, h]), []
    for sign, limit in ((1.0, program.upper[:, :q]), (-1.0, program.lower[:, :q])):
        bounds.append((limit, (sign * limit < torch.inf).any(0)))
        sides[0].append(sign * eye[:, bounds[-1][1]])
        sides[1].append(sign * limit[:, bounds[-1][1]])
    R, r = torch.cat(sides[0], -2), torch.cat(sides[1], -1)
    if R.shape[-2] > 2 * q or not R.shape[-2]:
        return None
    usable = ~(program.lower >= program.upper).any(-1) & torch.cat(
        [program.Q.flatten(1), program.q], -1
    ).isfinite().all(-1)
    Q = torch.where(usable[:, None, None], program.Q[:, :q, :q], eye)
    L, info = torch.linalg.cholesky_ex(Q)
    usable = usable & (info == 0)
    L = torch.where(usable[:, None, None], L, eye)
    bounded = r < torch.inf
    r, R = torch.where(bounded, r, 0.0), torch.where(bounded.unsqueeze(-1), R, 0.0)
    half = torch.linalg.solve_triangular(L, torch.cat([R.mT, program.q[:, :q].unsqueeze(-1)], -1), upper=False)
    half, c = half[..., :-1], half[..., -1]  # L^-1 R', L^-1 q
    S, d = half.mT @ half, torch.where(bounded, r + matrix_times(half.mT, c), torch.inf)
    multipliers, done, steps = _complementary(S, d, m - k, min(max_steps, _STEPS))
    y = -torch.linalg.solve_triangular(L.mT, (c + matrix_times(half, multipliers)).unsqueeze(-1), upper=True).squeeze(
        -1
    )
    start = m
    for limit, known in bounds:  # what is held is there exactly
        end = start + int(known.sum())
        y[:, known] = torch.where(multipliers[:, start:end] > 0, limit[:, known], y[:, known])
        start = end
    y = y.clamp(program.lower[:, :q], program.upper[:, :q])
    if m > k:  # what is not held takes what is left of the equalities: rounding, but of multipliers of any size
        A_F = A * ((y > program.lower[:, :q]) & (y < program.upper[:, :q])).unsqueeze(-2)
        left = b - matrix_times(A, y)
        y = y + matrix_times(A_F.mT, matrix_times(pseudo_inverse(A_F @ A_F.mT), left))
        y = y.clamp(program.lower[:, :q], program.upper[:, :q])
    slacks = torch.where(bounded[:, m - k : m], r[:, m - k : m] - matrix_times(G, y), 0.0)
    slacks = torch.where(multipliers[:, m - k : m] > 0, 0.0, slacks)
    return Pivoted(torch.cat([y, slacks], -1), multipliers[:, :m], done & usable, steps)


def _complementary(S: Tensor, d: Tensor, equalities: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Multipliers l with s = d + S l, s >= 0, l >= 0, s'l = 0 `(rows, m)`, the first of them free, s zero there."""
    free = torch.arange(d.shape[-1], device=d.device) < equalities
    held = free.expand_as(d).clone()
    fewest = torch.full_like(d[:, 0], d.shape[-1] + 1, dtype=torch.long)
    full = torch.full_like(fewest, _FULL)
    found, done, steps = torch.zeros_like(d), torch.zeros_like(fewest, dtype=torch.bool), torch.zeros_like(fewest)
    left = torch.arange(len(d), device=d.device)
    order = torch.arange(d.shape[-1], device=d.device)
    for _ in range(most):
        S_l, d_l, held_l = S[left], d[left], held[left]
        both = held_l.unsqueeze(-1) & held_l.unsqueeze(-2)
        L, info = torch.linalg.cholesky_ex(torch.where(both, S_l, 0.0) + torch.diag_embed((~held_l).to(d)))
        side = torch.where(held_l, -d_l, 0.0)
        multipliers = torch.cholesky_solve(side.unsqueeze(-1), L).squeeze(-1)
        image = matrix_times(S_l, multipliers)
        sizes = torch.where(d_l.isfinite(), d_l.abs(), 0.0)
        level = _ROUNDING * positive_or_one(torch.maximum(row_moduli(sizes), row_moduli(image)))
        small = _ROUNDING * positive_or_one(row_moduli(multipliers))
        violated = torch.where(held_l, (multipliers < -small) & ~free, d_l + image < -level)
        count = violated.sum(-1)
        steps[left] += 1
        ended = (count == 0) & (info == 0)
        # With both near zero others may be multipliers as well: interior points find those in the middle of all.
        strict = torch.where(
            held_l, (multipliers > _STRICT * small / _ROUNDING) | free, d_l + image > _STRICT * level / _ROUNDING
        )
        found[left[ended]], done[left[ended]] = multipliers[ended], strict.all(-1)[ended]
        going = ~ended & (info == 0)
        if not bool(going.any()):
            break
        better = count < fewest[left]
        fewest[left] = torch.minimum(fewest[left], count)
        full[left] = torch.where(better, _FULL, full[left] - 1)
        last = order == torch.where(violated, order, -1).amax(-1, keepdim=True)
        exchanged = torch.where((full[left] >= 0).unsqueeze(-1), violated, violated & last)
        held[left] = held_l ^ exchanged
        left = left[going]
    return found, done, steps
