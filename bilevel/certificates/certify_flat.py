"""Certificates in vectors: in float64 wherever f and g can be evaluated in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bilevel._calculus import Exact, outer_gradients
from bilevel._flat import FlatProblem
from bilevel._linear import AbstractLinearSolver
from bilevel._numerics.rows import safe_row_norms
from bilevel._numerics.spectrum import least_eigenvalue
from bilevel._result import Tally
from bilevel._tree import tree_leaves, tree_map
from bilevel.certificates.assumptions import assumptions, moved
from bilevel.certificates.certificate import Assumption, Certificate, Constants, NonfiniteError
from bilevel.certificates.completed import completed
from bilevel.certificates.double_precision import in_double
from bilevel.certificates.measured import ROUNDING, Measured
from bilevel.certificates.remarks import remark
from bilevel.certificates.residuals import measure
from bilevel.certificates.theorems import Terms, bounded, confronted, theorem_b

NOT_FINITE = "NaN or Inf was met"


def certify_flat(
    problem: FlatProblem,
    x: Tensor,
    z: Tensor,
    y: Tensor,
    v: Tensor | None,
    constants: Constants,
    linear: AbstractLinearSolver,
    refine: bool = False,
) -> Certificate:
    """The certificate in vectors; see `certify`. In float64 wherever f and g can be evaluated in it."""

    def certificate(problem: FlatProblem, to: Any, doubled: bool) -> Certificate:
        try:
            return _certify(problem, to(x), to(z), to(y), to(v), constants, linear, refine, doubled)
        except NonfiniteError:
            return nothing(problem, to(z), constants, "B" if constants.mu is None else "A")

    return precise(certificate, problem)


def precise(certificate: Callable[[FlatProblem, Any, bool], Certificate], problem: FlatProblem) -> Certificate:
    """(problem, cast, whether cast) -> certificate, in float64, or, where that fails, in the problem's dtype."""
    single = problem.y.dtype
    if single != torch.float64:
        trial = in_double(problem, Tally())
        try:
            found: Certificate = certificate(trial, lambda t: None if t is None else t.double(), True)
        except (RuntimeError, TypeError, ValueError):
            pass  # f or g insists on its dtype; whatever else it was is met again below
        else:
            problem.tally.add(trial.tally.stats())
            return _in_dtype(replace(found, stats=problem.tally.stats()), single)
    found = certificate(problem, lambda t: t, False)
    if single == torch.float64:
        return found
    unit = ROUNDING * torch.finfo(single).eps
    note = Assumption("rounding", unit, f"modelled, of {single}")
    reason = found.reason or f"rounding errors of {single} are modelled: f and g cannot be evaluated in float64"
    return replace(found, assumed=(*found.assumed, note), proven=False, reason=reason)


def _in_dtype(found: Certificate, dtype: torch.dtype) -> Certificate:
    """The refined hypergradient in the user's dtype, with the rounding of that in its bound."""
    if found.refined is None or found.refined_bound is None:
        return found
    rounded = tree_map(lambda leaf: leaf.to(dtype), found.refined)
    leaves = zip(tree_leaves(rounded), tree_leaves(found.refined), strict=True)
    loss = math.hypot(*(distance(a.reshape(-1), b.reshape(-1)) for a, b in leaves))
    return replace(found, refined=rounded, refined_bound=found.refined_bound + loss)


def _certify(
    problem: FlatProblem,
    x: Tensor,
    z: Tensor,
    y: Tensor,
    v: Tensor | None,
    constants: Constants,
    linear: AbstractLinearSolver,
    refine: bool,
    doubled: bool,
) -> Certificate:
    if v is None:
        at = Exact().linearize(problem, x, y)
        v = linear.solve(at.operator, outer_gradients(problem, x, y)[2]).value
    known, notes = completed(problem, x, y, constants)
    found = measure(problem, x, y, v, known, doubled)
    bound = theorem(problem, x, y, found, known)
    reason = bound.reason or beyond(bound.distance, constants)
    off = distance(z, found.h)
    best, refined, refined_bound = off + bound.total + found.rounding, None, None
    if not math.isfinite(best):
        best, reason = math.inf, reason or NOT_FINITE
    terms = {"inner": bound.inner, "linear": bound.linear, "estimate": off, "rounding": found.rounding}
    if refine and math.isfinite(best):
        refined, refined_bound = _refine(problem, x, y, v, known, bound, linear)
        if distance(z, refined) + refined_bound < best and not reason:
            terms = {"estimate": distance(z, refined), "refined": refined_bound}
            best = sum(terms.values())
    norm, L = float(safe_row_norms(z.double())), bound.known.L
    return Certificate(
        bound=best,
        terms=terms,
        theorem="A" if known.mu is not None and "mu" not in known.local else "B",
        proven=not constants.heuristic and not reason and math.isfinite(best),
        confidence=known.confidence,
        assumed=tuple(assumptions(constants, bound.known, bound.mu)) + notes,
        distance=bound.distance,
        grad_norm=norm,
        stats=problem.tally.stats(),
        refined=None if refined is None else problem.x.unravel(refined),
        refined_bound=refined_bound,
        reason=reason,
        remark=remark(best, norm, terms, L / bound.mu if L is not None and bound.mu > 0 else None, refine),
    )


def nothing(problem: FlatProblem, z: Tensor, constants: Constants, theorem: str) -> Certificate:
    """The certificate where NaN or Inf was met."""
    return Certificate(
        bound=math.inf,
        terms={},
        theorem=theorem,
        proven=False,
        confidence=constants.confidence,
        assumed=(),
        distance=math.inf,
        grad_norm=float(safe_row_norms(z.double())),
        stats=problem.tally.stats(),
        reason=NOT_FINITE,
    )


def beyond(reach: float, constants: Constants) -> str:
    """Why a bound is no theorem although its formula applies: it reaches beyond where the constants hold."""
    if math.isnan(reach) or reach <= constants.radius:
        return ""
    return (
        f"the constants hold within {constants.radius:g} of y*, but y is only known to be within {reach:.3g} of it:"
        f" solve the inner problem more accurately."
    )


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b|, rounded up."""
    return float(safe_row_norms(a.double() - b.double())) * (1 + ROUNDING * torch.finfo(torch.float64).eps)


def _refine(
    problem: FlatProblem, x: Tensor, y: Tensor, v: Tensor, known: Constants, plain: Terms, linear: AbstractLinearSolver
) -> tuple[Tensor, float]:
    """The implicit gradient at y - H^-1 e, whose error is of second order in |y - y*|, and its own bound."""
    at = Exact().linearize(problem, x, y)
    step = linear.solve(at.operator, at.gradient).value
    y = y - step
    at = Exact().linearize(problem, x, y)
    v = linear.solve(at.operator, outer_gradients(problem, x, y)[2], v).value
    reach = float(safe_row_norms(step.double()).max())
    if not math.isfinite(reach):
        return torch.full_like(x, math.nan), math.inf
    local = moved(known, reach)
    if known.mu is not None and local.mu is None:
        return torch.full_like(x, math.nan), math.inf
    found = measure(problem, x, y, v, local)
    bound = theorem(problem, x, y, found, local)
    # Both bounds are of one stationary point: that of y - s lies where that of y is the only one; and y - s, as well
    # as y, is where the constants hold.
    near = reach + (plain.distance if plain.unique == math.inf else bound.distance)
    same = reach + bound.distance <= plain.unique and near <= known.radius
    return found.h, bound.total + found.rounding if same else math.inf


def theorem(problem: FlatProblem, x: Tensor, y: Tensor, found: Measured, known: Constants) -> Terms:
    """The bound at (x, y); without any mu theorem B from the least eigenvalue of the dense H there."""
    if known.mu is not None:
        return bounded(found, known)
    matrix = Exact().linearize(problem, x, y).operator.dense(y)
    return confronted(found, theorem_b(found, least_eigenvalue(matrix), known))
