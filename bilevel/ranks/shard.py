"""Data that a rank alone has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch

from bilevel._problem import Split
from bilevel._tree import tree_leaves
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.portable.pickling import AbstractPortable
from bilevel.ranks.ranks import Ranks


@final
@dataclass(frozen=True, eq=False)
class Shard(AbstractPortable):
    """What a rank alone has of the samples, where the data are not on every rank.

    With n_r the samples of rank r, f = sum_r (n_r / sum_s n_s) f_r, so that unequal shards give the mean over all.

    Args:
        data: one batch (a tensor, dict or tuple), or a callable step -> batch of this rank.
        samples: batch -> how many samples it has; None: the leading axis of its first tensor.

    Raises:
        TypeError: if `samples` is no function.

    Example:
        >>> import torch
        >>> Shard(torch.ones(3, 2)).count(torch.ones(3, 2))
        3
    """

    data: Any
    samples: Callable[[Any], int] | None = None

    def __post_init__(self) -> None:
        demand_types(self)

    @checked()
    def count(self, batch: Any) -> int:
        """How many samples a batch has.

        Raises:
            ValueError: if it has none, or no leading axis to tell by.
        """
        if self.samples is not None:
            found = self.samples(batch)
        else:
            leaves = [leaf for leaf in tree_leaves(batch) if getattr(leaf, "ndim", 0)]
            found = int(leaves[0].shape[0]) if leaves else 0
        if found < 1:
            raise ValueError(
                "`Shard(data=...)` must have at least one sample on each rank, along the leading axis of its tensors."
                " Pass `samples=` to say otherwise how many a batch has."
            )
        return found


def own_samples(call: str, data: Any, ranks: Ranks | None) -> tuple[Any, tuple[float, float]]:
    """One batch of f and g of this rank, and what its samples weigh in the means over all ranks.

    Args:
        call: what was given it.
        data: a batch, or a `Split` of two; with ranks a `Shard` in the place of each.
        ranks: the processes; None: there is one.

    Raises:
        ValueError: if it is no `Shard` with ranks, or one without.
    """
    sides = (data.f, data.g) if isinstance(data, Split) else (data,)
    if ranks is None and not any(isinstance(side, Shard) for side in sides):
        return data, (1.0, 1.0)
    if ranks is None or not all(isinstance(side, Shard) for side in sides):
        raise ValueError(
            f"`{call}(group=..., data=...)` go together: `Shard(batch)` is what one of several ranks has of the"
            f" samples. Got {', '.join(type(side).__name__ for side in sides)}. With a group pass `Shard(...)`, of f"
            f" and of g in a `Split`, or a problem with `tasks=True`; without one the batch itself."
        )
    counts = torch.zeros(ranks.size, len(sides), dtype=torch.float64)
    counts[ranks.rank] = torch.tensor([float(side.count(side.data)) for side in sides], dtype=torch.float64)
    counts = ranks.total(counts)[0]
    weights = (counts[ranks.rank] / counts.sum(0)).tolist()
    if isinstance(data, Split):
        return Split(f=data.f.data, g=data.g.data), (weights[0], weights[1])
    return data.data, (weights[0], weights[0])
