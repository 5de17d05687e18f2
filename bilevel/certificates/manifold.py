"""Certificates of composite problems: the theorems of smooth ones on the manifold that y* is shown to lie on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel._calculus import Exact, Linearization, outer_gradients
from bilevel._flat import FlatProblem
from bilevel._linear import AbstractLinearSolver, LinearOperator
from bilevel._numerics.rows import row_dots, safe_row_norms
from bilevel._numerics.spectrum import largest_eigenvalue, least_eigenvalue
from bilevel.certificates.assumptions import assumptions
from bilevel.certificates.certificate import Assumption, Certificate, Constants, NonfiniteError
from bilevel.certificates.certify_flat import beyond, distance, nothing, precise
from bilevel.certificates.completed import FAILURE, completed
from bilevel.certificates.groups import certify_groups, group_lasso_at
from bilevel.certificates.measured import ROUNDING
from bilevel.certificates.remarks import remark
from bilevel.inner_problems.flat_term import FlatDerivative, FlatTerm
from bilevel.inner_problems.stationary_point import StationaryPoint

_PARTS = (0.1, 1e-2, 1e-3, 1e-4)  # of the largest entry of v: how far a piece is followed
_SLACK = 1e-9  # a constant is contradicted by more than rounding
_SAME = 1e3  # rounding units of v over a radius: what differences of an affine map are off by


@final
@dataclass(frozen=True, eq=False)
class Piece:
    """A point and the piece of the proximal map at it, on which the map is to be affine in v.

    Attributes:
        term: h.
        x: the outer variable.
        y: the point.
        step: t.
        at: grad_y g there.
        P: the derivative of the map at v.
        v: where the map is taken.
        image: T(y).
    """

    term: FlatTerm
    x: Tensor
    y: Tensor
    step: Tensor
    at: Linearization
    P: FlatDerivative
    v: Tensor
    image: Tensor

    def refusal(self, radius: Tensor) -> str:
        """Why y* is not known to be on this piece, though it is within `radius` of y in every entry; empty: it is."""
        off = (self.image - self.y) - self.P.onto(self.image - self.y)
        if bool((off != 0).any()):
            return "y is not on one manifold with its next proximal step: solve the inner problem more accurately."
        if not self.term.active(self.x, self.v, self.step).shape[-1]:
            return "the term does not say which manifold it is on (`AbstractProxTerm.active`)."
        if not self._reaches(radius):
            return (
                f"the margin of the support is not above {float(radius.max()):.3g}, which y* may be from y: solve the"
                f" inner problem more accurately, or move x away from a kink of y*(x)."
            )
        eps, r = torch.finfo(self.v.dtype).eps, self.reach(radius).unsqueeze(-1).expand_as(self.v)
        slope = self.P.times(torch.ones_like(self.v))
        for sign in (1.0, -1.0):
            change = self.term.prox(self.x, self.v + sign * r, self.step) - self.image - sign * slope * r
            if bool((change.abs() > _SAME * eps * (self.v.abs() + r)).any()):
                return "the manifold of the term is curved: certificates are for terms that are piecewise quadratic."
        return ""

    def reach(self, radius: Tensor) -> Tensor:
        """How far v may move, in every entry, within the piece: at least the radius, and as far as is tried.

        Over more than rounding, so that what is not affine shows.
        """
        size = self.v.abs().amax(-1)
        for part in _PARTS:
            farther = torch.maximum(part * size, radius)
            if self._reaches(farther):
                return farther
        return radius

    def _reaches(self, radius: Tensor) -> bool:
        here, r = self.term.active(self.x, self.v, self.step), radius.unsqueeze(-1)
        ends = (self.term.active(self.x, self.v + sign * r, self.step) for sign in (1.0, -1.0))
        return all(torch.equal(end, here) for end in ends)


def certify_on_manifold(
    problem: FlatProblem,
    term: FlatTerm,
    x: Tensor,
    z: Tensor,
    y: Tensor,
    v: Tensor | None,
    constants: Constants,
    linear: AbstractLinearSolver,
) -> Certificate:
    """A bound on |z - h(x)| for y*(x) = argmin_y g(x, y) + h_x(y), h piecewise quadratic and separable.

    All is measured at T(y), T the proximal gradient step of t = 1 / L. With P the (diagonal) derivative of the map,
    e = |P^+ (y - T(y))| / t is the length of the gradient of g + h along the manifold, whose least curvature m is mu,
    or the least eigenvalue of the restricted H + (P^+ - I) / t at y, extended by M_yy as in the local theorem. A
    stationary point on the manifold is then within d of y, and it is y* if nothing of the map changes its piece within
    that distance of v: the margin of the support is larger than the error of y. There, with u and r = b - K u of the
    restricted system, and w as in `StationaryPoint`,

        |du| <= (|r| + d (L_fyy + M_yy |u|)) / m,
        |z - h| <= |z - h_u| + d (L_fxy + M_xy |u|) + (C_G + |B_on| |P^+| / t) |du|
                   + |B_off| (d (L_fyy + M_yy |u|) + L |du|),  B = d prox / dx, the same on the whole piece.

    g has to be convex in y. The group lasso, which is neither, has a smooth problem on its active groups instead; see
    `certify_groups`.
    """

    def certificate(problem: FlatProblem, to: Callable[[Any], Any], doubled: bool) -> Certificate:  # noqa: ARG001  (T(y) is in the dtype of y)
        inner = FlatTerm(problem, term.function)
        try:
            return _certify(problem, inner, to(x), to(z), to(y), to(v), constants, linear)
        except NonfiniteError:
            return nothing(problem, to(z), constants, "manifold")

    return precise(certificate, problem)


def _certify(
    problem: FlatProblem,
    term: FlatTerm,
    x: Tensor,
    z: Tensor,
    y: Tensor,
    u: Tensor | None,
    constants: Constants,
    linear: AbstractLinearSolver,
) -> Certificate:
    known, notes = completed(problem, x, y, constants)
    assert known.L is not None and known.C_G is not None and known.M_yy is not None and known.M_xy is not None
    assert known.L_fyy is not None and known.L_fxy is not None
    if not known.L > 0:
        return _refused(problem, z, constants, "g has no curvature at y.")
    t, rows = 1 / known.L, y.shape[:-1].numel()
    step = torch.full_like(y[..., :1], t)
    y = term.prox(x, y - t * Exact().linearize(problem, x, y).gradient, t).detach()
    if group_lasso_at(term, x) is not None:
        given = certify_groups(problem, term, x, z, y, replace(known, mu=constants.mu), linear)
        return _refused(problem, z, constants, given) if isinstance(given, str) else _noted(given, notes)
    at = Exact().linearize(problem, x, y)
    point = StationaryPoint(term, x, y, at, step, False, None)
    P = term.derivative(x, point.v, step)
    if P is None or not term.is_separable(x):
        return _refused(problem, z, constants, _no_theorem(term, x))
    piece = Piece(term, x, y, step, at, P, point.v, term.prox(x, point.v, step).detach())
    linearized = point.on_manifold(P)
    steep = P.inverse(torch.ones_like(y)).amax(-1).clamp_min(1.0)  # |P^+|, and 1 where nothing moves
    eps = ROUNDING * torch.finfo(y.dtype).eps
    size, gradient = safe_row_norms(y), safe_row_norms(at.gradient)
    rounded = eps * (known.L * size + gradient)
    e = safe_row_norms(P.inverse(y - piece.image)) / t + steep * rounded
    m = _least_curvature(linearized, P, y, known)
    room = m * m - 2 * (known.M_yy if known.mu is None or "mu" in known.local else 0.0) * e
    if not bool((m > 0).all() & (room > 0).all()):
        why = "g + h is not known to be strongly convex on the manifold of y, as far as y is accurate."
        return _refused(problem, z, constants, why)
    mu = room.sqrt()
    d = 2 * e / (m + mu)
    top = known.L + (float(known.M_yy * d.max()) if "L" in known.local else 0.0)
    if top > 2 * known.L:  # the step would be too long on the way
        return _refused(
            problem, z, constants, "the curvature may double as far as y* may be from y: solve for y better."
        )
    radius = steep * (d + safe_row_norms(y - piece.image)) + rounded * t
    why = piece.refusal(radius)
    if why:
        return _refused(problem, z, constants, why, float(d.max()))
    value, fx, fy = outer_gradients(problem, x, y)
    b = linearized.right_hand_side(fy)
    u = linear.solve(linearized.operator, b).value if u is None else P.onto(u)
    ku, gu = linearized.products(u)
    moves = linearized.cross(u, fy)
    h = fx if moves is None else fx - moves
    del value, gu
    on, off, fixed = _moves(term, x, point, P, piece.reach(radius))
    if not fixed:
        return _refused(
            problem,
            z,
            constants,
            "how the proximal map moves with x changes on the manifold: no theorem covers it.",
            float(d.max()),
        )
    norm_u = safe_row_norms(u)
    seen = row_dots(u, ku) / torch.where(norm_u > 0, norm_u.square(), 1.0)
    if bool(((norm_u > 0) & (seen < m * (1 - _SLACK))).any()):
        why = f"mu = {float(m.min()):.3g} does not hold: the curvature along u is {float(seen.min()):.3g} at y"
        return _refused(problem, z, constants, why)
    r = safe_row_norms(b - ku) + eps * (known.L * norm_u + safe_row_norms(fy))
    drift = d * (known.L_fyy / rows + known.M_yy * norm_u)
    response = known.C_G + (known.M_xy * d if "C_G" in known.local else 0.0) + on * steep / t
    through = (response + off * top) / mu  # what a change of the right-hand side becomes
    inner = d * (known.L_fxy / rows + known.M_xy * norm_u) + through * drift + off * drift
    linear_part = through * r
    sizes = float(safe_row_norms(fx)) + float((response * norm_u).sum()) + off * float(safe_row_norms(fy).sum())
    rounding = eps * (sizes + known.L_fxy * float(size.mean()))
    away = distance(z, h)
    terms = {"inner": float(inner.sum()), "linear": float(linear_part.sum()), "estimate": away, "rounding": rounding}
    bound, reach = sum(terms.values()), float(d.max())
    reason = beyond(reach, constants)
    norm, least = float(safe_row_norms(z.double())), float(mu.min())
    proven = not constants.heuristic and not reason and math.isfinite(bound)
    return Certificate(
        bound=bound if math.isfinite(bound) else math.inf,
        terms=terms,
        theorem="manifold",
        proven=proven,
        confidence=known.confidence * (1 - 2 * FAILURE if on or off else 1.0),
        assumed=(*assumptions(constants, known, least), *notes, Assumption("|dprox/dx|", max(on, off), "at y")),
        distance=reach,
        grad_norm=norm,
        stats=problem.tally.stats(),
        reason=reason,
        remark=remark(bound, norm, terms, known.L / least, refined=True),
    )


def _no_theorem(term: FlatTerm, x: Tensor) -> str:
    """Why there is no certificate for a term that is neither separable nor a group lasso."""
    found = term.one_at(x)
    name = type(found).__name__
    return (
        f"no theorem covers the manifold of `{name}`, which may be curved: certificates are for separable terms, such"
        f" as L1, and the group lasso. See `estimate.error_estimate`."
    )


def _noted(found: Certificate, notes: tuple[Assumption, ...]) -> Certificate:
    return replace(found, assumed=(*found.assumed, *notes))


def _refused(problem: FlatProblem, z: Tensor, constants: Constants, why: str, reach: float = math.inf) -> Certificate:
    return Certificate(
        bound=math.inf,
        terms={},
        theorem="manifold",
        proven=False,
        confidence=constants.confidence,
        assumed=(),
        distance=reach,
        grad_norm=float(safe_row_norms(z.double())),
        stats=problem.tally.stats(),
        reason=why,
    )


def _least_curvature(at: Linearization, P: FlatDerivative, y: Tensor, known: Constants) -> Tensor:
    """The least eigenvalue of K on the range of P: mu where it is known everywhere, else of the dense matrix."""
    if known.mu is not None and "mu" not in known.local:
        return torch.full_like(y[..., 0], known.mu)
    matrix = at.operator.dense(y)
    on = P.onto(torch.ones_like(y))
    top = matrix.abs().sum(-1).amax(-1, keepdim=True)  # above every eigenvalue: what is off the range is not the least
    return least_eigenvalue(matrix + torch.diag_embed((1 - on) * top)).to(y)


def _moves(
    term: FlatTerm, x: Tensor, point: StationaryPoint, P: FlatDerivative, radius: Tensor
) -> tuple[float, float, bool]:
    """|B| on and off the range of P, and whether B is the same within the radius of v."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        images = [term.prox(leaf, point.v + sign * radius.unsqueeze(-1), point.step) for sign in (0.0, 1.0, -1.0)]
        if not images[0].requires_grad:
            return 0.0, 0.0, True
        w = torch.zeros_like(point.y).requires_grad_()
        pulled = torch.autograd.grad(images[0], leaf, w, create_graph=True, allow_unused=True)[0]
        if pulled is None:
            return 0.0, 0.0, True

    def moved(dx: Tensor) -> Tensor:
        if not pulled.requires_grad:
            return torch.zeros_like(w)
        return torch.autograd.grad(pulled, w, dx, retain_graph=True, allow_unused=True, materialize_grads=True)[0]

    def back(w: Tensor, image: Tensor) -> Tensor:
        return torch.autograd.grad(image, leaf, w, retain_graph=True, allow_unused=True, materialize_grads=True)[0]

    probe = torch.cos(1.0 + torch.arange(w.shape[-1], device="cpu").to(w)).expand_as(w).contiguous()
    here = back(probe, images[0])
    scale = float(here.abs().max())
    fixed = all(float((back(probe, other) - here).abs().max()) <= 1e-10 * scale for other in images[1:])
    on, off = (
        float(largest_eigenvalue(LinearOperator(square, x.numel()), x).clamp_min(0)) ** 0.5
        for square in (
            lambda dx: back(P.onto(moved(dx)), images[0]),
            lambda dx: back(moved(dx) - P.onto(moved(dx)), images[0]),
        )
    )
    return on, off, fixed
