"""Fixed data of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import SEED, SIZE
from bilevel.reinforcement.environment import AbstractEnvironment
from bilevel.reinforcement.offline import SIDES
from bilevel.reinforcement.policy import AbstractPolicy, Params
from bilevel.reinforcement.trajectories import Trajectories, rollout
from bilevel.tasks._random import generator, normal, subsets
from bilevel.tasks.source import AbstractTasks, Batch


@final
@dataclass(frozen=True, eq=False)
class OfflineTasks(AbstractTasks):
    """Tasks out of a finite number, each with the episodes that were once collected in it.

    Args:
        data: tensors with one leading axis of tasks: what the environment's functions are given, and of both sides
            `support_observations`, `support_actions`, `support_rewards`, `support_alive`, `support_log_probs`, and
            `query_...` likewise; see `OfflinePolicy`.

    Raises:
        ValueError: if the leading axes differ, or there is none.

    Example:
        >>> OfflineTasks({"goal": torch.zeros(7, 2)}).sample(3, seed=0)["goal"].shape
        torch.Size([3, 2])
    """

    data: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        demand_types(self)
        counts = {len(value) if value.dim() else 0 for value in self.data.values()}
        if len(counts) != 1 or not min(counts):
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.data.items()) or "nothing"
            raise ValueError(f"`OfflineTasks(data=...)` must be tensors with one leading axis of tasks. Got {shapes}.")

    @property
    def count(self) -> int:
        """How many tasks there are."""
        return len(next(iter(self.data.values())))

    @checked(count=SIZE, seed=SEED)
    def sample(self, count: int, seed: int) -> Batch:
        """`count` of them, different ones as far as there are so many."""
        draws = generator(seed)
        rows: list[int] = []
        while len(rows) < count:
            some = min(count - len(rows), self.count)
            rows += subsets(torch.tensor([self.count]), some, draws)[0].tolist()
        index = torch.tensor(rows)
        return {name: value[index.to(value.device)] for name, value in self.data.items()}


@checked(episodes=SIZE, seed=SEED)
def collect(
    environment: AbstractEnvironment,
    policy: AbstractPolicy,
    params: Params,
    tasks: dict[str, Tensor],
    *,
    episodes: int = 20,
    seed: int = 0,
) -> OfflineTasks:
    """The episodes that one policy makes in tasks, on both sides, with its probabilities: data for `OfflinePolicy`.

    Args:
        environment: where.
        policy: whose actions.
        params: its parameters.
        tasks: what the environment's functions are given, with a leading axis of tasks.
        episodes: of each side.
        seed: of the noise.

    Raises:
        ValueError: if there are no tasks or no parameters, or the tasks' leading axes differ.

    Example:
        >>> from torch import nn
        >>> from bilevel.reinforcement import CategoricalPolicy, GaussianBandit
        >>> policy = CategoricalPolicy(nn.Linear(1, 3))
        >>> data = collect(
        ...     GaussianBandit(3), policy, policy.params, {"means": torch.zeros(4, 3)}, episodes=5
        ... )
        >>> data.data["support_rewards"].shape
        torch.Size([4, 5, 1])
    """
    if not tasks or any(not each.dim() for each in tasks.values()) or len({len(each) for each in tasks.values()}) > 1:
        shapes = {name: tuple(each.shape) for name, each in tasks.items()}
        raise ValueError(f"`collect(tasks=...)` must be tensors with a leading axis of as many tasks. Got {shapes}.")
    if not params:
        raise ValueError("`collect(params=...)` must be the policy's parameters. Got none.")
    draws = generator(seed)
    like = next(iter(params.values()))
    count, wide = len(next(iter(tasks.values()))), policy.noise + environment.step_noise
    found: dict[str, Tensor] = dict(tasks)
    for name in SIDES:
        start = normal(count, episodes, environment.start_noise, generator=draws).to(like)
        noise = normal(count, episodes, environment.horizon, wide, generator=draws).to(like)
        made: Trajectories = torch.vmap(lambda task, s, n: rollout(environment, policy, params, task, s, n))(
            tasks, start, noise
        )
        found |= {f"{name}_{part}": value for part, value in made._asdict().items()}
    return OfflineTasks(found)
