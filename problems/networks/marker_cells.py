"""Synthetic cells: which of several markers a nucleus has, in patches of several channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, COUNT, SEED, SHARE, SIZE, demand_ranges
from bilevel.problems.networks._batches import generator
from bilevel.tasks.source import AbstractTasks, Batch

_NUCLEUS = 2  # channels that every cell is in


@final
@dataclass(frozen=True)
class MarkerCells(AbstractTasks):
    """Patches (2 + kinds) x side x side: a nucleus in channels 0 and 1, a soma in channel 2 + c for kind c, and noise.

    A task is a kind c out of `kinds_of_tasks`: is a cell of it? Half of the cells of both sets are, the others are of
    the other kinds of the tasks. What can be learned from few kinds is that a certain channel means yes; what should be
    is to find out which.

    Args:
        kinds_of_tasks: whose tasks these are.
        kinds: in all.
        side: of a patch, in pixels.
        shots: cells of a support set.
        queries: cells of a query set.
        noise: of every pixel, a standard deviation; cells are 1 high.

    Raises:
        ValueError: if there are fewer than two kinds, or one that does not exist.

    Example:
        >>> batch = MarkerCells(shots=4, queries=6).sample(3, seed=0)
        >>> batch["support_x"].shape, batch["query_y"].sum(1)
        (torch.Size([3, 4, 7, 10, 10]), tensor([3, 3, 3]))
    """

    kinds_of_tasks: tuple[int, ...] = (0, 2, 3)
    kinds: int = 5
    side: int = 10
    shots: int = 10
    queries: int = 20
    noise: float = 0.8

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, kinds=SIZE, side=SIZE, shots=SIZE, queries=SIZE, noise=AT_LEAST_0)
        own = self.kinds_of_tasks
        if len(set(own)) < 2 or len(set(own)) < len(own) or not all(0 <= k < self.kinds for k in own):
            raise ValueError(
                f"`MarkerCells(kinds_of_tasks=...)` must be two different numbers or more from 0 to {self.kinds - 1}."
                f" Got {own}."
            )

    @property
    def channels(self) -> int:
        """Of a patch."""
        return _NUCLEUS + self.kinds

    @checked(count=SIZE, seed=SEED)
    def sample(self, count: int, seed: int) -> Batch:
        draws, own = generator(seed, 4), torch.tensor(self.kinds_of_tasks, device="cpu")
        which = torch.randint(len(own), (count, 1), generator=draws, device="cpu")
        made: dict[str, Tensor] = {}
        for side, size in (("support", self.shots), ("query", self.queries)):
            label = torch.arange(size, device="cpu").expand(count, -1) % 2
            label = label.gather(
                1, torch.rand(count, size, generator=draws, device="cpu", dtype=torch.float32).argsort(1)
            )
            others = torch.randint(1, len(own), (count, size), generator=draws, device="cpu")
            kind = own[(which + (1 - label) * others) % len(own)]
            made |= {f"{side}_x": self._patches(kind, draws), f"{side}_y": label}
        return made

    def _patches(self, kind: Tensor, draws: torch.Generator) -> Tensor:
        """(tasks, n) -> (tasks, n, channels, side, side)."""
        shape, grid = kind.shape, torch.arange(self.side, device="cpu").float()

        def blob(width: float, shift: Tensor) -> Tensor:
            centre = (self.side - 1) / 2 + shift
            rows, columns = ((grid - centre[..., k : k + 1]).square() for k in (0, 1))
            return torch.exp(-(rows.unsqueeze(-1) + columns.unsqueeze(-2)) / (2 * width**2))

        shift = torch.randn(*shape, 2, generator=draws, device="cpu", dtype=torch.float32)
        height = 0.7 + 0.6 * torch.rand(*shape, 3, 1, 1, generator=draws, device="cpu", dtype=torch.float32)
        pixels = (*shape, self.channels, self.side, self.side)
        x = self.noise * torch.randn(*pixels, generator=draws, device="cpu", dtype=torch.float32)
        nucleus = blob(self.side / 8, shift).unsqueeze(-3)
        x[..., :_NUCLEUS, :, :] += height[..., :_NUCLEUS, :, :] * nucleus
        soma = height[..., 2, :, :] * blob(self.side / 4, shift)
        place = torch.nn.functional.one_hot(kind + _NUCLEUS, self.channels).to(x)
        return (x + place[..., None, None] * soma.unsqueeze(-3)).float()


@final
@dataclass(frozen=True, eq=False)
class Augmented(AbstractTasks):
    """Tasks of a source, each transformed as a whole: what is done to its support set is done to its query set.

    - with probability `flip` the labels of a task of two classes are exchanged, y' = 1 - y;
    - the channels are permuted, by a permutation of each task's own;
    - images are turned by the same number of quarter turns;
    - of the support set a random number of samples is kept, at least `least`, which `support_mask` says.

    Args:
        source: of tasks with `(n, channels, height, width)` inputs.
        flip: a probability.
        permute: whether channels are permuted.
        rotate: whether images are turned.
        least: samples of a support set that are kept, at least; 0: all are, and there is no mask.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> source = Augmented(MarkerCells(shots=8, queries=6), least=2)
        >>> batch = source.sample(50, seed=0)
        >>> counts = batch["support_mask"].sum(1)
        >>> float(counts.min()), float(counts.max())
        (2.0, 8.0)
    """

    source: AbstractTasks
    flip: float = 0.5
    permute: bool = True
    rotate: bool = True
    least: int = 0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, flip=SHARE, least=COUNT)

    @checked(count=SIZE, seed=SEED)
    def sample(self, count: int, seed: int) -> Batch:
        batch, draws = dict(self.source.sample(count, seed)), generator(seed, 5)
        channels = batch["support_x"].shape[2]
        flips = torch.rand(count, generator=draws, device="cpu", dtype=torch.float32) < self.flip
        orders = torch.rand(count, channels, generator=draws, device="cpu", dtype=torch.float32).argsort(1)
        turns = torch.randint(4, (count,), generator=draws, device="cpu")
        size = batch["support_y"].shape[1]
        kept = torch.randint(min(self.least, size), size + 1, (count, 1), generator=draws, device="cpu")
        for side in ("support", "query"):
            x, y = batch[f"{side}_x"], batch[f"{side}_y"]
            x = permuted(x, orders) if self.permute else x
            batch[f"{side}_x"] = turned(x, turns) if self.rotate else x
            batch[f"{side}_y"] = flipped(y, flips)
        if self.least:
            batch["support_mask"] = (torch.arange(size, device="cpu") < kept).to(batch["support_x"])
        return batch


@checked()
def flipped(labels: Tensor, which: Tensor) -> Tensor:
    """1 - y in the tasks that `which` `(tasks,)` says; labels `(tasks, n)`.

    Example:
        >>> flipped(torch.tensor([[0, 1], [0, 1]]), torch.tensor([True, False]))
        tensor([[1, 0],
                [0, 1]])
    """
    return torch.where(which.unsqueeze(1), 1 - labels, labels)


@checked()
def permuted(images: Tensor, orders: Tensor) -> Tensor:
    """Channel j of task t is what was channel orders[t, j]; images `(tasks, n, channels, ...)`.

    Example:
        >>> x = torch.arange(3.0).reshape(1, 1, 3, 1, 1)
        >>> permuted(x, torch.tensor([[2, 0, 1]])).flatten()
        tensor([2., 0., 1.])
    """
    return torch.stack([own[:, order] for own, order in zip(images, orders, strict=True)])


@checked()
def turned(images: Tensor, quarters: Tensor) -> Tensor:
    """The images of task t by quarters[t] quarter turns, `(tasks, n, channels, side, side)`.

    Example:
        >>> turned(
        ...     torch.tensor([[0.0, 1.0], [2.0, 3.0]]).reshape(1, 1, 1, 2, 2), torch.tensor([1])
        ... ).flatten()
        tensor([1., 3., 0., 2.])
    """
    return torch.stack([own.rot90(int(k), (-2, -1)) for own, k in zip(images, quarters.tolist(), strict=True)])
