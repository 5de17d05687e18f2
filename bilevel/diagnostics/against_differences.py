"""Test of `check`: the derivative of Phi by those of the inner problem against differences along a random direction."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bilevel._apply import apply_estimator
from bilevel._calculus import Exact, outer_gradients
from bilevel._estimate import AbstractEstimator, FlatStart
from bilevel._inner import AbstractUnrollable
from bilevel._result import Status, Tally
from bilevel.diagnostics.findings import Findings
from bilevel.diagnostics.subject import Subject
from bilevel.hypergrad.itd import ITD
from bilevel.named.registry import build
from bilevel.named.slopes import slopes
from bilevel.requirements.properties import DoesNotApply, Property
from bilevel.solvers.cg import accurate_cg


def hypergradient_agrees(subject: Subject, found: Findings) -> Findings:
    """Whether <h, d> is the slope of Phi along d; where all before is sound, and y depends on x.

    Of an inner problem whose solution depends on x the implicit gradient, else the derivative of its steps.
    """
    sound = found.second_order and found.definite and found.solvable and not found.kinked
    if not sound or found.dependence in ("", "none"):
        return found
    by_steps = not subject.stationary or found.dependence != "inner objective"
    try:
        at = _of_steps(subject) if by_steps else _implicit(subject, found)
    except ValueError as error:  # such as a proximal map that is not separable
        reason = error.__cause__.reason if isinstance(error.__cause__, DoesNotApply) else ""
        return replace(found, no_condition=reason)
    except NotImplementedError:
        return found
    if at is None:
        return found
    (h, v, at_kink), d = at, subject.direction(subject.x)
    solver = subject.setting.unrolled() if by_steps and subject.inner is None else subject.solver()
    start = subject.given if by_steps else found.y
    quiet = subject.problem.with_tally(Tally())
    along = slopes(quiet, subject.x, start, solver, d, v, 2, from_start=by_steps)
    predicted = float(h @ d)
    # Relative to what <h, d> is along a typical direction: a d nearly orthogonal to h must not count.
    size = max(abs(predicted), float(torch.linalg.vector_norm(h)) * subject.x.numel() ** -0.5, 1e-12)
    if along.one_sided(1e-6 * size):
        return found.saying(
            "hypergradient",
            None,
            f"Phi has a kink here: its slopes are {along.left[-1]:.5g} and {along.right[-1]:.5g} to the two sides",
            Status.one_sided.value,
        )
    off = along.off(predicted) / size
    good = True if off < 1e-2 else (None if off < 0.1 or at_kink or not found.smooth else False)
    if good is False:
        found = replace(found, wrong=found.wrong | {"Phi"})
    return found.saying(
        "hypergradient",
        good,
        f"<h, d> = {predicted:.5g}, difference of Phi = {along.central[0]:.5g} along a random direction",
        "x may be detached in a part of the inner problem, the inner problem not solved accurately enough, or Phi not"
        " smooth here",
    )


def _implicit(subject: Subject, found: Findings) -> tuple[Tensor, Tensor | None, bool] | None:
    """The implicit gradient at the solution that was found, v, and whether y* has a kink there; None: there is none.

    Raises:
        ValueError: if there is no optimality condition to differentiate.
    """
    if not subject.kind.implicit:
        return None
    if not subject.minimizes_g:
        return _estimated(subject, build(subject.kind.implicit, subject.setting), found.y)
    at = Exact().linearize(subject.problem, subject.x, found.y)
    _, fx, fy = outer_gradients(subject.problem, subject.x, found.y)
    v = accurate_cg(found.y).solve(at.operator, fy).value
    cross = at.cross(v)
    return (fx if cross is None else fx - cross), v, False


def _of_steps(subject: Subject) -> tuple[Tensor, Tensor | None, bool] | None:
    """The derivative of the steps that are taken by name, or of those of the user's solver."""
    if Property.steps not in subject.kind.offers:
        return None
    if subject.inner is None:
        return _estimated(subject, build("itd", subject.setting), subject.given)
    if not isinstance(subject.inner, AbstractUnrollable):
        return None
    return _estimated(subject, ITD(subject.inner), subject.given)


def _estimated(subject: Subject, estimator: AbstractEstimator, start: Tensor) -> tuple[Tensor, None, bool]:
    estimate = apply_estimator(estimator, subject.problem, subject.x, FlatStart(start))
    return estimate.grad, None, any(report.status is Status.weakly_active for report in estimate.reports)
