"""A state whose vectors are each rank's part of y: put together for a file, and taken apart for other ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._tree import tree_leaves
from bilevel.ranks.ranks import Ranks
from bilevel.ranks.sharded import Shards


@final
@dataclass(frozen=True, eq=False)
class WholeVectors:
    """Plain data in which every vector as long as this rank's part of y is one of y, and its way to whole y and back.

    A file then holds what one process would write, and may be read by another number of ranks. What is as long as y is
    known by its length alone, so that x must have another one.

    Cost: `gathered` is one all-gather for each parameter and vector of y, after which rank 0 has them in the memory of
    its processor; `of_rank` reads the whole file on every rank.

    Attributes:
        shards: how y is shared out.
        ranks: over which processes.
    """

    shards: Shards
    ranks: Ranks

    def demand_length_of_x(self, p: int) -> None:
        """Refuse an x which could be taken for a part of y.

        Raises:
            ValueError: on every rank.
        """
        lengths = {*self.ranks.gathered(self._length), sum(leaf.numel() for leaf in self._parameters)}
        if p in lengths:
            raise ValueError(
                f"`minimize(checkpoint=...)` tells x from parts of y, which are shared out over ranks (`DTensor`), by"
                f" their lengths: x has {p} entries, and so has a part of y. Leave `checkpoint` out, or share y out"
                f" over another number of ranks."
            )

    def gathered(self, content: Any) -> Any:
        """The content with whole vectors on rank 0; on other ranks, which write none, with nothing in their place."""
        return _mapped(content, self._length, self._whole)

    def of_rank(self, content: Any, device: torch.device) -> Any:
        """The content with this rank's parts of whole vectors, all of it on a device."""
        length = sum(leaf.numel() for leaf in self._parameters)
        return _mapped(content, length, self._part, lambda other: other.to(device))

    @property
    def _parameters(self) -> list[Any]:
        return tree_leaves(self.shards.y0)

    @property
    def _length(self) -> int:
        return sum(leaf.to_local().numel() for leaf in self._parameters)

    def _whole(self, vector: Tensor) -> Tensor | None:
        from torch.distributed.tensor import DTensor

        found = []
        parts = torch.split(vector.detach(), [leaf.to_local().numel() for leaf in self._parameters])
        for part, like in zip(parts, self._parameters, strict=True):
            own = part.reshape(like.to_local().shape)
            shared = DTensor.from_local(
                own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
            )
            whole = shared.full_tensor().reshape(-1)
            if self.ranks.rank == 0:
                found.append(whole.cpu())
        return torch.cat(found) if found else None

    def _part(self, vector: Tensor) -> Tensor:
        from torch.distributed.tensor import distribute_tensor

        found = []
        wholes = torch.split(vector, [leaf.numel() for leaf in self._parameters])
        for whole, like in zip(wholes, self._parameters, strict=True):
            on_device = whole.reshape(like.shape).to(like.device)
            # every rank has read the same, and takes its own part of it without a message
            shared: Any = distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)
            found.append(shared.to_local().reshape(-1))
        return torch.cat(found)


def _mapped(
    content: Any,
    length: int,
    change: Callable[[Tensor], Tensor | None],
    other: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Any:
    """Nested dicts, lists and tuples with the vectors of a length changed, row by row."""
    if isinstance(content, Tensor):
        if content.dim() == 0 or content.shape[-1] != length or not content.is_floating_point():
            return other(content)
        rows = [change(row) for row in content.reshape(-1, length)]
        whole = [row for row in rows if row is not None]
        return torch.stack(whole).reshape(*content.shape[:-1], -1) if whole else None
    if isinstance(content, dict):
        return {key: _mapped(item, length, change, other) for key, item in content.items()}
    if isinstance(content, list | tuple) and not hasattr(content, "_fields"):
        items: Sequence[Any] = [_mapped(item, length, change, other) for item in content]
        return items if isinstance(content, list) else tuple(items)
    return content
