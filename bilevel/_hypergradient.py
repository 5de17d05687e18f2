"""One hypergradient: ravel the structures, estimate in vectors, give structures back."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel._apply import apply_estimator, check_chunks
from bilevel._estimate import AbstractEstimator, Estimate, FlatEstimate, FlatStart, LeftBehind, Start
from bilevel._flat import FlatProblem, ravel_rows
from bilevel._numerics.misfits import called
from bilevel._numerics.rows import all_finite
from bilevel._numerics.transforms import demand_autograd
from bilevel._problem import BilevelProblem, Split, check_signature
from bilevel._result import BilevelError, Report, Status, Tally
from bilevel._tree import Structure, Tree, demand_alike, ravel, tree_map
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import SIZE
from bilevel.arguments.unchecked import unchecked
from bilevel.certificates.error_estimate import second_level
from bilevel.named.auto import Auto
from bilevel.named.registry import resolve
from bilevel.portable.pickling import copied, hindrance, taken_by_value
from bilevel.ranks.ranks import demand_ranks
from bilevel.ranks.shard import own_samples

_start, _estimate = unchecked(FlatStart), unchecked(Estimate)


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
    group: Any = None,
    compile: bool = False,
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
        group: a process group of `torch.distributed`, as in `minimize`: all ranks call this alike and have the same h.
            With tasks each treats its share of them, and y is that of its own; else `data` are what this rank alone
            has, as `bilevel.ranks.Shard(batch)`.
        compile: whether the estimate is to be one compiled program; see `Compiled`.

    Returns:
        The estimate: `grad`, `value`, `y`, `status`, `reports`, `stats`, `start`.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if structures, dtypes or devices do not match, or the estimator does not apply; if
            there is neither y0 nor `init`.
        BilevelError: if `throw` and a part did not succeed; its `partial` is the estimate.

    Example:
        >>> import torch
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x["a"]).square() / 2
        ... )
        >>> hypergradient(problem, {"a": torch.tensor(1.0)}, torch.tensor(0.0)).grad
        {'a': tensor(-2.)}
    """
    demand_autograd("hypergradient")
    ranks = demand_ranks("hypergradient", group)
    data, shares = own_samples("hypergradient", data, None if problem.tasks else ranks)
    check_signature(problem, data)
    check_chunks("hypergradient", problem, chunk_size)
    x_vector, x_structure = ravel(x, "x")
    if y0 is None:
        y0 = own_start("hypergradient", problem, x, data)
    y_vector, y_structure = ravel(y0, "y0")
    demand_alike("hypergradient(x, y0)", x_structure, y_structure)
    flat = FlatProblem(problem, x_structure, y_structure, data, given=x)
    flat.over(ranks, shares)
    x_vector, y_vector = unshared(x_vector), unshared(y_vector)
    chosen = resolve(estimator, flat, x_vector, y_vector)
    if compile:
        from bilevel.compiled.estimator import compiled

        chosen = compiled(chosen)
    own = flat if flat.tasks_over is None else flat.part(flat.tasks_over.rows(flat.tasks or 1))
    before = flat_start(own, start, y_vector)
    made = _apart(apply_estimator(chosen, flat, x_vector, before, chunk_size), x_vector, before)
    found = structured(own, x_vector, made, before.count)
    del made
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


def unshared(vector: Tensor) -> Tensor:
    """A vector to compute at, without its graph; the user's own memory where that will do, as nobody writes to it."""
    vector = vector.detach().contiguous()
    return vector.clone() if vector.is_inference() else vector  # which autograd would not take


def _apart(found: FlatEstimate, x: Tensor, start: FlatStart) -> FlatEstimate:
    """The estimate, copied where it shares memory with what was given: a solver may return the very start."""
    given = {each.untyped_storage().data_ptr() for each in (x, start.y, start.v) if each is not None}

    def copied(entry: Tensor) -> Tensor:
        return entry.clone() if entry.untyped_storage().data_ptr() in given else entry

    entries = (found.grad, found.y, found.v, None if found.penalized is None else found.penalized[0])
    if not any(each is not None and each.untyped_storage().data_ptr() in given for each in entries):
        return found
    return replace(
        found,
        grad=copied(found.grad),
        y=copied(found.y),
        v=None if found.v is None else copied(found.v),
        penalized=None if found.penalized is None else (copied(found.penalized[0]), found.penalized[1]),
    )


def flat_start(problem: FlatProblem, start: Start | None, y0: Tensor) -> FlatStart:
    """A user's warm start in vectors; y0 where there is none."""
    if start is None:
        return _start(y0)
    if not isinstance(start, Start):
        raise TypeError(
            f"`hypergradient(start=...)` must be a Start. Got {type(start).__name__}."
            f" Pass `estimate.start`, or `bilevel.Start(y=...)`."
        )
    y, v = ravel_rows(problem, start.y, "start.y"), start.v
    return _start(unshared(y), None if v is None else unshared(ravel_rows(problem, v, "start.v")), start.count)


def structured(problem: FlatProblem, x: Tensor, found: FlatEstimate, count: int) -> Estimate:
    """An estimate in the user's structures; whatever is not finite is reported, never replaced."""
    reports = found.reports
    value = float(found.value)
    finite = math.isfinite(value) and all_finite(found.grad)
    if not finite and all(report.status is not Status.nonfinite for report in reports):
        reports += (Report("hypergradient", Status.nonfinite, float(torch.linalg.vector_norm(found.grad)), 0),)
    # A derivative of what is not finite is not a number, even where a solver stopped before it showed.
    lost = any(report.status is Status.nonfinite for report in reports)
    h = torch.full_like(found.grad, torch.nan) if lost else found.grad
    x, y, v = x.clone(), found.y, found.v
    # The estimate holds each vector once. What is handed out may be written to: what it is asked later checks that.
    quiet, as_found = problem.alone(Tally()), Unwritten.of(x=x, y=y, v=v, grad=h)
    return _estimate(
        grad=problem.x.unravel(h),
        value=value,
        y=problem.y.unravel(y),
        v=None if v is None else problem.y.unravel(v),
        status=Status.worst(report.status for report in reports),
        reports=reports,
        stats=problem.tally.stats(),
        standard_error=found.standard_error,
        bias=found.bias,
        bound=found.bound,
        note=found.note,
        penalized=None if found.penalized is None else (problem.y.unravel(found.penalized[0]), found.penalized[1]),
        second_level=None if found.of_steps else _SecondLevel(quiet, x, y, v, h, as_found),
        x=problem.x.unravel(x),
        warm=_Warm(quiet.y, y, v, count + 1, as_found),
        substitute=found.substitute,
        multipliers=found.multipliers,
    )


@final
@dataclass(frozen=True, eq=False)
class Unwritten:
    """Tensors that are to be what they were: how often each had been written to.

    Attributes:
        versions: by name, a tensor and that number.
    """

    versions: dict[str, tuple[Tensor, int]]

    @staticmethod
    def of(**tensors: Tensor | None) -> Unwritten:
        """As they are now."""
        return Unwritten({name: (each, each._version) for name, each in tensors.items() if each is not None})

    def demand(self, wanted: str, *names: str) -> None:
        """Refuse to compute from what has been written to since.

        Args:
            wanted: what of the estimate is asked for.
            names: what it is computed from.

        Raises:
            ValueError: naming what was written to.
        """
        for name in names:
            tensor, version = self.versions.get(name, (None, 0))
            if tensor is not None and tensor._version != version:
                raise ValueError(
                    f"`Estimate.{wanted}` is made of `estimate.{name}` when it is first read, and that has been written"
                    f" to. Read it before, or write to a copy: `estimate.{name}.clone()`."
                )

    def __reduce__(self) -> Any:  # of a copy, the numbers are others
        tensors = {name: each for name, (each, _) in self.versions.items()}
        return _as_copied, (
            tensors,
            [name for name, (each, version) in self.versions.items() if each._version != version],
        )


def _as_copied(tensors: dict[str, Tensor], written: list[str]) -> Unwritten:
    return Unwritten({name: (each, -1 if name in written else each._version) for name, each in tensors.items()})


@final
@dataclass(frozen=True, eq=False)
class _Warm:
    """How the start of the next estimate is made."""

    structure: Structure
    y: Tensor
    v: Tensor | None
    count: int
    as_found: Unwritten

    def __call__(self) -> Start:
        self.as_found.demand("start", "y", "v")
        unravel = self.structure.unravel
        return Start(unravel(self.y.clone()), None if self.v is None else unravel(self.v.clone()), self.count)


@final
@dataclass(frozen=True, eq=False)
class _SecondLevel:
    """How the error of an estimate is estimated, which takes f and g: they travel with it where they can."""

    problem: FlatProblem
    x: Tensor
    y: Tensor
    v: Tensor | None
    grad: Tensor
    as_found: Unwritten

    def __call__(self) -> float:
        self.as_found.demand("error_estimate", "x", "y", "v", "grad")
        return second_level(self.problem.with_tally(Tally()), self.x, self.y, self.v, self.grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.problem.across is not None:
            return LeftBehind, ("it takes the other ranks, which are not there",)
        if not copied(2) and not taken_by_value():
            found = hindrance(self.problem.problem) or hindrance(self.problem.data, "data")
            if found is not None:
                return LeftBehind, (f"{found}, which pickle does not take",)
        return object.__reduce_ex__(self, protocol)
