"""An estimate of a hypergradient's error that needs no constants."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel._calculus import Exact, outer_gradients
from bilevel._flat import FlatProblem
from bilevel._registry import default_linear


def second_level(problem: FlatProblem, x: Tensor, y: Tensor, v: Tensor | None, z: Tensor) -> float:
    """|z - h_+|, h_+ the implicit gradient after one Newton correction of y: an estimate of |z - h|, no bound.

    h_+ has an error of second order in |y - y*|, so that the difference is the error of z up to that order. Two linear
    solves, two gradients of g and one of f. NaN where a linear solve does not succeed.
    """
    linear = default_linear(y)
    at = Exact().linearize(problem, x, y)
    step = linear.solve(at.operator, at.gradient)
    y = y - step.value
    at = Exact().linearize(problem, x, y)
    _, fx, fy = outer_gradients(problem, x, y)
    system = linear.solve(at.operator, fy, v)
    if not (step.status.ok and system.status.ok):
        return float("nan")
    cross = at.cross(system.value)
    if cross is None and problem.problem.init is not None:  # y is where the steps lead, not a minimizer
        return float("nan")
    better = fx if cross is None else fx - cross
    return float(torch.linalg.vector_norm(z - better))
