"""Environments of finitely many states and actions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import SIZE, demand_ranges
from bilevel.reinforcement.environment import AbstractEnvironment, demand_action, demand_task


@final
@dataclass(frozen=True)
class Tabular(AbstractEnvironment):
    """s_0 ~ start, s_{t+1} ~ P(s_t, a_t, .), r_t = r(s_t, a_t), for a fixed number of steps.

    The task is `{"start": (s,), "P": (s, a, s), "r": (s, a)}`; states and observations are unit vectors `(*b, s)`.

    Args:
        horizon: how many actions an episode has.

    Raises:
        ValueError: if there is none.

    Example:
        >>> task = {
        ...     "start": torch.tensor([0.0, 1.0]),
        ...     "P": torch.ones(2, 1, 2) / 2,
        ...     "r": torch.ones(2, 1),
        ... }
        >>> Tabular(3).start(task, torch.zeros(1, 1))
        tensor([[0., 1.]])
    """

    horizon: int
    start_noise: int = field(init=False, default=1, repr=False)
    step_noise: int = field(init=False, default=1, repr=False)

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, horizon=SIZE)

    def start(self, task: Any, noise: Tensor) -> Tensor:
        for name in ("start", "P", "r"):
            demand_task(self, task, name, None)
        return drawn(task["start"].expand(*noise.shape[:-1], -1), noise)

    def step(self, task: Any, state: Tensor, action: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        demand_action(self, state, action, None)
        taken = one_hot(action, task["r"].shape[-1], state)
        reward = torch.einsum("...s,...a,sa->...", state, taken, task["r"])
        following = torch.einsum("...s,...a,sat->...t", state, taken, task["P"])
        return drawn(following, noise), reward, torch.ones_like(reward)


def drawn(probabilities: Tensor, noise: Tensor) -> Tensor:
    """The unit vector `(*b, n)` that a normal number `(*b, 1)` draws from probabilities."""
    reached = probabilities.cumsum(-1)[..., :-1]
    number = (torch.special.ndtr(noise) > reached).sum(-1)
    return one_hot(number, probabilities.shape[-1], probabilities)


def one_hot(number: Tensor, size: int, like: Tensor) -> Tensor:
    """Unit vectors `(*b, size)` in the dtype of another tensor; also under `torch.vmap`."""
    return (number.unsqueeze(-1) == torch.arange(size, device=number.device)).to(like.dtype)
