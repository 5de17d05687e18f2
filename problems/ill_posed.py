"""Inner problems that break an assumption, and what has to happen there."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import FINITE


@checked()
def rank_deficient(*, consistent: bool = False) -> Instance:
    """A line of minimizers: g = (y_1 + y_2 - x)^2 / 2, f = (y_1 + y_2 - 1)^2 / 2 + (y_1 - y_2 - 1)^2 / 2.

    With `consistent`, f has its first term only: grad_y f lies in the range of H = 11', every solution v of
    H v = grad_y f gives the same hypergradient x - 1, and Krylov methods find it, as does ITD; a Cholesky
    factorization must report that H is not positive definite.

    Without it H v = grad_y f has no solution and the hypergradient does not exist, although the iterates started
    at zero go to the solution of least norm y = (x / 2, x / 2), which is what `solution` gives. An implicit
    estimator must end in a status other than `successful`; a finite number that looks like an answer is wrong.

    Args:
        consistent: leave out the second term of f.

    Example:
        >>> rank_deficient().solution(torch.tensor(2.0))
        tensor([1., 1.])
    """
    return Instance(
        problem=BilevelProblem(_sum if consistent else _sum_and_difference, _line),
        x0=torch.zeros((), dtype=torch.float64, device="cpu"),
        y0=torch.zeros(2, dtype=torch.float64, device="cpu"),
        description="singular inner Hessian" + ("" if consistent else ", no hypergradient"),
        solution=_least_norm,
        gradient=_of_sum if consistent else None,
        settings={"estimator": "aid-cg", "outer_step": 0.1, "max_steps": 50},
    )


@checked(tilt=FINITE, start=FINITE)
def double_well(*, tilt: float = 0.0, start: float = 0.0) -> Instance:
    """Two wells: g = (y^2 - 1)^2 / 4 - (x + tilt) y with |x + tilt| < 2 / (3 sqrt 3), and f = (y - 1)^2 / 2.

    Started at y = 0 with x + tilt = 0, y is a stationary point that is no minimum: the curvature there is -1, and
    an implicit estimator that stays there must report `negative_curvature` (or `not_positive_definite`). Started
    in a well, y follows that local branch, along which the hypergradient (y - 1) / (3 y^2 - 1) is right; it jumps
    where the branch ends. There are no constants: g is not convex.

    Args:
        tilt: added to x.
        start: y0.

    Example:
        >>> instance = double_well(start=2.0)
        >>> float(instance.problem.g(instance.x0, instance.y0))
        2.25
    """
    return Instance(
        problem=BilevelProblem(_to_one, partial(_wells, tilt)),
        x0=torch.zeros((), dtype=torch.float64, device="cpu"),
        y0=torch.tensor(start, dtype=torch.float64, device="cpu"),
        description="double well: a nonconvex inner problem",
        settings={"estimator": "aid-cg", "outer_step": 0.05, "max_steps": 50},
    )


def _sum(_: Tensor, y: Tensor) -> Tensor:
    return (y.sum() - 1).square() / 2


def _sum_and_difference(x: Tensor, y: Tensor) -> Tensor:
    return _sum(x, y) + (y[0] - y[1] - 1).square() / 2


def _line(x: Tensor, y: Tensor) -> Tensor:
    return (y.sum() - x).square() / 2


def _least_norm(x: Tensor) -> Tensor:
    return torch.stack([x / 2, x / 2])


def _of_sum(x: Tensor) -> Tensor:
    return x - 1


def _to_one(_: Tensor, y: Tensor) -> Tensor:
    return (y - 1).square() / 2


def _wells(tilt: float, x: Tensor, y: Tensor) -> Tensor:
    return (y.square() - 1).square() / 4 - (x + tilt) * y
