"""`bilevel run` of a few-shot experiment: train, evaluate, and everything about it in a folder."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, final

from bilevel._files import write_atomically
from bilevel._optimizer import AbstractOptimizer
from bilevel._result import BilevelError, Stats, Status
from bilevel.commands.arguments import split, takes
from bilevel.commands.claim import Claim, claimed
from bilevel.commands.company import Company, as_restarted, company
from bilevel.commands.contents import (
    BEGUN,
    FINISHING,
    INTERRUPTED,
    STOPPED,
    append_history,
    damaged,
    read_checkpoint,
    read_history,
    sync_history,
    write_history,
    write_result,
)
from bilevel.commands.folder import Folder
from bilevel.commands.home import Home
from bilevel.commands.listing import outer_method
from bilevel.commands.loading import load_experiment
from bilevel.commands.plan import Request, merge
from bilevel.commands.plot_training import draw_training
from bilevel.commands.progress import note, number, table, training_progress
from bilevel.commands.raised import Failure, raised_by, told
from bilevel.commands.replaced import bring_back, forget, set_aside
from bilevel.commands.result import versions
from bilevel.commands.run import MISREAD, again, left, resuming
from bilevel.few_shot.calibration import calibration_of
from bilevel.few_shot.evaluate import Evaluation
from bilevel.few_shot.experiment import Experiment, Paths
from bilevel.few_shot.options import Saving
from bilevel.few_shot.trained import Progress, Trained
from bilevel.named.registry import demand_names
from bilevel.outer.watcher import AbstractWatcher

_LONG = 300  # characters of a description
_TRIAL = 50  # episodes that tell how long the evaluation will take
_SLACK = 1.3  # the time that is kept for it, over what they say


def run_experiment(request: Request) -> None:
    """Train and evaluate; leave result.json, history.jsonl, plot.png, checkpoint.pt, best.pt and model.pt.

    Raises:
        ValueError: if the request makes no sense.
        Failure: if training met NaN, or the evaluation failed.
        KeyboardInterrupt: if it was interrupted; the files are written first.
    """
    with company() as ranks:
        if not ranks.leads:
            _follow(request, ranks)
            return
        with ranks.led():
            request = as_restarted(request)
            with claimed(request) as claim:
                _claimed(request, claim, ranks)


def _follow(request: Request, ranks: Company) -> None:
    """Train and evaluate as rank 0 does, and leave everything else to it."""
    told_first = ranks.told()
    if told_first is None:
        return
    plan = _plan(request, told_first["recorded"])
    experiment = _within(plan.experiment, told_first["limit"])
    saving = Saving(told_first["out"], experiment.settings.checkpoint_every, told_first["resume"])
    try:
        trained = experiment.train(plan.seed, out=saving, callback=lambda _: False, group=ranks.ranks)
    except BilevelError as error:
        if not isinstance(error.partial, Trained) or error.partial.ended == "interrupted":
            raise
        trained = error.partial
    experiment.evaluate(trained.x, plan.seed, group=ranks.ranks)
    if trained.ended == "failed":
        raise Failure(trained.message)


def _within(experiment: Experiment, limit: float | None) -> Experiment:
    """The experiment, with so many seconds for its training."""
    if limit is None:
        return experiment
    settings = replace(experiment.settings, outer=replace(experiment.settings.loop, seconds=limit))
    return replace(experiment, settings=settings)


def _claimed(request: Request, claim: Claim, ranks: Company) -> None:
    folder, before = claim.folder, claim.before
    plan = _plan(request, None if before is None else before["settings"])
    head = {
        "experiment": plan.request.problem,
        "description": plan.experiment.description,
        "settings": plan.settings,
        "versions": versions(),
    }
    lines = _earlier_lines(folder) if claim.goes_on else []
    if claim.goes_on and before is not None and _same_length(plan, before):
        if before["status"] == FINISHING and _complete(plan, folder, before):
            return
        if before["status"] == Status.successful.name and before.get("ended") == "max_steps":
            if not request.quiet:
                name = str(folder.path)
                note(f"nothing to do: the run in {name!r} has taken its steps. Raise `--steps` to continue it.")
            return
    if request.overwrite:
        set_aside(folder)
    elif not claim.goes_on:
        folder.clear(but_result=True)
    if not claim.goes_on:  # before anything is computed: who is killed now has said what was to be run
        write_result(folder, head | {"status": BEGUN})
    recorded = None if before is None else before["settings"]
    going = _Going(plan, folder, head, lines, claim.goes_on, ranks, recorded)
    try:
        _run(going)
    except BaseException as error:
        if bring_back(folder):
            error.add_note(f"The earlier run in {str(folder.path)!r} is kept.")
        elif not (going.told or request.resume):  # nothing was computed
            folder.clear()
        raise


@final
@dataclass(frozen=True, eq=False)
class _Plan:
    """An experiment as it was asked for, ready to start, and what was asked for as plain data."""

    request: Request
    experiment: Experiment
    settings: dict[str, Any]

    @property
    def seed(self) -> int:
        """Of the tasks."""
        return 0 if self.request.seed is None else self.request.seed


def _plan(request: Request, recorded: Mapping[str, Any] | None) -> _Plan:
    arguments = split(request.arguments)
    if request.tol is not None:
        raise ValueError("`--tol` does not apply to few-shot experiments: every step has other tasks.")
    if request.algorithm is not None:
        raise ValueError("`--algorithm` does not apply to few-shot experiments: their learners are trained by descent.")
    if recorded is not None:
        request, arguments = merge(request, arguments, recorded)
    experiment, _ = load_experiment(request.problem, arguments, request.seed)
    if request.estimator is not None:
        demand_names(request.estimator)
    own = experiment.settings
    loop = replace(own.loop, optimizer=_outer(request, own.loop.optimizer))
    if request.estimator is not None:
        loop = replace(loop, estimator=request.estimator)
    steps = own.max_steps if request.steps is None else request.steps
    experiment = replace(experiment, settings=replace(own, outer=loop, max_steps=steps))
    settings = {
        "problem": request.problem,
        "set": arguments,
        "seed": request.seed,
        "estimator": request.estimator,
        "outer": request.outer,
        "step": request.step,
        "steps": steps,
        "seconds": request.seconds,
        "tol": None,
        "chosen": {
            "learner": experiment.learner.name,
            "estimator": request.estimator or repr(experiment.learner.estimator),
            "adapt": repr((experiment.tester or experiment.learner).adapt),
            "tasks": _short(experiment.tasks),
            "test": _short(experiment.test),
            "evaluation": asdict(experiment.evaluation),
            "outer": repr(loop.optimizer),
            "max_steps": steps,
            "batch": own.batch,
            "validate_every": experiment.validating.every,
            "validate_episodes": experiment.validating.episodes,
            "checkpoint_every": own.checkpoint_every,
        },
    }
    return _Plan(request, experiment, settings)


def _short(value: object) -> str:
    """Its description, without the end of very long ones."""
    text = repr(value)
    return text if len(text) <= _LONG else f"{text[:_LONG]}..."


def _outer(request: Request, own: AbstractOptimizer) -> AbstractOptimizer:
    if request.outer is None:
        if request.step is None:
            return own
        moved = own.with_step(request.step)
        if moved is None:
            raise ValueError(f"the outer method of this experiment is {own!r}: `--step` needs `--outer NAME`.")
        return moved
    build = outer_method(request.outer)
    if not takes(build, "step"):
        raise ValueError(f"`--outer {request.outer}` runs its own loop on a deterministic problem. Use `adam`.")
    if request.step is None:
        raise ValueError(f"`--outer {request.outer}` needs a step length: add `--step`.")
    found: AbstractOptimizer = build(step=request.step)
    return found


@final
class _Going:
    """A run as it goes: its lines, and whether a new one has been `told`."""

    def __init__(
        self,
        plan: _Plan,
        folder: Folder,
        head: dict[str, Any],
        lines: list[dict[str, Any]],
        goes_on: bool,
        ranks: Company,
        recorded: Mapping[str, Any] | None,
    ) -> None:
        self.plan, self.folder, self.head, self.lines, self.goes_on = plan, folder, head, lines, goes_on
        self.ranks, self.recorded = ranks, recorded
        self.told = False
        self.home = Home()

    def tell(self, progress: Progress) -> None:
        """Write the line of a step."""
        self.home.back_from(self.plan.request.problem)
        if not self.told:
            write_result(self.folder, self.head | {"status": BEGUN})
        if progress.record.status.ok or progress.record.step > 0:
            forget(self.folder)
        line = _line(progress)
        if not self.told:
            write_history(self.folder, self.lines)
        append_history(self.folder, line)
        self.lines.append(line)
        self.told = True


@final
class _Teller(AbstractWatcher):
    """Writes and shows each step."""

    def __init__(self, going: _Going, show: Callable[[Progress], None]) -> None:
        self._going, self._show = going, show

    def __call__(self, told: Progress) -> None:
        self._going.tell(told)
        self._show(told)

    def before_save(self) -> None:
        if self._going.told:
            sync_history(self._going.folder)


def _run(going: _Going) -> None:
    plan, folder, head, lines = going.plan, going.folder, going.head, going.lines
    experiment, request, began = plan.experiment, plan.request, time.perf_counter()
    earlier = float(lines[-1]["elapsed"]) if lines else 0.0
    limit = None
    if request.seconds is not None:
        limit = max(request.seconds - _time_to_evaluate(experiment), 1e-3)
        experiment = _within(experiment, limit)
    every, between = experiment.settings.checkpoint_every, request.checkpoint_seconds
    saving = Saving(folder.path, every, resuming(request, goes_on=going.goes_on), between or Saving.seconds)

    def seconds() -> float:
        return earlier + time.perf_counter() - began

    with training_progress(experiment.settings.max_steps, quiet=request.quiet, name=request.problem) as show:
        try:
            try:
                out, resume = str(folder.path), saving.resume
                going.ranks.tell(recorded=going.recorded, limit=limit, out=out, resume=resume)
                group = going.ranks.ranks
                trained = experiment.train(plan.seed, out=saving, callback=_Teller(going, show), group=group)
            finally:
                going.home.back_from(request.problem)
        except KeyboardInterrupt as error:
            if not going.told and (folder.replaced.is_dir() or not folder.saved):
                raise
            kept = f"Continue with: {again(request, folder)}" if folder.saved else "No checkpoint could be written."
            if not going.told:
                if not going.goes_on:
                    write_result(folder, head | {"status": INTERRUPTED})
                raise KeyboardInterrupt(f"interrupted before another step was taken. {kept}") from error
            message = f"interrupted after step {lines[-1]['step']}. {kept}"
            _write(folder, head, lines, _Ending(INTERRUPTED, message, seconds()))
            raise KeyboardInterrupt(message) from error
        except BaseException as error:  # also `sys.exit` in f or g
            partial = error.partial if isinstance(error, BilevelError) else None
            if isinstance(partial, Trained) and partial.ended != "interrupted":
                _finish(going, partial, seconds())
                return
            if not going.told:
                if going.goes_on and isinstance(error, MISREAD) and not raised_by(error):
                    raise damaged(folder) from error
                raise
            message = f"stopped after step {lines[-1]['step']}: {told(error, request.problem)}"
            unwritten = isinstance(error, BilevelError) and error.status is Status.interrupted
            status = error.status.name if isinstance(error, BilevelError) and not unwritten else STOPPED
            if unwritten or isinstance(error, OSError):  # as on a full disk
                message = f"{message}. {left(folder)}"
            try:
                _write(folder, head, lines, _Ending(status, message, seconds()))
            except OSError as failure:
                message = f"{message} Its files could not be written: {failure}."
            raise Failure(message) from error
    try:
        _finish(going, trained, seconds())
    except KeyboardInterrupt as error:
        message = f"interrupted while what was trained was evaluated. Continue with: {again(request, folder)}"
        raise KeyboardInterrupt(message) from error
    except OSError as error:
        text = f"stopped after step {lines[-1]['step']}: a file could not be written: {error}. {left(folder)}"
        raise Failure(text) from error


def _finish(going: _Going, trained: Trained, seconds: float) -> None:
    """Evaluate and write what was trained, failed or not."""
    plan, folder, head, lines = going.plan, going.folder, going.head, going.lines
    experiment, request, began = plan.experiment, plan.request, time.perf_counter()
    if not request.quiet:
        note(
            f"training ended ({trained.ended}) at step {trained.history[-1].step}; evaluating x of step {trained.step}."
        )
    test = experiment.evaluate(trained.x, plan.seed, group=going.ranks.ranks)
    numbers = {} if experiment.numbers is None else dict(experiment.numbers(trained.x, plan.seed))
    paths = None if experiment.paths is None else experiment.paths(trained.x, plan.seed)
    failed = trained.ended == "failed"
    last = trained.history[-1]
    message = f"training failed at step {last.step}. {trained.message}" if failed else ""
    ending = _Ending(
        last.status.name if failed else "successful",
        message,
        seconds + time.perf_counter() - began,
        trained,
        test,
        numbers,
        paths,
    )
    content = _write(folder, head, lines, ending)
    if not request.quiet:
        _show(plan, folder, content, test)
    if failed:
        raise Failure(message)


def _time_to_evaluate(experiment: Experiment) -> float:
    """A generous guess of how long the evaluation takes, from a few episodes at the start of training."""
    learner = experiment.tester or experiment.learner
    for count in (1, _TRIAL):  # the first one warms up
        few = replace(experiment.evaluation, episodes=count)
        found = few.evaluate(learner, learner.x0, experiment.validating.tasks)
    return _SLACK * found.seconds * experiment.evaluation.episodes / _TRIAL + 1.0


def _line(progress: Progress) -> dict[str, Any]:
    validation = None if progress.validation is None else progress.validation.as_dict()
    return {
        **progress.record.as_dict(),
        "score": progress.score,
        "validation": validation,
        "elapsed": progress.seconds,
    }


def _earlier_lines(folder: Folder) -> list[dict[str, Any]]:
    """The lines of history.jsonl up to the checkpoint.

    Raises:
        ValueError: if the checkpoint, or a line, cannot be read.
    """
    step = read_checkpoint(folder)["step"]
    return [line for line in read_history(folder) if line["step"] < step and _sound(folder, line)]


def _sound(folder: Folder, line: Mapping[str, Any]) -> bool:
    """Whether a line holds what is used of it.

    Raises:
        ValueError: if it does not.
    """
    try:
        numbers = [line["elapsed"], line["value"], line["grad_norm"]]
        numbers += [] if line["validation"] is None else [line["validation"]["score"]]
        read = list(map(float, numbers)), Stats(**line["stats"]), Status[line["status"]]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{str(folder.history)!r} is damaged at step {line['step']}. `--overwrite` begins the run anew."
        ) from error
    return bool(read)


@final
@dataclass(frozen=True, eq=False)
class _Ending:
    """How a run ended: the status and its message, the seconds, and what there was to show."""

    status: str
    message: str
    seconds: float
    trained: Trained | None = None
    test: Evaluation | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    paths: Paths | None = None


def _write(folder: Folder, head: dict[str, Any], lines: list[dict[str, Any]], ending: _Ending) -> dict[str, Any]:
    """Write every file of a run that has ended."""
    trained, test = ending.trained, ending.test
    content = head | {
        "status": ending.status,
        "message": ending.message,
        "steps": lines[-1]["step"],
        "initial": _values(lines[0]),
        "final": _values(lines[-1]),
        "ended": None if trained is None else trained.ended,
        "step": None if trained is None else trained.step,
        "validation": None if trained is None or trained.best is None else trained.best.as_dict(),
        "test": None if test is None else test.as_dict(),
        "calibration": None if test is None else _calibration(test),
        "failed": dict(Counter(line["status"] for line in lines if line["status"] != "successful")),
        "skipped": sum(Status[line["status"]].lost for line in lines),
        "stats": sum((Stats(**line["stats"]) for line in lines), Stats()).as_dict(),
        "training_seconds": lines[-1]["elapsed"],
        "seconds": ending.seconds,
        "notes": [],
        "numbers": dict(ending.numbers),
        **({} if ending.paths is None else {"paths": asdict(ending.paths)}),
    }
    unfinished = {} if test is None else {"status": FINISHING, "computed": {"status": ending.status}}
    write_result(folder, content | unfinished)
    _draw(folder, content, lines)
    return content


def _draw(folder: Folder, content: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    """The picture, and then the result, by which the run is finished."""
    notes = content["notes"]
    try:
        write_atomically(folder.plot, lambda file: draw_training(file, lines, content["test"], content.get("paths")))
    except Exception as error:
        missing = isinstance(error, ImportError)
        notes.append(f"left out plot.png: {error if missing else f'{type(error).__name__}: {error}'}")
        note(notes[-1])
    write_result(folder, content)


def _same_length(plan: _Plan, before: Mapping[str, Any]) -> bool:
    """Whether no more, and no less, is to be trained than was."""
    return all(before["settings"].get(name) == plan.settings[name] for name in ("steps", "seconds"))


def _complete(plan: _Plan, folder: Folder, before: Mapping[str, Any]) -> bool:
    """Make what is missing of a run that was killed after its evaluation; False where there is something to train.

    Raises:
        Failure: if training failed, as it would have said itself.
    """
    computed, lines = before.get("computed"), read_history(folder)
    if not (isinstance(computed, dict) and lines and all(_sound(folder, line) for line in lines)):
        return False
    content = {name: value for name, value in before.items() if name != "computed"}
    content |= {"status": str(computed.get("status")), "notes": []}
    _draw(folder, content, lines)
    if not plan.request.quiet:
        note(f"the run in {str(folder.path)!r} was trained and evaluated: its plot was missing.")
    if content.get("ended") == "failed":
        raise Failure(str(content.get("message")))
    return True


def _values(line: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": line["step"], "value": line["value"], "grad_norm": line["grad_norm"]}


def _calibration(test: Evaluation) -> dict[str, float] | None:
    """Of the predicted probabilities, for classification."""
    if test.metric != "accuracy":
        return None
    found = calibration_of(test)
    return {"NLL": found.nll, "ECE": found.ece, "MCE": found.mce}


def _show(plan: _Plan, folder: Folder, content: Mapping[str, Any], test: Evaluation) -> None:
    counts = content["stats"]
    files = sorted(file.name for file in folder.path.iterdir() if not file.name.startswith("."))
    curve = ", ".join(f"{steps}: {score}" for steps, score in test.curve.items())
    validation = content["validation"]
    rows = [
        ("status", content["status"]),
        (f"test {test.metric}", f"{test.score} on {test.episodes} tasks"),
        ("without adaptation", str(test.before)),
        *([("after steps", curve)] if curve else []),
        ("test loss", str(test.loss)),
        *([("predictive NLL", str(test.nll))] if test.nll else []),
        *((name, number(value)) for name, value in content["numbers"].items()),
        *([("90 % intervals hold", str(test.coverage))] if test.coverage else []),
        *((name, number(value)) for name, value in (content["calibration"] or {}).items()),
        *([("validation", f"{number(validation['score'])} at step {validation['step']}")] if validation else []),
        ("outer loss", f"{number(content['initial']['value'])} -> {number(content['final']['value'])}"),
        *(
            [("failed estimates", f"{content['failed']}, {content['skipped']} passed over")]
            if content["failed"]
            else []
        ),
        *([("failed adaptations", str(dict(test.failed)))] if test.failed else []),
        *([(f"{test.metric} of the others", str(test.settled))] if test.lost else []),
        ("oracle calls", ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count)),
        ("outer steps", f"{content['steps']} ({content['ended']})"),
        ("seconds", f"{content['seconds']:.2f}, {content['training_seconds']:.2f} of them for training"),
        ("files", f"{folder.path}: {', '.join(files)}"),
    ]
    table(f"{plan.request.problem}: {plan.experiment.learner.name}", rows)
