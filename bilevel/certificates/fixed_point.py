"""Certificates of fixed points: the theorems of smooth inner problems, with I - dT/dy in the place of H."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from bilevel._calculus import Linearization, outer_gradients
from bilevel._flat import FlatProblem
from bilevel._linear import AbstractLinearSolver
from bilevel._numerics.rows import safe_row_norms
from bilevel._result import Solved, Status
from bilevel.certificates.assumptions import assumptions
from bilevel.certificates.certificate import Assumption, Certificate, Constants
from bilevel.certificates.certify_flat import beyond, distance, nothing
from bilevel.certificates.measured import ROUNDING, Measured, measured
from bilevel.certificates.remarks import remark
from bilevel.certificates.theorems import bounded
from bilevel.inner_problems.kind import AbstractInnerProblem
from bilevel.solvers.gmres import GMRES

_DENSE = 500  # up to so many y the matrices dT/dy and dT/dx are formed, where a constant is not given


def certify_fixed_point(
    problem: FlatProblem,
    kind: AbstractInnerProblem,
    x: Tensor,
    z: Tensor,
    y: Tensor,
    v: Tensor | None,
    constants: Constants,
    linear: AbstractLinearSolver | None,
) -> Certificate:
    """A bound on |z - h(x)| for y*(x) = T(x, y*(x)).

    The constants are those of F(x, y) = y - T(x, y): mu with |F(x, y) - F(x, y')| >= mu |y - y'|, which is 1 - rho
    where T contracts by rho in the 2-norm, so that |y - y*| <= |y - T(x, y)| / (1 - rho); M_yy and M_xy the Lipschitz
    constants in y of dT/dy and dT/dx, C_G a bound on |dT/dx|. The bound is that of `certify`, whose proof needs no
    symmetry. Without mu the least singular value of I - dT/dy at y is taken for it, extended by M_yy (Newton,
    Kantorovich): a fixed point is then near, and that is the one which is certified, whether T contracts or not.

    Cost: T and one product with both derivatives; without mu, L or C_G q products.

    Raises:
        ValueError: if mu or C_G is missing, and y has too many entries to form the matrices.
    """
    at = kind.linearize(problem, x, Solved(y, (Status.successful,), torch.zeros(()), 0), _none, None)
    value, fx, fy = outer_gradients(problem, x, y)
    if v is None:
        solver = GMRES(rtol=1e-13 if y.dtype == torch.float64 else 1e-6) if linear is None else linear
        v = solver.solve(at.operator, fy).value
    given, notes = _completed(at, y, constants)
    hv, gv = at.products(v)
    found = measured(y, v, at.gradient, fy - hv, fx, fy, gv, given, hv)
    found = replace(found, curvature=_stretch(v, hv))
    if not _finite(found, value):
        return nothing(problem, z, constants, "B" if constants.mu is None else "A")
    bound = bounded(found, given)
    off = distance(z, found.h)
    best, reason = off + bound.total + found.rounding, bound.reason or beyond(bound.distance, constants)
    best = best if math.isfinite(best) else math.inf
    single = y.dtype != torch.float64
    if single and not reason:
        reason = f"rounding errors of {y.dtype} are modelled. Compute in float64."
    terms = {"inner": bound.inner, "linear": bound.linear, "estimate": off, "rounding": found.rounding}
    norm, L = float(safe_row_norms(z.double())), bound.known.L
    return Certificate(
        bound=best,
        terms=terms,
        theorem="B" if "mu" in given.local else "A",
        proven=not constants.heuristic and not reason and math.isfinite(best),
        confidence=given.confidence,
        assumed=tuple(assumptions(constants, bound.known, bound.mu)) + notes,
        distance=bound.distance,
        grad_norm=norm,
        stats=problem.tally.stats(),
        reason=reason,
        remark=remark(best, norm, terms, L / bound.mu if L is not None and bound.mu > 0 else None, False),
    )


def _none() -> Linearization:
    raise AssertionError("a fixed point has no gradient of g")


def _completed(at: Linearization, y: Tensor, constants: Constants) -> tuple[Constants, tuple[Assumption, ...]]:
    """The constants with mu, L and C_G at y where they were not given."""
    wanted = [name for name in ("mu", "L", "C_G") if getattr(constants, name) is None]
    if not wanted:
        return constants, ()
    if y.shape[-1] > _DENSE:
        if wanted == ["L"]:  # of a contraction
            return replace(constants, L=2.0), ()
        raise ValueError(
            f"`certify` forms dT/dy to measure a constant, for at most {_DENSE} entries of y. Got {y.shape[-1]}. Give"
            f" mu (1 - rho, where T contracts by rho) and C_G (a bound on |dT/dx|)."
        )
    columns, crosses = [], []
    for j in range(y.shape[-1]):
        unit = torch.zeros_like(y)
        unit[..., j] = 1.0
        hv, gv = at.products(unit)
        columns.append(hv.clone())
        crosses.append(None if gv is None else gv)
    values = torch.linalg.svdvals(torch.stack(columns, dim=-1).double())
    rounding = ROUNDING * y.shape[-1] * torch.finfo(y.dtype).eps * float(values.max())
    found: dict[str, float] = {}
    if "mu" in wanted:
        found["mu"] = max(float(values.min()) - rounding, 0.0)
    if "L" in wanted:
        found["L"] = float(values.max()) + rounding
    if "C_G" in wanted:
        if y.dim() > 1:
            raise ValueError("`certify` of a fixed point with tasks needs C_G, a bound on |dT/dx|. Give it.")
        rows = [cross.double() for cross in crosses if cross is not None]
        size = float(torch.linalg.matrix_norm(torch.stack(rows), 2)) if rows else 0.0
        found["C_G"] = size * (1 + ROUNDING * y.shape[-1] * torch.finfo(y.dtype).eps)
    notes = tuple(Assumption(name, number, "at y, from the matrix") for name, number in found.items())
    if found.get("mu") == 0.0:
        raise ValueError(
            "`certify` does not apply: I - dT/dy is singular to rounding at y, so that y*(x) may not be unique there."
        )
    mu, L, C_G = (found.get(name, getattr(constants, name)) for name in ("mu", "L", "C_G"))
    return replace(constants, mu=mu, L=L, C_G=C_G, local=constants.local | frozenset(found)), notes


def _stretch(v: Tensor, hv: Tensor) -> float | None:
    """The least |H v| / |v| over the tasks, rounded up: what mu cannot be more than."""
    size = safe_row_norms(v.double())
    if not bool((size > 0).all()):
        return None
    return float((safe_row_norms(hv.double()) / size).min()) * (1 + ROUNDING * torch.finfo(v.dtype).eps)


def _finite(found: Measured, value: Tensor) -> bool:
    parts = (found.e, found.r, found.v, found.h, value)
    return all(bool(part.isfinite().all()) for part in parts)
