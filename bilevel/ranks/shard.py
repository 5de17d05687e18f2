"""Data that a rank alone has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from bilevel.arguments.fits import demand_types


@final
@dataclass(frozen=True, eq=False)
class Shard:
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

    def count(self, batch: Any) -> int:
        """How many samples a batch has.

        Raises:
            ValueError: if it has none, or no leading axis to tell by.
        """
        from bilevel._tree import tree_leaves

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
