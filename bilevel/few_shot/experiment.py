"""A learner, the tasks that it is trained, chosen and judged on, and the settings of a run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from bilevel._instance import Instance
from bilevel._tree import Tree
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_type, demand_types
from bilevel.arguments.ranges import SEED
from bilevel.arguments.words import got
from bilevel.few_shot.evaluate import Evaluation
from bilevel.few_shot.learner import Learner
from bilevel.few_shot.options import FORMERLY, Reporting, Saving, Validating, validating
from bilevel.few_shot.train import train
from bilevel.few_shot.trained import Callback, Trained
from bilevel.few_shot.training import Evaluating, Training, regrouped, taken
from bilevel.portable.pickling import AbstractPortable
from bilevel.tasks.source import AbstractTasks, batches

_TEST = 2**35  # test tasks are drawn from a stream of seeds of their own


@final
@dataclass(frozen=True)
class Paths:
    """Paths in the plane, as plain numbers.

    Attributes:
        goals: (x, y) of each task.
        before: the points of a path in each task, without adaptation.
        after: the same after it.
    """

    goals: list[list[float]]
    before: list[list[list[float]]]
    after: list[list[list[float]]]


@final
@dataclass(frozen=True, eq=False)
class Experiment(AbstractPortable):
    """What `bilevel run` trains and evaluates.

    Attributes:
        learner: the method, with its start.
        tasks: what is trained on.
        validation: what the best x is chosen by: tasks, or a `Validating` that says how often.
        test: what it is judged on, once, at the end.
        description: one line.
        settings: of the training. (A mapping of keyword arguments of `train` is the old form.)
        evaluation: of the test. (A mapping of keyword arguments of `evaluate` is the old form.)
        tester: the learner of validation and test, where it is not that of training.
        numbers: (x, seed) -> named numbers that are told beside the test; None: none.
        paths: (x, seed) -> what is drawn beside the curves: paths in the plane before and after adaptation, and where
            they are to lead, as `Paths`; None: nothing.

    Raises:
        TypeError: if a mapping of old has keywords that belong to a run, such as `out`.
    """

    learner: Learner
    tasks: AbstractTasks
    validation: AbstractTasks | Validating
    test: AbstractTasks
    description: str = ""
    settings: Training = Training()
    evaluation: Evaluating = Evaluating()
    tester: Learner | None = None
    numbers: Callable[[Tree, int], Mapping[str, float]] | None = None
    paths: Callable[[Tree, int], Paths] | None = None

    def __post_init__(self) -> None:
        demand_type("Experiment", "tester", self.tester, Learner | None)
        settings, evaluation = self.settings, self.evaluation
        for name, value, kind in (("settings", settings, Training), ("evaluation", evaluation, Evaluating)):
            demand_type("Experiment", name, value, kind | Mapping[str, Any])
        if isinstance(settings, Mapping):
            _warn("Experiment(settings={...})", "Experiment(settings=Training(...), validation=Validating(...))", 4)
            own, validation, rest = regrouped(Training(), self.validating, settings)
            if rest:
                raise TypeError(f"`Experiment(settings=...)` cannot hold {', '.join(rest)}: that is of a single run.")
            object.__setattr__(self, "settings", own)
            object.__setattr__(self, "validation", validation)
        if isinstance(evaluation, Mapping):
            _warn("Experiment(evaluation={...})", "Experiment(evaluation=Evaluating(...))", 4)
            try:
                object.__setattr__(self, "evaluation", Evaluating(**evaluation))
            except TypeError as error:
                raise TypeError(f"`Experiment(evaluation=...)`: {error}") from None
        demand_types(self)

    @property
    def validating(self) -> Validating:
        """The validation, with its defaults and by the tester."""
        own = validating(self.validation)
        assert own is not None
        return replace(own, learner=self.tester) if own.learner is None else own

    @checked(seed=SEED)
    def train(
        self,
        seed: int = 0,
        changes: Mapping[str, Any] | None = None,
        *,
        out: str | os.PathLike[str] | Saving | None = None,
        callback: Callback | Reporting | None = None,
        group: Any = None,
    ) -> Trained:
        """`train` on `tasks`, validated on `validation`.

        Args:
            seed: of the tasks.
            changes: an old form, keyword arguments of `train` in the place of `settings`; write
                `replace(experiment, settings=...)` for the experiment with others.
            out: as for `train`.
            callback: as for `train`.
            group: as for `train`.
        """
        settings, validation = self.settings, self.validating
        if changes is not None:
            _warn("Experiment.train(changes=...)", "replace(experiment, settings=Training(...)).train()")
            settings, validation, rest = regrouped(settings, validation, changes)
            out = _kept(rest.pop("out", out), settings)
            out = FORMERLY["out"].build(out, taken(rest, {"resume": "resume"}))
            told = rest.pop("callback", callback)
            callback = FORMERLY["callback"].build(told, taken(rest, FORMERLY["callback"].fields))
            if rest:
                raise TypeError(f"`Experiment.train(changes=...)`: `train` has no argument {got(next(iter(rest)))}.")
        return train(
            self.learner,
            self.tasks,
            max_steps=settings.max_steps,
            batch=settings.batch,
            seed=seed,
            outer=settings.outer,
            validation=validation,
            out=_kept(out, settings),
            callback=callback,
            group=group,
        )

    @checked(seed=SEED)
    def evaluate(
        self, x: Tree, seed: int = 0, changes: Mapping[str, Any] | None = None, *, group: Any = None
    ) -> Evaluation:
        """`evaluate` on `test`.

        Args:
            x: what was learned.
            seed: of the tasks.
            changes: an old form, keyword arguments of `evaluate` in the place of `evaluation`; write
                `replace(experiment, evaluation=...)` for the experiment with others.
            group: as for `evaluate`.
        """
        own = self.evaluation
        if changes is not None:
            _warn("Experiment.evaluate(changes=...)", "replace(experiment, evaluation=Evaluating(...)).evaluate(x)")
            own = replace(own, **changes)
        learner = self.learner if self.tester is None else self.tester
        return own.evaluate(learner, x, self.test, seed + _TEST, group)

    @checked(seed=SEED)
    def instance(self, seed: int = 0) -> Instance:
        """The bilevel problem of one batch of training tasks, for `check` and `compare`."""
        sample = batches(self.tasks, self.settings.batch, seed)
        learner = self.learner

        def data(step: int) -> Any:
            batch = sample(step)
            return batch if learner.prepare is None else learner.prepare(batch, step)

        return Instance(
            learner.problem,
            learner.x0,
            learner.y0,
            description=self.description,
            settings={"data": data, "estimator": learner.estimator, "warm_start": False},
        )


@final
@dataclass(frozen=True)
class NamedExperiment(AbstractPortable):
    """An experiment that can be built by name.

    Attributes:
        name: what the command line calls it.
        description: one line.
        build: makes it; its keyword arguments are those that `--set` passes, as are the fields of one that is a
            dataclass.
    """

    name: str
    description: str
    build: Callable[..., Experiment]

    def __post_init__(self) -> None:
        demand_types(self)


Named = NamedExperiment  # the name of old


def _kept(out: str | os.PathLike[str] | Saving | None, settings: Training) -> Saving | None:
    return out if out is None or isinstance(out, Saving) else Saving(out, settings.checkpoint_every)


def _warn(old: str, new: str, level: int = 3) -> None:
    """On behalf of the caller of the method that warns."""
    text = f"`{old}` is an old form, and will go: write `{new}`."
    warnings.warn(text, DeprecationWarning, stacklevel=level)
