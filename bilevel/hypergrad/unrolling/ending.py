"""How an unrolled iteration ended: the verdict on y, and that on the derivative."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bilevel._calculus import inner_gradient_in_x
from bilevel._numerics.rows import safe_row_norms
from bilevel._result import Report, Solved, Status, ended

if TYPE_CHECKING:
    from bilevel._inner import State
    from bilevel.hypergrad.unrolling.form import Unrolled
    from bilevel.hypergrad.unrolling.walk import Walk


def solved(walk: Walk, end: State) -> Solved:
    """The verdict on y_N: its own residual, and divergence if there was any.

    The residual takes one more gradient, unless the steps ended at their tolerance, where it is at hand. Where y is not
    to solve anything (without a tolerance, MAML's, whose start depends on x, and steps of the problem's own), the
    residual before the last step, which is at hand, has to do. Own steps do not diverge: they are what was asked for,
    as long as y is finite.
    """
    y = end[0]
    walk.problem.tally.inner_steps += walk.steps * walk.rows
    if walk.last is not None and not walk.inner.tol and (walk.has_init or walk.is_own):
        vector, value = walk.last
        value = value + 0.0 * y.sum(-1)  # not finite where y is not
    elif walk.last is not None and walk.met:
        vector, value = walk.last
    else:
        vector, value = _residual(walk, end)
    residual = safe_row_norms(vector)
    first = (None if walk.is_own else walk.first) or (residual, value)
    allowed = walk.inner.allowed(y)
    allowances = allowed.expand(residual.shape) if isinstance(allowed, Tensor) else None
    columns = [each.reshape(-1).tolist() for each in (residual, value, *first)]
    columns.append([allowed] * len(columns[0]) if allowances is None else allowances.reshape(-1).tolist())
    statuses = tuple([ended(*row) for row in zip(*columns, strict=True)])
    if not all(status.ok for status in statuses):
        statuses = walk.inner.missed(walk.fixed, y, statuses)
    return Solved(y, statuses, residual, walk.steps)


def _residual(walk: Walk, end: State) -> tuple[Tensor, Tensor]:
    """The residual as a vector at the end, and g there; a step more where the residual is the length of a step."""
    value, gradient = walk.gradient(end[0], with_graph=False)
    if walk.length is None:
        assert gradient is not None
        return gradient, value
    with torch.no_grad():
        return walk.moved(end, walk.inner.advance(walk.fixed, gradient, end, walk.steps)), value


def carried(walk: Walk, unrolled: Unrolled, accurate: bool = True) -> Report | None:
    """Whether the steps were enough for the derivative; None: that was not asked.

    Where y itself is not `accurate` it is its report that says so.
    """
    left = unrolled.left
    if left is None:
        return None
    through_g = walk.needs_gradient and walk.objective.prox is None  # x reaches y by grad_y g alone
    known = left <= unrolled.allowed or walk.linearized is not None or not through_g
    depends = known or inner_gradient_in_x(walk.problem, walk.x, walk.start.detach()) is not None
    lacks = accurate and depends and not left <= unrolled.allowed
    return Report("unrolled derivative", Status.truncated if lacks else Status.successful, left, walk.steps)
