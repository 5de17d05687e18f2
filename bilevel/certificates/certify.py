"""A-posteriori certificates: how wrong a hypergradient can be, from residuals measured at run time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bilevel._estimate import Estimate
from bilevel._flat import FlatProblem, ravel_rows, row_structure
from bilevel._linear import AbstractLinearSolver
from bilevel._numerics.transforms import demand_autograd
from bilevel._problem import BilevelProblem, check_signature
from bilevel._result import Substitute
from bilevel._tree import Tree, ravel
from bilevel.arguments.checked import checked
from bilevel.certificates.applies import no_certificate, no_certificate_at
from bilevel.certificates.assumptions import NEEDED
from bilevel.certificates.certificate import Certificate, Constants
from bilevel.certificates.certify_flat import certify_flat
from bilevel.certificates.curved_face import NEEDED as NEEDED_OF_CONSTRAINTS, certify_on_curved_face
from bilevel.certificates.face import certify_on_face
from bilevel.certificates.fixed_point import certify_fixed_point
from bilevel.certificates.manifold import certify_on_manifold
from bilevel.certificates.penalty import certify_penalty
from bilevel.certificates.task_by_task import certify_tasks
from bilevel.inner_problems.constrained import LinearlyConstrained
from bilevel.inner_problems.kind import AbstractInnerProblem
from bilevel.inner_problems.kinds import inner_problem
from bilevel.inner_problems.nonlinearly_constrained import NonlinearlyConstrained
from bilevel.prox.group_lasso import GroupLasso
from bilevel.requirements.properties import DoesNotApply, Feature
from bilevel.solvers.cg import accurate_cg


@checked()
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
    estimate's y and v (H itself, also where the estimate solved another system by design, `Estimate.substitute`), and
    d = |e| / mu >= |y - y*|:

        |z - h| <= |z - h_v| + d (L_fxy + M_xy |v|) + (C_G / mu) (|r| + d (L_fyy + M_yy |v|)).

    mu, L_fyy, L_fxy, M_yy and M_xy must hold on the segment from y to y*, C_G at both of its ends.

    The estimate may come from any estimator: one that solved no linear system has one solved here. Without mu, the
    local theorem applies: with m the least eigenvalue of H at y and 2 M_yy |e| <= m^2, a stationary point lies within
    d = (m - m*) / M_yy, m* = sqrt(m^2 - 2 M_yy |e|), and the bound holds with m* for mu; it is then the local branch
    of y* that is certified. M_yy must hold within d of y. The same theorem extends a mu that was measured at y.

    Residuals and norms are recomputed in float64, whatever the dtype of x and y and of the data that f and g close
    over. Where f or g cannot be evaluated in it, a rounding error is added to each, 8 units of the dtype times |H| |y|
    and the like; what cancels inside of f and g it does not see, and so the certificate is then a heuristic. A mu or
    C_G that the products contradict makes the bound infinite.

    With a non-smooth term that is separable and piecewise quadratic (`L1`, boxes, ...), or `GroupLasso`, all of
    this holds on the manifold that y* is on: mu, or the least curvature measured there, is that of the support;
    what is shown first is that the margin of the support is larger than the error of y, so that y* has that support.
    Where it is not, the bound is infinite, with the reason. g has to be convex in y. See `docs/non_smooth.md`.

    Under linear constraints all of this holds on the face that y* is on, of a vertex without any curvature; what is
    shown first is that strict complementarity has a margin larger than the error of y. Under nonlinear constraints, and
    where rows move with x, Newton and Kantorovich's theorem is taken of the optimality conditions with what holds as
    equations: it needs the constants of the constraints, L_cyy, L_cxy, M_cyy and M_cxy, and mu, L and C_G of none.
    Where there is no such margin, and in float32, the bound is infinite, with the reason. g and the constraints have to
    be convex in y. Tasks are certified one after the other. See `docs/constraints.md`.

    For a fixed point y = T(x, y) the constants are those of y - T(x, y): mu = 1 - rho where T contracts by rho in the
    2-norm, M_yy and M_xy of dT/dy and dT/dx, C_G of dT/dx. Without mu it is the least singular value of I - dT/dy at y
    that the local theorem extends. See `docs/fixed_points.md`.

    Cost: two gradients, one Hessian product and one cross product with all constants and v given. Without C_G some
    30 cross products more, to bound |G| at y with 99 % confidence; without L a gradient and some 14 Hessian products,
    to bound |H| there alike, which the rounding of residuals is proportional to; without mu q products, for the dense
    Hessian; with `refine` one more linear solve, for s = H^-1 e, and the same again at y - s. With an `init` one
    uncounted gradient, to see whether y depends on x by more than its start.

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
        The certificate. Its bound is infinite, with a reason, where the theorem does not apply; where it is valid but
        not below |z|, a remark says why and what helps.

    Raises:
        TypeError: if `estimate` or `constants` is of another type.
        ValueError: if needed constants are missing, or structures do not match; if y is no unconstrained minimizer of
            a smooth g, or depends on x through its start only.

    Example:
        >>> import torch
        >>> from bilevel import hypergradient
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> x = torch.tensor(1.0, dtype=torch.float64)
        >>> constants = Constants(mu=1.0, L_fyy=1.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0, C_G=1.0)
        >>> certify(
        ...     problem, x, hypergradient(problem, x, torch.zeros_like(x)), constants
        ... ).bound < 1e-6
        True
    """
    if not isinstance(estimate, Estimate) or not isinstance(constants, Constants):
        raise TypeError(
            f"`certify(problem, x, estimate, constants)` needs an Estimate and Constants. Got"
            f" {type(estimate).__name__} and {type(constants).__name__}. Pass what `hypergradient` returned."
        )
    missing = [name for name in NEEDED if getattr(constants, name) is None]
    if missing:
        raise ValueError(
            f"`certify` needs the constants {', '.join(NEEDED)}. Missing: {', '.join(missing)}."
            f" Give them, or use `estimate_constants(problem, x, estimate.y)`, or see `estimate.error_estimate`."
        )
    demand_autograd("certify")
    check_signature(problem, data)
    kind = inner_problem(problem)
    # kinds with theorems of their own
    own = {Feature.prox, Feature.constraints, Feature.nonlinear_constraints, Feature.fixed_point}
    why = "" if own & kind.features else no_certificate(problem)
    if why:
        raise ValueError(f"`certify` does not apply: {why}")
    x_vector, x_structure = ravel(x, "x")
    z = x_structure.ravel(estimate.grad, "`certify(x=..., estimate=...)`: estimate.grad")
    flat = FlatProblem(problem, x_structure, row_structure(estimate.y, "estimate.y", several=bool(problem.tasks)), data)
    y = ravel_rows(flat, estimate.y, "estimate.y")
    if problem.tasks and _by_tasks(flat, kind, x_vector.detach()) and not (refine or first_order):

        def one(task: FlatProblem, z: Tensor, y: Tensor) -> Certificate:
            single = replace(estimate, grad=x_structure.unravel(z), y=task.y.unravel(y), v=None, multipliers=None)
            return certify(task.problem, x, single, constants, data=task.data, linear=linear)

        return certify_tasks(flat, kind, x_vector.detach(), z.detach(), y, one)
    if (term := kind.term(flat)) is not None:
        if refine or first_order:
            raise ValueError(
                "`certify(refine=..., first_order=...)` is for smooth inner problems. Here there is a non-smooth term:"
                " leave them out."
            )
        v = None if estimate.v is None else ravel_rows(flat, estimate.v, "estimate.v")
        solver = accurate_cg(y) if linear is None else linear
        return certify_on_manifold(flat, term, x_vector.detach(), z.detach(), y, v, constants, solver)
    with torch.enable_grad():
        leaf = x_vector.detach().requires_grad_()
        constraints = kind.linear_constraints(flat, leaf)
    if (constraints is not None or isinstance(kind, NonlinearlyConstrained)) and (refine or first_order):
        raise ValueError(
            "`certify(refine=..., first_order=...)` is for smooth inner problems. Here there are constraints: leave"
            " them out."
        )
    if isinstance(kind, NonlinearlyConstrained):
        missing = [name for name in NEEDED_OF_CONSTRAINTS if getattr(constants, name) is None]
        if missing:
            raise ValueError(
                f"`certify` needs the constants {', '.join(NEEDED_OF_CONSTRAINTS)} of nonlinear constraints on y (see"
                f" `Constants`). Missing: {', '.join(missing)}. Give them: 0 where a derivative does not change with y."
            )
        return certify_on_curved_face(
            flat,
            kind.constraints,
            kind.polytope(flat, x_vector.detach()),
            lambda x: kind.nonlinear(flat, x),
            x_vector.detach(),
            z.detach(),
            y,
            constants,
        )
    if constraints is not None:
        solver = accurate_cg(y) if linear is None else linear
        if isinstance(kind, LinearlyConstrained) and constraints.A.requires_grad and constants.L_cxy is not None:
            known = replace(constants, L_cyy=0.0, M_cyy=0.0, M_cxy=0.0)  # rows are affine in y
            return certify_on_curved_face(
                flat, kind.constraints, constraints, None, x_vector.detach(), z.detach(), y, known
            )
        return certify_on_face(flat, constraints, leaf, z.detach(), y, constants, solver)
    if Feature.fixed_point in kind.features:
        if refine or first_order:
            raise ValueError(
                "`certify(refine=..., first_order=...)` is for smooth inner problems. Here y is a fixed point: leave"
                " them out."
            )
        v = None if estimate.v is None else ravel_rows(flat, estimate.v, "estimate.v")
        at = (x_vector.detach(), z.detach(), y, v)
        found = certify_fixed_point(flat, kind, *at, constants, linear)
        return found if estimate.substitute is None else replace(found, remark=_of_another(estimate.substitute, found))
    why = no_certificate_at(flat, x_vector.detach(), y)
    if why:
        raise ValueError(f"`certify` does not apply: {why}")
    v = None if estimate.v is None else ravel_rows(flat, estimate.v, "estimate.v")
    if first_order:
        try:
            return _first_order(flat, x_vector.detach(), z.detach(), y, estimate, constants)
        except DoesNotApply as error:
            raise ValueError(f"`certify` does not apply: {error.reason}") from error
    solver = accurate_cg(y) if linear is None else linear
    found = certify_flat(flat, x_vector.detach(), z.detach(), y, v, constants, solver, refine)
    return found if estimate.substitute is None else replace(found, remark=_of_another(estimate.substitute, found))


def _by_tasks(problem: FlatProblem, kind: AbstractInnerProblem, x: Tensor) -> bool:
    """Whether the theorems of this kind are of one problem, so that tasks are certified one after the other."""
    if {Feature.constraints, Feature.nonlinear_constraints} & kind.features:
        return True
    term = kind.term(problem)
    return term is not None and isinstance(term.one_at(x), GroupLasso)


def _of_another(substitute: Substitute, found: Certificate) -> str:
    """The remark of a certificate for an estimate that solved another system, whose residual is part of the bound."""
    text = f"v is that of another system by design ({substitute}); that residual is the part 'linear' of the bound."
    return f"{text} {found.remark}".strip()


def _first_order(
    problem: FlatProblem, x: Tensor, z: Tensor, y: Tensor, estimate: Estimate, constants: Constants
) -> Certificate:
    if estimate.penalized is None or constants.mu is None:
        raise ValueError(
            "`certify(first_order=True)` needs an estimate of `Penalty(..., extrapolate=False)`, and mu."
            " Leave it out: any estimate is certified through one implicit gradient."
        )
    if "mu" in constants.local:
        raise ValueError("`certify(first_order=True)` needs a mu that holds along the segment. Got one measured at y.")
    y_w = ravel_rows(problem, estimate.penalized[0], "estimate.penalized")
    return certify_penalty(problem, x, z, y, y_w, estimate.penalized[1], constants)
