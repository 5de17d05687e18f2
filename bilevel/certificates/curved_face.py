"""Certificates under nonlinear constraints, and rows that turn with x: Newton and Kantorovich on what holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel._calculus import Exact, outer_gradients
from bilevel._flat import FlatProblem
from bilevel._numerics.misfits import called
from bilevel._numerics.rows import safe_row_norms
from bilevel._tree import Tree
from bilevel.certificates.certificate import Assumption, Certificate, Constants, NonfiniteError
from bilevel.certificates.certify_flat import beyond, distance
from bilevel.certificates.measured import ROUNDING, measured
from bilevel.certificates.theorems import Terms, bounded
from bilevel.inner_problems.activity import Activity
from bilevel.inner_problems.nonlinear_constraints import FlatConstraints, tangent
from bilevel.inner_problems.polytope import FlatPolytope, Polytope, padded

NEEDED = ("L_cyy", "L_cxy", "M_cyy", "M_cxy")
_SCALES = tuple(2.0**k for k in range(-8, 9, 2))  # of the constraints, around that which makes both blocks alike


@final
@dataclass(frozen=True, eq=False)
class Conditions:
    """F(x, y, w) = (grad_y g + J'w, c_A): the optimality conditions, with what holds as equations.

    Attributes:
        K: dF/d(y, w) `(q + r, q + r)`, symmetric.
        cross: dF/dx `(q + r, p)`.
        gradient: grad_y g `(q,)`.
        values: of the constraints that hold `(r,)`.
        w: their multipliers, by least squares.
        signed: which of them are inequalities or bounds.
        room: -c_j of the others `(k,)`.
        steep: |grad c_j| of the others.
    """

    K: Tensor
    cross: Tensor
    gradient: Tensor
    values: Tensor
    w: Tensor
    signed: Tensor
    room: Tensor
    steep: Tensor

    @staticmethod
    def at(
        problem: FlatProblem,
        x: Tensor,
        y: Tensor,
        rows: Callable[[Tensor, Tensor], Tensor],
        signed: Tensor,
        active: Tensor,
        idle: Tensor,
    ) -> Conditions:
        """At (x, y), for constraints `rows(x, y)`: which are inequalities, which hold, and which are left out."""
        with torch.enable_grad():
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            c = rows(x, y)
            told = c.isfinite() & ~idle  # a bound that there is not
            active = active & told
            J = _jacobian(c[active], (y,), graph=True)[0]
            gradient = torch.autograd.grad(problem.g(x, y), y, create_graph=True)[0]
            w = -torch.linalg.lstsq(J.detach().T, gradient.detach().unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
            top = gradient + J.T @ w if len(w) else gradient
            Lyy, Lyx = _jacobian(top, (y, x))
        Jx = _jacobian(c[active], (x,))[0]
        J, loose = J.detach(), told & ~active
        K = torch.cat([torch.cat([Lyy, J.T], 1), torch.cat([J, J.new_zeros(len(J), len(J))], 1)])
        steep = torch.linalg.vector_norm(_jacobian(c[loose], (y,))[0], dim=-1)
        return Conditions(
            (K + K.T) / 2,
            torch.cat([Lyx, Jx]),
            gradient.detach(),
            c[active].detach(),
            w,
            signed[active],
            -c[loose].detach(),
            steep,
        )


def certify_on_curved_face(
    problem: FlatProblem,
    linear: Callable[..., Polytope] | None,
    moving: FlatPolytope | None,
    nonlinear: Callable[[Tensor], FlatConstraints] | None,
    x: Tensor,
    z: Tensor,
    y: Tensor,
    constants: Constants,
) -> Certificate:
    """A bound on |z - h(x)| for y*(x) = argmin_y {g : c <= 0, e = 0, A y = b, G y <= h, lower <= y <= upper}.

    g and c are convex in y, and e affine. With the constraints A that seem to hold at y as equations, and a scale s for
    their sizes, (y*, w*) is a zero of F(x, y, w) = (grad_y g + s J'w, s c_A), whose derivative K in (y, w) is
    symmetric. Within rho = 2 |F| / m of (y, w), with W = |w| + rho, it is Lipschitz with

        M = |(M_yy + s M_cyy W + s L_cyy, s L_cyy)|,  and dF/dx with M likewise, of M_xy, M_cxy and L_cxy,

    where L_cyy bounds |sum_i u_i d2c_i/dy2| / |u|, and so on. By Newton and Kantorovich a zero lies within d of (y, w),
    d = 2 |F| / (m + (m^2 - 2 M |F|)^(1/2)) <= rho, m the least singular value of K, if the root is real; the theorems
    of smooth problems bound the error of h with m and F in the place of mu and grad_y g, as their proof needs no
    definiteness. The zero is y*(x), now and for x nearby, if all multipliers of inequalities are above d there, and no
    other constraint j can hold: c_j(y) + |grad c_j| d + L_cyy d^2 / 2 < 0. So strict complementarity has a margin
    larger than the error; where it has not, the bound is infinite, with the reason. It is the least over some s.

    Cost: a gradient, and q + r backward passes through it for r constraints that hold; SVDs of q + r rows.

    Args:
        problem: the problem in vectors, without tasks, in float64.
        linear: x -> the linear constraints, as they were written; None: there are none.
        moving: the same with slacks.
        nonlinear: x -> the others; None: there are none.
        x: `(p,)`.
        z: the estimate.
        y: where it was made.
        constants: M_yy, M_xy, L_fyy and L_fxy as for smooth problems, and those of the constraints; others are not
            needed, as the matrices are formed.
    """
    norm = float(safe_row_norms(z.double()))

    def refused(why: str, reach: float = math.inf) -> Certificate:
        return Certificate(
            bound=math.inf,
            terms={},
            theorem="kkt",
            proven=False,
            confidence=constants.confidence,
            assumed=(),
            distance=reach,
            grad_norm=norm,
            stats=problem.tally.stats(),
            reason=why,
        )

    if y.dtype != torch.float64 or y.dim() != 1:
        return refused("certificates under constraints are in float64, and without tasks.")
    at = Conditions.at(problem, x, y, *_rows(problem, linear, moving, nonlinear, x, y))
    problem.tally.gradients += 1
    if not all(bool(part.isfinite().all()) for part in (at.K, at.cross, at.gradient, at.values)):
        return refused("NaN or Inf was met")
    _, fx, fy = outer_gradients(problem, x, y)
    q, r = y.shape[-1], len(at.w)
    alike = _alike(at.K, q)
    best: tuple[float, Certificate] | None = None
    why, reach = "", math.inf
    for scale in _SCALES if r else (1.0,):
        s = scale * alike
        felt = s if r else 0.0  # constraints of which none holds are not in F
        size = torch.cat([y.new_ones(q), y.new_full((r,), s)])
        K, cross = at.K * size.unsqueeze(-1) * size, at.cross * size.unsqueeze(-1)
        w = at.w / s
        F = torch.cat([at.gradient + at.K[:q, q:] @ at.w, s * at.values])
        singular = torch.linalg.svdvals(K)
        least = float(singular.min()) - ROUNDING * (q + r) * torch.finfo(y.dtype).eps * float(singular.max())
        if not least > 0:
            why = why or (
                "the system of the optimality conditions is singular at y: gradients of constraints that hold are"
                " dependent (LICQ), or nothing curves along them."
            )
            continue
        side = torch.cat([fy, fy.new_zeros(r)])
        v = torch.linalg.solve(K, side)
        Kv, gv = K @ v, cross.T @ v
        zw = torch.cat([y, w])
        known = of_conditions(constants, felt, float(w.norm()), least, float(singular.max()), cross)
        found = measured(zw, v, F, side - Kv, fx, side, gv, known, Kv)
        stretch = float(Kv.norm() / v.norm()) * (1 + 1e-12) if bool(v.any()) else None
        found = replace(found, curvature=stretch)
        rho = 2 * float(found.e) / least  # d lies between half of this and this, whatever M is
        known = of_conditions(constants, felt, float(w.norm()) + rho, least, float(singular.max()), cross)
        try:
            terms = bounded(found, known)
        except NonfiniteError:
            return refused("NaN or Inf was met")
        d = terms.distance
        reach = min(reach, d)
        if not math.isfinite(d):
            why = why or terms.reason
            continue
        short = _short(at, w, d, s, constants)
        if short:
            why = short
            continue
        off = distance(z, found.h)
        bound = off + terms.total + found.rounding
        if best is None or bound < best[0]:
            best = bound, _certificate(problem, at, constants, terms, off, found.rounding, bound, norm, w * s)
    return best[1] if best is not None and math.isfinite(best[0]) else refused(why or "NaN or Inf was met", reach)


def _alike(K: Tensor, q: int) -> float:
    """The scale of constraints that makes their gradients as large as the Hessian."""
    if K.shape[-1] == q:
        return 1.0
    top, side = (float(torch.linalg.matrix_norm(part, 2)) for part in (K[:q, :q], K[q:, :q]))
    return top / side if top > 0 and side > 0 else 1.0


def of_conditions(constants: Constants, s: float, W: float, least: float, most: float, cross: Tensor) -> Constants:
    """The constants of F, those of a smooth problem in (y, w), for constraints times s and multipliers within W.

    With a = M_yy + M_cyy W and b = L_cyy, both of c times s, the change of K u is at most
    |(a |dy| |u_y| + b (|dw| |u_y| + |dy| |u_w|), b |dy| |u_y|)| <= |(a + b, b)| |d| |u|. That of dF/dx has rows
    a |dy| + b |dw| and b |dy|, a = M_xy + M_cxy W, b = L_cxy, which is at most the norm of [[a, b], [b, 0]] times |d|.
    """
    L_cyy, L_cxy, M_cyy, M_cxy = (s * (getattr(constants, name) or 0.0) for name in NEEDED)
    assert constants.M_yy is not None and constants.M_xy is not None
    cross_bend = constants.M_xy + M_cxy * W
    return replace(
        constants,
        mu=least,
        L=most,
        C_G=float(torch.linalg.matrix_norm(cross, 2)) * (1 + 1e-12) if cross.numel() else 0.0,
        M_yy=math.hypot(constants.M_yy + M_cyy * W + L_cyy, L_cyy),
        M_xy=(cross_bend + math.hypot(cross_bend, 2 * L_cxy)) / 2,
        local=frozenset({"mu", "L", "C_G"}),
    )


def _short(at: Conditions, w: Tensor, d: float, s: float, constants: Constants) -> str:
    """Why the zero of F within d of (y, w) need not be y*; empty: it is."""
    rounding = ROUNDING * torch.finfo(w.dtype).eps
    cure = ": solve the inner problem more accurately, or move x away from a kink of y*(x)."
    if bool(at.signed.any()):
        force, near = float(w[at.signed].min()), d + rounding * float(w.abs().max())
        if not force > near:
            return f"the least multiplier, {s * force:.3g}, is not above {s * near:.3g}, which it may be off by{cure}"
    if len(at.room):
        bend = (constants.L_cyy or 0.0) * d * d / 2
        left = at.room - at.steep * d - bend - rounding * (at.room.abs() + at.steep)
        j = int(left.argmin())
        if not float(left[j]) > 0:
            return (
                f"a constraint that does not hold, {-float(at.room[j]):.3g} at y, may hold within {d:.3g} of it{cure}"
            )
    return ""


def _certificate(
    problem: FlatProblem,
    at: Conditions,
    constants: Constants,
    terms: Terms,
    off: float,
    rounding: float,
    bound: float,
    norm: float,
    w: Tensor,
) -> Certificate:
    reason = terms.reason or beyond(terms.distance, constants)
    values = [("least singular value", terms.mu, "at y, from the matrix")]
    if bool(at.signed.any()):
        values.append(("least multiplier", float(w[at.signed].min()), "at y"))
    if len(at.room):
        values.append(("least distance", float((at.room / at.steep.clamp_min(1e-300)).min()), "at y, to first order"))
    for name in ("L_fyy", "L_fxy", "M_yy", "M_xy", *NEEDED):
        number = getattr(constants, name)
        if number is not None:
            heuristic = ", heuristic" if name in constants.heuristic else ""
            values.append((name, number, constants.source + heuristic))
    return Certificate(
        bound=bound if math.isfinite(bound) else math.inf,
        terms={"inner": terms.inner, "linear": terms.linear, "estimate": off, "rounding": rounding},
        theorem="kkt",
        proven=not constants.heuristic and not reason and math.isfinite(bound),
        confidence=constants.confidence,
        assumed=tuple(Assumption(*value) for value in values),
        distance=terms.distance,
        grad_norm=norm,
        stats=problem.tally.stats(),
        reason=reason,
    )


def _rows(
    problem: FlatProblem,
    linear: Callable[..., Polytope] | None,
    moving: FlatPolytope | None,
    nonlinear: Callable[[Tensor], FlatConstraints] | None,
    x: Tensor,
    y: Tensor,
) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor, Tensor]:
    """All constraints as functions of (x, y); which are inequalities, which seem to hold, and which say nothing new."""
    q = y.shape[-1]

    def parts(x: Tree, *data: Any) -> Any:
        assert linear is not None
        return called("constraints(x, data)", linear, x, *data).parts(problem.y)

    def all_rows(x: Tensor, y: Tensor) -> Tensor:
        none = y.new_zeros(0)
        own = None if nonlinear is None else nonlinear(x)
        e, c = (none, none) if own is None else (own.equalities(y), own.inequalities(y))
        if linear is None:
            return torch.cat([e, c])
        A, b, lower, upper, G, h = problem.map(parts, "g", x)
        return torch.cat([e, A @ y - b, c, G @ y - h, y - upper, lower - y])

    at = Exact().linearize(problem, x, y)
    own = FlatConstraints(lambda y: y[..., :0], lambda y: y[..., :0]) if nonlinear is None else nonlinear(x)
    tangents = own.tangents(y)
    still = FlatPolytope(*(part.detach() for part in tangent(moving, tangents).tensors()))
    whole = still.with_slacks(y)
    curved = at.products(y)[0]
    found = Activity.of(still, whole, padded(at.gradient, whole), padded(curved, whole), None)
    k = tangents.c.shape[-1]
    tight = ~found.free[q:]
    G, c = tight[: len(tight) - k], tight[len(tight) - k :]
    equations = still.A.shape[-2] - len(tight)
    held = torch.ones(equations, dtype=torch.bool, device=y.device)
    bound, high, fixed = ~found.free[:q], found.upper[:q], still.fixed[:q]
    none = torch.zeros_like(bound)
    if linear is None:
        bound = high = fixed = none = none[:0]
    active = torch.cat([held, c, G, bound & (high | fixed), bound & ~high & ~fixed])
    signed = torch.cat([~held, torch.ones_like(c), torch.ones_like(G), ~fixed, ~fixed])
    idle = torch.cat([~held, torch.zeros_like(c), torch.zeros_like(G), none, fixed])
    return all_rows, signed, active, idle


def _jacobian(values: Tensor, leaves: tuple[Tensor, ...], graph: bool = False) -> list[Tensor]:
    """The derivatives of values `(k,)` in each leaf: `(k, size)`."""
    found = []
    for leaf in leaves:
        each = [
            torch.autograd.grad(
                value, leaf, retain_graph=True, create_graph=graph, allow_unused=True, materialize_grads=True
            )[0]
            if value.requires_grad
            else torch.zeros_like(leaf)
            for value in values
        ]
        found.append(torch.stack(each) if each else leaf.new_zeros(0, leaf.numel()))
    return found
