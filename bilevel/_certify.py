"""A-posteriori certificates: how wrong a hypergradient can be, from residuals measured at run time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel._calculus import Exact, cross_operator, outer_gradients
from bilevel._certificate import Assumption, Certificate, Constants
from bilevel._certify_penalty import certify_penalty
from bilevel._estimate import Estimate
from bilevel._flat import FlatProblem
from bilevel._hypergradient import ravel_rows
from bilevel._linear import AbstractLinearSolver
from bilevel._measure import Measured, measure
from bilevel._problem import BilevelProblem, check_signature
from bilevel._registry import default_linear
from bilevel._spectrum import largest_eigenvalue
from bilevel._tree import Structure, Tree, ravel

_NEEDED = ("L_fyy", "L_fxy", "M_yy", "M_xy")
_FAILURE = 0.01  # of the bound on |G|, where it is estimated


def certify(
    problem: BilevelProblem,
    x: Tree,
    estimate: Estimate,
    constants: Constants,
    *,
    data: Any = None,
    linear: AbstractLinearSolver | None = None,
    refine: bool = False,
    first_order: bool = False,
) -> Certificate:
    """A bound on |z - h(x)| for any estimate z of h = grad Phi(x), from one implicit gradient at its y.

    With e = grad_y g, r = grad_y f - H v and the implicit gradient h_v = grad_x f - G v, all recomputed at the
    estimate's y and v, and d = |e| / mu >= |y - y*|:

        |z - h| <= |z - h_v| + d (L_fxy + M_xy |v|) + (C_G / mu) (|r| + d (L_fyy + M_yy |v|)).

    The estimate may come from any estimator: one that solved no linear system has one solved here. Without mu, the
    local theorem applies: with m the least eigenvalue of H at y and 2 M_yy |e| <= m^2, a stationary point lies within
    d = (m - m*) / M_yy, m* = sqrt(m^2 - 2 M_yy |e|), and the bound holds with m* for mu; it is then the local branch
    of y* that is certified.

    Cost: two gradients, one Hessian product and one cross product with all constants and v given. Without C_G some
    ten products more, to bound |G| at y with 99 % confidence; without mu q products, for the dense Hessian; with
    `refine` one more linear solve, for s = H^-1 e, and the same again at y - s.

    Source: the bound with |v| <= |grad f| / mu is Ghadimi, Wang, "Approximation methods for bilevel programming"
    (2018), lemma 2.2; the idea of computable a-posteriori bounds is Ehrhardt, Roberts, "Analyzing inexact
    hypergradients for bilevel learning", IMA J. Appl. Math. 89 (2024). Derived in docs/certificates.md.

    Args:
        problem: f and g.
        x: where the estimate was made.
        estimate: the estimate.
        constants: what is known of f and g; L_fyy, L_fxy, M_yy and M_xy are needed.
        data: the third argument of f and g, as for the estimate.
        linear: solves for v where the estimate has none, and for the correction; by default accurate CG.
        refine: also return the hypergradient after one Newton correction of y, and the least of both bounds.
        first_order: for an estimate of `Penalty` without extrapolation: use gradients only, no Hessian product.

    Returns:
        The certificate. Its bound is infinite, with a reason, where the theorem does not apply.

    Raises:
        TypeError: if `estimate` or `constants` is of another type.
        ValueError: if needed constants are missing, or structures do not match.

    Example:
        >>> from bilevel import hypergradient
        >>> problem = BilevelProblem(lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2)
        >>> x = torch.tensor(1.0, dtype=torch.float64)
        >>> constants = Constants(mu=1.0, L_fyy=1.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0, C_G=1.0)
        >>> certify(problem, x, hypergradient(problem, x, torch.zeros_like(x)), constants).bound < 1e-6
        True
    """
    if not isinstance(estimate, Estimate) or not isinstance(constants, Constants):
        raise TypeError(
            f"`certify(problem, x, estimate, constants)` needs an Estimate and Constants. Got"
            f" {type(estimate).__name__} and {type(constants).__name__}. Pass what `hypergradient` returned."
        )
    missing = [name for name in _NEEDED if getattr(constants, name) is None]
    if missing:
        raise ValueError(
            f"`certify` needs the constants {', '.join(_NEEDED)}. Missing: {', '.join(missing)}."
            f" Give them, or use `estimate_constants(problem, x, estimate.y)`, or see `estimate.error_estimate`."
        )
    check_signature(problem, data)
    x_vector, x_structure = ravel(x, "x")
    z, _ = ravel(estimate.grad, "estimate.grad")
    flat = FlatProblem(problem, x_structure, _one_row(estimate.y, problem.tasks), data)
    y = ravel_rows(flat, estimate.y, "estimate.y")
    v = None if estimate.v is None else ravel_rows(flat, estimate.v, "estimate.v")
    if first_order:
        return _first_order(flat, x_vector.detach(), z.detach(), y, estimate, constants)
    solver = default_linear(y) if linear is None else linear
    return certify_flat(flat, x_vector.detach(), z.detach(), y, v, constants, solver, refine)


def _first_order(
    problem: FlatProblem, x: Tensor, z: Tensor, y: Tensor, estimate: Estimate, constants: Constants
) -> Certificate:
    if estimate.penalized is None or constants.mu is None:
        raise ValueError(
            "`certify(first_order=True)` needs an estimate of `Penalty(..., extrapolate=False)`, and mu."
            " Leave it out: any estimate is certified through one implicit gradient."
        )
    y_w = ravel_rows(problem, estimate.penalized[0], "estimate.penalized")
    known, notes = completed(problem, x, y, constants)
    distance = float(torch.linalg.vector_norm(y_w - y, dim=-1).max())
    known = _widened(known, 2 * distance)
    found = certify_penalty(problem, x, z, y, y_w, estimate.penalized[1], known)
    return replace(found, assumed=tuple(_assumptions(constants, known, constants.mu)) + notes)


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
    """The certificate in vectors; see :func:`certify`."""
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
        assumed=tuple(_assumptions(constants, known, bound.mu)) + notes,
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
        return theorem_a(found, known.mu, delta, _widened(known, float(delta.max())))
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
    return theorem_a(found, mu, delta, _widened(known, float(delta.max())))


def _widened(known: Constants, delta: float) -> Constants:
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


def _assumptions(constants: Constants, known: Constants, mu: float) -> list[Assumption]:
    listed = [Assumption("mu", mu, constants.source if constants.mu is not None else "least eigenvalue of H at y")]
    for name in (*_NEEDED, "C_G"):
        given = getattr(constants, name)
        if given is not None:
            source = f"{constants.source}, heuristic" if name in constants.heuristic else constants.source
            listed.append(Assumption(name, getattr(known, name), source))
    return listed


def _one_row(y: Tree, tasks: bool) -> Structure:
    vector, structure = ravel(y, "estimate.y")
    if not tasks:
        return structure
    shapes = tuple(shape[1:] for shape in structure.shapes)
    return Structure(structure.spec, shapes, vector.dtype, vector.device)
