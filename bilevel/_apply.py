"""How an estimator is applied to a problem: if it applies, to a part of the tasks at a time, to an encoding of x."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bilevel._calculus import demand_beyond_start
from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._numerics.second_derivatives import explained
from bilevel._problem import BilevelProblem
from bilevel._result import Report, Status, Substitute, Tally
from bilevel._tree import Tree, tree_parts
from bilevel.inner_problems.multipliers import Multipliers
from bilevel.ranks.ranks import Ranks
from bilevel.requirements.first_look import looked_at
from bilevel.requirements.iterations import why_iteration
from bilevel.requirements.kinks import kink_reports
from bilevel.requirements.padding import demand_padding_unseen
from bilevel.requirements.properties import STRICTEST, DoesNotApply
from bilevel.requirements.why_not import refusal, why_not


def apply_estimator(
    estimator: AbstractEstimator,
    problem: FlatProblem,
    x: Tensor,
    start: FlatStart,
    chunk_size: int | None = None,
    *,
    applies: bool = False,
) -> FlatEstimate:
    """The estimate at x; with `chunk_size` that of so many tasks at a time, to bound memory, and the mean of them.

    Where the problem has an `encode`, the estimator sees z = encode(x) in the place of x, and its h_z is pulled back:
    h = (dz/dx)' h_z, which every estimator that is linear in the derivatives of f and g commutes with.

    The first estimate of a run (`start.count` is 0) brings a look at f and g with it, see `first_look`, and
    one at g near the inner solution; see `kinked`. A run that has asked once whether the estimator applies says so.

    Raises:
        ValueError: if the estimator does not apply to the problem, naming it and the reason; at the first estimate of
            a run, if what pads tasks of different sizes changes their values.
    """
    if problem.tasks_over is not None and problem.tasks is not None:
        return _over_ranks(estimator, problem, x, start, chunk_size, problem.tasks_over, problem.tasks)
    if not applies and (why := why_not(estimator, problem.problem)):
        raise ValueError(why)
    of_steps = bool(why_iteration(estimator))
    try:
        if (
            estimator.requires is STRICTEST
        ):  # it says nothing: what others see where they form derivatives is looked for
            demand_beyond_start(problem.with_tally(Tally()), x, problem.start(x, start.y).detach())
        if problem.tasks is not None and not start.count:
            demand_padding_unseen(problem, x, start.y)
        if problem.tasks is None or chunk_size is None or chunk_size >= problem.tasks:
            found = _encoded(estimator, problem, x, start)
            found = found if start.count else _looked_at(estimator, problem, x, found)
        else:
            found = _chunked(estimator, problem, x, start, chunk_size, problem.tasks)
        if (
            start.count == 0
            and not of_steps
            and all(report.status is not Status.not_repeatable for report in found.reports)
        ):
            found = replace(found, reports=found.reports + kink_reports(estimator, problem, x, found.y, chunk_size))
        return replace(found, of_steps=True) if of_steps else found
    except DoesNotApply as error:
        raise ValueError(refusal(estimator, error.reason)) from error


def _over_ranks(
    estimator: AbstractEstimator,
    problem: FlatProblem,
    x: Tensor,
    start: FlatStart,
    chunk_size: int | None,
    ranks: Ranks,
    tasks: int,
) -> FlatEstimate:
    """The estimate of all tasks, of which each rank treats its share: one message of p + 5 + 3 size floats.

    Its h, value and status are the same on every rank; y, v and the other reports are of this rank's tasks.
    """
    if tasks < ranks.size:
        raise ValueError(
            f"tasks over ranks (`group=`) need at least one task for each. Got {tasks} tasks and {ranks.size} ranks."
            f" Pass more tasks, or a smaller group."
        )
    rows = ranks.rows(tasks)
    share = (rows.stop - rows.start) / tasks
    v = None if start.v is None else start.v / share
    some = problem.part(rows)
    found = apply_estimator(estimator, some, x, FlatStart(start.y, v, start.count), chunk_size)
    told = [found.standard_error, found.bound, found.bias, found.value_error]
    order = list(Status)
    worst = Status.worst(report.status for report in found.reports)
    slots = x.new_zeros(ranks.size, 3)
    slots[ranks.rank, 0] = order.index(worst)
    slots[ranks.rank, 1] = max((report.residual for report in found.reports), key=lambda r: (r != r, r), default=0.0)
    slots[ranks.rank, 2] = max((report.steps for report in found.reports), default=0)
    numbers = x.new_tensor([0.0 if number is None else share * number for number in told])
    grad, value, numbers, slots = ranks.total(share * found.grad, share * found.value, numbers, slots)
    others = [row for rank, row in enumerate(slots.tolist()) if rank != ranks.rank]
    elsewhere = tuple(
        Report("the tasks of another rank", order[int(status)], residual, int(steps))
        for status, residual, steps in others
        if not order[int(status)].ok
    )
    sums = [None if number is None else float(total) for number, total in zip(told, numbers, strict=True)]
    standard_error, bound, bias, value_error = sums
    return replace(
        found,
        grad=grad,
        value=value,
        reports=found.reports + elsewhere,
        v=None if found.v is None else share * found.v,
        standard_error=standard_error,
        bound=bound,
        bias=bias,
        value_error=value_error,
    )


def _chunked(
    estimator: AbstractEstimator, problem: FlatProblem, x: Tensor, start: FlatStart, chunk_size: int, tasks: int
) -> FlatEstimate:
    parts = []
    for begin in range(0, tasks, chunk_size):
        rows = slice(begin, min(begin + chunk_size, tasks))
        share = (rows.stop - begin) / tasks
        # v solves H v = grad_y f, where f is the mean over those tasks that are in the batch.
        v = None if start.v is None else start.v[rows] / share
        y = start.y if start.y.dim() == 1 else start.y[rows]
        some = problem.part(rows)
        found = _encoded(estimator, some, x, FlatStart(y, v, start.count))
        parts.append((share, found if start.count or begin else _looked_at(estimator, some, x, found)))
    return _mean(parts)


def check_chunks(call: str, problem: BilevelProblem, chunk_size: int | None) -> None:
    """Refuse a chunk size that means nothing.

    Raises:
        ValueError: if it is less than 1, or there are no tasks.
        TypeError: if it is not an integer.
    """
    if chunk_size is None:
        return
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool):
        raise TypeError(f"`{call}(chunk_size=...)` must be an integer or None. Got {chunk_size!r}.")
    if chunk_size < 1 or not problem.tasks:
        got = f"{chunk_size}" if problem.tasks else "a problem without tasks"
        raise ValueError(
            f"`{call}(chunk_size=...)` must be at least 1, for a `BilevelProblem(tasks=True)`. Got {got}. Leave it out."
        )


def _looked_at(estimator: AbstractEstimator, problem: FlatProblem, x: Tensor, found: FlatEstimate) -> FlatEstimate:
    return looked_at(problem, x, found, partial(why_not, estimator), bool(why_iteration(estimator)))


def _encoded(estimator: AbstractEstimator, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
    if problem.problem.encode is None or not estimator.takes_encoding:
        return estimator.estimate(problem, x, start)
    with torch.enable_grad(), explained():
        leaf = x.detach().requires_grad_()
        z, in_z = problem.encode(leaf)
        if z is leaf:
            return estimator.estimate(problem, x, start)
        found = estimator.estimate(in_z, z.detach(), start)
        h = torch.autograd.grad(z, leaf, found.grad)[0] if z.requires_grad else torch.zeros_like(x)
    return replace(found, grad=h)


def _mean(parts: list[tuple[float, FlatEstimate]]) -> FlatEstimate:
    """The estimate of all tasks from those of parts of them, each with its share of the tasks."""
    found = [estimate for _, estimate in parts]

    def total(terms: list[Tensor]) -> Tensor:
        return torch.stack([share * term for (share, _), term in zip(parts, terms, strict=True)]).sum(0)

    def sum_of(numbers: list[float | None]) -> float | None:
        terms = [share * number for (share, _), number in zip(parts, numbers, strict=True) if number is not None]
        return sum(terms) if len(terms) == len(parts) else None

    vs = [share * estimate.v for share, estimate in parts if estimate.v is not None]
    ends = [estimate.penalized for estimate in found if estimate.penalized is not None]
    return FlatEstimate(
        grad=total([estimate.grad for estimate in found]),
        value=total([estimate.value for estimate in found]),
        y=torch.cat([estimate.y for estimate in found]),
        reports=tuple(_worst(same) for same in zip(*(estimate.reports for estimate in found), strict=True)),
        v=torch.cat(vs) if vs else None,
        # Estimates along the same directions are not independent: their deviations may add up.
        standard_error=sum_of([estimate.standard_error for estimate in found]),
        penalized=(torch.cat([y for y, _ in ends]), ends[0][1]) if ends else None,
        bound=sum_of([estimate.bound for estimate in found]),
        bias=sum_of([estimate.bias for estimate in found]),
        note=found[0].note,
        value_error=sum_of([estimate.value_error for estimate in found]),
        substitute=_worst_substitute([estimate.substitute for estimate in found]),
        multipliers=_joined([estimate.multipliers for estimate in found]),
    )


def _joined(parts: list[Multipliers | None]) -> Multipliers | None:
    """Those of all chunks of tasks, one after the other."""
    found = [part for part in parts if part is not None]
    if not found or len(found) < len(parts):
        return None

    def joined(trees: list[Tree]) -> Tree:
        if trees[0] is None:
            return None
        leaves, build = zip(*(tree_parts(tree) for tree in trees), strict=True)
        return build[0]([torch.cat(same) for same in zip(*leaves, strict=True)])

    return Multipliers(**{name: joined([getattr(part, name) for part in found]) for name in vars(found[0])})


def _worst(reports: tuple[Report, ...]) -> Report:
    """One part of the estimate in all chunks: the worst status, the largest residual, the most steps."""
    return Report(
        reports[0].part,
        Status.worst(report.status for report in reports),
        max((report.residual for report in reports), key=lambda r: (r != r, r)),
        max(report.steps for report in reports),
        tuple(status for report in reports for status in report.statuses),
    )


def _worst_substitute(parts: list[Substitute | None]) -> Substitute | None:
    """That of the largest residual; None where there is none."""
    found = [part for part in parts if part is not None]
    return max(found, key=lambda part: (part.residual != part.residual, part.residual), default=None)
