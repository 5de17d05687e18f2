"""What a source of tasks is, and how it feeds an outer loop."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import SEED, SIZE, demand_ranges
from bilevel.portable.pickling import AbstractPortable
from bilevel.tasks._random import seed_of_step

Batch: TypeAlias = dict[str, Tensor]
"""Tasks with a leading task axis: `support_x`, `support_y`, `query_x`, `query_y`, and what else f and g read."""


class AbstractTasks(AbstractPortable, abc.ABC):
    """A distribution over tasks: `sample(count, seed)` is a batch of independent tasks, a function of its arguments.

    Your own source is a subclass with that one method.

    Example:
        >>> import torch
        >>> class Lines(AbstractTasks):
        ...     def sample(self, count, seed):
        ...         generator = torch.Generator().manual_seed(seed)
        ...         slope = torch.randn(count, 1, 1, generator=generator)
        ...         x = torch.randn(count, 10, 1, generator=generator)
        ...         y = slope * x
        ...         return {
        ...             "support_x": x[:, :5],
        ...             "support_y": y[:, :5],
        ...             "query_x": x[:, 5:],
        ...             "query_y": y[:, 5:],
        ...         }
        >>> Lines().sample(3, seed=0)["query_x"].shape
        torch.Size([3, 5, 1])
    """

    @abc.abstractmethod
    def sample(self, count: int, seed: int) -> Batch:
        """`count` independent tasks.

        Args:
            count: how many.
            seed: of every draw; equal arguments give equal tensors, on every device.
        """


@checked(size=SIZE, seed=SEED)
def batches(source: AbstractTasks, size: int, seed: int) -> Batches:
    """The function step -> batch of `size` tasks, for `minimize(data=...)`.

    No two steps share a seed, and a step's batch depends on the step and on `seed` only, so that a run that is resumed
    sees what it would have seen.

    Args:
        source: where tasks come from.
        size: tasks in a batch.
        seed: two streams with different seeds are unrelated.

    Raises:
        ValueError: if the size is not positive.

    Example:
        >>> import torch
        >>> from bilevel.tasks import Sinusoid, batches
        >>> data = batches(Sinusoid(), 25, seed=0)
        >>> data(7)["support_x"].shape, torch.equal(data(7)["support_x"], data(7)["support_x"])
        (torch.Size([25, 10, 1]), True)
    """
    return Batches(source, size, seed)


@final
@dataclass(frozen=True)
class Batches:
    """What `batches` returns: step -> source.sample(size, seed of the step)."""

    source: AbstractTasks
    size: int
    seed: int

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, size=SIZE, seed=SEED)

    def __call__(self, step: int) -> Batch:
        return self.source.sample(self.size, seed_of_step(self.seed, step))


def demand_placement(call: str, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
    """Refuse a dtype that is none of real numbers, and a device that this machine does not have.

    Raises:
        ValueError: naming the argument.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"`{call}(dtype=...)` must be a floating point one, such as torch.float32. Got {dtype}.")
    if device is None:
        return
    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        text = str(error).partition("\n")[0][:100]
        raise ValueError(
            f"`{call}(device=...)` must be a device that holds numbers here. Got {str(device)[:100]!r}: {text}"
        ) from error


def chosen(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that was asked for, or torch's default one."""
    return torch.get_default_dtype() if dtype is None else dtype
