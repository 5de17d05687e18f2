"""Classification of classes that were never seen before, from a few images of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import SEED, SIZE, demand_ranges
from bilevel.tasks._random import generator, orders, subsets
from bilevel.tasks.images import AbstractImages
from bilevel.tasks.source import AbstractTasks, Batch, chosen, demand_placement


@final
@dataclass(frozen=True, eq=False)
class Episodes(AbstractTasks):
    """`way` classes, `shots` support and `queries` query images of each, all drawn without replacement.

    Labels are 0 to way - 1, given to the classes of a task at random; the images of a set are in random order. A batch
    has `support_x` `(tasks, way shots, channels, height, width)` and `support_y` `(tasks, way shots)` integers, and
    `query_x`, `query_y` accordingly. No list of all episodes is made, and those of a batch are drawn at once.

    Args:
        classes: what to draw from: an `ImageClasses`, a part of `Splits`.
        way: classes of a task.
        shots: support images of each.
        queries: query images of each.
        rotations: every class turned by 90, 180 and 270 degrees is a class of its own: four times as many.
        dtype: of the images; None: torch's default.
        device: of all tensors; None: that of the images.

    Raises:
        ValueError: if there are fewer classes than `way`, or a class has fewer images than `shots + queries`, or
            rotated images are not square.

    Example:
        >>> import torch
        >>> from bilevel.tasks import ImageClasses
        >>> source = Episodes(
        ...     ImageClasses(torch.rand(12, 20, 8, 8)), way=5, shots=1, queries=3, rotations=True
        ... )
        >>> batch = source.sample(4, seed=0)
        >>> batch["query_x"].shape, batch["support_y"][0].sort().values
        (torch.Size([4, 15, 1, 8, 8]), tensor([0, 1, 2, 3, 4]))
    """

    classes: AbstractImages
    way: int = 5
    shots: int = 1
    queries: int = 15
    rotations: bool = False
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, way=SIZE, shots=SIZE, queries=SIZE)
        demand_placement("Episodes", self.dtype, self.device)
        available = len(self.classes) * (4 if self.rotations else 1)
        if self.way > available:
            kind = "classes and their rotations" if self.rotations else "classes"
            raise ValueError(
                f"`Episodes(way=...)` must be at most the number of {kind}, {available}. Got {self.way}."
                " Take fewer, or a split with more classes."
            )
        fewest = int(self.classes.counts.min())
        if self.shots + self.queries > fewest:
            name = self.classes.names[int(self.classes.counts.argmin())]
            raise ValueError(
                f"`Episodes(shots=..., queries=...)` must be at most {fewest} together, the images of class {name!r}:"
                f" support and query sets share none. Got {self.shots} and {self.queries}."
            )
        _, height, width = self.classes.shape
        if self.rotations and height != width:
            raise ValueError(f"`Episodes(rotations=True)` needs square images. Got {height} by {width}.")

    @checked(count=SIZE, seed=SEED)
    def sample(self, count: int, seed: int) -> Batch:
        draws, turns = generator(seed), 4 if self.rotations else 1
        kinds = subsets(torch.full((count,), len(self.classes) * turns, device="cpu"), self.way, draws).flatten()
        classes = kinds // turns
        members = subsets(self.classes.counts[classes], self.shots + self.queries, draws)
        labels, items = [], []  # of the support sets of all tasks, then of the query sets
        for each, first in ((self.shots, 0), (self.queries, self.shots)):
            order = orders(count, self.way * each, draws)
            labels.append(order // each)
            items.append(order % each + first)
        rows = torch.cat(
            [(torch.arange(count, device="cpu").unsqueeze(1) * self.way + label).flatten() for label in labels]
        )
        member = members[rows, torch.cat([item.flatten() for item in items])]
        images = self._images(classes[rows], member, (kinds % turns)[rows])
        end = count * self.way * self.shots
        return {
            "support_x": images[:end].view(count, -1, *self.classes.shape),
            "support_y": labels[0].to(images.device),
            "query_x": images[end:].view(count, -1, *self.classes.shape),
            "query_y": labels[1].to(images.device),
        }

    def _images(self, classes: Tensor, members: Tensor, turned: Tensor) -> Tensor:
        """Scaled images, each turned counter-clockwise by its number of quarter turns."""
        if self.rotations:
            images = self._turned(classes, members, turned)
        else:
            images = self.classes.pixels(classes, members).to(self.device, chosen(self.dtype))
        return images if self.classes.scale == 1 else images * self.classes.scale

    def _turned(self, classes: Tensor, members: Tensor, turned: Tensor) -> Tensor:
        order = turned.argsort()
        stored = self.classes.pixels(classes[order], members[order]).to(self.device)
        images = torch.empty_like(stored, dtype=chosen(self.dtype))
        first = 0
        for k, size in enumerate(turned.bincount(minlength=4).tolist()):
            these = slice(first, first + size)
            images[these].copy_(stored[these].rot90(k, dims=(-2, -1)))  # one pass turns and converts
            first += size
        return images.index_select(0, order.argsort().to(images.device))
