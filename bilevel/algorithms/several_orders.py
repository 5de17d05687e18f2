"""The same samples in several orders at once, one for each of several runs side by side."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from bilevel._tree import tree_parts
from bilevel.algorithms.finite_sum import FiniteSum
from bilevel.algorithms.oracle import AbstractData, Block


@final
@dataclass(frozen=True, eq=False)
class SeveralOrders(AbstractData):
    """Batch number t is, for each run, that of its own order: one axis of runs before that of the samples.

    All blocks must have one size, so that they can be stacked: `of` gives None where they have not.

    Args:
        orders: the samples in the order of each run.
    """

    orders: tuple[FiniteSum, ...]

    @staticmethod
    def of(orders: tuple[FiniteSum, ...]) -> AbstractData | None:
        """The data of several runs; None: they cannot be stacked."""
        first = orders[0]
        if first.is_fixed:
            return first
        return None if first.samples % first.batch_size else SeveralOrders(orders)

    @cached_property
    def _blocks(self) -> list[Tensor]:
        """Each tensor as blocks `(N, batch_size, ...)`; a view."""
        leaves, _ = tree_parts(self.orders[0].tensors)
        return [leaf.unflatten(0, (self.orders[0].blocks, -1)) for leaf in leaves]

    @property
    def samples(self) -> int:
        return self.orders[0].samples

    def block(self, index: int, first: int) -> Block:
        each = [order.block(index, first) for order in self.orders]
        numbers = torch.tensor([block.number for block in each], device="cpu")
        build = tree_parts(self.orders[0].tensors)[1]
        data = build([blocks[numbers.to(blocks.device)] for blocks in self._blocks])
        one = each[0]
        return Block(data, None, one.count, one.samples, one.weight, numbers, self.share)

    def batch(self, index: int, first: int) -> Any:
        return self.block(index, first).data

    def whole(self) -> Any:
        return self.orders[0].tensors

    @property
    def share(self) -> float:
        """Every rank has all samples of every block, which is right, and no faster: a sweep is short."""
        return 1 / self.orders[0].ranks

    @property
    def has_whole(self) -> bool:
        return True
