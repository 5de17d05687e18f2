"""What rounding makes of an implicit gradient where f and g are computed in less than the dtype of y."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel._calculus import outer_gradients, total
from bilevel._flat import FlatProblem
from bilevel._numerics.graphs import rounding_unit
from bilevel._result import Report, Status, Tally
from bilevel.hypergrad.abstract_implicit import AbstractImplicit

_ENOUGH = 0.02  # of h: what rounding may move it by


def rounding_reports(
    estimator: AbstractImplicit, problem: FlatProblem, x: Tensor, y: Tensor, h: Tensor
) -> tuple[Report, ...]:
    """|h(y') - h(y)| / |h(y)| with y' within the rounding of y, in a report; none where g is computed in y's own dtype.

    Under `torch.autocast` weights are rounded before they are used, to 3 digits in bfloat16. Products with second
    derivatives are off by as much, and a linear system that is far from well-conditioned multiplies that. So y is moved
    by random numbers of that size, and all that follows from y is computed again: h then moves by about what it is off,
    and above a fiftieth it is `Status.imprecise`.

    Cost: one value of g; where it is computed in less, a linear solve more. Asked for once, at the first estimate of a
    run, and not counted.

    Args:
        estimator: what h was computed with.
        problem: in vectors.
        x: `(p,)`.
        y: `(*tasks, q)`.
        h: the implicit gradient `(p,)`.
    """
    if problem.known is not None and not torch.is_autocast_enabled(y.device.type):
        return ()  # g computes in the dtype of y
    problem = problem.with_tally(Tally())
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        value = total(problem.g(x, leaf))
    unit = rounding_unit(value, leaf) if value.requires_grad else 0.0
    if unit <= torch.finfo(y.dtype).eps:
        return ()
    draws = torch.rand(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    near = y * (1 + unit * (draws - 0.5))
    at = estimator.products.linearize(problem, x, near)
    _, fx, fy = outer_gradients(problem, x, near)
    v = estimator.linear.solve(at.operator.shifted(estimator.damping), at.right_hand_side(fy), None).value
    cross = at.cross(v, fy)
    moved = float((fx - h if cross is None else fx - cross - h).norm() / h.norm())
    return (Report("rounding of f and g", Status.successful if moved <= _ENOUGH else Status.imprecise, moved, 0),)
