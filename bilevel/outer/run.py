"""The outer loop, which runs every algorithm: records, callbacks, statuses, checkpoints and the end."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

from torch import Tensor

from bilevel._calculus import demand_beyond_start
from bilevel._estimate import Estimate
from bilevel._result import Stats, Status, Tally
from bilevel.algorithms.algorithm import AbstractAlgorithm, Evaluated
from bilevel.algorithms.oracle import Oracle
from bilevel.outer.batches import positions, run_forward
from bilevel.outer.best import Candidate, Kept
from bilevel.outer.encoding import decoded, encoded
from bilevel.outer.entries import MISREAD, unreadable
from bilevel.outer.looks import BLOWN, Look, blown, is_finite
from bilevel.outer.partial import attach
from bilevel.outer.randomness import Randomness, drawn_so_far, go_on_from
from bilevel.outer.records import Rules, Run
from bilevel.outer.saves import NotSavedError, Saves
from bilevel.outer.solution import Solution
from bilevel.outer.sound import demand_point, demand_state, sound_candidate, sound_records, suspect
from bilevel.outer.sweep import Winner
from bilevel.requirements.first_look import looked_at
from bilevel.requirements.padding import demand_padding_unseen
from bilevel.requirements.properties import STRICTEST, DoesNotApply
from bilevel.requirements.why_not import refusal, why_not


@final
@dataclass(frozen=True, eq=False)
class _Reached:
    """Where a run is: at `state`, with the oracle calls that led there since the latest record, and what is kept.

    That, and the random numbers that were drawn on the way, as far as there is a file to keep them in; how many records
    there are of the steps before; how many calls for samples the latest look at all the data took, and at which norm a
    certificate was last tried.
    """

    step: int
    state: Any
    calls: Stats
    kept: Kept = Kept()
    drawn: Randomness | None = None
    loaders: Any = None
    records: int = 0
    look: int = 0
    tried: float = math.inf


_FIRST = 10  # steps whose largest norm stands for that at the start: a single batch may be a lucky one
_UNKEPT = Stats()  # where no file is written, nobody asks for the calls since the latest record


def iterate(
    run: Run, algorithm: AbstractAlgorithm[Any], oracle: Oracle, x: Tensor, y: Tensor, begun: Winner | None = None
) -> Solution:
    """Run an algorithm from x and y, or from where its checkpoint is.

    Args:
        run: the records.
        algorithm: what is run.
        oracle: of step 0.
        x: the start `(p,)`.
        y: the start `(q,)`, of one task.
        begun: by a sweep, whose state and number of steps are then the start; None: nothing has been done.

    Raises:
        ValueError: if a checkpoint is of another run, or the algorithm does not apply to the problem.
        BilevelError: if the run does not succeed, and that is to be raised.
    """
    why = why_not(algorithm, oracle.like.problem)
    if why:
        raise ValueError(why)
    try:
        demand_padding_unseen(oracle.problem().with_tally(Tally()), x, y)
        if (
            algorithm.requires is STRICTEST
        ):  # it says nothing: what others see where they form derivatives is looked for
            problem = oracle.problem().with_tally(Tally())
            demand_beyond_start(problem, x, problem.start(x, y).detach())
        return _iterate(run, algorithm, oracle, x, y, begun)
    except DoesNotApply as error:  # seen on the way only
        raise attach(ValueError(refusal(algorithm, error.reason)), getattr(error, "partial", None)) from error


def _iterate(
    run: Run, algorithm: AbstractAlgorithm[Any], oracle: Oracle, x: Tensor, y: Tensor, begun: Winner | None
) -> Solution:
    rules, tally = run.rules, oracle.like.tally
    initial = algorithm.init(oracle, x, y)
    reached = _Reached(0, initial, tally.stats(), Kept(), *_drawn(rules, oracle))
    if begun is not None:
        run.trials = begun.trials
        reached = replace(reached, step=begun.steps, state=begun.state)
        oracle = oracle.at(begun.steps)
    if rules.resume:
        assert rules.saves is not None
        reached = _resumed(run, rules.saves, algorithm, initial, oracle)
        oracle = oracle.at(reached.step)
        tally.clear()
        tally.add(reached.calls)
        go_on(oracle, reached)
    solution: Solution | None = None
    first_step = reached.step
    try:
        seconds = 0.0
        while True:
            at = _seen(run, algorithm, oracle, reached, seconds)
            ended = None if at.estimate is None else _ended(run, reached.step, at, reached.step >= rules.max_steps)
            if ended is not None:
                break
            before = time.perf_counter()
            state = reached.state
            if not run.passes_over(reached.step):
                state = algorithm.step(oracle, state, at.found)
            seconds = at.seconds + time.perf_counter() - before
            records = len(run.history) if at.estimate is not None else reached.records
            calls = tally.stats() if rules.saves is not None else _UNKEPT
            both = run.best.kept if rules.saves is not None else Kept(run.best.kept.best)  # a copy less is held
            kept = both, *_drawn(rules, oracle), records, at.look, at.tried
            reached = _Reached(reached.step + 1, state, calls, *kept)
            oracle = oracle.at(reached.step)
            if rules.saves is not None and rules.saves.due(reached.step):
                reached = replace(reached, state=_save(run, algorithm, reached, initial))
        if at.found.back is not None:  # what is returned is not a trial point that was no good
            back = _Reached(reached.step + 1, at.found.back, Stats(), records=len(run.history))
            at = _look(run, algorithm, oracle.at(back.step), back, 0.0)
            ended = _returned(run, at, ended)
        assert at.estimate is not None
        solution = run.solution(oracle.like, at.x, at.estimate, ended)
        _save(run, algorithm, reached, initial, last=True)
        return run.finish(solution)
    except NotSavedError as failure:
        raise run.not_saved(failure, solution) from failure.__cause__
    except BaseException as error:
        if rules.saves is not None and rules.resume and reached.step <= first_step:
            suspect(error, rules.saves.checkpoint.path)
        if solution is not None:
            attach(error, solution)
        else:  # the last whole step is kept; its record, if it has one, is written on resuming
            run.leave(error, partial(_save, run, algorithm, reached, initial, last=True, together=False))
        raise


def _drawn(rules: Rules, oracle: Oracle) -> tuple[Randomness | None, Any]:
    """Where the global random numbers are, and the loaders in their data, if that is kept."""
    return (None, None) if rules.saves is None else (drawn_so_far(), positions(oracle.data))


def go_on(oracle: Oracle, reached: _Reached) -> None:
    """Bring loaders and the global random numbers to where they were."""
    if reached.drawn is not None:
        run_forward(oracle.data, oracle.draws, reached.step)
        go_on_from(reached.drawn)


@final
@dataclass(frozen=True, eq=False)
class _At:
    """What is known at a point: `(p,)`, what the algorithm found there, and that as an estimate with its measure.

    Where nothing is recorded there is no estimate; seconds are those since the latest record, and look how many calls
    for samples the latest look at all the data took.
    """

    x: Tensor
    found: Evaluated
    estimate: Estimate | None
    measure: float
    seconds: float = 0.0
    look: int = 0
    tried: float = math.inf


def _seen(run: Run, algorithm: AbstractAlgorithm[Any], oracle: Oracle, reached: _Reached, seconds: float) -> _At:
    """Evaluate at a state; record it, and in a run on batches look at all the data, where that is due."""
    if oracle.is_fixed or not oracle.has_whole:
        return _look(run, algorithm, oracle, reached, seconds)
    looks, spent = run.rules.looks, oracle.like.tally.sampled
    if reached.step >= run.rules.max_steps or looks.due(reached.step, spent, reached.look):
        return _look(run, algorithm, oracle, reached, seconds, on_everything=True)
    before = time.perf_counter()
    found, x = algorithm.evaluate(oracle, reached.state), algorithm.point(reached.state)[0]
    took = seconds + time.perf_counter() - before
    if is_finite(found.estimate):
        return _At(x, found, None, math.nan, took, reached.look, reached.tried)
    here = Look(oracle.first(), found.estimate, math.nan, math.nan)
    return _recorded(run, oracle, reached, x, found, here, took, is_phi=False)


def _look(
    run: Run,
    algorithm: AbstractAlgorithm[Any],
    oracle: Oracle,
    reached: _Reached,
    seconds: float,
    *,
    on_everything: bool = False,
) -> _At:
    """Evaluate at a state, and record it."""
    before = time.perf_counter()
    found, x = algorithm.evaluate(oracle, reached.state), algorithm.point(reached.state)[0]
    if not run.history and algorithm.requires:  # else it asks an estimator, which looks itself
        found = replace(found, estimate=looked_at(oracle.first(), x, found.estimate, partial(why_not, algorithm)))
    if on_everything:
        look = run.rules.looks.look(algorithm, oracle, reached.state, found, reached.tried)
        noticed = tuple(report for report in found.estimate.reports if not report.status.ok)  # at the first look
        seen = replace(look.estimate, reports=(*look.estimate.reports, *noticed))
        look = blown(replace(look, estimate=seen), run.first_norm(1))
    else:
        norm = float(algorithm.stationarity(oracle, reached.state, found))
        look = Look(oracle.first(), found.estimate, norm, norm)
        says_itself = algorithm.values_are_phi or algorithm.best_by_measure
        if reached.step >= _FIRST and not says_itself:
            look = blown(look, run.first_norm(_FIRST))
    took = seconds + time.perf_counter() - before
    is_phi = not on_everything or algorithm.values_are_phi or reached.step > 0  # else y is where it was put
    return _recorded(run, oracle, reached, x, found, look, took, is_phi=is_phi)


def _recorded(
    run: Run,
    oracle: Oracle,
    reached: _Reached,
    x: Tensor,
    found: Evaluated,
    look: Look,
    took: float,
    *,
    is_phi: bool,
) -> _At:
    """What is known at a point, as a record."""
    seen = look.estimate if not run.note else replace(look.estimate, note=run.note)
    estimate = run.structured(look.problem, x, seen, reached.step)
    rejected = found.back is not None
    record = run.record(reached.step, estimate, look.norm, took, rejected, before=reached.records, outer=found.outer)
    run.best.see(Candidate(x, look.estimate.y, record, estimate.status.ok and is_phi))
    run.reached(len(run.history) - 1, oracle.like, x, estimate)
    oracle.like.tally.clear()
    return _At(x, found, estimate, look.measure, 0.0, max(1, look.cost), look.tried)


def _ended(run: Run, step: int, at: _At, last_step: bool) -> Status | None:
    """Why the run ends here, or None; the callback is told of the record."""
    assert at.estimate is not None
    stops, goes_back = run.stops(at.estimate), at.found.back is not None
    if run.passes_over(step):
        return at.estimate.status if last_step else Status.stopped if stops else None
    if (run.failed(at.estimate) or _is_blown(at.estimate)) and not goes_back:
        return at.estimate.status
    if run.met(at.measure, at.found.tol) and not goes_back:
        return Status.successful
    if stops:
        return Status.stopped
    return at.found.ended or (run.used_up if last_step else None)


def _is_blown(estimate: Estimate) -> bool:
    return any(report.part == BLOWN and report.status is Status.diverged for report in estimate.reports)


def _returned(run: Run, at: _At, ended: Status) -> Status:
    """How the run has ended, at the point that was gone back to."""
    assert at.estimate is not None
    run.stops(at.estimate)
    if run.failed(at.estimate):
        return at.estimate.status
    return Status.successful if run.met(at.measure, at.found.tol) else ended


def _save(
    run: Run,
    algorithm: AbstractAlgorithm[Any],
    reached: _Reached,
    initial: Any,
    *,
    last: bool = False,
    together: bool = True,
) -> Any:
    """Write the state; one that is over ranks is put together first, where the ranks are together.

    Returns:
        The state to go on from: what a run that resumes will have, so that the same bits follow.
    """
    if run.rules.saves is None:
        return reached.state
    state, ranks, own = reached.state, run.rules.ranks, reached.state
    if ranks is not None and algorithm.is_apart(state):
        if not together:  # the file that was written before stands
            return own
        state = algorithm.gathered(state, ranks)
        own = algorithm.of_rank(state, ranks)
    point, written = algorithm.point(state), encoded(state, initial)
    best, least = (None if each is None else each.as_dict() for each in (reached.kept.best, reached.kept.least))
    if run.rules.whole is not None:
        if not together:
            return own
        point, written, best, least = run.rules.whole.gathered((point, written, best, least))
    run.rules.saves.save(
        reached.step,
        point,
        run.history,
        last=last,
        state=written,
        calls=reached.calls.as_dict(),
        best=best,
        least=least,
        kept=reached.records,
        trials=[trial.to_dict() for trial in run.trials],
        look=reached.look,
        tried=reached.tried,
        random=reached.drawn,
        loaders=reached.loaders,
    )
    return own


def _resumed(run: Run, saves: Saves, algorithm: AbstractAlgorithm[Any], initial: Any, oracle: Oracle) -> _Reached:
    """Where the checkpoint is; its records become those of the run."""
    checkpoint, start = saves.checkpoint, algorithm.point(initial)
    content = checkpoint.load(*start)
    if "state" not in content:
        raise checkpoint.foreign("it holds the evaluations of a method that runs its own loop")
    try:
        state = decoded(content["state"], initial)
    except ValueError as error:
        raise checkpoint.foreign(error) from error
    except MISREAD as error:
        raise ValueError(unreadable(checkpoint.path, "its state makes no sense")) from error
    checkpoint.demand(content)
    with checkpoint.intact(content):
        demand_state(state, initial, (len(start[0]), start[1].shape[-1]))
        demand_point(algorithm.point(state), content, start)
        # else there is a record of each look, or of the steps after a sweep
        each_step = not run.trials and (oracle.is_fixed or not oracle.has_whole)
        kept = content["step"] if each_step else content.get("kept", content["step"])
        run.history = sound_records(content["history"], content["step"], kept)
        # files of earlier versions do not tell
        both = (
            None if content.get(name) is None else sound_candidate(name, content[name], *start, run.history)
            for name in ("best", "least")
        )
        run.best.kept = Kept(*both)
        calls = Stats(**content["calls"])
    if run.rules.ranks is not None:
        state = algorithm.of_rank(state, run.rules.ranks)
    saves.go_on_from(content)
    drawn, loaders = content.get("random"), content.get("loaders")
    look, tried = content.get("look", 0), content.get("tried", math.inf)
    return _Reached(content["step"], state, calls, run.best.kept, drawn, loaders, kept, look, tried)
