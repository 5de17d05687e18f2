"""Test of `check`: what the derivative of a constrained minimizer needs; the whole conditions agree with it."""

from __future__ import annotations

from dataclasses import replace

import torch

from bilevel._apply import apply_estimator
from bilevel._estimate import FlatEstimate, FlatStart
from bilevel._result import Report, Status, Tally
from bilevel.diagnostics.findings import Findings
from bilevel.diagnostics.subject import Subject
from bilevel.hypergrad.aid import AID
from bilevel.hypergrad.full_kkt import FullKKT
from bilevel.solvers.saddle_cholesky import SaddleCholesky

_DENSE = 200  # up to so many entries of y the whole conditions are solved too


def constraints_are_regular(subject: Subject, found: Findings) -> Findings:
    """Whether what holds is independent, multipliers are positive and the Lagrangian is curved where it has to be.

    Where all that is so, the derivative by the active set is compared with that of the whole conditions.
    """
    if not subject.constrained or not found.second_order or not found.solvable:
        return found
    problem, start = subject.problem.with_tally(Tally()), FlatStart(found.y, None, 1)
    try:
        reduced = apply_estimator(AID(subject.solver(), SaddleCholesky()), problem, subject.x, start)
    except (ValueError, NotImplementedError):  # why is said where estimators are listed
        return found
    reports = {report.part: report for report in reduced.reports}
    found = _of(found, "active constraints", reports["active bounds"], "margin of strict complementarity")
    found = _of(found, "independence", reports["independence of active constraints"], "least singular value")
    curved = reports["linear solver"].status is not Status.not_positive_definite
    found = replace(found, definite=curved).saying(
        "curvature",
        curved,
        f"the Lagrangian is {'' if curved else 'not '}positive definite along the constraints that hold",
        Status.not_positive_definite.value,
    )
    sound = all(report.status.ok for report in reduced.reports)
    if not sound or found.y.shape[-1] > _DENSE:
        return found
    return _compared(found, reduced, apply_estimator(FullKKT(subject.solver()), problem, subject.x, start))


def _of(found: Findings, name: str, report: Report, measure: str) -> Findings:
    good = True if report.status.ok else None
    return found.saying(name, good, f"{measure} {report.residual:.3g}", report.status.value)


def _compared(found: Findings, reduced: FlatEstimate, whole: FlatEstimate) -> Findings:
    off = float(torch.linalg.vector_norm(reduced.grad - whole.grad))
    size = max(float(torch.linalg.vector_norm(reduced.grad)), 1e-12)
    good = off < 1e-6 * size + 1e-9
    return found.saying(
        "whole conditions",
        True if good else None,
        f"without an active set the hypergradient differs by {off / size:.2g} of its size",
        "a constraint may hold only just: solve the inner problem more accurately, or move x a little",
    )
