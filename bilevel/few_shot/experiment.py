"""A learner, the tasks that it is trained, chosen and judged on, and the settings of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from bilevel._instance import Instance
from bilevel._tree import Tree
from bilevel.few_shot.evaluate import Evaluation, evaluate
from bilevel.few_shot.learner import Learner
from bilevel.few_shot.train import Trained, train
from bilevel.tasks.source import AbstractTasks, batches

_TEST = 2**35  # test tasks are drawn from a stream of seeds of their own


@final
@dataclass(frozen=True, eq=False)
class Experiment:
    """What `bilevel run` trains and evaluates.

    Attributes:
        learner: the method, with its start.
        tasks: what is trained on.
        validation: what the best x is chosen by.
        test: what it is judged on, once, at the end.
        description: one line.
        settings: keyword arguments of `train`: `max_steps`, `batch`, `outer`, `validate_every`, ...
        evaluation: keyword arguments of `evaluate` for the test: `episodes`, `curve`, ...
        tester: the learner of validation and test, where it is not that of training.
    """

    learner: Learner
    tasks: AbstractTasks
    validation: AbstractTasks
    test: AbstractTasks
    description: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    tester: Learner | None = None

    def train(self, seed: int = 0, changes: Mapping[str, Any] | None = None) -> Trained:
        """`train` on `tasks`, validated on `validation`.

        Args:
            seed: of the tasks.
            changes: keyword arguments of `train` in the place of `settings`.
        """
        options = {**self.settings, **(changes or {})}
        return train(
            self.learner,
            self.tasks,
            seed=seed,
            validation=self.validation,
            validation_learner=self.tester,
            **options,
        )

    def evaluate(self, x: Tree, seed: int = 0, changes: Mapping[str, Any] | None = None) -> Evaluation:
        """`evaluate` on `test`.

        Args:
            x: what was learned.
            seed: of the tasks.
            changes: keyword arguments of `evaluate` in the place of `evaluation`.
        """
        options = {**self.evaluation, **(changes or {})}
        learner = self.learner if self.tester is None else self.tester
        return evaluate(learner, x, self.test, seed=seed + _TEST, **options)

    def instance(self, seed: int = 0) -> Instance:
        """The bilevel problem of one batch of training tasks, for `check` and `compare`."""
        sample = batches(self.tasks, self.settings.get("batch", 16), seed)
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
class Named:
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
