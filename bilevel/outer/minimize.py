"""The outer loop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor

from bilevel._apply import apply_estimator, check_chunks
from bilevel._estimate import AbstractEstimator, Estimate, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._hypergradient import demand_alike, structured
from bilevel._optimizer import AbstractOptimizer, AbstractOuterDriver
from bilevel._problem import BilevelProblem, check_signature
from bilevel._result import BilevelError, Stats, Status
from bilevel._sets import Constraint, bounds, projection
from bilevel._tree import Tree, ravel
from bilevel._validate import demand_type
from bilevel.algorithms.descent import AbstractAlgorithm, Descent, OuterState
from bilevel.certificates.accuracy import adaptive
from bilevel.certificates.certificate import Constants
from bilevel.named.auto import Auto
from bilevel.named.registry import default_outer, resolve
from bilevel.outer.batches import stream
from bilevel.outer.checkpoint import fingerprint, load_checkpoint, save_checkpoint


@final
@dataclass(frozen=True)
class Record:
    """One outer step.

    Attributes:
        step: which.
        value: Phi at the iterate, as the inner solution found it.
        grad_norm: |h|; with a constraint |x - P(x - h)|; plus the error bound, where one was asked for.
        status: the name of the estimate's status.
        stats: the oracle calls of this step.
        seconds: the wall-clock time of this step.
    """

    step: int
    value: float
    grad_norm: float
    status: str
    stats: Stats
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The record as plain data."""
        return asdict(self)

    @staticmethod
    def from_dict(content: dict[str, Any]) -> Record:
        """The inverse of :meth:`as_dict`."""
        return Record(**{**content, "stats": Stats(**content["stats"])})


@final
@dataclass(frozen=True, eq=False)
class Solution:
    """Where an outer run ended.

    Attributes:
        x: the last outer iterate: the structure of x0.
        y: the inner solution there: the structure of y0 (stacked in task mode).
        value: Phi(x).
        status: why the run stopped, or the worst status of an estimate on the way.
        message: what to do about it; empty on success.
        stats: the oracle calls of the whole run.
        history: one record a step; the last is of x itself.
        estimate: the hypergradient at x.
    """

    x: Tree = field(repr=False)
    y: Tree = field(repr=False)
    value: float
    status: Status
    message: str = field(repr=False)
    stats: Stats
    history: tuple[Record, ...] = field(repr=False)
    estimate: Estimate = field(repr=False)


Callback: TypeAlias = Callable[[Record, Estimate], bool | None]


def minimize(
    problem: BilevelProblem,
    x0: Tree,
    y0: Tree,
    *,
    estimator: AbstractEstimator | Auto | str = "implicit",
    outer: AbstractOptimizer | AbstractOuterDriver | None = None,
    max_steps: int = 100,
    tol: float | None = None,
    data: Any = None,
    constraint: Constraint = None,
    callback: Callback | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10,
    resume: bool = False,
    warm_start: bool = True,
    chunk_size: int | None = None,
    accuracy: Literal["fixed", "adaptive"] = "fixed",
    constants: Constants | Callable[[Tree], Constants] | None = None,
    throw: bool = True,
) -> Solution:
    """min_x Phi(x) = f(x, y*(x)) by x <- P(outer.step(x, h)), h a hypergradient estimate at each step.

    Cost: `max_steps` + 1 estimates, the last at the point returned; every oracle call is counted. No argument is
    modified. From the same arguments, and across `resume`, the same bits follow.

    Args:
        problem: f and g.
        x0: where x starts; its structure is that of x.
        y0: where y starts (one task's in task mode).
        estimator: an estimator or a name; see `bilevel.estimators()`.
        outer: an optimizer (`Adam(0.05)` if None), or a driver such as `ScipyMinimize()`, which runs its own loop.
        max_steps: how many outer steps.
        tol: stop when |h| (with a constraint |x - P(x - h)|) is at most this; None: take all the steps.
        data: for problems with a third argument: one batch (a tensor, dict or tuple) for every step; a loader (any
            other iterable that can be started again, as it is at its end: a `DataLoader`, or a list, whose entries are
            batches, one a step); a callable step -> batch; or a `Split` of two of these.
        constraint: a set for x (`Box`, `Simplex`), or a dict of sets for entries of x's top-level dict.
        callback: called with the record and the estimate of each step; a true return value stops the run.
        checkpoint: a file that the state is written to, atomically, every `checkpoint_every` steps, at the end, and
            when the run is interrupted or fails. A driver keeps its state to itself, and writes none.
        checkpoint_every: how often.
        resume: continue from `checkpoint`, with the estimator, the outer method, the constraint and the structures that
            the run was begun with. Loaders are run forward to where they were; callables are exact.
        warm_start: start each inner and linear solve where the previous ended.
        chunk_size: in task mode, how many tasks to treat at a time: bounds the memory; None: all.
        accuracy: "adaptive" (implicit estimators only): each hypergradient is certified to half of its own norm and no
            better, so that early steps are cheap, and the run stops when |h| is certified to be at most `tol`, that
            is |h_estimated| plus its error bound. "fixed": the estimator's own tolerances.
        constants: what is known of f and g, or a function of x that tells, for adaptive accuracy; None: estimated.
        throw: raise at the first estimate that does not succeed, and if `tol` is given and missed. Otherwise the run
            goes on as long as it stays finite, and `Solution.status` is the worst that was met.

    Returns:
        The solution.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if structures do not match, an estimator does not apply, or a number is out of range.
        BilevelError: if `throw` and the run did not succeed; its `partial` is the solution so far.

    Example:
        >>> from bilevel.solvers import GradientDescent
        >>> problem = BilevelProblem(lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2)
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> solution = minimize(problem, x0, x0, outer=GradientDescent(0.5), max_steps=50, tol=1e-6)
        >>> round(float(solution.x), 4)
        3.0
    """
    _demand_arguments(max_steps, tol, callback, checkpoint, checkpoint_every)
    if max_steps < 0 or checkpoint_every < 1:
        raise ValueError(
            f"`minimize` needs max_steps >= 0 and checkpoint_every >= 1. Got {max_steps} and {checkpoint_every}."
        )
    if resume and checkpoint is None:
        raise ValueError("`minimize(resume=True)` needs `checkpoint=` to say from which file.")
    if checkpoint is not None and (not Path(checkpoint).name or Path(checkpoint).is_dir()):
        raise ValueError(
            f"`minimize(checkpoint=...)` must be a file. Got {str(checkpoint)!r}. Write `'run/checkpoint.pt'`."
        )
    if tol is not None and not tol >= 0:
        raise ValueError(f"`minimize(tol=...)` must be at least 0, or None to take all the steps. Got {tol}.")
    x, x_structure = ravel(x0, "x0")
    y, y_structure = ravel(y0, "y0")
    demand_alike("minimize(x0, y0)", x_structure, y_structure)
    x, y = x.detach().clone(), y.detach().clone()
    batches = stream(data)
    first = batches(0)
    check_signature(problem, first)
    check_chunks("minimize", problem, chunk_size)
    flat = FlatProblem(problem, x_structure, y_structure, first)
    chosen = resolve(estimator, flat, x, y)
    if accuracy != "fixed":
        chosen = adaptive(chosen, accuracy, constants, tol)
    chosen_outer = default_outer() if outer is None else outer
    shapes = {"x": x_structure.describe(), "y": y_structure.describe()}
    settings = fingerprint({"estimator": estimator, "outer": chosen_outer, "constraint": constraint, **shapes})
    run = _Run(flat, y, chosen, tol, callback, checkpoint, checkpoint_every, throw, chunk_size, settings)
    if isinstance(chosen_outer, AbstractOuterDriver):
        if resume or data is not None:
            raise ValueError(
                f"`{type(chosen_outer).__name__}` runs its own loop on a deterministic problem: it takes neither"
                f" `resume` nor `data`. Close f and g over the data, or use an optimizer such as `Adam`."
            )
        return run.drive(chosen_outer, x, bounds(constraint, x_structure, x), max_steps, warm_start)
    if not isinstance(chosen_outer, AbstractOptimizer):
        raise TypeError(
            f"`minimize(outer=...)` must be an optimizer such as `Adam(0.05)`. Got {type(outer).__name__}."
            f" Wrap a torch optimizer as `TorchOptim(lambda params: torch.optim.SGD(params, lr=0.1))`."
        )
    if chosen_outer.needs_curvature:
        raise ValueError(f"`minimize(outer={type(chosen_outer).__name__}())` needs a step size: pass `step=...`.")
    algorithm = Descent(chosen, chosen_outer, projection(constraint, x_structure), warm_start, chunk_size)
    return run.descend(algorithm, algorithm.init(x, FlatStart(y)), batches, max_steps, resume)


def _demand_arguments(max_steps: Any, tol: Any, callback: Any, checkpoint: Any, checkpoint_every: Any) -> None:
    demand_type("minimize", "max_steps", max_steps, int)
    demand_type("minimize", "checkpoint_every", checkpoint_every, int)
    demand_type("minimize", "tol", tol, float | None)
    demand_type("minimize", "callback", callback, Callable[..., Any] | None)
    demand_type("minimize", "checkpoint", checkpoint, str | os.PathLike | None, "a path or None")


@final
class _Run:
    """One run of the outer loop: its records, its checkpoint, its end."""

    def __init__(
        self,
        problem: FlatProblem,
        y0: Tensor,
        estimator: AbstractEstimator,
        tol: float | None,
        callback: Callback | None,
        checkpoint: str | os.PathLike[str] | None,
        every: int,
        throw: bool,
        chunk_size: int | None,
        settings: dict[str, str],
    ) -> None:
        self.problem, self.y0, self.estimator = problem, y0, estimator
        self.tol, self.callback, self.checkpoint, self.every, self.throw = tol, callback, checkpoint, every, throw
        self.chunk_size, self.settings = chunk_size, settings
        self.history: list[Record] = []

    def descend(
        self,
        algorithm: AbstractAlgorithm,
        state: OuterState,
        batches: Callable[[int], Any],
        max_steps: int,
        resume: bool,
    ) -> Solution:
        if resume:
            assert self.checkpoint is not None
            state, records = load_checkpoint(self.checkpoint, state, self.settings)
            self.history = [Record.from_dict(record) for record in records]
        try:
            while True:
                problem = self._at(batches(state.step))
                before = time.perf_counter()
                found = algorithm.evaluate(problem, state)
                norm = float(algorithm.stationarity(state, found))
                estimate = structured(problem, state.x, found, state.start.count)
                self._record(state.step, estimate, norm, time.perf_counter() - before)
                ended = self._ended(estimate, norm, state.step >= max_steps)
                if ended is not None:
                    break
                state = algorithm.step(state, found)
                if self.checkpoint is not None and state.step % self.every == 0:
                    self._save(state)
        except BaseException as error:
            try:
                self._save(state)  # of the last whole step; its record, if it has one, is written again on resuming
            except OSError as failure:  # must not hide what went wrong first
                error.add_note(f"The checkpoint could not be written either: {failure}")
            raise
        self._save(state)
        return self._finish(state.x, estimate, ended)

    def drive(
        self,
        driver: AbstractOuterDriver,
        x: Tensor,
        limits: tuple[Tensor, Tensor] | None,
        max_steps: int,
        warm_start: bool,
    ) -> Solution:
        last: list[tuple[Tensor, Estimate, FlatEstimate]] = []

        def evaluate(x: Tensor) -> tuple[float, Tensor]:
            problem, before = self._at(None), time.perf_counter()
            start = FlatStart(self.y0, count=len(self.history))
            if last and warm_start:
                start = FlatStart(last[0][2].y, last[0][2].v, len(self.history))
            found = apply_estimator(self.estimator, problem, x, start, self.chunk_size)
            estimate = structured(problem, x, found, start.count)
            norm = float(torch.linalg.vector_norm(found.grad))
            self._record(len(self.history), estimate, norm, time.perf_counter() - before)
            last[:] = [(x.clone(), estimate, found)]
            ended = self._ended(estimate, norm, last_step=False, converged_by="driver")
            if ended is not None:
                raise _Stop(ended)
            return float(found.value), found.grad

        try:
            x, ended = driver.drive(evaluate, x, bounds=limits, max_steps=max_steps, tol=self.tol)
            if not last or not torch.equal(last[0][0], x):
                evaluate(x)
        except _Stop as stop:
            x, ended = last[0][0], stop.status
        return self._finish(x, last[0][1], ended)

    def _at(self, batch: Any) -> FlatProblem:
        return FlatProblem(self.problem.problem, self.problem.x, self.problem.y, batch)

    def _record(self, step: int, estimate: Estimate, norm: float, seconds: float) -> None:
        record = Record(step, estimate.value, norm, estimate.status.name, estimate.stats, seconds)
        del self.history[step:]
        self.history.append(record)

    def _ended(self, estimate: Estimate, norm: float, last_step: bool, converged_by: str = "tol") -> Status | None:
        """Why the run stops here, or None."""
        stop = self.callback is not None and bool(self.callback(self.history[-1], estimate))
        if estimate.status is Status.nonfinite or (self.throw and not estimate.status.ok):
            return estimate.status
        if self.tol is not None and converged_by == "tol" and norm <= self.tol:
            return Status.successful
        if stop:
            return Status.successful
        if last_step:
            return Status.successful if self.tol is None else Status.max_steps
        return None

    def _save(self, state: OuterState) -> None:
        if self.checkpoint is not None:
            records = [record.as_dict() for record in self.history[: state.step]]
            save_checkpoint(self.checkpoint, state, records, self.settings)

    def _finish(self, x: Tensor, estimate: Estimate, ended: Status) -> Solution:
        met = [Status[record.status] for record in self.history]
        status = Status.worst([ended, *met])
        message = ""
        if not ended.ok:
            message = estimate.message or f"minimize: {ended.value}"
        elif not status.ok:
            failed = next(record.step for record in self.history if record.status == status.name)
            message = f"the estimate at step {failed}: {status.value}"
        solution = Solution(
            x=self.problem.x.unravel(x.clone()),
            y=estimate.y,
            value=estimate.value,
            status=status,
            message=message,
            stats=sum((record.stats for record in self.history), Stats()),
            history=tuple(self.history),
            estimate=estimate,
        )
        if self.throw and not status.ok:
            step = self.history[-1].step
            raise BilevelError(f"`minimize` did not succeed; it stopped at step {step}. {message}", status, solution)
        return solution


class _Stop(Exception):  # noqa: N818  (not an error: how a callback leaves somebody else's loop)
    def __init__(self, status: Status) -> None:
        Exception.__init__(self)
        self.status = status
