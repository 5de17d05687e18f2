"""The same samples in several orders at once, one for each of several runs side by side."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from bilevel._numerics.uneven import Uneven
from bilevel._tree import tree_parts
from bilevel.algorithms.finite_sum import FiniteSum
from bilevel.algorithms.oracle import AbstractData, Block


@final
@dataclass(frozen=True, eq=False)
class SeveralOrders(AbstractData):
    """Batch number t is, for each run, that of its own order: one axis of runs before that of the samples.

    Where a last block is smaller, some runs may see it while others see a whole one: then batches are in two groups.

    Attributes:
        orders: the samples in the order of each run.
        like: a tensor of the dtype and on the device of x, for weights.
    """

    orders: tuple[FiniteSum, ...]
    like: Tensor

    @staticmethod
    def of(orders: tuple[FiniteSum, ...], like: Tensor) -> AbstractData:
        """The data of several runs."""
        return orders[0] if orders[0].is_fixed else SeveralOrders(orders, like)

    @cached_property
    def _whole_blocks(self) -> int:
        """How many blocks are no smaller one at the end."""
        return self.orders[0].samples // self.orders[0].batch_size

    @cached_property
    def _blocks(self) -> list[Tensor]:
        """Each tensor as whole blocks `(N, batch_size, ...)`; a view."""
        leaves, _ = tree_parts(self.orders[0].tensors)
        count, size = self._whole_blocks, self.orders[0].batch_size
        return [leaf[: count * size].unflatten(0, (count, size)) for leaf in leaves]

    @property
    def samples(self) -> int:
        return self.orders[0].samples

    @property
    def batch_samples(self) -> int:
        return self.orders[0].batch_samples

    @cached_property
    def _distinct(self) -> tuple[list[FiniteSum], Tensor]:
        """An order for each seed, and which of them each run has: runs may differ in other things than their seeds."""
        distinct = {order.seed: order for order in self.orders}
        place = {seed: k for k, seed in enumerate(distinct)}
        return list(distinct.values()), torch.tensor([place[order.seed] for order in self.orders], device="cpu")

    @cached_property
    def _epochs(self) -> dict[int, Tensor]:
        """The blocks that the latest epochs visit `(seeds, N)`."""
        return {}

    def _numbers(self, index: int) -> Tensor:
        """Of the block of each run."""
        orders, which = self._distinct
        epoch, position = divmod(index, orders[0].blocks)
        if epoch not in self._epochs:
            for passed in [known for known in self._epochs if known < epoch - 1]:
                del self._epochs[passed]
            self._epochs[epoch] = torch.tensor([order.visits(epoch) for order in orders], device="cpu")
        return self._epochs[epoch][:, position][which]

    def block(self, index: int, first: int) -> Block:
        numbers = self._numbers(index)
        last = numbers == self._whole_blocks  # of the smaller one, where there is one
        one = self.orders[0].block_number(0)
        if not bool(last.any()):
            return Block(self._stacked(numbers), None, one.count, one.samples, one.weight, numbers, self.share)
        rest = self.orders[0].block_number(self._whole_blocks)
        if bool(last.all()):
            data = self._repeated(rest.data, len(numbers))
            return Block(data, None, rest.count, rest.samples, rest.weight, numbers, self.share)
        groups = (~last).nonzero().squeeze(-1), last.nonzero().squeeze(-1)
        data = Uneven(groups, (self._stacked(numbers[groups[0]]), self._repeated(rest.data, len(groups[1]))))
        sizes = torch.where(last, rest.samples, one.samples).to(self.like)
        return Block(data, None, one.count, one.samples, one.weight, numbers, self.share, sizes)

    def _stacked(self, numbers: Tensor) -> Any:
        build = tree_parts(self.orders[0].tensors)[1]
        return build([torch.index_select(blocks, 0, numbers.to(blocks.device)) for blocks in self._blocks])

    def _repeated(self, data: Any, times: int) -> Any:
        leaves, build = tree_parts(data)
        return build([leaf.expand(times, *leaf.shape) for leaf in leaves])

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
