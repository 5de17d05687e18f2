"""Cells of kinds that were not learned from, told apart after few labels, some of them asked for (AGILE)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from bilevel._instance import Instance
from bilevel._tree import Tree, ravel
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_0, BELOW_1, COUNT, POSITIVE, SEED, SHARE, SIZE
from bilevel.hypergrad.itd import ITD
from bilevel.modules.functional import functional
from bilevel.problems._plots import COLORS
from bilevel.problems.networks._modules import made
from bilevel.problems.networks.marker_cells import Augmented, MarkerCells
from bilevel.problems.networks.masked_dropout import MaskedDropout, Rule, acquire, bald, predictive_entropy
from bilevel.solvers.adam import Adam
from bilevel.solvers.clipped import Clipped
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate
from bilevel.tasks.source import AbstractTasks, Batch, batches

_LEARNED, _REAL = (0, 2, 3), (1, 4)  # kinds of cells
SIZES = (4, 10, 20)  # labelled samples that accuracies are told for
_FIRST, _ROUND, _DRAWS = 4, 2, 20  # random labels, labels of a round, draws of the masks
_TASKS, _POOL, _JUDGED = 40, 60, 200  # real tasks, cells to ask for, cells that each is judged on
_RULES = {"entropy": predictive_entropy, "bald": bald}


@checked(
    flip=SHARE,
    least=COUNT,
    noise=AT_LEAST_0,
    dropout=BELOW_1,
    step=POSITIVE,
    filters=SIZE,
    shots=SIZE,
    queries=SIZE,
    rate=POSITIVE,
    batch=SIZE,
    plain_steps=COUNT,
    max_steps=COUNT,
    seed=SEED,
)
def active_cells(
    *,
    rule: Rule = "entropy",
    flip: float = 0.5,
    permute: bool = True,
    rotate: bool = True,
    least: int = 2,
    noise: float = 0.8,
    dropout: float = 0.2,
    step: float = 0.4,
    filters: int = 16,
    shots: int = 20,
    queries: int = 20,
    rate: float = 3e-3,
    batch: int = 8,
    plain_steps: int = 600,
    max_steps: int = 1000,
    seed: int = 0,
) -> Instance:
    """Is a cell of this kind? MAML on three kinds of synthetic cells, then two others: augmented, and asking.

    A network of two convolutions learns from :class:`MarkerCells` of kinds 0, 2 and 3, :class:`Augmented`, with dropout
    whose masks are held (:class:`MaskedDropout`), and adapts by one step. On 40 tasks of kinds 1 and 4, the real ones,
    it is given 4, 10 or 20 labels out of a pool of 60 cells: at random, or those asked for by :func:`acquire` after 4
    at random, two at a time.

    Metrics: the accuracy on 200 cells of each real task with 4, 10 and 20 labels, at random (`random_10`, ...) and
    asked for (`active_10`, ...), and with random labels that of MAML on tasks as they are, of as many labels and
    without dropout (`plain_10`, ...).

    Args:
        rule: what is asked for, "entropy" or "bald".
        flip: the probability that labels of a task are exchanged.
        permute: whether its channels are permuted.
        rotate: whether its images are turned.
        least: support samples in training, at least, of a random number; 0: always all.
        noise: of every pixel, a standard deviation; cells are 1 high.
        dropout: of features, in training and for asking.
        step: of the adaptation.
        filters: of each convolution.
        shots: support samples in training, at most.
        queries: query samples.
        rate: the step length of Adam.
        batch: tasks of a step.
        plain_steps: of the baseline.
        max_steps: of a run.
        seed: of tasks and network.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> active_cells(filters=4).x0["head"]["bias"].shape
        torch.Size([2])
    """
    cells = MarkerCells(_LEARNED, shots=shots, queries=queries, noise=noise)
    source = Augmented(cells, flip, permute, rotate, least)

    def body() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(cells.channels, filters, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(filters, filters, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )

    width = 4 * filters
    nets = functional(made(body, seed)), functional(made(lambda: nn.Linear(width, 2), seed))
    own = MaskedDropout(*nets, width, dropout, step)
    draw = Prepared(own, source, batch, seed)
    plain = MarkerCells(_LEARNED, shots=10, queries=queries, noise=noise)
    shown = _Shown(own, rule, plain, (batch, plain_steps, seed), rate)
    return Instance(
        problem=own.problem,
        x0=own.x0,
        y0=own.x0,
        description="a start for telling kinds of cells apart that are not learned from",
        metrics=shown.metrics,
        plot=shown.plot,
        settings={
            "estimator": ITD(Iterate(GradientDescent(step), 1)),
            "outer": Clipped(Adam(rate), 5.0),
            "data": draw,
            "max_steps": max_steps,
        },
    )


@final
@dataclass(frozen=True)
class Prepared:
    """Batch k of a source, with the masks of a learner.

    Args:
        own: draws the masks.
        source: of the tasks.
        size: of a batch.
        seed: of the draws.
    """

    own: MaskedDropout
    source: AbstractTasks
    size: int
    seed: int

    def __call__(self, step: int) -> Batch:
        return self.own.prepare(batches(self.source, self.size, self.seed)(step), self.seed + step)


@final
@dataclass(frozen=True, eq=False)
class _Shown:
    """What a person is told of a solution; the baseline is trained when it is first asked for."""

    own: MaskedDropout
    rule: Rule
    plain: MarkerCells
    run: tuple[int, int, int]
    rate: float

    @functools.cached_property
    def tasks(self) -> Batch:
        noise = self.plain.noise
        return MarkerCells(_REAL, shots=_POOL, queries=_JUDGED, noise=noise).sample(_TASKS, self.run[2] + 2**20)

    @functools.cached_property
    def baseline(self) -> Tree:
        size, steps, seed = self.run
        start, structure = ravel(self.own.x0)
        x = start.clone().requires_grad_()
        moving = torch.optim.Adam([x], lr=self.rate)
        draw = batches(self.plain, size, seed)
        for k in range(steps):
            moving.zero_grad()
            self._outer(structure.unravel(x), draw(k)).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_([x], 5.0)
            moving.step()
        found: Tree = structure.unravel(x.detach())
        return found

    def _outer(self, x: Tree, tasks: Batch) -> Tensor:
        """The loss of MAML, without dropout."""
        vector, structure = ravel(x)
        rows = vector.expand(len(tasks["support_x"]), -1)
        losses = torch.vmap(lambda row, task: self.own.g(None, structure.unravel(row), task))(rows, tasks)
        (slopes,) = torch.autograd.grad(losses.sum(), rows, create_graph=True)
        there = rows - self.own.step * slopes
        return torch.vmap(lambda row, task: self.own.f(None, structure.unravel(row), task))(there, tasks).mean()

    def adapted(self, x: Tree, task: Batch, rows: Tensor) -> Tree:
        """X after a step on the labels of some cells of a task's pool."""
        vector, structure = ravel(x)
        leaf = vector.detach().requires_grad_()
        chosen = {f"support_{part}": task[f"support_{part}"][rows] for part in "xy"}
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.own.g(None, structure.unravel(leaf), chosen), leaf)
        return structure.unravel(leaf.detach() - self.own.step * slope)

    def accuracies(self, x: Tree, active: bool) -> dict[int, Tensor]:
        """Of each real task `(tasks,)`, by the number of labels."""
        found: dict[int, list[float]] = {size: [] for size in SIZES}
        for k in range(_TASKS):
            task = {name: part[k] for name, part in self.tasks.items()}
            order = acquire(
                functools.partial(self.adapted, x, task),
                functools.partial(self._wanted, task, k),
                _POOL,
                first=_FIRST if active else SIZES[-1],
                batch=_ROUND,
                count=SIZES[-1],
                seed=k,
            )
            for size in SIZES:
                y = self.adapted(x, task, order[:size])
                with torch.no_grad():
                    right = self.own.logits(y, task["query_x"]).argmax(-1) == task["query_y"]
                found[size].append(float(right.double().mean()))
        return {size: torch.tensor(values, dtype=torch.float64, device="cpu") for size, values in found.items()}

    def _wanted(self, task: Batch, k: int, y: Tree) -> Tensor:
        return _RULES[self.rule](self.own.drawn(y, task["support_x"], _DRAWS, k))

    def curves(self, x: Tree) -> dict[str, dict[int, Tensor]]:
        return {
            "random": self.accuracies(x, active=False),
            "active": self.accuracies(x, active=True),
            "plain": self.accuracies(self.baseline, active=False),
        }

    def metrics(self, x: Tree, y: Tree) -> dict[str, float]:
        curves = self.curves(x)
        found = {f"{name}_{size}": float(each.mean()) for name, own in curves.items() for size, each in own.items()}
        gains = torch.stack([curves["active"][size] - curves["random"][size] for size in SIZES]).mean(0)
        return found | {"gain": float(gains.mean()), "gain_within": float(1.96 * gains.std() / len(gains) ** 0.5)}

    def plot(self, figure: Any, x: Tree, y: Tree) -> None:
        axes = figure.subplots(1, 1)
        labels = {
            "active": "augmented, asked for",
            "random": "augmented, random labels",
            "plain": "MAML, random labels",
        }
        curves = self.curves(x)
        for k, (name, label) in enumerate(labels.items()):
            means, within = (
                [float(of(curves[name][size])) for size in SIZES]
                for of in (torch.mean, lambda each: 1.96 * each.std() / len(each) ** 0.5)
            )
            axes.errorbar(SIZES, means, within, fmt="o-", capsize=3, label=label, color=COLORS[k])
        axes.axhline(0.5, color=COLORS[3], linestyle=":", label="chance")
        axes.set_xlabel("labelled cells of a new kind")
        axes.set_ylabel("accuracy after one step")
        axes.legend()
        figure.tight_layout()
