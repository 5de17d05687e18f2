"""Outer methods that run their own loop, with the records and the checkpoints of every run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeAlias, final

import torch
from torch import Tensor

from bilevel._estimate import Estimate, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._optimizer import AbstractOuterDriver
from bilevel._result import Report, Status, Substitute, Tally
from bilevel.outer.best import Candidate
from bilevel.outer.entries import MISREAD
from bilevel.outer.partial import attach
from bilevel.outer.randomness import Randomness, drawn_so_far, go_on_from
from bilevel.outer.records import Run
from bilevel.outer.saves import NotSavedError, Saves
from bilevel.outer.solution import Record, Solution
from bilevel.outer.sound import demand_alike, sound_records

if TYPE_CHECKING:
    from bilevel.outer.rounds import Rounds

Estimator: TypeAlias = Callable[[FlatProblem, Tensor, FlatStart], FlatEstimate]


def drive(
    run: Run,
    driver: AbstractOuterDriver,
    estimator: Estimator,
    problem: FlatProblem,
    start: tuple[Tensor, Tensor],
    *,
    bounds: tuple[Tensor, Tensor] | None,
    warm_start: bool,
    rounds: Rounds | None = None,
) -> Solution:
    """Let a driver minimize Phi, recording each evaluation.

    A checkpoint holds every evaluation. Resuming calls the driver from the start, and answers from the file as long as
    it asks for the points that are there: what goes on inside it is then where it was, bit for bit. The first other
    point (after a change of `max_steps`, say) and all after it are estimated.

    Args:
        run: the records.
        driver: what is run.
        estimator: (problem, x, warm start) -> the estimate at x.
        problem: the problem, without data.
        start: x `(p,)` and y `(q,)`, of one task.
        bounds: on x, or None.
        warm_start: whether estimates start where the one before ended.
        rounds: the driver's runs where there are constraints on x and y*(x); None: it has one.

    Raises:
        ValueError: if a checkpoint is of another run.
        BilevelError: if the run does not succeed, and that is to be raised.
    """
    answers = _Answers(run, estimator if rounds is None else rounds.estimate, problem, start, warm_start, bounds)
    answers.rounds = rounds
    rules = run.rules
    if rules.resume:
        assert rules.saves is not None
        answers.resume(rules.saves)
    solution: Solution | None = None
    try:
        try:
            if rounds is not None:
                x, ended = rounds.drive(answers.at_with_y, problem, start[0], rules.max_steps, rules.tol)
            else:
                x, ended = driver.drive(answers.at, start[0], bounds=bounds, max_steps=rules.max_steps, tol=rules.tol)
            if answers.latest is None or not torch.equal(answers.latest.x, x):
                answers.at(x)
        except _Stop as stop:
            ended = stop.status
        last = answers.latest
        assert last is not None
        solution = run.solution(problem, last.x, answers.structured(last), ended)
        answers.save(last=True)
        return run.finish(solution)
    except NotSavedError as failure:
        raise run.not_saved(failure, solution) from failure.__cause__
    except BaseException as error:
        if solution is not None:
            attach(error, solution)
        else:
            run.leave(error, answers.save_all)
        raise


@final
class _Stop(Exception):  # noqa: N818  (not an error: how a callback leaves somebody else's loop)
    def __init__(self, status: Status) -> None:
        Exception.__init__(self)
        self.status = status


@final
@dataclass(frozen=True, eq=False)
class _Answer:
    """The estimate that was found at x, and its record."""

    x: Tensor
    found: FlatEstimate
    record: Record


@final
class _Answers:
    """Phi and its gradient where a driver asks for them: from the record as far as that goes, estimated after."""

    def __init__(
        self,
        run: Run,
        estimator: Estimator,
        problem: FlatProblem,
        start: tuple[Tensor, Tensor],
        warm_start: bool,
        bounds: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.run, self.estimator, self.problem, self.start = run, estimator, problem, start
        self.warm_start, self.bounds = warm_start, bounds
        self.latest: _Answer | None = None
        self.rounds: Rounds | None = None
        self.given: list[_Answer] = []  # all of them, where there is a file to keep them in
        self.known: list[_Answer] = []  # from the file
        self.begun: Randomness | None = None if run.rules.saves is None else drawn_so_far()  # random numbers
        self.drawn: Randomness | None = self.begun
        self.go_on: Randomness | None = None  # where they were after all that is known

    def at(self, x: Tensor) -> tuple[float, Tensor]:
        """Phi(x) and its gradient, as drivers take them."""
        index = len(self.run.history)
        known = self.known[index] if index < len(self.known) else None
        if known is not None and torch.equal(known.x, x):
            self.run.history.append(known.record)
            self._see(known)
            self._keep(known)
            self.run.reached(index, self.problem, known.x, self.structured(known))
            status = known.record.status
            if status is Status.nonfinite or (self.run.rules.throw and not status.ok):
                raise _Stop(status)
            return float(known.found.value), known.found.grad
        if self.go_on is not None and index == len(self.known):
            go_on_from(self.go_on)
        self.known, self.go_on = [], None  # another run from here on
        before = time.perf_counter()
        begin = FlatStart(self.start[1], count=index)
        if self.latest is not None and self.warm_start:
            begin = FlatStart(self.latest.found.y, self.latest.found.v, index)
        problem = self.problem.with_tally(Tally())
        found = self.estimator(problem, x, begin)
        estimate = self.run.structured(problem, x, found, index)
        left = found.grad if self.bounds is None else x - (x - found.grad).clamp(*self.bounds)
        norm = float(torch.linalg.vector_norm(left))
        told = None
        if self.rounds is not None:
            told = self.rounds.told(problem, x, found.y)
            norm = max(norm, told.complementarity, told.violation)
        self.run.record(index, estimate, norm, time.perf_counter() - before, outer=told)
        answer = _Answer(x.clone(), found, self.run.history[-1])
        self._see(answer)
        self.run.reached(index, problem, answer.x, estimate)  # also where the callback raises
        stops = self.run.stops(estimate)
        self._keep(answer)
        if self.run.failed(estimate):
            raise _Stop(estimate.status)
        if stops:
            raise _Stop(Status.stopped)
        if self.run.rules.saves is not None and self.run.rules.saves.due(index + 1):
            self.save(last=False)
        return float(found.value), found.grad

    def at_with_y(self, x: Tensor) -> tuple[float, Tensor, Tensor, float]:
        """The same, with the inner solution and the measure that was recorded."""
        value, gradient = self.at(x)
        assert self.latest is not None
        return value, gradient, self.latest.found.y, self.latest.record.grad_norm

    def structured(self, answer: _Answer) -> Estimate:
        """The estimate of an answer in the user's structures."""
        tally = Tally()
        tally.add(answer.record.stats)
        return self.run.structured(self.problem.with_tally(tally), answer.x, answer.found, answer.record.step)

    def save(self, *, last: bool) -> None:
        """Write all answers that the callback has been told of."""
        saves = self.run.rules.saves
        if saves is None:
            return
        point = (self.given[-1].x, self.given[-1].found.y) if self.given else self.start
        saves.save(
            len(self.given),
            point,
            [answer.record for answer in self.given],
            last=last,
            evaluations=lambda i: _plain(self.given[i]),
            random=self.drawn,
            begun=self.begun,
        )

    def save_all(self) -> None:
        """Write what there is; while the file is replayed, it holds more than that."""
        if len(self.given) >= len(self.known):
            self.save(last=True)

    def resume(self, saves: Saves) -> None:
        """Take the answers of a file for known.

        Raises:
            ValueError: if it is that of another run.
        """
        checkpoint = saves.checkpoint
        content = checkpoint.load(*self.start)
        if "evaluations" not in content:
            raise checkpoint.foreign("it holds a state, and this method runs its own loop")
        checkpoint.demand(content)
        with checkpoint.intact(content):
            records = sound_records(content["history"], content["step"])
            if len(content["evaluations"]) != len(records):
                raise ValueError(f"it has {len(records)} records and {len(content['evaluations'])} evaluations")
            self.known = [
                _sound_answer(plain, record, *self.start)
                for plain, record in zip(content["evaluations"], records, strict=True)
            ]
        saves.go_on_from(content)
        if "random" in content:
            self.begun, self.go_on = content["begun"], content["random"]
            self.drawn = self.begun
            go_on_from(content["begun"])

    def _see(self, answer: _Answer) -> None:
        self.latest = answer
        inside = self.bounds is None or torch.equal(answer.x, answer.x.clamp(*self.bounds))
        self.run.best.see(Candidate(answer.x, answer.found.y, answer.record, answer.record.status.ok and inside))

    def _keep(self, answer: _Answer) -> None:
        if self.run.rules.saves is not None:
            self.given.append(answer)
            self.drawn = drawn_so_far() if self.go_on is None else self.go_on


def _plain(answer: _Answer) -> dict[str, Any]:
    found = answer.found
    reports = [(r.part, r.status.name, r.residual, r.steps, [s.name for s in r.statuses]) for r in found.reports]
    kept = {field.name: getattr(found, field.name) for field in fields(FlatEstimate)}
    substitute = None if found.substitute is None else found.substitute.as_dict()
    return {**kept, "reports": reports, "at": answer.x, "substitute": substitute}


def _sound_answer(plain: Any, record: Record, x: Tensor, y: Tensor) -> _Answer:
    """An answer from plain data.

    Raises:
        ValueError: saying what is wrong with it.
    """
    where = f"its evaluation of step {record.step}"
    try:
        if not isinstance(plain, dict):
            raise TypeError("it is no dict")
        for name, like in (("at", x), ("grad", x), ("y", y)):
            demand_alike(plain[name], like, f"'{name}'")
        if plain["v"] is not None:
            demand_alike(plain["v"], y, "'v'")
        if plain["at"].shape != x.shape or plain["grad"].shape != x.shape:
            raise ValueError("'at' and 'grad' are no vectors")
        answer = _answer(plain, record)
        if math.isnan(record.value) == (float(answer.found.value) == record.value):
            raise ValueError("its value is not that of its record")
    except MISREAD as error:
        raise ValueError(f"{where} makes no sense: {str(error).partition(chr(10))[0][:200]}") from error
    return answer


def _answer(plain: Mapping[str, Any], record: Record) -> _Answer:
    reports = tuple(
        Report(part, Status[status], residual, steps, tuple(Status[each] for each in statuses))
        for part, status, residual, steps, statuses in plain["reports"]
    )
    kept = {name: value for name, value in plain.items() if name not in ("at", "reports", "substitute")}
    substitute = plain.get("substitute")
    kept["substitute"] = None if substitute is None else Substitute(**substitute)
    return _Answer(plain["at"], FlatEstimate(**kept, reports=reports), record)
