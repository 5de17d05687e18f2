"""Test of `check`: the implicit gradient against a difference of Phi along a random direction."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel._apply import apply_estimator
from bilevel._calculus import Exact, outer_gradients
from bilevel._estimate import FlatStart
from bilevel._result import Status
from bilevel.diagnostics.findings import Findings
from bilevel.diagnostics.subject import Subject
from bilevel.inner_problems.kinds import inner_objective
from bilevel.named.registry import build
from bilevel.solvers.cg import accurate_cg


def hypergradient_agrees(subject: Subject, found: Findings) -> Findings:
    """Whether <h, d> is the central difference of Phi along d; where all before is sound, and y depends on x by g."""
    sound = found.second_order and found.definite and found.solvable and found.smooth
    if not sound or found.dependence != "inner objective":
        return found
    if not subject.kind.implicit:  # nothing that is differentiated implicitly
        return found
    at = _implicit(subject, found)
    if at is None:
        return found
    (h, at_kink), d = at, subject.direction(subject.x)
    # The difference is off by some t^2 and by the error of Phi over t, which may then be as large as sqrt(eps).
    t = torch.finfo(subject.x.dtype).eps ** 0.25 * max(1.0, float(torch.linalg.vector_norm(subject.x)))
    solver = subject.solver()
    ends = []
    for sign in (1.0, -1.0):
        x = subject.x + sign * t * d
        y = solver.solve(inner_objective(subject.problem, x), found.y).value
        ends.append(float(subject.problem.f(x, y)))
    slope, predicted = (ends[0] - ends[1]) / (2 * t), float(h @ d)
    # Relative to what <h, d> is along a typical direction: a d nearly orthogonal to h must not count.
    size = max(abs(predicted), float(torch.linalg.vector_norm(h)) * subject.x.numel() ** -0.5, 1e-12)
    off = abs(slope - predicted) / size
    return found.saying(
        "hypergradient",
        True if off < 1e-2 else (None if off < 0.1 or at_kink else False),
        f"<h, d> = {predicted:.5g}, difference of Phi = {slope:.5g} along a random direction",
        "Phi is not smooth here, or the inner problem is not solved accurately enough",
    )


def _implicit(subject: Subject, found: Findings) -> tuple[Tensor, bool] | None:
    """The implicit gradient at the solution that was found, and whether y* has a kink there; None: there is none."""
    if not subject.minimizes_g:
        try:
            estimate = apply_estimator(
                build(subject.kind.implicit, subject.setting), subject.problem, subject.x, FlatStart(found.y)
            )
        except (ValueError, NotImplementedError):  # such as a proximal map that is not separable
            return None
        return estimate.grad, any(report.status is Status.weakly_active for report in estimate.reports)
    at = Exact().linearize(subject.problem, subject.x, found.y)
    _, fx, fy = outer_gradients(subject.problem, subject.x, found.y)
    cross = at.cross(accurate_cg(found.y).solve(at.operator, fy).value)
    return fx if cross is None else fx - cross, False
