"""The fully first-order hypergradient of an inner problem with a non-smooth term."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import inner_gradients, outer_gradients
from bilevel._estimate import FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver, Objective
from bilevel._numerics.rows import safe_row_norms
from bilevel._result import Report, Solved, Status, report
from bilevel.inner_problems.flat_term import FlatTerm
from bilevel.inner_problems.kinds import inner_objective
from bilevel.inner_problems.stationary_point import balanced_step


@final
@dataclass(frozen=True, eq=False)
class _Least:
    """A minimizer of g + h_x + f / w, and derivatives there.

    Attributes:
        y: the minimizer.
        slope: the derivative in x of min_y g + h_x + <c, y>, c = grad_y f / w held, summed over tasks.
        value: f.
        fx: grad_x f.
        size: |grad_y f|.
    """

    y: Tensor
    slope: Tensor
    value: Tensor
    fx: Tensor
    size: float


def penalty_with_term(
    problem: FlatProblem,
    term: FlatTerm,
    x: Tensor,
    start: FlatStart,
    inner: AbstractInnerSolver,
    weights: tuple[float, float],
    extrapolate: bool,
    accuracy: float,
) -> FlatEstimate:
    """h_w = grad_x f(y_w) + w (dV_w - dV), y_w = argmin g + h_x + f / w, dV the derivative of the least value in x.

    By the theorem of the envelope dV is the derivative of g(x, y) + e_x(v) in x at y and v held, e_x the Moreau
    envelope of h_x of a step t, e_x(v) = h_x(p) + |p - v|^2 / (2 t), p = prox_{t h_x}(v), and v = y - t (grad_y g +
    grad_y f / w).

    Args:
        problem: the problem in vectors.
        term: h.
        x: the outer variable.
        start: where the first inner solver starts.
        inner: a solver that heeds the term.
        weights: w and 2w.
        extrapolate: 2 h_2w - h_w instead of h_w.
        accuracy: what may be lost of h by rounding and residuals times w.
    """
    objective, rows = inner_objective(problem, x), 1 if problem.tasks is None else problem.tasks
    solved = inner.solve(objective, problem.start(x, start.y).detach())
    least = _least(problem, term, x, solved, math.inf)
    reports, found, moved, residuals = [report("inner solver", solved)], list[Tensor](), 0.0, solved.residual
    both = extrapolate or start.count == 0
    points = list[Tensor]()
    for w in weights[: 1 + both]:
        ended = _penalized(problem, objective, x, (points or [solved.value])[-1], inner, w)
        reports.append(report(f"penalized inner solver (weight {w:g})", ended))
        at = _least(problem, term, x, ended, w)
        points.append(ended.value)
        part = w / rows * (at.slope - least.slope)
        moved = float(safe_row_norms(part))
        found.append(at.fx + part)
        residuals = torch.maximum(residuals, ended.residual)
    h = 2 * found[1] - found[0] if extrapolate else found[0]
    apart = float(safe_row_norms(found[-1] - found[0]))
    size = max(float(safe_row_norms(h)), float(safe_row_norms(least.fx)), moved)
    bias = (apart * apart / size if size > 0 else 0.0) if extrapolate else apart
    top = weights[len(found) - 1]
    # A residual r moves y by r / mu, where f / w moves it by |grad_y f| / (w mu): so much of the difference is lost.
    lost = moved * top * float(residuals.max()) / least.size if least.size > 0 else 0.0
    lost += top * torch.finfo(x.dtype).eps * float(safe_row_norms(least.slope)) / rows
    share = 1 / size if size > 0 else 0.0
    status = Status.successful if lost * share <= accuracy else Status.imprecise
    reports.append(Report("penalty", status, (bias + lost) * share, 0))
    penalized = None if extrapolate else (points[0], weights[0])
    known = bias + lost if both else None
    return FlatEstimate(h, least.value, solved.value, tuple(reports), penalized=penalized, bias=known)


def _penalized(
    problem: FlatProblem, objective: Objective, x: Tensor, y: Tensor, inner: AbstractInnerSolver, w: float
) -> Solved:
    """argmin_y g + h_x + f / w, from y."""
    rows = y.shape[:-1].numel()

    def penalized(y: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            problem.tally.outer_gradients += rows
        return problem.g(x, y) + problem.f_each(x, y) / w

    return inner.solve(Objective(penalized, problem.tally, prox=objective.prox, active=objective.active), y)


def _least(problem: FlatProblem, term: FlatTerm, x: Tensor, solved: Solved, w: float) -> _Least:
    y, residual = solved.value, solved.residual
    value, fx, fy = outer_gradients(problem, x, y)
    _, gx, gy = inner_gradients(problem, x, y)
    rows = y.shape[:-1].numel()
    force = gy + rows * fy / w  # the mean over tasks of f is undone
    t = balanced_step(y, force, residual)
    v = (y - t * force).detach()
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        p = term.prox(leaf, v, t)
        envelope = (term.value(leaf, p) + (p - v).square().sum(-1) / (2 * t.squeeze(-1))).sum()
        slope = torch.zeros_like(x)
        if envelope.requires_grad:
            slope = torch.autograd.grad(envelope, leaf, allow_unused=True, materialize_grads=True)[0]
    slope = slope if gx is None else slope + gx
    return _Least(y, slope, value, fx, rows * float(safe_row_norms(fy).max()))
