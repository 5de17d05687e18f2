"""Environments of one action."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, SIZE, demand_ranges
from bilevel.reinforcement.environment import AbstractEnvironment, demand_action, demand_task


@final
@dataclass(frozen=True)
class GaussianBandit(AbstractEnvironment):
    """r = means_a + spread xi: the task is `{"means": (arms,)}`, the observation the number 1.

    Args:
        arms: how many there are.
        spread: the standard deviation of the rewards.

    Raises:
        ValueError: if there is no arm, or the spread is negative.

    Example:
        >>> bandit = GaussianBandit(2, spread=0.0)
        >>> bandit.step(
        ...     {"means": torch.tensor([1.0, 5.0])},
        ...     torch.ones(1, 1),
        ...     torch.tensor([1]),
        ...     torch.zeros(1, 1),
        ... )[1]
        tensor([5.])
    """

    arms: int
    spread: float = 1.0
    horizon: int = field(init=False, default=1, repr=False)
    start_noise: int = field(init=False, default=0, repr=False)
    step_noise: int = field(init=False, default=1, repr=False)

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, arms=SIZE, spread=AT_LEAST_0)

    def start(self, task: Any, noise: Tensor) -> Tensor:
        demand_task(self, task, "means", self.arms)
        return noise.new_ones(*noise.shape[:-1], 1)

    def step(self, task: Any, state: Tensor, action: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        demand_action(self, state, action, None)
        means = task["means"].expand(*action.shape, self.arms)
        reward = means.gather(-1, action.long().unsqueeze(-1)).squeeze(-1) + self.spread * noise[..., 0]
        return state, reward, torch.zeros_like(reward)
