"""Training a learner over tasks."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch

from bilevel._files import write_atomically
from bilevel._optimizer import AbstractOptimizer
from bilevel._result import BilevelError, Status
from bilevel._validate import grouped
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import COUNT, SEED, SIZE
from bilevel.few_shot.adapt import demand_tasks
from bilevel.few_shot.evaluate import evaluate
from bilevel.few_shot.learner import Learner
from bilevel.few_shot.options import (
    FORMERLY,
    OuterLoop,
    Reporting,
    Saving,
    Validating,
    outer_loop,
    reporting,
    saving,
    validating,
)
from bilevel.few_shot.trained import Callback as Callback, Progress as Progress, Trained as Trained
from bilevel.few_shot.training_run import Clock, Reporter, TrainingBatches, TrainingRun, Validator
from bilevel.few_shot.validate import Validations
from bilevel.outer.checkpoint import read_checkpoint
from bilevel.outer.lock import held
from bilevel.outer.minimize import minimize
from bilevel.outer.partial import attach, tells_partial
from bilevel.outer.solution import Solution
from bilevel.outer.together import demand_same_everywhere
from bilevel.ranks.ranks import Ranks, demand_ranks
from bilevel.tasks.source import AbstractTasks, batches

_VALIDATION = 2**34  # validation tasks are drawn from another stream of seeds than training tasks


@tells_partial
@grouped(**FORMERLY)
@checked(max_steps=COUNT, batch=SIZE, seed=SEED)
def train(
    learner: Learner,
    tasks: AbstractTasks,
    *,
    max_steps: int,
    batch: int = 16,
    seed: int = 0,
    outer: AbstractOptimizer | OuterLoop = OuterLoop(),
    validation: AbstractTasks | Validating | None = None,
    out: str | os.PathLike[str] | Saving | None = None,
    callback: Callback | Reporting | None = None,
    group: Any = None,
) -> Trained:
    """min_x E_t f(x, y_t(x), task_t) by outer steps on batches of new tasks; the x of the best validation is kept.

    A layer over `bilevel.minimize`, without warm starts, as every step has other tasks. An estimate that is not finite,
    or whose inner solver diverged, is never stepped along: see `OuterLoop.skip`. From the same arguments the
    same bits follow, also when a run is interrupted and resumed.

    Each of the last four arguments is one thing, or a value that says more about it.

    Cost: one hypergradient estimate a step, and `evaluate` at each validation.

    Args:
        learner: the method, with its start `learner.x0`.
        tasks: what is trained on.
        max_steps: how many outer steps.
        batch: tasks a step.
        seed: of the tasks and of what the learner draws.
        outer: the outer optimizer, or an `OuterLoop` with its optimizer, the estimator, a constraint, ...
        validation: where validation tasks come from, or a `Validating` that says how often; None: no validation.
        out: a folder for `checkpoint.pt`, `best.pt` and `model.pt`, or a `Saving` that resumes; None: nothing is kept.
        callback: called with the `Progress` after each estimate; a true return value stops training. Or a `Reporting`.
        group: a process group of `torch.distributed` whose ranks all call this alike. Of each batch every one treats
            its share of the tasks (see `minimize`), of each validation likewise; all hold the same x. Rank 0 alone
            tells the callback and writes files, and its clock is the one that counts; to resume, all must be able to
            read the files. None: this process alone.

    Raises:
        ValueError: if a number is out of range, a batch of tasks is malformed, the estimator does not apply, another
            run has the folder, or ranks have other code, settings or tasks.
        TypeError: if `learner` is none, or a source of tasks has no `sample`.
        ImportError: if TensorBoard is asked for and missing.
        BilevelError: if more than `outer.skip` estimates in a row, or the last three, were not finite or diverged, or
            `outer.throw` and one did not succeed; a file could not be written; or another rank has not answered within
            the timeout of the group.
        BaseException: whatever the learner, the tasks or the callback raise, and Ctrl-C, as they are. Every exception
            that leaves here has an attribute `partial`: what was `Trained` until then, None if nothing was.

    Example:
        >>> from bilevel import ITD, BilevelProblem
        >>> from bilevel.extending import Learner
        >>> from bilevel.solvers import Adam, GradientDescent, Iterate
        >>> from bilevel.tasks.sinusoid import Sinusoid
        >>> problem = BilevelProblem(
        ...     f=lambda x, y, task: (y - task["query_y"]).square().mean(),
        ...     g=lambda x, y, task: (y - task["support_y"]).square().mean() / 2,
        ...     init=lambda x, task: x,
        ...     tasks=True,
        ... )
        >>> inner, x0 = Iterate(GradientDescent(0.1), max_steps=1), torch.tensor(3.0)
        >>> predict = lambda x, y, task: y.expand(task["query_y"].shape)
        >>> learner = Learner("mean", problem, x0, x0, ITD(inner), inner, predict, lambda x: None)
        >>> trained = train(learner, Sinusoid(), max_steps=100, outer=Adam(0.1))
        >>> bool(trained.x.abs() < 1)  # sinusoids have mean zero
        True
    """
    loop, chosen_by, kept_in = outer_loop(outer), validating(validation), saving(out)
    demand_tasks("train", learner, tasks=tasks, validation=None if chosen_by is None else chosen_by.tasks)
    ranks = demand_ranks("train", group)
    together = None if ranks is None or ranks.size == 1 else ranks
    writes = together is None or together.rank == 0
    told = {"max_steps": max_steps, "batch": batch, "seed": seed, "loop": loop}
    _demand_alike(together, told, {"tasks": tasks, "validation": chosen_by}, kept_in, reporting(callback))
    place = Path(os.path.abspath("." if kept_in is None else kept_in.path))  # also if the current directory changes
    with held(None if kept_in is None or not writes else kept_in.best, "train(out=...)", "folder"):
        data = TrainingBatches(learner, batches(tasks, batch, seed), seed)
        clock = Clock(_earlier_seconds(kept_in), loop.seconds)
        validator = _validator(learner, chosen_by, kept_in, seed, together)
        reporter = Reporter(reporting(callback), together)
        run = TrainingRun(data, max_steps, clock, validator, reporter, loop, together)
        solution: Solution | None = None
        try:
            try:
                descends, estimator = loop.algorithm is None, loop.estimator
                solution = minimize(
                    learner.problem,
                    learner.x0,
                    learner.y0,
                    algorithm=loop.algorithm,
                    estimator=(learner.estimator if estimator is None else estimator) if descends else None,
                    outer=loop.optimizer if descends else None,
                    max_steps=max_steps,
                    data=data,
                    constraint=loop.constraint,
                    callback=run,
                    checkpoint=None if kept_in is None else kept_in.checkpoint,
                    checkpoint_every=Saving.every if kept_in is None else kept_in.every,
                    checkpoint_seconds=Saving.seconds if kept_in is None else kept_in.seconds,
                    resume=False if kept_in is None else kept_in.resume,
                    warm_start=False if descends else None,
                    chunk_size=loop.chunk_size,
                    throw=loop.throw,
                    skip=0 if loop.throw else loop.skip,
                    group=ranks,
                )
            finally:
                reporter.close()
        except BaseException as error:
            solution = _left_by(error) if solution is None else solution
            if not (isinstance(error, BilevelError) and solution is not None and solution.status is error.status):
                attach(error, None if solution is None else run.interrupted(solution))
                raise
            if solution.status is Status.interrupted:  # a checkpoint could not be written
                raise BilevelError(str(error), error.status, run.interrupted(solution)) from error.__cause__
        assert solution is not None
        trained = run.trained(solution)
        if kept_in is not None and writes:
            _write_module(place / "model.pt", trained)
        if trained.ended == "failed":
            raise _failure(trained, solution, loop)
        return trained


def _left_by(error: BaseException) -> Solution | None:
    """What `minimize` left with an exception, or with the one that another one came after."""
    for each in (error, error.__context__):
        partial = getattr(each, "partial", None)
        if isinstance(partial, Solution):
            return partial
    return None


def _write_module(path: Path, trained: Trained) -> None:
    try:
        state = trained.module().state_dict()
        write_atomically(path, lambda file: torch.save(state, file))
    except OSError as error:
        text = f"`train` ended, and {str(path)!r} could not be written: {error}"
        raise BilevelError(text, Status.interrupted, trained) from error
    except BaseException as error:
        attach(error, trained)
        raise


def _failure(trained: Trained, solution: Solution, loop: OuterLoop) -> BilevelError:
    status = solution.estimate.status
    why = "an estimate did not succeed, and `throw` was asked for."
    lost = next((k for k, r in enumerate(reversed(trained.history)) if not r.status.lost), len(trained.history))
    if not loop.throw:
        why = (
            f"the last {lost} estimates were not finite, or diverged; no step was taken along them."
            f" Shorten the inner step or have it derived (`step=None`), take another inner solver (with a line search),"
            f" clip the gradient (`outer=Clipped(Adam(1e-3), max_norm=1.0)`), or raise `OuterLoop(skip=...)`."
        )
    step = trained.history[-1].step
    return BilevelError(f"`train` stopped at step {step}: {why} {solution.estimate.message}", status, trained)


def _demand_alike(
    ranks: Ranks | None, settings: dict[str, object], made_of: dict[str, Any], kept_in: Saving | None, told: Reporting
) -> None:
    """Refuse ranks that would not train and validate the same."""
    settings = {**settings, "out": kept_in is not None, "resume": kept_in is not None and kept_in.resume}
    settings |= {"callback": told.callback is not None, "tensorboard": told.tensorboard is not None}
    demand_same_everywhere(ranks, {**settings, "score_every": told.score_every}, made_of, "train")


def _validator(
    learner: Learner, given: Validating | None, kept_in: Saving | None, seed: int, ranks: Ranks | None
) -> Validator:
    """Also without validations there may be those of an earlier part of the run."""
    path = None if kept_in is None else Path(os.path.abspath(kept_in.best))
    kept = Validations.begin(path, learner.x0, resume=kept_in is not None and bool(kept_in.resume), ranks=ranks)
    if given is None:
        return Validator(kept)
    own = learner if given.learner is None else given.learner
    evaluation = functools.partial(
        evaluate, own, tasks=given.tasks, episodes=given.episodes, seed=seed + _VALIDATION, group=ranks
    )
    return Validator(kept, evaluation, given.every, given.patience)


def _earlier_seconds(kept_in: Saving | None) -> float:
    """The time that the run so far took, from the records in its checkpoint."""
    if kept_in is None or not kept_in.resume or not kept_in.checkpoint.exists():
        return 0.0  # `minimize` says so where there should be one
    try:
        return float(sum(record["seconds"] for record in read_checkpoint(kept_in.checkpoint)["history"]))
    except (ValueError, TypeError, LookupError, OverflowError):
        return 0.0  # as above
