"""What an environment is: functions of tensors, so that episodes and tasks run side by side."""

from __future__ import annotations

import abc
from typing import Any

from torch import Tensor

from bilevel.arguments.words import got
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


def demand_task(environment: AbstractEnvironment, task: Any, name: str, size: int | None) -> None:
    """Refuse a task without what an environment reads of it.

    Args:
        environment: which.
        task: what it was given.
        name: of the entry that it reads.
        size: of its last axis; None: that of the others is to fit.

    Raises:
        ValueError: naming the entry.
    """
    there = isinstance(task, dict) and isinstance(task.get(name), Tensor)
    if there and (size is None or (task[name].dim() > 0 and task[name].shape[-1] == size)):
        return
    wanted = f"an entry {name!r}" + ("" if size is None else f" of {size} numbers")
    own = got(task[name]) if there else (f"entries {sorted(map(str, task))}" if isinstance(task, dict) else got(task))
    raise ValueError(f"a task of `{type(environment).__name__}` must have {wanted}. Got {own}.")


def demand_action(environment: AbstractEnvironment, state: Tensor, action: Tensor, size: int | None) -> None:
    """Refuse actions of a policy that is for another environment, which broadcasting would make something else of.

    Args:
        environment: which.
        state: `(*b, s)`.
        action: what the policy gave.
        size: of an action; None: integers `(*b,)`.

    Raises:
        ValueError: naming what is required.
    """
    batch = state.shape[:-1]
    if size is None:
        if action.shape == batch and not action.is_floating_point():
            return
        wanted = "one integer, as those of `CategoricalPolicy`"
    else:
        if action.shape == (*batch, size):
            return
        wanted = f"a vector of {size} numbers, as those of `GaussianPolicy(module, actions={size})`"
    raise ValueError(f"an action of `{type(environment).__name__}` must be {wanted}. Got {got(action)} for {batch[0]}.")
