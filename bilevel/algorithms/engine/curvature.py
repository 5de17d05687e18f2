"""The least curvature of a sum of g and f in y, as few products see it."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel._flat import FlatProblem
from bilevel._inner import Objective
from bilevel._linear import LinearOperator
from bilevel._numerics.lanczos import ritz_ends
from bilevel._numerics.rows import safe_row_norms
from bilevel._result import Tally
from bilevel.algorithms.oracle import Oracle


def most_data(oracle: Oracle) -> FlatProblem:
    """The problem on all the data where they are known, and on the first batches where not; counting nowhere."""
    problem = oracle.whole() if oracle.has_whole else oracle.problem()
    return problem.with_tally(Tally())


def least_curvature(problem: FlatProblem, x: Tensor, y: Tensor, nu: float) -> tuple[float, float]:
    """The least eigenvalue of H_g + nu H_f of all tasks, as 64 Lanczos steps see it, and how large its rounding may be.

    Products are exact, or central differences of gradients where torch has no second derivatives.
    """
    objective = Objective(lambda y: problem.g(x, y) + nu * problem.f_each(x, y), problem.tally)
    try:
        least, most = ritz_ends(objective.hessian(y)[2], y)
        digits = 1.0
    except NotImplementedError:
        step = torch.finfo(y.dtype).eps ** (1 / 3)
        t = step * (1 + safe_row_norms(y)).unsqueeze(-1)  # products are with vectors of unit length
        differences = LinearOperator(
            lambda v: (objective.gradient(y + t * v) - objective.gradient(y - t * v)) / (2 * t), y.shape[-1]
        )
        least, most = ritz_ends(differences, y)
        digits = 1 / step
    size = float(torch.maximum(least.abs(), most.abs()).max())
    return float(least.min()), 10 * digits * torch.finfo(y.dtype).eps * size
