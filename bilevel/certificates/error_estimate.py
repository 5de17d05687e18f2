"""An estimate of a hypergradient's error that needs no constants."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bilevel._calculus import Exact, outer_gradients
from bilevel._flat import FlatProblem
from bilevel._numerics.rows import safe_row_norms
from bilevel.certificates.applies import no_certificate
from bilevel.certificates.double_precision import in_double
from bilevel.requirements.properties import DoesNotApply
from bilevel.solvers.cg import accurate_cg


def second_level(problem: FlatProblem, x: Tensor, y: Tensor, v: Tensor | None, z: Tensor) -> float:
    """|z - h_+|, h_+ the implicit gradient after one Newton correction of y: an estimate of |z - h|, no bound.

    h_+ has an error of second order in |y - y*|, so that the difference is the error of z up to that order. Two linear
    solves, two gradients of g and one of f, in float64 wherever f and g can be evaluated in it. NaN where a linear
    solve does not succeed, and where y is constrained.
    """
    if no_certificate(problem.problem):
        return math.nan  # the Newton correction is of grad_y g = 0
    if y.dtype != torch.float64:
        doubled = in_double(problem, problem.tally)
        try:
            found = _second_level(doubled, x.double(), y.double(), None if v is None else v.double(), z)
        except (RuntimeError, TypeError, ValueError):
            found = math.nan  # f or g insists on its dtype
        if math.isfinite(found):
            return found
    return _second_level(problem, x, y, v, z)


def _second_level(problem: FlatProblem, x: Tensor, y: Tensor, v: Tensor | None, z: Tensor) -> float:
    linear = accurate_cg(y)
    at = Exact().linearize(problem, x, y)
    step = linear.solve(at.operator, at.gradient)
    y = y - step.value
    at = Exact().linearize(problem, x, y)
    _, fx, fy = outer_gradients(problem, x, y)
    system = linear.solve(at.operator, fy, v)
    try:
        cross = at.cross(system.value)
    except DoesNotApply:  # y depends on x only through its start: it is where the steps lead, not a minimizer
        return math.nan
    if not (step.status.ok and system.status.ok):
        return math.nan
    better = fx if cross is None else fx - cross
    return float(safe_row_norms(z.double() - better.double()))
