"""Certificates under linear constraints: the theorems of smooth problems on the face that y* is shown to lie on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import Exact, outer_gradients
from bilevel._flat import FlatProblem
from bilevel._linear import AbstractLinearSolver
from bilevel._numerics.rows import matrix_times
from bilevel._numerics.spectrum import largest_eigenvalue
from bilevel._problem import BilevelProblem
from bilevel._tree import ravel
from bilevel.certificates.certificate import Assumption, Certificate, Constants
from bilevel.certificates.certify_flat import certify_flat, distance
from bilevel.certificates.measured import ROUNDING
from bilevel.inner_problems.activity import Activity
from bilevel.inner_problems.polytope import FlatPolytope, padded

_DEPENDENT = 1e-8  # a singular value of rows of length one: below it they are dependent


@final
@dataclass(frozen=True, eq=False)
class Face:
    """The affine set J y = b(x) of the constraints that seem to hold at y, y = p(x) + N w on it.

    Attributes:
        J: the rows of length one `(r, q)`, independent.
        b: their right-hand sides `(r,)`, with a graph from x where they move.
        signed: which of them are inequalities or bounds `(r,)`, all written as J y <= b.
        others: the rows of length one of the inequalities and bounds that do not hold `(k, q)`.
        limits: their right-hand sides `(k,)`.
    """

    J: Tensor
    b: Tensor
    signed: Tensor
    others: Tensor
    limits: Tensor

    @staticmethod
    def at(moving: FlatPolytope, y: Tensor, gradient: Tensor, curved: Tensor) -> Face:
        """The face that y is on, by distances and multipliers."""
        still, q = FlatPolytope(*(part.detach() for part in moving.tensors())), y.shape[-1]
        whole = still.with_slacks(y)
        active = Activity.of(still, whole, padded(gradient, whole), padded(curved, whole), None)
        A, b, lower, upper, G, h = moving.natural(q)
        A, G, eye = A.detach(), G.detach(), torch.eye(q, dtype=y.dtype, device=y.device)
        held, high, fixed = ~active.free[:q], active.upper[:q], still.fixed[:q]
        tight = ~active.free[q:]
        size = torch.linalg.vector_norm(A, dim=-1)
        known = size > 0
        up, down = held & (high | fixed), held & ~high & ~fixed
        J = torch.cat([A[known] / size[known].unsqueeze(-1), eye[up], G[tight], -eye[down]])
        right = torch.cat([b[known] / size[known], upper[up], h[tight], -lower[down]])
        count = int(known.sum())
        one_sided = torch.cat([torch.zeros(count, dtype=torch.bool, device=y.device), ~fixed[up]])
        one_sided = torch.cat([one_sided, torch.ones(len(J) - len(one_sided), dtype=torch.bool, device=y.device)])
        above, below = ~held & upper.isfinite(), ~held & lower.isfinite()
        loose = ~tight & h.isfinite()
        others = torch.cat([eye[above], -eye[below], G[loose]])
        limits = torch.cat([upper[above], -lower[below], h[loose]]).detach()
        return Face(J, right, one_sided, others, limits)


def certify_on_face(
    problem: FlatProblem,
    moving: FlatPolytope,
    leaf: Tensor,
    z: Tensor,
    y: Tensor,
    constants: Constants,
    linear: AbstractLinearSolver,
) -> Certificate:
    """A bound on |z - h(x)| for y*(x) = argmin_y {g(x, y) : A y = b, G y <= h, lower <= y <= upper}, g convex in y.

    On the face J y = b(x) of the constraints that seem to hold, y = p(x) + N w with p = J^+ b(x), N orthonormal and w
    free, so that the theorems of smooth problems bound the error for g(x, p(x) + N w), with B = dp/dx in

        L_fxy + |B| L_fyy,  M_xy + |B| M_yy,  C_G + |B| L.

    They also bound how far the minimizer on the face is from y, by d. It is y*, and stays on the face as x moves, if
    its multipliers are positive and no other constraint holds there: that is shown where every multiplier at y is above
    |J^+| L d, and every other constraint farther away than d. So strict complementarity has a margin larger than the
    error; where it has not, the bound is infinite, with the reason. At a vertex d is zero and no curvature is needed.

    Args:
        problem: the problem in vectors, without tasks, in float64.
        moving: the constraints, with a graph from `leaf` where they move.
        leaf: x.
        z: the estimate.
        y: where it was made.
        constants: of f and g, as for a smooth problem.
        linear: solves on the face.
    """
    x = leaf.detach()
    if y.dtype != torch.float64 or y.dim() != 1:
        return _refused(problem, z, constants, "certificates under constraints are in float64, and without tasks.")
    if moving.A.requires_grad:
        return _refused(
            problem,
            z,
            constants,
            "rows of constraints move with x: give L_cxy, the Lipschitz constant in y of their derivative in x.",
        )
    at = Exact().linearize(problem, x, y)
    face = Face.at(moving, y, at.gradient, at.products(y)[0])
    U, sizes, Vh = torch.linalg.svd(face.J, full_matrices=True)
    r = len(face.J)
    if r > len(y) or (r and float(sizes.min()) < _DEPENDENT):
        return _refused(problem, z, constants, "the gradients of constraints that hold are dependent (LICQ fails).")
    inverse, N = (Vh[:r].T / sizes) @ U.T if r else face.J.T, Vh[r:].T
    p = inverse @ face.b if r else torch.zeros_like(y)
    rows = [torch.autograd.grad(each, leaf, retain_graph=True)[0] for each in p] if p.requires_grad else []
    B = torch.stack(rows) if rows else torch.zeros(len(y), len(x), dtype=y.dtype, device=y.device)
    p, slide = p.detach(), float(torch.linalg.matrix_norm(B, 2))
    top = float(largest_eigenvalue(at.operator, y)) if constants.L is None else constants.L

    def on(x_: Tensor, w: Tensor) -> Tensor:
        point: Tensor = p + B @ (x_ - x) + N @ w
        return point

    w = N.T @ (y - p)
    if not len(w):
        found = _vertex(problem, x, z, on(x, w), B, constants)
    else:
        reduced = BilevelProblem(lambda x, w: problem.f(x, on(x, w)), lambda x, w: problem.g(x, on(x, w)))
        flat = FlatProblem(reduced, ravel(x)[1], ravel(w)[1], tally=problem.tally)
        found = certify_flat(flat, x, z, w, None, _slid(constants, slide, top), linear)
    d, M = found.distance, constants.M_yy or 0.0
    point = on(x, w)
    gradient = Exact().linearize(problem, x, point).gradient
    multipliers = -inverse.T @ gradient
    rounding = ROUNDING * torch.finfo(y.dtype).eps
    steep = float(1 / sizes.min()) if r else 0.0
    drift = steep * ((top + M * d) * d + rounding * (top * float(point.norm()) + float(gradient.norm())))
    near = d + rounding * float(point.norm())
    force = float(multipliers[face.signed].min()) if bool(face.signed.any()) else math.inf
    room = float((face.limits - matrix_times(face.others, point)).min()) if len(face.others) else math.inf
    notes = tuple(
        Assumption(name, value, "at y")
        for name, value in (("least multiplier", force), ("least distance", room))
        if math.isfinite(value)
    )
    found = replace(found, theorem="face", assumed=(*found.assumed, *notes), stats=problem.tally.stats())
    if not math.isfinite(d):
        return found
    if not force > drift:
        why = f"the least multiplier, {force:.3g}, is not above {drift:.3g}, which it may be off by"
    elif not room > near:
        why = f"a constraint that does not hold is only {room:.3g} away, and y* may be {near:.3g} from y"
    else:
        return found
    why += ": solve the inner problem more accurately, or move x away from a kink of y*(x)."
    return replace(found, bound=math.inf, terms={}, proven=False, reason=why, remark="", refined_bound=None)


def _slid(constants: Constants, slide: float, top: float) -> Constants:
    """What is known of f and g along a face that moves by `slide` with x."""
    if not slide:
        return constants

    def plus(own: float | None, other: float | None) -> float | None:
        return None if own is None or other is None else own + slide * other

    return replace(
        constants,
        L_fxy=plus(constants.L_fxy, constants.L_fyy),
        M_xy=plus(constants.M_xy, constants.M_yy),
        C_G=plus(constants.C_G, top),
    )


def _vertex(problem: FlatProblem, x: Tensor, z: Tensor, y: Tensor, B: Tensor, constants: Constants) -> Certificate:
    """That of a face without a direction: y* = p(x), and h = grad_x f + B' grad_y f, to rounding."""
    _, fx, fy = outer_gradients(problem, x, y)
    h = fx + B.T @ fy
    sizes = float(fx.norm()) + float(torch.linalg.matrix_norm(B, 2)) * float(fy.norm())
    terms = {"estimate": distance(z, h), "rounding": ROUNDING * torch.finfo(y.dtype).eps * sizes}
    bound = sum(terms.values())
    return Certificate(
        bound=bound if math.isfinite(bound) else math.inf,
        terms=terms,
        theorem="face",
        proven=not constants.heuristic and math.isfinite(bound),
        confidence=constants.confidence,
        assumed=(),
        distance=0.0,
        grad_norm=float(z.norm()),
        stats=problem.tally.stats(),
    )


def _refused(problem: FlatProblem, z: Tensor, constants: Constants, why: str) -> Certificate:
    return Certificate(
        bound=math.inf,
        terms={},
        theorem="face",
        proven=False,
        confidence=constants.confidence,
        assumed=(),
        distance=math.inf,
        grad_norm=float(z.double().norm()),
        stats=problem.tally.stats(),
        reason=why,
    )
