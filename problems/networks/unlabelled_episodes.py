"""Few-shot tasks with unlabelled samples, some of them of classes that are not the task's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import COUNT, SEED, SIZE, demand_ranges
from bilevel.problems.networks._batches import generator
from bilevel.tasks.episodes import Episodes
from bilevel.tasks.images import AbstractImages
from bilevel.tasks.source import AbstractTasks, Batch


@final
@dataclass(frozen=True, eq=False)
class UnlabelledEpisodes(AbstractTasks):
    """`Episodes` with `unlabeled` more images of each class, without labels, and of `distractors` other classes.

    To the entries of :class:`~bilevel.tasks.Episodes` come `unlabeled_x`, `unlabeled_noise` `(tasks, steps + 1, n)` in
    [0, 1) for random choices, and `unlabeled_y`, for judging choices only: -1 at distractors.

    Args:
        classes: what to draw from.
        way: classes of a task.
        shots: support images of each.
        queries: query images of each.
        unlabeled: unlabelled images of each class, of distractors as well.
        distractors: how many classes more are among the unlabelled images.
        rotations: turned classes are classes of their own.
        steps: of the adaptation, for the noise.

    Example:
        >>> from bilevel.tasks import ImageClasses
        >>> source = UnlabelledEpisodes(
        ...     ImageClasses(torch.rand(6, 9, 4, 4)), 3, 1, 2, unlabeled=5, distractors=2
        ... )
        >>> batch = source.sample(2, seed=0)
        >>> batch["unlabeled_x"].shape, (batch["unlabeled_y"] < 0).sum(1)
        (torch.Size([2, 25, 1, 4, 4]), tensor([10, 10]))
    """

    classes: AbstractImages
    way: int = 5
    shots: int = 1
    queries: int = 5
    unlabeled: int = 14
    distractors: int = 0
    rotations: bool = False
    steps: int = 10

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, way=SIZE, shots=SIZE, queries=SIZE, unlabeled=SIZE, distractors=COUNT, steps=COUNT)
        self._episodes()

    def _episodes(self) -> Episodes:
        way, queries = self.way + self.distractors, self.queries + self.unlabeled
        return Episodes(self.classes, way, self.shots, queries, self.rotations, torch.float32)

    @checked(count=SIZE, seed=SEED)
    def sample(self, count: int, seed: int) -> Batch:
        whole, draws = self._episodes().sample(count, seed), generator(seed, 3)
        order = whole["query_y"].argsort(dim=1, stable=True)
        grid = (count, self.way + self.distractors, self.queries + self.unlabeled)
        images = _taken(whole["query_x"], order).reshape(*grid, *self.classes.shape)
        labels = whole["query_y"].gather(1, order).reshape(grid)
        kept = whole["support_y"].argsort(dim=1, stable=True)[:, : self.way * self.shots]
        mixed = torch.stack(
            [torch.randperm(labels[0, :, self.queries :].numel(), generator=draws, device="cpu") for _ in range(count)]
        )
        truth = labels[:, :, self.queries :].flatten(1).gather(1, mixed)
        return {
            "support_x": _taken(whole["support_x"], kept),
            "support_y": whole["support_y"].gather(1, kept),
            "query_x": images[:, : self.way, : self.queries].flatten(1, 2),
            "query_y": labels[:, : self.way, : self.queries].flatten(1),
            "unlabeled_x": _taken(images[:, :, self.queries :].flatten(1, 2), mixed),
            "unlabeled_y": torch.where(truth < self.way, truth, torch.full_like(truth, -1)),
            "unlabeled_noise": torch.rand(
                count, self.steps + 1, mixed.shape[1], generator=draws, device="cpu", dtype=torch.float32
            ),
        }


def _taken(images: Tensor, order: Tensor) -> Tensor:
    """Rows of each task, in an order of its own."""
    return torch.stack([part[rows] for part, rows in zip(images, order, strict=True)])
