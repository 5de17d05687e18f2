"""What an environment is: functions of tensors, so that episodes and tasks run side by side."""

from __future__ import annotations

import abc
from typing import Any

from torch import Tensor

from bilevel.portable.pickling import AbstractPortable


class AbstractEnvironment(AbstractPortable, abc.ABC):
    """s_0 = start(task, xi), o_t = observe(task, s_t), (s_{t+1}, r_t, c_t) = step(task, s_t, a_t, xi_t), t < horizon.

    All chance is in xi, standard normal numbers that are arguments: equal arguments give equal episodes, and a run is
    resumed to the same bits. Functions are written in torch operations for episodes side by side: states `(*b, s)`,
    actions `(*b, a)` or, of a finite set, integers `(*b,)`, rewards `(*b,)`, and c_t `(*b,)`, which is 1 where the
    episode goes on and 0 where it has ended. They are called under `torch.vmap` over tasks, without `if`s on values.

    A subclass sets `horizon`, and `start_noise` and `step_noise`, how many numbers xi and xi_t have.

    Example:
        >>> import torch
        >>> class Drift(AbstractEnvironment):
        ...     horizon, start_noise, step_noise = 5, 1, 1
        ...
        ...     def start(self, task, noise):
        ...         return noise
        ...
        ...     def step(self, task, state, action, noise):
        ...         return (
        ...             state + action + noise,
        ...             -state[..., 0].square(),
        ...             torch.ones_like(state[..., 0]),
        ...         )
        >>> Drift().start({}, torch.zeros(3, 1)).shape
        torch.Size([3, 1])
    """

    horizon: int
    start_noise: int
    step_noise: int

    @abc.abstractmethod
    def start(self, task: Any, noise: Tensor) -> Tensor:
        """The first states `(*b, s)`, from noise `(*b, start_noise)`."""

    @abc.abstractmethod
    def step(self, task: Any, state: Tensor, action: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The next states, the rewards, and whether episodes go on, from noise `(*b, step_noise)`."""

    def observe(self, task: Any, state: Tensor) -> Tensor:
        """What a policy sees of the states, `(*b, o)`: all of it, unless the environment says otherwise."""
        return state
