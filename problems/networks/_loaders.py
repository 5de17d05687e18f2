"""Batches of recipes for networks: drawn by seeds alone, so that a run can be repeated and resumed to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset as TorchDataset, Sampler

# A run of seed s takes the seeds from s UNSEEN on; networks that no run has seen, those right before (s + 1) UNSEEN.
UNSEEN = 10**6


@final
class Shuffled(Sampler[list[int]]):
    """Numbers of samples, `size` at a time, each epoch in an order of its own; an incomplete batch is left out.

    A batch sampler of a `DataLoader`, practically without end. Every pass over it is the same: the order of epoch k
    is that of the seed and k.
    """

    def __init__(self, samples: int, size: int, seed: int, batches: int = UNSEEN) -> None:
        self.samples, self.size, self.batches, self.seed = samples, min(size, samples), batches, seed

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        each, order = self.samples // self.size, list[int]()
        for k in range(self.batches):
            if k % each == 0:
                generator = torch.Generator("cpu").manual_seed(self.seed * 1_000_003 + k // each)
                order = torch.randperm(self.samples, generator=generator, device="cpu").tolist()
            yield order[k % each * self.size :][: self.size]


@final
class Initializations(TorchDataset[dict[str, Tensor]]):
    """What a module's parameters start from, one draw a number; that of number k has the seed `first` + k."""

    def __init__(self, make: Callable[[], nn.Module], first: int) -> None:
        self.make, self.first = make, first

    def __len__(self) -> int:
        return UNSEEN

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return initial(self.make, self.first + number)


def initial(make: Callable[[], nn.Module], seed: int) -> dict[str, Tensor]:
    """The parameters of a module that is made with the global random numbers at `seed`, which are put back after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {name: each.detach() for name, each in make().named_parameters() if each.requires_grad}


def loader(
    samples: TorchDataset[Any],
    *,
    batch_size: int = 1,
    batch_sampler: Shuffled | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
) -> DataLoader[Any]:
    """A `DataLoader` with a generator of its own: one that has none draws a seed from the global random numbers."""
    return DataLoader(
        samples,
        batch_size=batch_size,
        batch_sampler=batch_sampler,
        collate_fn=collate_fn,
        generator=torch.Generator("cpu"),
    )


@final
@dataclass(frozen=True)
class Rows:
    """Makes of a list of samples tensors with a leading axis of `rows`, a part of the samples for each network."""

    rows: int

    def __call__(self, samples: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        columns = [torch.stack(column) for column in zip(*samples, strict=True)]
        return tuple(column.reshape(self.rows, -1, *column.shape[1:]) for column in columns)
