"""Where tasks of environments come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import POSITIVE, SEED, SIZE, demand_ranges
from bilevel.tasks._random import generator, normal, uniform
from bilevel.tasks.source import AbstractTasks, Batch


@final
@dataclass(frozen=True)
class GoalTasks(AbstractTasks):
    """Goals that are uniform in a cube, for `Navigation` and `PointMass`: `{"goal": (tasks, dimensions)}`.

    Args:
        dimensions: of the goals.
        reach: half the length of an edge.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> GoalTasks().sample(3, seed=0)["goal"].shape
        torch.Size([3, 2])
    """

    dimensions: int = 2
    reach: float = 0.5

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, dimensions=SIZE, reach=POSITIVE)

    @checked(count=SIZE, seed=SEED)
    def sample(self, count: int, seed: int) -> Batch:
        drawn = uniform(-1.0, 1.0, count, self.dimensions, generator=generator(seed))
        return {"goal": (self.reach * drawn).to(torch.get_default_dtype())}


@final
@dataclass(frozen=True)
class BanditTasks(AbstractTasks):
    """Means of arms that are independent and normal, for `GaussianBandit`: `{"means": (tasks, arms)}`.

    Args:
        arms: how many there are.
        spread: the standard deviation of the means.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> BanditTasks(5).sample(2, seed=0)["means"].shape
        torch.Size([2, 5])
    """

    arms: int
    spread: float = 1.0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, arms=SIZE, spread=POSITIVE)

    @checked(count=SIZE, seed=SEED)
    def sample(self, count: int, seed: int) -> Batch:
        drawn = normal(count, self.arms, generator=generator(seed))
        return {"means": (self.spread * drawn).to(torch.get_default_dtype())}
