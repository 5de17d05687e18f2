"""The theorems behind certificates, in vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import Exact, cross_operator, outer_gradients
from bilevel._certificate import Assumption, Certificate, Constants
from bilevel._flat import FlatProblem
from bilevel._linear import AbstractLinearSolver
from bilevel._measure import Measured, measure
from bilevel._spectrum import largest_eigenvalue

NEEDED = ("L_fyy", "L_fxy", "M_yy", "M_xy")
_FAILURE = 0.01  # of the bound on |G|, where it is estimated


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
    """The certificate in vectors; see `certify`."""
    tally = problem.tally
    if v is None:
        at = Exact().linearize(problem, x, y)
        v = linear.solve(at.operator, outer_gradients(problem, x, y)[2]).value
    known, notes = completed(problem, x, y, constants)
    found = measure(problem, x, y, v, known.L)
    bound = _theorem(problem, x, y, found, known)
    distance = float(torch.linalg.vector_norm(z.double() - found.h.double()))
    plain = distance + bound.total + found.rounding
    best, refined, refined_bound = plain, None, None
    if refine and math.isfinite(bound.total):
        refined, refined_bound = _refine(problem, x, y, v, known, linear)
        best = min(plain, float(torch.linalg.vector_norm(z.double() - refined.double())) + refined_bound)
    heuristic = bool(constants.heuristic) or bound.distance > constants.radius
    reason = bound.reason
    if bound.distance > constants.radius:
        reason = (
            f"the constants hold within {constants.radius:g} of y*, but y is only known to be within"
            f" {bound.distance:.3g} of it: solve the inner problem more accurately."
        )
    return Certificate(
        bound=best,
        terms={"inner": bound.inner, "linear": bound.linear, "estimate": distance, "rounding": found.rounding},
        theorem="A" if constants.mu is not None else "B",
        proven=not heuristic and math.isfinite(best),
        confidence=constants.confidence * (1 - _FAILURE if constants.C_G is None else 1.0),
        assumed=tuple(assumptions(constants, known, bound.mu)) + notes,
        distance=bound.distance,
        grad_norm=float(torch.linalg.vector_norm(z)),
        stats=tally.stats(),
        refined=None if refined is None else problem.x.unravel(refined.to(x.dtype)),
        refined_bound=refined_bound,
        reason=reason,
    )


@final
@dataclass(frozen=True)
class Terms:
    """The bound of one point: its parts, the distance |y - y*| and the mu that it used."""

    inner: float
    linear: float
    distance: float
    mu: float
    reason: str = ""

    @property
    def total(self) -> float:
        """The bound on |h_v - h|."""
        return self.inner + self.linear


def theorem_a(found: Measured, mu: float | Tensor, delta: Tensor, known: Constants) -> Terms:
    """The bound with a strong convexity mu valid on the segment, and delta >= |y - y*|; the mean over tasks.

    h - h_v = (a* - a) - (G* - G) v - G* (v* - v) with v* - v = H*^-1 [(b* - b) + r + (H - H*) v], stars at y*.
    """
    assert known.L_fxy is not None and known.M_xy is not None and known.L_fyy is not None and known.M_yy is not None
    assert known.C_G is not None
    kappa_g = known.C_G / mu
    inner = delta * (known.L_fxy + known.M_xy * found.v) + kappa_g * delta * (known.L_fyy + known.M_yy * found.v)
    linear = kappa_g * found.r
    least = float(mu.min()) if isinstance(mu, Tensor) else mu
    return Terms(float(inner.mean()), float(linear.mean()), float(delta.max()), least)


def _theorem(problem: FlatProblem, x: Tensor, y: Tensor, found: Measured, known: Constants) -> Terms:
    """Theorem A with the given mu, or theorem B with the least eigenvalue of H at y."""
    if known.mu is not None:
        delta = found.e / known.mu
        return theorem_a(found, known.mu, delta, widened(known, float(delta.max())))
    matrix = Exact().linearize(problem, x, y).operator.dense(y)
    eps = matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    eigenvalues = torch.linalg.eigvalsh(((matrix + matrix.mT) / 2).double())
    m = eigenvalues[..., 0] - eps * eigenvalues.abs().amax(-1)
    assert known.M_yy is not None
    room = m * m - 2 * known.M_yy * found.e
    if not bool((m > 0).all()) or not bool((room >= 0).all()):
        why = (
            "the inner Hessian is not positive definite at y, which is no strict minimum of g(x, .)"
            if not bool((m > 0).all())
            else "|grad_y g| is too large for a stationary point nearby to be certain: solve the inner problem better"
        )
        return Terms(math.inf, 0.0, math.inf, float(m.min()), why)
    mu = room.sqrt()
    # (m - mu) / M_yy without cancellation, which also covers M_yy = 0
    delta = 2 * found.e / (m + mu)
    return theorem_a(found, mu, delta, widened(known, float(delta.max())))


def widened(known: Constants, delta: float) -> Constants:
    """C_G measured at y, made valid at y*: |G(y*)| <= |G(y)| + M_xy delta; a given one holds there already."""
    if "C_G" not in known.heuristic:
        return known
    assert known.C_G is not None and known.M_xy is not None
    return replace(known, C_G=known.C_G + known.M_xy * delta)


def completed(
    problem: FlatProblem, x: Tensor, y: Tensor, constants: Constants
) -> tuple[Constants, tuple[Assumption, ...]]:
    """The constants with C_G bounded from the operator at y where it was not given; it is then marked."""
    if constants.C_G is not None:
        return replace(constants, heuristic=constants.heuristic - {"C_G"}), ()
    squared, like = cross_operator(problem, x, y)
    c_g = math.sqrt(max(float(largest_eigenvalue(squared, like, failure=_FAILURE)), 0.0))
    note = Assumption("C_G", c_g, f"|G| at y, bounded by Lanczos with confidence {1 - _FAILURE:g}")
    return replace(constants, C_G=c_g, heuristic=constants.heuristic | {"C_G"}), (note,)


def _refine(
    problem: FlatProblem, x: Tensor, y: Tensor, v: Tensor, known: Constants, linear: AbstractLinearSolver
) -> tuple[Tensor, float]:
    """The implicit gradient at y - H^-1 e, whose error is of second order in |y - y*|, and its own bound."""
    at = Exact().linearize(problem, x, y)
    s = linear.solve(at.operator, at.gradient).value
    y = y - s
    at = Exact().linearize(problem, x, y)
    v = linear.solve(at.operator, outer_gradients(problem, x, y)[2], v).value
    found = measure(problem, x, y, v, known.L)
    return found.h, _theorem(problem, x, y, found, known).total + found.rounding


def assumptions(constants: Constants, known: Constants, mu: float) -> list[Assumption]:
    listed = [Assumption("mu", mu, constants.source if constants.mu is not None else "least eigenvalue of H at y")]
    for name in (*NEEDED, "C_G"):
        given = getattr(constants, name)
        if given is not None:
            source = f"{constants.source}, heuristic" if name in constants.heuristic else constants.source
            listed.append(Assumption(name, getattr(known, name), source))
    return listed
