"""Loaders of recipes: which samples are in a batch, and what is drawn for them, is a function of a seed and its number.

Nothing is remembered from one pass to the next, so that a run can be repeated, and resumed to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset as TorchDataset, Sampler

Draw: TypeAlias = Callable[[torch.Generator, tuple[Tensor, ...]], tuple[Tensor, ...]]


@final
class Endless(Sampler[tuple[int, list[int]]]):
    """(k, the numbers of the samples of batch k), k = 0, 1, ...: every epoch in a new order, without end.

    What is left of an epoch beyond whole batches is left out of it, so that statistics of a batch are those of `size`
    samples.
    """

    def __init__(self, samples: int, size: int, seed: int) -> None:
        self.samples, self.size, self.seed = samples, min(size, samples), seed

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        k, epoch = 0, 0
        while True:
            order = torch.randperm(self.samples, generator=generator(self.seed, epoch), device="cpu").tolist()
            for begin in range(0, self.samples - self.size + 1, self.size):
                yield k, order[begin : begin + self.size]
                k += 1
            epoch += 1


@final
class Batches(TorchDataset[tuple[Tensor, ...]]):
    """Batch k: samples of each tensor, and what `draw` makes of random numbers of its own."""

    def __init__(self, tensors: tuple[Tensor, ...], seed: int, draw: Draw | None) -> None:
        self.tensors, self.seed, self.draw = tensors, seed, draw

    def __getitem__(self, index: tuple[int, list[int]]) -> tuple[Tensor, ...]:
        k, numbers = index
        samples = tuple(tensor[numbers] for tensor in self.tensors)
        return samples if self.draw is None else samples + self.draw(generator(self.seed + 1, k), samples)


def loader(tensors: tuple[Tensor, ...], size: int, seed: int, draw: Draw | None = None) -> DataLoader[Any]:
    """Batches of `size` samples, tuples of tensors, with what is drawn for each at the end.

    Args:
        tensors: they share a leading axis of samples.
        size: of a batch; no more than there are samples.
        seed: of the orders, and of what is drawn.
        draw: (generator, the tensors of a batch) -> what belongs to it; None: nothing is drawn.

    Example:
        >>> batches = iter(loader((torch.arange(4),), 2, seed=0))
        >>> sorted(torch.cat([*next(batches), *next(batches)]).tolist())
        [0, 1, 2, 3]
    """
    sampler = Endless(len(tensors[0]), size, seed)
    return DataLoader(Batches(tensors, seed, draw), batch_size=None, sampler=sampler, collate_fn=tuple)


def generator(seed: int, number: int) -> torch.Generator:
    """Random numbers of their own for each seed and number."""
    found = torch.Generator("cpu")
    found.manual_seed(seed * 1_000_003 + number)
    return found
