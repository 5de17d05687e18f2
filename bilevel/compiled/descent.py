"""Descent whose whole step is one program: the estimate, the outer update and the projection."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel._apply import apply_estimator
from bilevel._estimate import Estimate, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._optimizer import AbstractMinimizer, AbstractOptimizer
from bilevel._result import Report, Stats, Status, Tally
from bilevel.algorithms.algorithm import AbstractAlgorithm
from bilevel.algorithms.descent import Descent
from bilevel.algorithms.oracle import Oracle
from bilevel.arguments.unchecked import unchecked
from bilevel.compiled.code import Code, tensors_of
from bilevel.compiled.norms import row_norm
from bilevel.compiled.packed import Legend, packed
from bilevel.compiled.plain import demand_optimizer
from bilevel.compiled.programs import Program, program
from bilevel.compiled.reading import fine, read, unlike
from bilevel.compiled.tracing import Traced, Tracing
from bilevel.outer.best import Candidate
from bilevel.outer.partial import attach
from bilevel.outer.records import Rules, Run
from bilevel.outer.solution import Record, Solution
from bilevel.requirements.starts import starts_warm
from bilevel.requirements.why_not import why_not


def is_one_program(algorithm: AbstractAlgorithm[Any], oracle: Oracle, rules: Rules) -> bool:
    """Whether a run is nothing but steps: no one asks to see each estimate, and no state is kept.

    Other runs, with callbacks or checkpoints, take the estimate alone from a program, and the rest as always.
    """
    from bilevel.compiled.estimator import Compiled

    if not isinstance(algorithm, Descent) or not isinstance(algorithm.estimator, Compiled):
        return False
    if isinstance(algorithm.outer, AbstractMinimizer) or oracle.like.problem.encode is not None:
        return False
    watched = rules.callback is not None or rules.saves is not None or rules.skip or rules.ranks is not None
    return not watched and algorithm.chunk_size is None and (oracle.is_fixed or not oracle.has_whole)


def descend(run: Run, algorithm: Descent, oracle: Oracle, x: Tensor, y: Tensor) -> Solution:
    """Run it from x and y. The records are those of `iterate`, up to rounding.

    Raises:
        NotCompilableError: naming the part that is no fixed program.
        ValueError: if the estimator does not apply.
        BilevelError: if the run does not succeed, and that is to be raised.
    """
    if why := why_not(algorithm, oracle.like.problem):
        raise ValueError(why)
    steps = _Steps(algorithm, oracle, oracle.project(x), y)
    solution: Solution | None = None
    try:
        ended: Status | None = None
        while ended is None:
            ended = steps.take(run)
        estimate = steps.estimate(run)
        solution = run.solution(oracle.like, steps.at, estimate, ended)
        return run.finish(solution)
    except BaseException as error:
        if solution is not None:
            attach(error, solution)
        else:
            if steps.row:
                run.reached(len(run.history) - 1, oracle.like, steps.at, steps.estimate(run))
            run.leave(error, lambda: None)
        raise


_record = unchecked(Record)


@final
class _Steps:
    """The steps of a run: everything that changes on its way."""

    def __init__(self, algorithm: Descent, oracle: Oracle, x: Tensor, y: Tensor) -> None:
        from bilevel.compiled.estimator import Compiled

        estimator, outer = algorithm.estimator, algorithm.outer
        assert isinstance(estimator, Compiled)
        assert isinstance(outer, AbstractOptimizer)
        demand_optimizer("minimize(outer=...)", outer, x)
        self.estimator, self.outer, self.oracle = estimator, outer, oracle
        self.warm = starts_warm(algorithm.warm_start, estimator, oracle.like.problem)
        problem = oracle.problem()
        self.y0 = problem.spread(y).contiguous()
        self.has_v = estimator.has_v
        self.guess = torch.zeros_like(self.y0) if self.warm and self.has_v else None
        self.keys = tuple(outer.init(x))
        self.x, self.memory = x.contiguous(), list(outer.init(x).values())
        self.step, self.at, self.row = 0, x, list[float]()
        self.standing: tuple[Report, ...] = ()
        self._programs: dict[object, Program] = {}
        self._problem, self._data = problem, tensors_of(problem.data)
        self._stats: dict[tuple[float, ...], Stats] = {}
        self._made: Sequence[Tensor] = ()
        # f and g are looked at once, by the estimator itself, which the first step is compared with
        self.first = apply_estimator(estimator.of, problem.with_tally(Tally()), x, FlatStart(y))

    def take(self, run: Run) -> Status | None:
        """One step; why the run ends there, or None."""
        begun = time.perf_counter()
        if self.step and not self.oracle.is_fixed:
            self.oracle = self.oracle.at(self.step)
            self._problem = self.oracle.problem()
            self._data = tensors_of(self._problem.data)
        vectors = [self.x, self.y0, *(() if self.guess is None else (self.guess,)), *self.memory]
        made = self._program(vectors).run(vectors, self._data)
        row: list[float] = made[-1].tolist()
        self.at, self.row, self._made = self.x, row, made
        count = 3 if self.has_v else 2
        self.x, self.memory = made[count], list(made[count + 1 : -1])
        y = made[1]
        if self.warm:
            self.y0 = y
            self.guess = None if self.guess is None else made[2]
        step, last = self.step, self.step >= run.rules.max_steps
        self.step += 1
        estimate: Estimate | None = None
        if row[0] and step:
            counts = tuple(row[6:11])
            if counts not in self._stats:
                self._stats[counts] = self._legend.stats(row)
            status, stats = Status.successful, self._stats[counts]
        else:
            estimate = self._found(run, step)
            status, stats = estimate.status, estimate.stats
        record = _record(step, row[1], row[2], status, stats, time.perf_counter() - begun)
        run.history.append(record)
        run.best.see(Candidate(self.at, y, record, status.ok))
        if estimate is not None and run.failed(estimate):
            return status
        if run.met(row[2], None):
            return Status.successful
        return run.used_up if last else None

    def estimate(self, run: Run) -> Estimate:
        """That of the latest step, in the user's structures."""
        return self._found(run, self.step - 1)

    def _found(self, run: Run, step: int) -> Estimate:
        problem = self._problem.with_tally(Tally())
        v = self._made[2] if self.has_v else None
        found = read(self._legend, self.row, self._made[0], self._made[1], v, problem.tally)
        if not step:
            found = self._looked_at(found)
        return run.structured(problem, self.at, found, step)

    def _looked_at(self, found: FlatEstimate) -> FlatEstimate:
        """The first estimate, with what was noticed of f and g, and whether the estimator itself finds the same."""
        own = {report.part for report in found.reports}
        noticed = tuple(report for report in self.first.reports if report.part not in own)
        return replace(found, reports=(*found.reports, *noticed, *unlike(self.first, found)))

    @property
    def _legend(self) -> Legend:
        (latest,) = list(self._programs.values())[-1:]
        legend: Legend = latest.notes
        return legend

    def _program(self, vectors: Sequence[Tensor]) -> Program:
        shapes = tuple((each.shape, each.stride()) for each in self._data)
        if shapes not in self._programs:
            code, x = Code.of(self._problem), vectors[0]
            sizes = tuple(tuple(v.shape) for v in vectors)
            key = ("step", code.key(self.estimator.of, self.outer, self.oracle.region), sizes, str(x.dtype))
            what = f"a step of minimize ({x.numel()} outer, {self.y0.numel()} inner variables)"
            inputs = [*vectors, *self._data]
            made = program(key, self.estimator.backend, lambda: self._traced(code, vectors), inputs, what)
            self._programs[shapes] = made
        return self._programs[shapes]

    def _traced(self, code: Code, vectors: Sequence[Tensor]) -> tuple[Traced, Legend]:
        from bilevel.compiled.estimator import computation

        tracing, region, has_guess = Tracing(code), self.oracle.region, self.guess is not None
        parts = computation(tracing, self.estimator.of, vectors[0], vectors[1])
        keys, outer = self.keys, self.outer

        def moved(_: FlatProblem, x: Tensor, h: Tensor, *memory: Tensor) -> tuple[Tensor, ...]:
            """The measure of stationarity, the next x, and the optimizer's state."""
            with torch.no_grad():
                there, state = outer.step(h, x, dict(zip(keys, memory, strict=True)))
                if region is None:
                    return row_norm(h), there, *(state[key] for key in keys)
                left = row_norm(x - region.project(x - h))
                return left, region.project(there), *(state[key] for key in keys)

        move = tracing.piece(moved, vectors[0], vectors[0], *self.memory)

        def whole(x: Tensor, y0: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            guess, memory = (others[0], others[1:]) if has_guess else (None, others)
            h, y, v, numbers, rows = parts.compute(x, y0, guess)
            norm, there, *state = move(x, h, *memory)
            numbers |= {"norm": norm, "fine": fine(h, numbers["value"], rows)}
            return h, y, *(() if v is None else (v,)), there, *state, packed(numbers, rows)

        return tracing.whole(whole, *vectors), parts.legend
