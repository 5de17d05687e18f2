"""Batches that every rank has, and of which each takes its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

from torch import Tensor

from bilevel._tree import tree_leaves, tree_map
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, COUNT
from bilevel.portable.pickling import AbstractPortable

Batches: TypeAlias = Callable[[Literal["f", "g"], int], Any]


@final
@dataclass(frozen=True, eq=False)
class Rows(AbstractPortable):
    """(role, number) -> batch, the same on every rank, of which rank r of R evaluates f and g on its rows.

    Of n rows rank r has those from floor(r n / R) to floor((r + 1) n / R), weighed by n_r / n: f and g must be means
    over the leading axis of every tensor of a batch. In one process it is the function itself.

    Cost: every rank makes the whole batch, and evaluates its part. No message.

    Args:
        batches: (role, number) -> batch, role "f" or "g"; a function of its arguments alone.

    Raises:
        TypeError: if `batches` is no function.

    Example:
        >>> import torch
        >>> data = Rows(lambda role, number: torch.arange(5.0) + number)
        >>> data("g", 0)
        tensor([0., 1., 2., 3., 4.])
        >>> data.of_rank(data("g", 0), rank=1, ranks=2)
        (tensor([2., 3., 4.]), 0.6)
    """

    batches: Batches

    def __post_init__(self) -> None:
        demand_types(self)

    def __call__(self, role: Literal["f", "g"], number: int) -> Any:
        """The whole batch."""
        return self.batches(role, number)

    @checked(rank=COUNT, ranks=AT_LEAST_1)
    def of_rank(self, batch: Any, rank: int, ranks: int) -> tuple[Any, float]:
        """The rows of a rank, and their share of all.

        Raises:
            ValueError: if tensors have no leading axis in common, or fewer rows than there are ranks.
        """
        leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        counts = {leaf.shape[0] if leaf.dim() else 0 for leaf in leaves}
        n = counts.pop() if len(counts) == 1 else 0
        if rank >= ranks or n < ranks:
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves) or type(batch).__name__
            raise ValueError(
                f"`Rows(batches=...)` must give batches whose tensors share a leading axis, of at least a row for each"
                f" rank. Got {shapes}, for rank {rank} of {ranks}."
            )
        begin, end = rank * n // ranks, (rank + 1) * n // ranks
        return tree_map(lambda leaf: leaf[begin:end], batch), (end - begin) / n
