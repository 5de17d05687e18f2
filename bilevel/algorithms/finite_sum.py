"""Finite sums: samples in blocks of a fixed identity, visited in an order that is a function of the seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, TypeAlias, final, get_args

import torch
from torch import Tensor

from bilevel._numerics.seeds import within_64_bits
from bilevel._tree import tree_leaves, tree_parts
from bilevel.algorithms.oracle import AbstractData, Block
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, AT_LEAST_1, demand_ranges
from bilevel.ranks.ranks import share_of

Order: TypeAlias = Literal["shuffle", "iid", "full"]
_KNOWN = 4096  # blocks whose views are kept, some kilobytes each at most


@final
@dataclass(frozen=True, eq=False)
class FiniteSum(AbstractData):
    """n samples, so that an objective is a mean over them: f = (1/n) sum_i f_i, in blocks of `batch_size`.

    The blocks are consecutive samples, N = ceil(n / batch_size) of them, the last one possibly smaller. Batch number
    t = 0, 1, ... is one of them, and which one is a function of t and the seed alone: a run that is resumed at any step
    sees what an uninterrupted one does, and nothing of a sampler has to be saved. An algorithm may ask for a block by
    its number (tables), for all samples, and for the same block at another point.

    A function that is called with a block returns the *mean* over it. Where an unbiased estimate of the whole is asked
    for, that is multiplied by w_k N, w_k the block's share of the samples: 1 but for a ragged last block, and right for
    that one.

    Orders: "shuffle" visits every block once an epoch, in a new random order each time (random reshuffling), which
    beats independent draws by orders of magnitude near a solution; "iid" draws blocks independently, as most theorems
    assume; "full" is all samples at every step. Sort samples by nothing that matters: blocks are as they come.

    Args:
        tensors: a structure of tensors that share a leading axis of samples; objectives are called with the same
            structure, of a block of them.
        batch_size: how many samples a block has.
        order: "shuffle", "iid" or "full".
        seed: of the order. f and g of a `Split` are drawn independently of each other, whatever their seeds.
        stream: which of several independent orders of one seed; a `Split` numbers f and g.
        rank: which of `ranks` this is, that has an equal part of the samples of every block; see `minimize(group=)`,
            which says so itself.
        ranks: how many there are.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if the tensors do not share a leading axis, there is no sample, `batch_size` is below 1 or there is
            no such order.

    Example:
        >>> data = FiniteSum((torch.arange(5.0), torch.arange(5) > 2), batch_size=2)
        >>> data.blocks, [block.weight for block in map(data.block_number, range(3))]
        (3, [0.4, 0.4, 0.2])
        >>> sorted(data.block(t, 0).number for t in range(3))
        [0, 1, 2]
        >>> data.whole()[0].sum()
        tensor(10.)
    """

    tensors: Any
    batch_size: int
    order: Order = "shuffle"
    seed: int = 0
    stream: int = 0
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, batch_size=AT_LEAST_1, stream=AT_LEAST_0, rank=AT_LEAST_0, ranks=AT_LEAST_1)
        if self.rank >= self.ranks:
            raise ValueError(f"`FiniteSum(rank=...)` must be below `ranks`. Got {self.rank} and {self.ranks}.")
        if self.order not in get_args(Order):
            raise ValueError(f"`FiniteSum(order=...)` must be one of {', '.join(get_args(Order))}. Got {self.order!r}.")
        leaves = tree_leaves(self.tensors, "`FiniteSum(tensors=...)`")
        sizes = {leaf.shape[0] if isinstance(leaf, Tensor) and leaf.dim() else None for leaf in leaves}
        if len(sizes) != 1 or None in sizes or 0 in sizes:
            raise ValueError(
                "`FiniteSum(tensors=...)` must be tensors that share a leading axis of at least one sample. Got leading"
                f" sizes {', '.join(sorted(map(str, sizes))) or 'of nothing'}."
            )

    @cached_property
    def _parts(self) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
        """The tensors, and what makes the structure of such tensors."""
        return tree_parts(self.tensors)

    @cached_property
    def _sizes(self) -> tuple[int, int]:
        """n, N."""
        samples = int(self._parts[0][0].shape[0])
        return samples, -(-samples // self.batch_size)

    @cached_property
    def _known(self) -> dict[int, Block]:
        """Blocks that have been asked for: views of the samples, which need not be made again."""
        return {}

    @property
    def samples(self) -> int:
        return self._sizes[0]

    @property
    def blocks(self) -> int:
        """N."""
        return self._sizes[1]

    def block_number(self, k: int) -> Block:
        """Block k as itself."""
        found = self._known.get(k)
        if found is None:
            samples, blocks = self._sizes
            start = k * self.batch_size
            stop = min(start + self.batch_size, samples)
            data, share = self._own(start, stop)
            found = Block(data, k, blocks, stop - start, (stop - start) / samples, share=share)
            if len(self._known) < _KNOWN:
                self._known[k] = found
        return found

    def block(self, index: int, first: int) -> Block:
        samples, blocks = self._sizes
        if self.order == "full" or blocks == 1:
            return Block(self.whole(), 0, 1, samples, 1.0, share=self.share)
        epoch, position = divmod(index, blocks)
        return self.block_number(self.visits(epoch)[position])

    def visits(self, epoch: int) -> tuple[int, ...]:
        """Which blocks an epoch visits, in order."""
        return _visits(self.blocks, self.order == "iid", self.seed, self.stream, epoch)

    @property
    def batch_samples(self) -> int:
        return self.samples if self.is_fixed else self.batch_size

    def batch(self, index: int, first: int) -> Any:
        return self.block(index, first).data

    def whole(self) -> Any:
        return self._everything[0]

    @property
    def share(self) -> float:
        return self._everything[1]

    @cached_property
    def _everything(self) -> tuple[Any, float]:
        return (self.tensors, 1.0) if self.ranks == 1 else self._own(0, self.samples)

    def _own(self, start: int, stop: int) -> tuple[Any, float]:
        """This rank's samples of those from `start` to `stop`, and what they weigh; one of weight zero for none."""
        leaves, build = self._parts
        own = share_of(stop - start, self.rank, self.ranks)
        first, count = min(start + own.start, stop - 1), own.stop - own.start
        return build([leaf[first : first + max(count, 1)] for leaf in leaves]), count / (stop - start)

    @property
    def has_whole(self) -> bool:
        return True

    @property
    def is_fixed(self) -> bool:
        return self.order == "full" or self.blocks == 1

    def of_rank(self, rank: int, ranks: int) -> FiniteSum:
        """The same blocks, of each of which one of several ranks has an equal part."""
        return replace(self, rank=rank, ranks=ranks)

    def independent(self, stream: int) -> FiniteSum:
        """The same samples in another order."""
        return replace(self, stream=stream)


@lru_cache(maxsize=64)
def _visits(blocks: int, independently: bool, seed: int, stream: int, epoch: int) -> tuple[int, ...]:
    """Which blocks an epoch visits, in order: a function of its arguments, on every machine."""
    generator = torch.Generator("cpu")
    generator.manual_seed(within_64_bits((seed * 1_000_003 + stream) * 1_000_003 + epoch))
    if independently:
        drawn = torch.randint(blocks, (blocks,), generator=generator, device="cpu")
    else:
        drawn = torch.randperm(blocks, generator=generator, device="cpu")
    return tuple(drawn.tolist())
