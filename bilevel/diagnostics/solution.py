"""Tests of `check`: the inner problem is solved, its minimum strict, and x and y* evenly scaled."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bilevel._calculus import Exact
from bilevel._linear import LinearOperator
from bilevel._numerics.misfits import origin
from bilevel._numerics.spectrum import largest_eigenvalue
from bilevel._result import Status
from bilevel.diagnostics.findings import Findings
from bilevel.diagnostics.subject import Subject
from bilevel.inner_problems.kinds import inner_objective
from bilevel.requirements.kinks import kinked

_DENSE = 200  # up to so many inner variables the spectrum at the solution is computed, not estimated
_ILL = 1e6  # a condition number above which some thousand steps of conjugate gradients are to be expected
_UNEVEN = 1e8  # between the sizes of entries: about what a gradient in float32 can still tell from nothing


def inner_problem_is_solved(subject: Subject, found: Findings) -> Findings:
    """How far the inner solver gets; y is then where it ended."""
    if not subject.minimizes_g:
        return _other_kind_is_solved(subject, found)
    try:
        solver = subject.solver()
        first = inner_objective(subject.problem, subject.x).gradient(subject.y0)
        solved = solver.solve(inner_objective(subject.problem, subject.x), subject.y0)
    except NotImplementedError:
        return _not_tried(found)
    before, after = float(torch.linalg.vector_norm(first)), float(solved.residual.max())
    finite = bool(solved.value.isfinite().all())
    solvable = solved.status.ok and finite
    return replace(found, solvable=solvable, y=solved.value if finite else subject.y0).saying(
        "inner solution",
        solvable,
        f"|grad_y g| from {before:.3g} to {after:.3g} in {solved.steps} steps",
        solved.status.value,
    )


def _other_kind_is_solved(subject: Subject, found: Findings) -> Findings:
    """The same where y is not given by grad_y g = 0; of an iteration nothing is asked but a finite y."""
    try:
        solved = subject.solved(subject.x, subject.y0)
    except NotImplementedError:
        return _not_tried(found)
    except Exception as error:  # whatever the user's functions raise is the verdict
        text = f"the inner problem raised {type(origin(error)).__name__}: {error}"
        return replace(found, wrong=found.wrong | {"values"}).saying(
            "inner solution", False, text, "make it run at (x, y0)"
        )
    finite = bool(solved.value.isfinite().all())
    solvable = finite and (solved.status.ok or not subject.stationary)
    text = f"optimality violated by {float(solved.residual.max()):.3g} after {solved.steps} steps"
    if found.constrained:
        text += f"; {solved.at_bounds} bounds hold"
    if not subject.stationary:
        text = f"y is {'finite' if finite else 'not finite'} after {solved.steps} steps"
    found = replace(found, solvable=solvable, y=solved.value if finite else subject.y0)
    return found.saying("inner solution", solvable, text, solved.status.value)


def g_is_smooth_there(subject: Subject, found: Findings) -> Findings:
    """Whether g has no kink at the inner solution; kinks elsewhere are harmless."""
    if not subject.has_g or not subject.stationary or not bool(found.y.isfinite().all()):
        return found
    at_kink = bool(kinked(subject.problem, subject.x, found.y).any())
    return replace(found, kinked=at_kink).saying(
        "smooth at y*",
        not at_kink,
        f"{'the gradient of g or its Hessian jumps' if at_kink else 'g has no kink'} at the inner solution",
        Status.kink.value,
    )


def _not_tried(found: Findings) -> Findings:
    return found.saying("inner solution", None, "not tried: it needs a second derivative that torch does not have")


def minimum_is_strict(subject: Subject, found: Findings) -> Findings:
    """Whether the inner Hessian at y is positive definite, and its condition number."""
    if not found.second_order or not subject.minimizes_g:
        return found  # of no account under constraints, or is singular off the support of a non-smooth term
    hessian = Exact().linearize(subject.problem, subject.x, found.y).operator
    least, most = _extreme_eigenvalues(hessian, found.y)
    eps = torch.finfo(found.y.dtype).eps * hessian.size
    if not least > eps * abs(most):
        kind = "negative" if least < -eps * abs(most) else "no"
        return replace(found, definite=False).saying(
            "curvature",
            False,
            f"{kind} curvature at the inner solution: eigenvalues from {least:.3g} to {most:.3g}",
            "y*(x) is not a strict minimum: add a regularizer in y to g, or use 'aid-minres', ITD or ESJ knowingly;"
            " where y are the weights of a network, take 'network' (`GaussNewton()` products where g is declared as"
            " `SupervisedTraining(outputs, loss)`, else damped and truncated ones), which says how biased it is, or the"
            " algorithm 'f2sa', which takes no second derivatives",
        )
    kappa = most / least if least > 0 else float("inf")
    steps = int(kappa**0.5 * 5) + 1
    return found.saying(
        "curvature",
        True if kappa < _ILL else None,
        f"positive definite, condition number {kappa:.3g}; conjugate gradients need about"
        f" {min(steps, hessian.size)} steps",
        "ill conditioned: rescale y, strengthen the regularizer, or give CG a preconditioner",
    )


def _extreme_eigenvalues(hessian: LinearOperator, y: Tensor) -> tuple[float, float]:
    """The least and the largest, of all tasks."""
    if hessian.size <= _DENSE:
        matrix = hessian.dense(y)
        eigenvalues = torch.linalg.eigvalsh((matrix + matrix.mT).double() / 2)
        return float(eigenvalues[..., 0].min()), float(eigenvalues[..., -1].max())
    most = float(largest_eigenvalue(hessian, y).max())
    top = max(most, 1e-30)
    shifted = LinearOperator(lambda v: top * v - hessian.mv(v), hessian.size)
    # A Ritz value is at most lambda_max of the shifted operator: `least` may be too large, never too small.
    return top - float(largest_eigenvalue(shifted, y, overshoot=0.01).max()) * 0.99, most


def scales_are_even(subject: Subject, found: Findings) -> Findings:
    """Whether the entries of x and of y* are of similar size."""
    uneven = []
    for name, vector in (("x", subject.x), ("y*", found.y)):
        sizes = vector.abs()[vector != 0]
        if sizes.numel() and float(sizes.max() / sizes.min()) > _UNEVEN:
            uneven.append(f"entries of {name} range from {float(sizes.min()):.1g} to {float(sizes.max()):.1g}")
    return found.saying(
        "scales",
        None if uneven else True,
        "; ".join(uneven) or "x and y* are evenly scaled",
        "optimize logarithms of quantities that differ by orders of magnitude",
    )
