"""One hypergradient: ravel the structures, estimate in vectors, give structures back."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bilevel._apply import apply_estimator, check_chunks
from bilevel._estimate import AbstractEstimator, Estimate, FlatEstimate, FlatStart, Start
from bilevel._flat import FlatProblem, ravel_rows
from bilevel._numerics.misfits import called
from bilevel._numerics.transforms import demand_autograd
from bilevel._problem import BilevelProblem, Split, check_signature
from bilevel._result import BilevelError, Report, Status, Tally
from bilevel._tree import Tree, demand_alike, ravel, tree_map
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import SIZE
from bilevel.certificates.error_estimate import second_level
from bilevel.named.auto import Auto
from bilevel.named.registry import resolve


@checked(chunk_size=SIZE)
def hypergradient(
    problem: BilevelProblem,
    x: Tree,
    y0: Tree = None,
    *,
    estimator: AbstractEstimator | Auto | str = "implicit",
    data: Any = None,
    start: Start | None = None,
    chunk_size: int | None = None,
    throw: bool = True,
) -> Estimate:
    """h ~ grad Phi(x), Phi(x) = f(x, y*(x)), y*(x) = argmin_y g(x, y).

    Cost and error are the estimator's; every oracle call is counted in the result. Nothing is added into
    `.grad`, and no argument is modified.

    Args:
        problem: f and g.
        x: where: a tensor, or a nested dict, list or tuple of tensors.
        y0: where the inner solver starts (one task's start in task mode); its structure is that of y. None where the
            problem has `init`: init(x).
        estimator: an estimator such as `AID(...)`, or a name with safe defaults; see `bilevel.estimators()`.
        data: the third argument of f and g, if they take one; `Split(f=..., g=...)` if they differ.
        start: a warm start, `estimate.start` of an earlier call; it replaces y0 and starts the linear solver.
        chunk_size: in task mode, how many tasks to treat at a time: bounds the memory; None: all. The estimate is the
            same up to rounding.
        throw: raise if any part did not succeed; otherwise see `Estimate.status`.

    Returns:
        The estimate: `grad`, `value`, `y`, `status`, `reports`, `stats`, `start`.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if structures, dtypes or devices do not match, or the estimator does not apply; if
            there is neither y0 nor `init`.
        BilevelError: if `throw` and a part did not succeed; its `partial` is the estimate.

    Example:
        >>> import torch
        >>> problem = BilevelProblem(lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x["a"]).square() / 2)
        >>> hypergradient(problem, {"a": torch.tensor(1.0)}, torch.tensor(0.0)).grad
        {'a': tensor(-2.)}
    """
    demand_autograd("hypergradient")
    check_signature(problem, data)
    check_chunks("hypergradient", problem, chunk_size)
    x_vector, x_structure = ravel(x, "x")
    if y0 is None:
        y0 = own_start("hypergradient", problem, x, data)
    y_vector, y_structure = ravel(y0, "y0")
    demand_alike("hypergradient(x, y0)", x_structure, y_structure)
    flat = FlatProblem(problem, x_structure, y_structure, data, given=x)
    x_vector, y_vector = x_vector.detach().clone(), y_vector.detach().clone()
    chosen = resolve(estimator, flat, x_vector, y_vector)
    before = flat_start(flat, start, y_vector)
    found = structured(flat, x_vector, apply_estimator(chosen, flat, x_vector, before, chunk_size), before.count)
    if throw and not found.status.ok:
        raise BilevelError(
            f"`hypergradient(estimator={estimator!r})` did not succeed. {found.message}", found.status, found
        )
    return found


def own_start(call: str, problem: BilevelProblem, x: Tree, data: Any) -> Tree:
    """init(x), of the first task where there are tasks: what gives y its structure where no start is given.

    Args:
        call: who was given no y0.
        problem: f and g.
        x: where.
        data: one batch, that fits the problem's signature.

    Raises:
        ValueError: if the problem has no `init`.
    """
    if problem.init is None:
        raise ValueError(
            f"`{call}(y0=...)` may be left out only where the problem has `init`, from which y starts. Pass y0."
        )
    batch = data.g if isinstance(data, Split) else data
    if problem.tasks:
        batch = tree_map(lambda leaf: leaf[0] if isinstance(leaf, Tensor) else leaf, batch)
    arguments = () if batch is None else (batch,)
    with torch.no_grad():
        z = x if problem.encode is None else called("encode(x, data)", problem.encode, x, *arguments)
        return called("init(x, data)", problem.init, z, *arguments)


def flat_start(problem: FlatProblem, start: Start | None, y0: Tensor) -> FlatStart:
    """A user's warm start in vectors; y0 where there is none."""
    if start is None:
        return FlatStart(y0)
    if not isinstance(start, Start):
        raise TypeError(
            f"`hypergradient(start=...)` must be a Start. Got {type(start).__name__}."
            f" Pass `estimate.start`, or `bilevel.Start(y=...)`."
        )
    y = ravel_rows(problem, start.y, "start.y")
    return FlatStart(y, None if start.v is None else ravel_rows(problem, start.v, "start.v"), start.count)


def structured(problem: FlatProblem, x: Tensor, found: FlatEstimate, count: int) -> Estimate:
    """An estimate in the user's structures; whatever is not finite is reported, never replaced."""
    reports = found.reports
    value = float(found.value)
    finite = math.isfinite(value) and bool(found.grad.isfinite().all())
    if not finite and all(report.status is not Status.nonfinite for report in reports):
        reports += (Report("hypergradient", Status.nonfinite, float(torch.linalg.vector_norm(found.grad)), 0),)
    # A derivative of what is not finite is not a number, even where a solver stopped before it showed.
    lost = any(report.status is Status.nonfinite for report in reports)
    h = torch.full_like(found.grad, torch.nan) if lost else found.grad
    y, v = found.y.clone(), None if found.v is None else found.v.clone()  # what is handed out may be written to

    def warm() -> Start:
        return Start(problem.y.unravel(y), None if v is None else problem.y.unravel(v), count + 1)

    return Estimate(
        grad=problem.x.unravel(h),
        value=value,
        y=problem.y.unravel(found.y),
        v=None if found.v is None else problem.y.unravel(found.v),
        status=Status.worst(report.status for report in reports),
        reports=reports,
        stats=problem.tally.stats(),
        standard_error=found.standard_error,
        bias=found.bias,
        bound=found.bound,
        note=found.note,
        penalized=None if found.penalized is None else (problem.y.unravel(found.penalized[0]), found.penalized[1]),
        second_level=lambda: second_level(problem.with_tally(Tally()), x, found.y, found.v, found.grad),
        x=problem.x.unravel(x.clone()),
        warm=warm,
    )
