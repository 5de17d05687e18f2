"""What rounding makes of an implicit gradient where f and g are computed in less than the dtype of y."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel._calculus import outer_gradients, total
from bilevel._flat import FlatProblem
from bilevel._numerics.graphs import rounding_unit
from bilevel._result import Report, Status, Tally
from bilevel.hypergrad.abstract_implicit import AbstractImplicit

_ENOUGH = 0.01  # of h: half of what rounding may move it by, as one draw tells that within a factor of two or so


def rounding_reports(
    estimator: AbstractImplicit, problem: FlatProblem, x: Tensor, y: Tensor, h: Tensor, by_sign: bool
) -> tuple[Report, ...]:
    """|h(y') - h(y)| / |h(y)| with y' as near to y as rounding tells, in a report; none where g has y's own dtype.

    Under `torch.autocast` weights are rounded before they are used, to 3 digits in bfloat16. Products with second
    derivatives are off by as much, and a linear system that is far from well-conditioned multiplies that. And y is off:
    the inner solver has come to where the gradient is rounding, which a curvature of mu makes 1 / mu times as long in
    y. So y is moved by random numbers of the size of its rounding and by a Newton step, and all that follows from y is
    computed again: h then moves by about what it is off. Above a hundredth, half of what is allowed, it is
    `Status.imprecise`.

    Cost: one value of g; where it is computed in less, two linear solves and a gradient more. Asked for once, at the
    first estimate of a run, and not counted.

    Args:
        estimator: what h was computed with.
        problem: in vectors.
        x: `(p,)`.
        y: `(*tasks, q)`.
        h: the implicit gradient `(p,)`.
        by_sign: whether these are the products of another system, taken since a curvature was not positive. In less
            than y's dtype that is a sign that rounding decides, and so is which of two answers is given: imprecise.
    """
    problem = problem.with_tally(Tally())
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        value = total(problem.g(x, leaf))
    unit = rounding_unit(value, leaf) if value.requires_grad else 0.0
    if unit <= torch.finfo(y.dtype).eps:
        return ()
    draws = torch.rand(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    here = estimator.products.linearize(problem, x, y)
    ahead = estimator.linear.solve(here.operator.shifted(estimator.damping), here.gradient, None).value
    near = y * (1 + unit * (draws - 0.5)) - ahead
    del here
    at = estimator.products.linearize(problem, x, near)
    _, fx, fy = outer_gradients(problem, x, near)
    v = estimator.linear.solve(at.operator.shifted(estimator.damping), at.right_hand_side(fy), None).value
    cross = at.cross(v, fy)
    moved = float((fx - h if cross is None else fx - cross - h).norm() / h.norm())
    if by_sign:
        return (Report("rounding of f and g, by which a curvature is negative", Status.imprecise, moved, 0),)
    return (Report("rounding of f and g", Status.successful if moved <= _ENOUGH else Status.imprecise, moved, 0),)
