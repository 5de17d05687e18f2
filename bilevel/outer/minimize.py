"""`minimize`: its arguments, and what they make: an algorithm with its data, run by the outer loop."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from bilevel._apply import apply_estimator, check_chunks
from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._files import demand_regular
from bilevel._flat import FlatProblem
from bilevel._hypergradient import own_start, structured
from bilevel._numerics.transforms import demand_autograd
from bilevel._optimizer import AbstractMinimizer, AbstractOptimizer, AbstractOuterDriver, demand_numbers
from bilevel._problem import BilevelProblem, Split, check_signature, demand_arguments
from bilevel._result import Tally
from bilevel._sets import Constraint, bounds, corners, region
from bilevel._tree import Tree, demand_alike, ravel, tree_leaves
from bilevel._validate import demand_type
from bilevel.algorithms.algorithm import AbstractAlgorithm
from bilevel.algorithms.auto import ALIKE, chosen as choose
from bilevel.algorithms.descent import Descent
from bilevel.algorithms.oracle import AbstractData, Oracle, has_whole, is_fixed
from bilevel.algorithms.outer_conditions import demand_steady
from bilevel.algorithms.registry import DESCENT, resolve_algorithm
from bilevel.algorithms.value_function import ValueFunction
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_0, AT_LEAST_1, SIZE
from bilevel.certificates.accuracy import adaptive
from bilevel.certificates.certificate import Constants
from bilevel.named.auto import Auto
from bilevel.named.implicit import IMPLICIT
from bilevel.named.registration import AUTO
from bilevel.named.registry import default_outer, resolve
from bilevel.named.setting import Setting
from bilevel.outer.batches import (
    demand_all_tasks,
    demand_own,
    expect,
    first_batch,
    first_shares,
    shares_of_some,
    some_blocks,
    sources,
)
from bilevel.outer.checkpoint import Checkpoint, begun_with, loaders_of, trials_of
from bilevel.outer.drivers import drive
from bilevel.outer.fingerprint import Fingerprint
from bilevel.outer.lock import held
from bilevel.outer.looks import Looks
from bilevel.outer.partial import tells_partial
from bilevel.outer.progress import Shown, shown
from bilevel.outer.records import Callback, Rules, Run
from bilevel.outer.rounds import Rounds
from bilevel.outer.run import iterate
from bilevel.outer.saves import Saves
from bilevel.outer.shared_out import all_shared_out, demand_first_order, demand_takes_shards, with_shards
from bilevel.outer.solution import Solution
from bilevel.outer.sweep import Winner, recalled, swept
from bilevel.outer.together import demand_same_everywhere, without_shards
from bilevel.outer.watcher import before_save
from bilevel.outer.words import in_words
from bilevel.ranks.ranks import Ranks, demand_ranks
from bilevel.ranks.sharded import shards_of
from bilevel.ranks.whole_vectors import WholeVectors
from bilevel.requirements.starts import starts_warm


@tells_partial
@checked(
    max_steps=AT_LEAST_0,
    tol=AT_LEAST_0,
    evaluate_every=AT_LEAST_1,
    sweep_steps=AT_LEAST_1,
    checkpoint_every=AT_LEAST_1,
    chunk_size=SIZE,
)
def minimize(
    problem: BilevelProblem,
    x0: Tree,
    y0: Tree = None,
    *,
    algorithm: AbstractAlgorithm[Any] | str | None = None,
    estimator: AbstractEstimator | Auto | str | None = None,
    outer: AbstractOptimizer | AbstractMinimizer | AbstractOuterDriver | None = None,
    max_steps: int = 100,
    tol: float | None = None,
    data: Any = None,
    evaluate_every: int | None = None,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    sweep_steps: int | None = None,
    constraint: Constraint = None,
    outer_inequalities: Callable[..., Tree] | None = None,
    outer_equalities: Callable[..., Tree] | None = None,
    callback: Callback | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10,
    checkpoint_seconds: float | None = 30.0,
    resume: bool | Literal["force"] = False,
    warm_start: bool | None = None,
    chunk_size: int | None = None,
    accuracy: Literal["fixed", "adaptive"] | None = None,
    constants: Constants | Callable[[Tree], Constants] | None = None,
    throw: bool = True,
    skip: int = 0,
    group: Any = None,
    compile: bool = False,
    progress: bool | str = False,
) -> Solution:
    """min_x Phi(x) = f(x, y*(x)): by steps along hypergradient estimates h, or by another algorithm.

    Without `algorithm=` that is `Descent`, which `estimator`, `outer`, `warm_start`, `chunk_size`, `accuracy` and
    `constants` describe; beside another algorithm, which has settings of its own, these six are refused.

    Cost: at most `max_steps` + 1 evaluations (for `Descent` estimates), the last at the point returned, and one more
    where a line search has to go back to it; every oracle call is counted. No argument is modified. From the same
    arguments, and across `resume`, the same bits follow.

    Args:
        problem: f and g.
        x0: where x starts; its structure is that of x.
        y0: where y starts (one task's in task mode); None where the problem has `init`, whose structure it then has.
        algorithm: a whole algorithm such as `SOBA(0.1, 0.01)`, or a name with steps that are derived from the problem;
            see `bilevel.algorithms.available()`. None: `Descent`.
        estimator: an estimator or a name ("implicit" if None); see `bilevel.estimators()`.
        outer: an optimizer; a minimizer, which has a line search; or a driver such as `ScipyMinimize()`, which runs its
            own loop. None: `QuasiNewton()` where the estimates are accurate (`AbstractEstimator.accurate`: the default,
            the aid family, kkt, itd with a tolerance) and the data the same at every step, else `Adam(0.05)`.
        max_steps: how many outer steps; of `QuasiNewton` evaluations.
        tol: stop when |h| (with a constraint |x - P(x - h)|), or the algorithm's own measure of stationarity, is at
            most this, on all the data, which must be known (a loader's luckiest batch would end the run); missing it is
            a failure. None: the outer method's own, which may be missed (`QuasiNewton` has one, optimizers have none
            and take all the steps).
        data: for problems with a third argument: one batch (a tensor, dict or tuple) for every step; a `FiniteSum`; a
            loader (any other iterable that can be started again, as it is at its end: a `DataLoader`, or a list, whose
            entries are batches, one a step); a callable step -> batch, or (role, step) -> batch with the role "f" or
            "g"; or a `Split` of two of these. An algorithm that draws n batches a step takes items n step, ...,
            n step + n - 1 at each, and a callable is called with these numbers.
        evaluate_every: of a run on the batches of a `FiniteSum`: how many steps lie between two looks at all the data,
            whose values of f and of the measure of stationarity are what is recorded, told to the callback, compared
            for the best iterate and with `tol`; there is one at the start and at the end. None: so many that looks take
            at most a tenth of the calls.
        sweep: lists of settings of the algorithm by name, such as `{"inner_step": [0.1, 1.0], "ratio": [1.0, 10.0]}`,
            with `ratio` that of inner_step to outer_step and `seed` that of the order of a `FiniteSum`: every
            combination is run for `sweep_steps` steps, those that differ in steps or seeds side by side in one batch,
            and the best is gone on with as if it had run alone. `Solution.sweep` has a row for each; calls are counted.
        sweep_steps: how long; None: a quarter of `max_steps`.
        constraint: a set for x (`Box`, `Simplex`), or a dict of sets for entries of x's top-level dict.
        outer_inequalities: c of c(x, y*(x)) <= 0, entry by entry: `outer_inequalities(x, y) -> tensors`, called as f
            is, so with the data where there are any; it may ignore y. With tasks it holds in each task. The method is
            then `AugmentedLagrangian`: `estimator` and `outer` make its rounds, `tol` is compared with its measure, and
            multipliers and violations are in the records and in `Solution.outer_constraints`. Refused beside data that
            change from step to step, accuracy="adaptive" and `algorithm` (but for `ValueFunction`, which takes them).
        outer_equalities: e of e(x, y*(x)) = 0, likewise.
        callback: called with the record and the estimate of each step; a true return value stops the run.
        checkpoint: a file that the state is written to, atomically, every `checkpoint_every` steps, at the end, and
            when the run is interrupted or fails. It holds the state of the algorithm; of a driver, which keeps its
            state to itself, all evaluations, that are replayed to it. The records of a long run are in a second file
            beside it, `checkpoint` + ".history", to whose end the new ones are added. It is this run's alone as long
            as that lasts: another one, of this process or not, is refused.
        checkpoint_every: how many steps lie between two writes.
        checkpoint_seconds: how much time, at most: it is written after the step in which that is over; None: it does
            not matter.
        resume: continue from `checkpoint`, with the problem, the data, the algorithm (estimator, outer method), the
            constraint and the structures that the run was begun with: as far as can be known, a file of another run is
            refused, and what is otherwise is named; "force": go on all the same. Loaders are run forward to where they
            were; callables are exact. The global random numbers (of torch, Python and numpy) are put back where they
            were, so that random functions go on as well; without `resume` they are never touched.
        warm_start: start each inner and linear solve where the previous ended. None: where the estimate forgets its
            start (its solvers have tolerances), so that this saves work and changes nothing; elsewhere, after so many
            steps without a tolerance, the start is a part of Phi, and each solve begins at y0. True with such steps is
            online unrolling: cheap, and what is minimized is no longer the Phi of any one number of steps.
        chunk_size: in task mode, how many tasks to treat at a time: bounds the memory; None: all.
        accuracy: "adaptive" (implicit estimators only): each hypergradient is certified to half of its own norm and no
            better, so that early steps are cheap, and the run stops when |h| is certified to be at most `tol`, that
            is |h_estimated| plus its error bound. "fixed", or None: the estimator's own tolerances.
        constants: what is known of f and g, or a function of x that tells, for adaptive accuracy; None: estimated.
        throw: raise at the first estimate that does not succeed, and if `tol` is given and missed. Otherwise the run
            goes on as long as it stays finite, and `Solution.status` is the worst that was met. Trial points that a
            line search went back from do not count.
        skip: with `throw=False` and data that change from step to step: take no step along an estimate that is not
            finite, or whose solver diverged, and go on with the next batch; the run ends where more than so many follow
            each other. 0: none is passed over, and the first that is not finite ends the run.
        group: a process group of `torch.distributed` whose ranks all call this alike; every one of them returns the
            same x, bit for bit. With `tasks=True` each treats its share of the tasks, and the estimates' h are averaged
            (y is that of its own tasks); else f and g are means over samples, of which each has a share: its part of
            every block of a `FiniteSum`, or a `bilevel.ranks.Shard`. Rank 0 alone calls the callback and writes files,
            after numbers of steps only; to resume, all must be able to read them. `bilevel.ranks.Ranks(group)` in its
            place counts messages. None: this process alone.
        compile: whether a step (inner steps, linear solve, cross product, outer update) is to be one compiled program,
            for `AID` and `ITD` of fixed inner steps; see `Compiled`. With a callback, a checkpoint or a line search
            the estimate is one, and the rest is as always. What cannot be compiled is refused by name.
        progress: show on stderr how far the run is, Phi, |h| and the time that is left: a bar in terminals and
            notebooks where rich is installed (the extra `cli`), else a line now and then. A text is the run's name.

    Returns:
        The solution: where it ended, whether it has `converged`, and the `best` iterate.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if structures do not match, an estimator or algorithm does not apply, a number is out of range,
            arguments exclude each other, ranks have other code, settings or data, or another run has the checkpoint.
        BilevelError: if `throw` and the run did not succeed, a checkpoint could not be written (a full disk), or
            another rank has not answered within the timeout of the group.
        BaseException: whatever f, g or the callback raise, and Ctrl-C, as they are. Every exception that leaves here
            has an attribute `partial`: the solution so far, None if there was none.

    Example:
        >>> import torch
        >>> from bilevel.solvers import GradientDescent
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> solution = minimize(problem, x0, x0, outer=GradientDescent(0.5), max_steps=50, tol=1e-6)
        >>> round(float(solution.x), 4)
        3.0
    """
    if progress is not False:
        arguments = dict(locals())
        _demand_arguments(max_steps, tol, callback, checkpoint, checkpoint_every, checkpoint_seconds, resume)
        with shown(max_steps, progress if isinstance(progress, str) else "") as show:
            return minimize(**{**arguments, "progress": False, "callback": Shown(show, callback)})
    demand_autograd("minimize")
    if TYPE_CHECKING or compile:
        from bilevel.compiled.descent import descend, is_one_program
        from bilevel.compiled.estimator import compiled
        from bilevel.compiled.single_loop import compiled_loop
    _demand_arguments(max_steps, tol, callback, checkpoint, checkpoint_every, checkpoint_seconds, resume)
    demand_type("minimize", "warm_start", warm_start, bool | None)
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
    _demand_skip(skip, throw, data, outer)
    of_descent = {
        "estimator": estimator,
        "outer": outer,
        "warm_start": warm_start,
        "chunk_size": chunk_size,
        "accuracy": accuracy,
        "constants": constants,
        "outer_inequalities": outer_inequalities,
        "outer_equalities": outer_equalities,
    }
    ranks = demand_ranks("minimize", group)
    together = None if ranks is None or ranks.size == 1 else ranks
    told: dict[str, object] = {
        "algorithm": algorithm,
        **of_descent,
        "max_steps": max_steps,
        "tol": tol,
        "evaluate_every": evaluate_every,
        "constraint": constraint,
        "sweep": sweep,
        "sweep_steps": sweep_steps,
        "skip": skip,
        "throw": throw,
        "callback": callback is not None,
        "checkpoint": checkpoint is not None,
        "checkpoint_every": checkpoint_every,
        "resume": resume,
    }
    shards = None if y0 is None else shards_of("minimize", y0, ranks)
    demand_same_everywhere(ranks, told, {"problem": problem, "data": data, "x0": x0, "y0": y0})
    batches = sources(data, None if problem.tasks else ranks)
    if ranks is None or problem.tasks:
        demand_own(data)
    if problem.tasks:
        demand_all_tasks(batches)
        _demand_estimates(ranks, algorithm)
    on_batches = has_whole(batches) and not is_fixed(batches)
    if tol is not None and not has_whole(batches):
        raise ValueError(
            "`minimize(tol=...)` is compared with what all the data say, and `data=` has only batches of them: the"
            " luckiest would end the run. Pass `data=FiniteSum(...)`, or leave `tol` out and take `max_steps`."
        )
    if algorithm == AUTO and is_fixed(batches):
        algorithm = DESCENT
    if isinstance(algorithm, ValueFunction):
        for name in ("outer_inequalities", "outer_equalities"):
            del of_descent[name]
    if algorithm is not None and algorithm != DESCENT:
        if on_batches:  # they are for the certificate that ends the run
            del of_descent["constants"]
        _refuse_beside(algorithm, [name for name, value in of_descent.items() if value is not None])
    if evaluate_every is not None and not on_batches:
        raise ValueError(
            "`minimize(evaluate_every=...)` is for runs on batches of data that are known as a whole: pass"
            " `data=FiniteSum(...)`, or leave it out: every step is recorded."
        )
    writes = ranks is None or ranks.rank == 0
    with held(checkpoint if writes else None, "minimize(checkpoint=...)"):
        if resume and checkpoint is not None:
            expect(batches, loaders_of(checkpoint))
        x, x_structure = ravel(x0, "x0")
        first = first_batch(batches)
        check_signature(problem, first)
        given = {"outer_inequalities": outer_inequalities, "outer_equalities": outer_equalities}
        on_x = {name: function for name, function in given.items() if function is not None}
        for name, function in on_x.items():
            demand_arguments(name, function, ("x", "y"), first, "minimize({}=...)")
        if y0 is None:
            y0 = own_start("minimize", problem, x0, first)
        original, start, vectors = problem, y0, None  # what a checkpoint is told by, on whatever ranks
        if shards is not None:
            demand_first_order(problem, algorithm, estimator, sweep)
            if checkpoint is not None:
                assert ranks is not None
                vectors = WholeVectors(shards, ranks)
                vectors.demand_length_of_x(len(x))
            problem, y0 = shards.problem(problem), shards.local()
        y, y_structure = ravel(y0, "y0")
        demand_alike("minimize(x0, y0)", x_structure, y_structure)
        x, y = x.detach().clone(), y.detach().clone()
        check_chunks("minimize", problem, chunk_size)
        flat = FlatProblem(problem, x_structure, y_structure, first, given=x0)
        if together is not None:
            whole = (1.0, 1.0) if problem.tasks else first_shares(batches)
            flat.over(together, whole, sharded=shards is not None)
        described = y_structure.describe() if shards is None else shards.describe()
        structures = {"x": x_structure.describe(), "y": described}
        settings: dict[str, object] = {"constraint": constraint, **structures}

        def run(compares: bool) -> Run:
            saves = None
            if checkpoint is not None:
                own = settings | on_x
                made_of = own | {"problem": original, "data": without_shards(data), "constants": constants}
                starts = [*tree_leaves(x0), *tree_leaves(start)]
                of_rank = None if vectors is None else vectors.of_rank
                kept = Checkpoint(checkpoint, Fingerprint(settings, made_of, starts), resume == "force", of_rank)
                seconds = checkpoint_seconds if together is None else None  # whose clocks differ
                before = partial(before_save, callback)
                saves = Saves(kept, checkpoint_every, seconds, before=before, writes=writes)
            looks = Looks(evaluate_every, tol, constants)
            rules = Rules(max_steps, tol, throw, callback, saves, bool(resume), skip, looks, together, vectors)
            return Run(rules, structured, compares, note, by_norm)

        chosen: AbstractAlgorithm[Any]
        loops = False
        by_norm, slack, note, share = False, 0.0, "", max(1, max_steps // 4)  # how long a sweep is, where nobody says
        if algorithm is None or algorithm == DESCENT:
            named: Any = IMPLICIT if estimator is None else estimator
            estimates = resolve(named, flat, x, y)
            if accuracy not in (None, "fixed"):
                estimates = adaptive(estimates, accuracy, constants, tol)
            if compile:
                estimates = compiled(estimates)
            steps: Any = outer
            if steps is None:
                steps = default_outer(estimates, is_fixed(batches))
                steps = _as_begun(steps, checkpoint) if resume and checkpoint is not None else steps
            settings = {"algorithm": DESCENT, "estimator": named, "outer": steps, **settings}
            warm = starts_warm(warm_start, estimates, problem)
            settings["warm_start"] = warm
            coupled = outer_inequalities is not None or outer_equalities is not None
            if coupled:
                demand_steady(batches, accuracy)
            if isinstance(steps, AbstractOuterDriver):
                _refuse_data(steps, data)
                estimate = partial(_estimate, estimates, chunk_size)
                limits = bounds(constraint, x_structure, x)
                rounds = Rounds(steps, estimate, outer_inequalities, outer_equalities, limits) if coupled else None
                by_norm = coupled
                return drive(run(True), steps, estimate, flat, (x, y), bounds=limits, warm_start=warm, rounds=rounds)
            descent = Descent(estimates, _optimizer(steps), warm, chunk_size)
            chosen = descent
            if coupled:
                from bilevel.algorithms.augmented_lagrangian import AugmentedLagrangian  # a floor above this one

                chosen = AugmentedLagrangian(descent, outer_inequalities, outer_equalities, tol=tol)
        else:
            shares = shares_of_some(batches)
            each = zip(some_blocks(batches), shares, strict=True)
            others = tuple(flat.on(block, Tally(), shares=weights) for block, weights in each)
            reach = corners(constraint, x_structure, x)
            setting = Setting(flat.with_tally(Tally()), x, y, others=others, corners=reach)
            if algorithm == AUTO:
                choice = choose(setting, batches)
                chosen, note = choice.algorithm, choice.why
                if sweep is None:
                    (sweep, share), slack = choice.affordable(max_steps), ALIKE
                    if resume and checkpoint is not None:  # to more steps, maybe, than it was begun for
                        known = [row["settings"]["outer_step"] for row in trials_of(checkpoint)]
                        sweep = {"outer_step": known} if known else None
            else:
                chosen = resolve_algorithm(algorithm, setting)
            if isinstance(chosen, ValueFunction) and on_x:
                chosen = replace(chosen, inequalities=outer_inequalities, equalities=outer_equalities)
            if tol is not None and not chosen.sees_everything:
                raise ValueError(
                    f"`minimize(tol=...)` is compared with what all the data say, and `{type(chosen).__name__}` asks"
                    f" only some in a step: the luckiest would end the run. Leave `tol` out and take `max_steps`."
                )
            settings = {"algorithm": chosen, **settings}
            if compile:
                compiled_loop(chosen)  # which refuses what is none, before anything is swept
                loops = True
        oracle = Oracle(flat.with_tally(Tally()), batches, chosen.draws, region(constraint, x_structure))
        begun: Winner | None = None
        if sweep is not None:
            _demand_sweep(algorithm, batches)
            swept_over = ", ".join(f"{name}={[*values]}" for name, values in sweep.items())
            settings["sweep"] = f"{swept_over}, steps={sweep_steps}"
            if resume and checkpoint is not None:
                begun = recalled(chosen, sweep, batches, trials_of(checkpoint))
            if begun is None:
                length = share if sweep_steps is None else min(sweep_steps, max_steps)
                as_run: Callable[[Any], Any] = compiled_loop if loops else lambda algorithm: algorithm
                begun = swept(chosen, sweep, oracle, x, y, length, slack, as_run)
            chosen = begun.algorithm
            oracle = Oracle(oracle.like, begun.data, chosen.draws, oracle.region)
        if loops:
            chosen = compiled_loop(chosen)
        by_norm = not chosen.values_are_phi
        compares = on_batches or (oracle.is_fixed and (chosen.values_are_phi or chosen.best_by_measure))
        if shards is not None:
            demand_takes_shards(chosen)
        made = run(compares)
        if compile and isinstance(chosen, Descent) and is_one_program(chosen, oracle, made.rules):
            return descend(made, chosen, oracle, x, y)
        if shards is None:
            return iterate(made, chosen, oracle, x, y, begun)
        with all_shared_out(shards):
            return with_shards(iterate(made, chosen, oracle, x, y, begun), shards)


def _demand_estimates(ranks: Ranks | None, algorithm: Any) -> None:
    if ranks is not None and not (algorithm is None or algorithm == DESCENT or isinstance(algorithm, Descent)):
        raise ValueError(
            "`minimize(group=...)` with `tasks=True` shares the tasks of hypergradient estimates: pass `estimator=` and"
            " `outer=` in the place of `algorithm=`."
        )


def _demand_arguments(
    max_steps: Any, tol: Any, callback: Any, checkpoint: Any, checkpoint_every: Any, seconds: Any, resume: Any
) -> None:
    demand_type("minimize", "max_steps", max_steps, int)
    demand_type("minimize", "checkpoint_every", checkpoint_every, int)
    demand_type("minimize", "tol", tol, float | None)
    demand_type("minimize", "callback", callback, Callable[..., Any] | None)
    if inspect.iscoroutinefunction(callback):  # what it returns is true, and would end the run
        raise TypeError(
            "`minimize(callback=...)` must be a function that is called and not awaited. Got an `async def`."
        )
    demand_type("minimize", "checkpoint", checkpoint, str | os.PathLike | None, "a path or None")
    if checkpoint is not None:
        try:
            demand_regular(checkpoint)
        except (OSError, ValueError) as error:  # before anything is computed
            raise ValueError(f"`minimize(checkpoint=...)` must be the path of a file. {str(error)[:200]}.") from error
    demand_type("minimize", "checkpoint_seconds", seconds, float | None)
    demand_type("minimize", "resume", resume, bool | str, 'True, False or "force"')
    if isinstance(resume, str) and resume != "force":
        raise ValueError(f'`minimize(resume=...)` must be True, False or "force". Got {resume!r}.')
    if seconds is not None and not seconds > 0:
        raise ValueError(f"`minimize(checkpoint_seconds=...)` must be positive, or None. Got {seconds}.")


def _demand_sweep(algorithm: Any, batches: AbstractData | Split) -> None:
    if algorithm is None or algorithm == DESCENT:
        raise ValueError(
            "`minimize(sweep=...)` sweeps over settings of an algorithm such as `SOBA(0.1, 0.1)`. Pass `algorithm=`."
        )
    if not has_whole(batches):
        raise ValueError(
            "`minimize(sweep=...)` compares values on all the data, and `data=` has only batches of them. Pass"
            " `data=FiniteSum(...)`, or all samples as one batch."
        )


def _demand_skip(skip: Any, throw: bool, data: Any, outer: Any) -> None:
    demand_type("minimize", "skip", skip, int)
    if skip < 0:
        raise ValueError(f"`minimize(skip=...)` must be at least 0. Got {skip}.")
    if skip and (throw or data is None or isinstance(outer, AbstractOuterDriver)):
        raise ValueError(
            "`minimize(skip=...)` passes over estimates that fail on one batch, on the way to the next: it needs"
            " `throw=False`, `data=` and an optimizer or algorithm that takes one step a batch. Leave it out."
        )


def _refuse_beside(algorithm: Any, given: list[str]) -> None:
    if given:
        belong, them = ("belongs", "it") if len(given) == 1 else ("belong", "them")
        name = repr(algorithm[:100]) if isinstance(algorithm, str) else f"{type(algorithm).__name__}(...)"
        raise ValueError(
            f"`minimize(algorithm={name})` is a whole algorithm: {', '.join(f'`{each}=`' for each in given)}"
            f" {belong} to `Descent`. Leave {them} out, or give such settings to the algorithm itself."
        )


def _refuse_data(driver: AbstractOuterDriver, data: Any) -> None:
    if data is not None:
        raise ValueError(
            f"`{type(driver).__name__}` runs its own loop on a deterministic problem: it takes no `data`. Close f and g"
            f" over the data, or use an optimizer such as `Adam`."
        )


def _as_begun(chosen: Any, checkpoint: str | os.PathLike[str]) -> Any:
    """The default outer method that a run was begun with: of files of earlier versions always `Adam`."""
    from bilevel.solvers.adam import Adam

    return Adam(0.05) if begun_with(checkpoint, "outer", in_words({"outer": Adam(0.05)})["outer"]) else chosen


def _optimizer(outer: Any) -> AbstractOptimizer | AbstractMinimizer:
    if isinstance(outer, AbstractMinimizer):
        return outer
    if not isinstance(outer, AbstractOptimizer):
        raise TypeError(
            f"`minimize(outer=...)` must be an optimizer such as `Adam(0.05)`. Got {type(outer).__name__}."
            f" Wrap a torch optimizer as `TorchOptim(lambda params: torch.optim.SGD(params, lr=0.1))`."
        )
    demand_numbers("minimize", "outer", outer)
    if outer.needs_curvature:
        raise ValueError(f"`minimize(outer={type(outer).__name__}())` needs a step size: pass `step=...`.")
    return outer


def _estimate(
    estimator: AbstractEstimator, chunk_size: int | None, problem: FlatProblem, x: Tensor, start: FlatStart
) -> FlatEstimate:
    return apply_estimator(estimator, problem, x, start, chunk_size)
