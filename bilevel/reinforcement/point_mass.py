"""A mass that is pushed: to a goal, or to a velocity."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from torch import Tensor

from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, POSITIVE, SIZE, demand_ranges
from bilevel.reinforcement.environment import AbstractEnvironment, demand_action, demand_task


@final
@dataclass(frozen=True)
class PointMass(AbstractEnvironment):
    """u_{t+1} = (1 - friction) u_t + dt clip(a_t, -1, 1),  q_{t+1} = q_t + dt u_{t+1}, from rest at the origin.

    The state is (q, u), seen whole. The reward is -|q_{t+1} - goal|, or -|u_{t+1} - goal| where the goal is a velocity,
    less `cost` |clip(a_t)|^2. The task is `{"goal": (dimensions,)}`, which the policy does not see.

    Source: the tasks of goal and of velocity follow Finn, Abbeel, Levine, ICML 2017, section 5.3, on the simplest body.

    Args:
        wanted: "goal" or "velocity".
        horizon: the number of steps.
        dimensions: of q.
        dt: the time of a step.
        friction: the share of the velocity that is lost in a step.
        cost: of pushing.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> mass = PointMass("velocity", dt=1.0, friction=0.0)
        >>> task, push = {"goal": torch.tensor([1.0, 0.0])}, torch.tensor([[1.0, 0.0]])
        >>> mass.step(task, torch.zeros(1, 4), push, torch.zeros(1, 0))[:2]
        (tensor([[1., 0., 1., 0.]]), tensor([-0.]))
    """

    wanted: Literal["goal", "velocity"] = "goal"
    horizon: int = 50
    dimensions: int = 2
    dt: float = 0.1
    friction: float = 0.1
    cost: float = 0.0
    start_noise: int = field(init=False, default=0, repr=False)
    step_noise: int = field(init=False, default=0, repr=False)

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, horizon=SIZE, dimensions=SIZE, dt=POSITIVE, friction=AT_LEAST_0, cost=AT_LEAST_0)

    def start(self, task: Any, noise: Tensor) -> Tensor:
        demand_task(self, task, "goal", self.dimensions)
        return noise.new_zeros(*noise.shape[:-1], 2 * self.dimensions)

    def step(self, task: Any, state: Tensor, action: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        demand_action(self, state, action, self.dimensions)
        q, u = state[..., : self.dimensions], state[..., self.dimensions :]
        push = action.clamp(-1, 1)
        u = (1 - self.friction) * u + self.dt * push
        q = q + self.dt * u
        missed = (q if self.wanted == "goal" else u) - task["goal"]
        reward = -missed.square().sum(-1).sqrt() - self.cost * push.square().sum(-1)
        return torch.cat([q, u], -1), reward, torch.ones_like(reward)
