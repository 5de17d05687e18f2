"""Tests of `check` for inner problems with a non-smooth term: the manifold that y* is on, and the curvature there."""

from __future__ import annotations

from dataclasses import replace

import torch

from bilevel._calculus import Exact, Linearization
from bilevel._result import Report, Solved, Status, Tally
from bilevel.diagnostics.findings import Findings
from bilevel.diagnostics.subject import Subject

_DENSE = 200  # up to so many inner variables the spectrum is computed
_NEAR = 1e-6  # a relative margin below which a small move of x changes the manifold


def support_is_clear(subject: Subject, found: Findings) -> Findings:
    """How many directions y* can move in, how far the nearest kink is, and whether g + h is strongly convex there."""
    problem = subject.problem.with_tally(Tally())
    if subject.kind.term(problem) is None or not found.second_order or not bool(found.y.isfinite().all()):
        return found
    solved = Solved(found.y, (Status.successful,), found.y.new_zeros(()), 0)
    at = subject.kind.linearize(
        problem, subject.x, solved, lambda: Exact().linearize(problem, subject.x, found.y), None
    )
    parts = {report.part: report for report in at.reports}
    margin = parts["support"]
    good = None if margin.status.ok and margin.residual < _NEAR else margin.status.ok
    moving = parts.get("dimension of the support")
    words = "" if moving is None else f"y* can move in {moving.residual:.0f} of {found.y.shape[-1]} directions; "
    found = found.saying(
        "support",
        good,
        f"{words}the nearest kink of y*(x) is at a relative distance of {margin.residual:.2g}",
        f"{margin.status.value if not margin.status.ok else 'a small move of x changes the support'}",
    )
    return _curvature(found, at, parts)


def _curvature(found: Findings, at: Linearization, parts: dict[str, Report]) -> Findings:
    size = at.operator.size
    if not at.operator.positive_definite:
        radius = parts["spectral radius of the fixed-point map"].residual
        return found.saying(
            "curvature",
            True if radius < 1 else None,
            f"the map has no derivative in closed form; the spectral radius of the fixed-point map is {radius:.6g}",
            "y* may not be locally unique, and the linear system singular: add a strongly convex term in y",
        )
    if size > _DENSE:
        return found
    matrix = at.operator.dense(found.y).double()
    units = torch.eye(size, dtype=found.y.dtype, device=found.y.device)
    onto = torch.stack([at.right_hand_side(unit.expand_as(found.y).contiguous()) for unit in units], dim=-1).double()
    matrix, onto = matrix.reshape(-1, size, size), onto.reshape(-1, size, size)
    least, most = float("inf"), 0.0
    for K, P in zip(matrix, onto, strict=True):
        basis = torch.linalg.eigh((P + P.mT) / 2)
        Q = basis.eigenvectors[:, basis.eigenvalues > 0.5]
        if Q.shape[-1]:
            eigenvalues = torch.linalg.eigvalsh(Q.mT @ ((K + K.mT) / 2) @ Q)
            least, most = min(least, float(eigenvalues[0])), max(most, float(eigenvalues[-1]))
    if most == 0.0:
        return found
    eps = torch.finfo(found.y.dtype).eps * size
    if not least > eps * most:
        return replace(found, definite=False).saying(
            "curvature",
            False,
            f"no curvature on the support: eigenvalues from {least:.3g} to {most:.3g}",
            "y*(x) is not a strict minimum: the columns of the support are dependent; add a strongly convex term in y",
        )
    return found.saying("curvature", True, f"positive definite on the support, condition number {most / least:.3g}")
