"""The settings of an experiment: how it is trained and how it is judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, final

from bilevel._optimizer import AbstractOptimizer
from bilevel._tree import Tree
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import COUNT, SEED, SIZE, demand_ranges
from bilevel.few_shot.evaluate import Evaluation, evaluate
from bilevel.few_shot.learner import Learner
from bilevel.few_shot.options import FORMERLY, OuterLoop, Validating, outer_loop
from bilevel.tasks.source import AbstractTasks


@final
@dataclass(frozen=True, eq=False)
class Training:
    """The arguments of `train` that belong to an experiment and not to one run of it.

    Attributes:
        max_steps: how many outer steps.
        batch: tasks a step.
        outer: the outer optimizer, or an `OuterLoop`.
        checkpoint_every: steps between checkpoints, where there is a folder for them.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> Training(max_steps=500).batch
        16
    """

    max_steps: int = 1000
    batch: int = 16
    outer: AbstractOptimizer | OuterLoop = OuterLoop()
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, max_steps=COUNT, batch=SIZE, checkpoint_every=SIZE)

    @property
    def loop(self) -> OuterLoop:
        """How x moves."""
        return outer_loop(self.outer)


@final
@dataclass(frozen=True)
class Evaluating:
    """The arguments of `evaluate` that belong to an experiment; see there.

    Attributes:
        episodes: how many tasks.
        batch: how many at a time.
        steps: how many steps the inner solver takes; None: its own number.
        curve: other numbers of steps to report the score after.

    Example:
        >>> Evaluating(curve=(0, 1, 5)).episodes
        600
    """

    episodes: int = 600
    batch: int = 50
    steps: int | None = None
    curve: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, episodes=SIZE, batch=SIZE, steps=COUNT, curve=COUNT)

    @checked(seed=SEED)
    def evaluate(self, learner: Learner, x: Tree, tasks: AbstractTasks, seed: int = 0, group: Any = None) -> Evaluation:
        """`evaluate` with these numbers."""
        return evaluate(
            learner,
            x,
            tasks,
            episodes=self.episodes,
            batch=self.batch,
            seed=seed,
            steps=self.steps,
            curve=self.curve,
            group=group,
        )


def taken(keywords: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Take the keywords of these names out: by the names that they have now."""
    return {now: keywords.pop(name) for name, now in names.items() if name in keywords}


def regrouped(
    settings: Training, validation: Validating, keywords: Mapping[str, Any]
) -> tuple[Training, Validating, dict[str, Any]]:
    """Settings and validation changed by what were keywords of `train`, and the keywords that belong to neither."""
    rest = dict(keywords)
    loop, optimizer = settings.loop, rest.pop("outer", None)
    if optimizer is not None:
        loop = optimizer if isinstance(optimizer, OuterLoop) else replace(loop, optimizer=optimizer)
    loop = FORMERLY["outer"].build(loop, taken(rest, FORMERLY["outer"].fields))
    validation = replace(validation, **taken(rest, FORMERLY["validation"].fields))
    own = taken(rest, {field.name: field.name for field in fields(Training) if field.name != "outer"})
    return replace(settings, outer=loop, **own), validation, rest
