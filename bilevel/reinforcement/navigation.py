"""A point that is to find an unknown goal in the plane."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor

from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import POSITIVE, SIZE, demand_ranges
from bilevel.reinforcement.environment import AbstractEnvironment, demand_action, demand_task


@final
@dataclass(frozen=True)
class Navigation(AbstractEnvironment):
    """s_{t+1} = s_t + clip(a_t, -speed, speed),  r_t = -|s_{t+1} - goal|^2,  s_0 = 0; it ends within `reached` of goal.

    The task is `{"goal": (2,)}`, which the policy does not see: only the rewards tell it. (Where episodes that
    arrive end, the rewards that they would still have cost nothing.)

    Source: Finn, Abbeel, Levine, "Model-agnostic meta-learning for fast adaptation of deep networks", ICML 2017,
    section 5.3: goals in [-0.5, 0.5]^2, steps of at most 0.1, 100 of them, and an end within 0.01 of the goal.

    Args:
        horizon: the greatest number of steps.
        speed: the greatest step in each direction.
        reached: how near is there.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> import torch
        >>> task, action = {"goal": torch.tensor([0.3, 0.0])}, torch.tensor([[1.0, 0.0]])
        >>> Navigation().step(task, torch.zeros(1, 2), action, torch.zeros(1, 0))[0]
        tensor([[0.1000, 0.0000]])
    """

    horizon: int = 100
    speed: float = 0.1
    reached: float = 0.01
    start_noise: int = field(init=False, default=0, repr=False)
    step_noise: int = field(init=False, default=0, repr=False)

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, horizon=SIZE, speed=POSITIVE, reached=POSITIVE)

    def start(self, task: Any, noise: Tensor) -> Tensor:
        demand_task(self, task, "goal", 2)
        return noise.new_zeros(*noise.shape[:-1], 2)

    def step(self, task: Any, state: Tensor, action: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        demand_action(self, state, action, 2)
        following = state + action.clamp(-self.speed, self.speed)
        square = (following - task["goal"]).square().sum(-1)
        return following, -square, (square > self.reached**2).to(square.dtype)
