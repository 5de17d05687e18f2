"""What to replay: a few samples of earlier tasks that keep a network from forgetting them while it learns another."""

from __future__ import annotations

import functools
import math
import statistics
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from bilevel._instance import Instance
from bilevel._optimizer import AbstractOptimizer, OptimizerState
from bilevel._problem import BilevelProblem
from bilevel._tree import Tree
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import COUNT, POSITIVE, SEED, SIZE
from bilevel.hypergrad.itd import ITD
from bilevel.hypergrad.unrolling.checkpointed import Checkpointed
from bilevel.modules.functional import Functional, functional
from bilevel.problems._data import Arrays, Dataset, load
from bilevel.problems._losses import accuracy
from bilevel.problems.networks._loaders import UNSEEN, initial, loader
from bilevel.problems.networks._networks import Made, Network, losses, trained
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate

_LEARNERS = 5  # by which a selection is judged
_COLORS = {"learned": "#0072b2", "random": "#d55e00"}


@checked(
    memory=SIZE,
    hidden=SIZE,
    inner_steps=SIZE,
    inner_step=POSITIVE,
    networks=SIZE,
    learner_steps=SIZE,
    learner_step=POSITIVE,
    batch=SIZE,
    n_train=SIZE,
    seed=SEED,
    max_steps=COUNT,
)
def replay(
    *,
    memory: int = 2,
    hidden: int = 64,
    inner_steps: int = 60,
    inner_step: float = 0.5,
    networks: int = 2,
    learner_steps: int = 150,
    learner_step: float = 0.3,
    batch: int = 32,
    n_train: int = 1300,
    max_steps: int | None = None,
    network: Network | None = None,
    data: Arrays | None = None,
    seed: int = 0,
    double: bool = False,
) -> Instance:
    """f = mean_t CE(y_t; all that was seen until task t),  g_t = [CE(y; task t) + t CE(y; memory, w_t)] / (t + 1).

    The classes come two at a time: task t holds 2t and 2t + 1. While a network learns task t = 1, 2, ..., `memory`
    samples of each earlier class are replayed; x = (w_t), a row for each t, says with which weights, and y_t is what N
    steps on g_t make of fresh weights, a few for each t. No task sees a later one.

    Selection is greedy: from w = 0 each outer step adds, for each t and class, the sample with the least entry of the
    hypergradient, which is the derivative of Phi in its weight. So `memory` steps fill the memory with samples that are
    good beside those chosen before (Frank and Wolfe's direction on a product of simplices).

    The metrics train new networks on all tasks in turn, with this memory and with random ones of the same size.
    Forgetting is how much accuracy on a task is lost between its end and the end of all, the mean over tasks, on test
    samples.

    Cost of an outer step: 2 N gradients and N Hessian and cross products on all samples, for each task after the
    first and each of its `networks`. Memory: 2 sqrt(N) times the weights of these networks, and one graph.

    Source: Borsos, Mutny, Krause, "Coresets via bilevel optimization for continual learning and streaming", NeurIPS
    2020, where inner problems are kernel regressions in the place of networks.

    Args:
        memory: how many samples of each earlier class are replayed.
        hidden: the width of the default network, 64 - hidden - 10 for digits, with tanh units.
        inner_steps: N.
        inner_step: their length.
        networks: how many starts an outer step averages over, for each t.
        learner_steps: how many steps a task takes when the selection is put to use.
        learner_step: their length.
        batch: samples of the current task in each of them; what is replayed, is so at every step.
        n_train: training samples; the others are for testing, and a run does not see them.
        max_steps: outer steps of a run; None: `memory`, as it should be.
        network: makes a module, with random weights, in the place of the default.
        data: the user's own data; None: scikit-learn's digits. See `bilevel.problems.Arrays`.
        seed: of the split and of the starts.
        double: float64, else float32.

    Raises:
        ImportError: if scikit-learn is needed and missing.
        ValueError: if an argument is out of its range, or there are less than 3 classes.

    Example:
        >>> from bilevel import minimize
        >>> X, labels = (
        ...     torch.randn(60, 2, generator=torch.Generator().manual_seed(0)),
        ...     torch.arange(60) % 4,
        ... )
        >>> instance = replay(hidden=4, inner_steps=3, n_train=40, data=(X, labels))
        >>> solution = minimize(instance.problem, instance.x0, instance.y0, **instance.settings)
        >>> solution.x.shape, solution.x.sum(1)  # two of each of the classes 0 and 1
        (torch.Size([1, 40]), tensor([4.]))
    """
    parts = load(data, "digits", sizes=(n_train - 1, 1), seed=seed, per_feature=False, bias=False, double=double)
    X, labels = torch.cat([parts.X_train, parts.X_val]), torch.cat([parts.y_train, parts.y_val])
    if parts.classes < 3:
        raise ValueError(f"`replay` needs at least 3 classes, for two tasks. Got {parts.classes}.")
    make = Made(network, (X.shape[1], hidden, parts.classes), X.dtype)
    stages = (parts.classes + 1) // 2 - 1
    task = labels // 2
    past = torch.stack([task < t for t in range(1, stages + 1)])
    steps = memory if max_steps is None else max_steps
    own = _Replayed(functional(make()), X, labels)
    starts = Stages(make, task, stages, seed * UNSEEN)
    learner = Learner(own, make, parts, task, stages, learner_steps, learner_step, batch)
    told = _Told(learner, parts, past, memory, seed)
    return Instance(
        problem=BilevelProblem(own.f, own.g, init=own.init, iterative=True, tasks=True),
        x0=torch.zeros_like(past, dtype=X.dtype),
        y0=initial(make, seed),
        description=f"which {memory} samples of each earlier class to replay, {parts.classes} classes two at a time",
        metrics=told.metrics,
        plot=told.plot,
        settings={
            "estimator": ITD(Iterate(GradientDescent(inner_step), inner_steps), Checkpointed()),
            "outer": Greedy(torch.where(past, labels, -1)),
            "max_steps": steps,
            "data": loader(starts, batch_size=networks * stages),
        },
    )


@final
@dataclass(frozen=True, eq=False)
class Greedy(AbstractOptimizer):
    """w_j <- 1 for the j of least gradient of every group, among those with w_j = 0.

    Args:
        groups: `(rows, n)`, for each weight which group of its row it belongs to; -1: it stays at 0.
    """

    groups: Tensor

    def init(self, point: Tensor) -> OptimizerState:
        return {}

    def step(self, grad: Tensor, point: Tensor, state: OptimizerState) -> tuple[Tensor, OptimizerState]:
        grad = torch.where(point == 0, grad, torch.inf).view_as(self.groups)
        chosen = point.clone().view_as(self.groups)
        for group in range(int(self.groups.max()) + 1):
            inside = torch.where(self.groups == group, grad, torch.inf)
            least, place = inside.min(dim=1)
            rows = least.isfinite().nonzero()[:, 0]
            chosen[rows, place[rows]] = 1.0
        return chosen.reshape(-1), state

    @property
    def needs_curvature(self) -> bool:
        return False

    def tuned(self, largest_curvature: Tensor) -> AbstractOptimizer:
        return self


@final
class Stages(TorchDataset[dict[str, Any]]):
    """What the inner problems are made of, t = 1, ..., `stages` in turn: fresh weights, and which samples are whose.

    `row` says which row of x holds the weights, `now` and `seen` are weights of sum 1 of the samples of task t and of
    those until its end.
    """

    def __init__(self, make: Made, task: Tensor, stages: int, first: int) -> None:
        self.make, self.first = make, first
        self.rows = torch.eye(stages, dtype=make.dtype, device="cpu")
        numbers = torch.arange(1, stages + 1, device="cpu").unsqueeze(1)
        self.now, self.seen = (
            (mask / mask.sum(1, keepdim=True)).to(make.dtype) for mask in (task == numbers, task <= numbers)
        )

    def __len__(self) -> int:
        return UNSEEN

    def __getitem__(self, number: int) -> dict[str, Any]:
        k = number % len(self.rows)
        start = initial(self.make, self.first + number)
        earlier = self.rows.new_tensor(k + 1.0)
        return {"start": start, "row": self.rows[k], "now": self.now[k], "seen": self.seen[k], "earlier": earlier}


@final
@dataclass(frozen=True, eq=False)
class _Replayed:
    """The functions of the problem, and the loss that a learner takes its steps on."""

    net: Functional
    X: Tensor
    labels: Tensor

    def f(self, x: Tensor, y: Tree, stage: Any) -> Tensor:
        seen: Tensor = stage["seen"]
        return seen @ losses(self.net(y, self.X), self.labels)

    def g(self, x: Tensor, y: Tree, stage: Any) -> Tensor:
        weights, each = stage["row"] @ x, losses(self.net(y, self.X), self.labels)
        kept = weights @ each / weights.sum().clamp_min(1.0)
        value: Tensor = (stage["now"] @ each + stage["earlier"] * kept) / (stage["earlier"] + 1)
        return value

    def init(self, x: Tensor, stage: Any) -> Tree:
        return stage["start"]


@final
@dataclass(frozen=True, eq=False)
class Learner:
    """A network that learns the tasks in turn, and replays what it is given beside each."""

    own: _Replayed
    make: Made
    parts: Dataset
    task: Tensor
    stages: int
    steps: int
    step: float
    batch: int

    def learn(self, memory: Tensor, seed: int) -> tuple[float, float]:
        """Forgetting, and the accuracy on all tasks at the end, with weights `(stages, n)` of what is replayed."""
        generator = torch.Generator("cpu").manual_seed(seed)
        y, table = initial(self.make, seed), list[list[float]]()
        for t in range(self.stages + 1):
            now = (self.task == t).nonzero()[:, 0]
            kept = memory[t - 1].nonzero()[:, 0] if t else now[:0]
            weights = memory[t - 1][kept] / memory[t - 1].sum() if t else memory[0][:0]
            loss = functools.partial(self._loss, t, now, kept, weights, generator)
            y = trained(loss, y, self.step, self.steps)
            table.append([self._accuracy(y, s) for s in range(t + 1)])
        lost = [table[s][s] - table[-1][s] for s in range(self.stages)]
        return sum(lost) / self.stages, sum(table[-1]) / len(table)

    def _loss(
        self,
        t: int,
        now: Tensor,
        kept: Tensor,
        weights: Tensor,
        generator: torch.Generator,
        y: dict[str, Tensor],
        _: int,
    ) -> Tensor:
        """g_t on some samples of task t, drawn anew, and on all that is kept."""
        drawn = now[torch.randint(len(now), (self.batch,), generator=generator, device="cpu")]
        both = torch.cat([drawn, kept])
        each = losses(self.own.net(y, self.own.X[both]), self.own.labels[both])
        return (each[: self.batch].mean() + t * (weights @ each[self.batch :])) / (t + 1)

    def _accuracy(self, y: dict[str, Tensor], t: int) -> float:
        some = self.parts.y_test // 2 == t
        with torch.no_grad():
            return accuracy(self.own.net(y, self.parts.X_test[some]), self.parts.y_test[some])


@final
@dataclass(frozen=True, eq=False)
class _Told:
    """What a person is told: what networks forget that the run has not seen, on samples that it has not seen."""

    learner: Learner
    parts: Dataset
    past: Tensor
    memory: int
    seed: int

    def metrics(self, x: Tensor, y: Tree) -> dict[str, float]:
        chosen = x.detach().clamp_min(0)
        return (
            _summary("learned", [self.learner.learn(chosen, self._seed(k)) for k in range(_LEARNERS)]) | self.baseline
        )

    @functools.cached_property
    def baseline(self) -> dict[str, float]:
        """The same networks, with as many random samples of each class, drawn anew for each network."""
        return _summary("random", [self.learner.learn(self.random(k), self._seed(k)) for k in range(_LEARNERS)])

    def _seed(self, k: int) -> int:
        return UNSEEN * (self.seed + 1) - 1 - k  # the last ones before the next seed's

    def random(self, k: int) -> Tensor:
        """A random memory `(stages, n)`."""
        generator, chosen = (
            torch.Generator("cpu").manual_seed(self._seed(k)),
            torch.zeros_like(self.past, dtype=self.learner.make.dtype),
        )
        labels = self.learner.own.labels
        for row, past in zip(chosen, self.past, strict=True):
            order = torch.randperm(len(labels), generator=generator, device="cpu")
            for c in sorted(set(labels[past].tolist())):
                row[order[(labels[order] == c)][: self.memory]] = 1.0
        return chosen

    def plot(self, figure: Any, x: Tensor, y: Tree) -> None:
        metrics, X = self.metrics(x, y), self.parts.raw_train
        last = x[-1].detach()[: len(X)].nonzero()[:, 0]
        labels = self.learner.own.labels[last]
        last, labels = last[labels.argsort(stable=True)][:20], labels.sort().values[:20]
        side = math.isqrt(X.shape[1])
        pictures = side >= 4 and side * side == X.shape[1]
        grid = figure.add_gridspec(3 if pictures else 1, 2, height_ratios=(3, 1, 1) if pictures else (1,))
        names = {"forgetting": "accuracy lost since a task was learned", "accuracy": "accuracy on all tasks at the end"}
        for k, (name, label) in enumerate(names.items()):
            axes = figure.add_subplot(grid[0, k])
            for j, (which, color) in enumerate(_COLORS.items()):
                mean, spread = metrics[f"{name}_{which}"], metrics[f"{name}_{which}_spread"]
                axes.bar([j], [mean], yerr=[spread], color=color, capsize=4, width=0.6)
                axes.annotate(f"{mean:.3f}", (j + 0.06, mean), ha="left", va="bottom", fontsize=9)
            axes.set_xticks([0, 1], [f"{which} replay" for which in _COLORS])
            axes.set_ylabel(label, fontsize=9)
        if pictures:
            cells = grid[1:, :].subgridspec(2, 10)
            for k, (index, c) in enumerate(zip(last.tolist(), labels.tolist(), strict=True)):
                axes = figure.add_subplot(cells[k // 10, k % 10])
                axes.imshow(X[index].reshape(side, side).tolist(), cmap="gray_r")
                axes.set_xticks([])
                axes.set_yticks([])
                axes.set_title(c, fontsize=9)
        figure.suptitle(f"{self.memory} replayed samples a class; below, those chosen for the last task", fontsize=11)
        figure.tight_layout()


def _summary(which: str, found: list[tuple[float, float]]) -> dict[str, float]:
    summary: dict[str, float] = {}
    for name, values in zip(("forgetting", "accuracy"), zip(*found, strict=True), strict=True):
        summary |= {
            f"{name}_{which}": statistics.fmean(values),
            f"{name}_{which}_spread": statistics.stdev(values),
        }
    return summary
