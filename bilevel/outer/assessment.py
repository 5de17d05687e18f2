"""Where an algorithm on batches is, by all the data: f, the directions that vanish at the solution, an error."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from bilevel._calculus import AbstractProducts, Exact, FiniteDifferences
from bilevel._estimate import FlatEstimate
from bilevel._flat import FlatProblem
from bilevel._linear import AbstractLinearSolver
from bilevel._result import Tally
from bilevel.algorithms.engine.direction import Coupled, Joint, residual_report
from bilevel.certificates.certificate import Constants, NonfiniteError


def _linear() -> AbstractLinearSolver:
    """For algorithms that have no v: D_x is to be that of y, to three digits."""
    from bilevel.solvers.cg import CG

    return CG(rtol=1e-3, max_steps=100)


def assessed(
    problem: FlatProblem, x: Tensor, y: Tensor, v: Tensor | None, *, second_derivatives: bool = True
) -> FlatEstimate:
    """f(x, y), D_x = grad_x f - G v and the residuals |grad_y g| and |H v - grad_y f|, all on the data of the problem.

    Cost: a gradient of f, one of g in y, the products H v and G v; where there is no v, a linear solve besides.

    Args:
        problem: on all the data.
        x: `(p,)`.
        y: the inner iterate `(*tasks, q)`.
        v: the linear iterate; None: there is none, and H v = grad_y f is solved.
        second_derivatives: whether they may be taken; otherwise products are differences of gradients.
    """
    products: AbstractProducts = Exact() if second_derivatives else FiniteDifferences()
    if v is None:
        linearized = products.linearize(problem, x, y)
        fy = Coupled(products).pieces(problem.with_tally(Tally()), Joint(x, y, torch.zeros_like(y)))[0].fy
        v = _linear().solve(linearized.operator, fy).value
    pieces, value = Coupled(products).pieces(problem, Joint(x, y, v))
    joint = pieces.joint()
    assert joint.v is not None
    reports = (residual_report("inner iterate", joint.y), residual_report("linear iterate", joint.v))
    return FlatEstimate(joint.x, value, y, reports, v)


def joint_norm(residual: float, found: FlatEstimate) -> float:
    """|(D_x, D_y, D_v)|, from the outer residual and the reports: zero at a stationary point, and only there."""
    return math.hypot(residual, *(report.residual for report in found.reports))


def bounded(problem: FlatProblem, x: Tensor, found: FlatEstimate, constants: Constants | None) -> FlatEstimate:
    """The same with a certified bound on |D_x - grad Phi(x)|, where a theorem gives one.

    Args:
        problem: on all the data.
        x: `(p,)`.
        found: what :func:`assessed` found there.
        constants: what is known of f and g, of each task; None: estimated there, but for tasks over ranks.
    """
    from bilevel.certificates.certify_flat import certify_flat  # which few runs come to
    from bilevel.certificates.estimate_constants import estimated

    try:
        if constants is None and problem.tasks_over is not None:  # each rank would know those of its own tasks
            return found
        known = estimated(problem, x, found.y) if constants is None else constants
        certificate = certify_flat(problem, x, found.grad, found.y, found.v, known, _linear())
    except (NonfiniteError, ValueError, NotImplementedError):  # what it needs is not there: nothing is certified
        return found
    return replace(found, bound=certificate.bound) if math.isfinite(certificate.bound) else found
