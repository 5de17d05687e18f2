"""Few-shot tasks with wrong labels: NestedMAML weighs every query instance of the training tasks."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel._instance import Instance
from bilevel._tree import Tree
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import BETWEEN_0_AND_1, COUNT, POSITIVE, SEED, SIZE
from bilevel.few_shot.networks import conv_net
from bilevel.modules.functional import functional
from bilevel.outside.of_argument import of_argument
from bilevel.problems._plots import COLORS, draw_bars
from bilevel.problems.hyper_cleaning import auc, corrupt
from bilevel.problems.networks._batches import generator
from bilevel.problems.networks._modules import made
from bilevel.problems.networks.nested_maml import NestedMAML
from bilevel.problems.networks.noisy_labels import descent
from bilevel.problems.networks.task_weights import Pool, Tasks, task_weights
from bilevel.tasks.digits import digits
from bilevel.tasks.episodes import Episodes
from bilevel.tasks.images import Splits
from bilevel.tasks.omniglot import omniglot

_TEST, _AT_ONCE = 600, 100  # episodes
_RATE = 3e-3  # of Adam on the initialization, of a run and of the baselines


@checked(
    corrupted=BETWEEN_0_AND_1,
    tasks=SIZE,
    validation=SIZE,
    way=COUNT,
    shots=SIZE,
    queries=SIZE,
    filters=SIZE,
    step=POSITIVE,
    outer_step=POSITIVE,
    batch=SIZE,
    max_steps=COUNT,
    seed=SEED,
)
def mislabelled_tasks(
    *,
    corrupted: float = 0.3,
    support: bool = True,
    tasks: int = 200,
    validation: int = 100,
    way: int = 0,
    shots: int = 1,
    queries: int = 5,
    filters: int = 16,
    step: float = 0.4,
    outer_step: float = 0.1,
    batch: int = 16,
    max_steps: int = 500,
    data: str | Path | None = None,
    seed: int = 0,
) -> Instance:
    """Weights of the query instances of training tasks with wrong labels, on digits or, with `data`, on Omniglot.

    A share of the labels of the training tasks is replaced by another class of the task, drawn uniformly; validation
    tasks are of other classes, and right, and test tasks of yet others. A convolutional network with batch
    normalization learns an initialization; see :class:`NestedMAML`.

    Metrics: `auc`, by which low weights rank wrong query labels before right ones; on the same 600 test tasks
    the accuracy after adaptation of what was learned (`nested`), and of what as many steps of the same Adam learn with
    equal weights (`maml`), from right labels (`oracle`, which nobody has), and from the validation tasks alone
    (`validation`); the mean difference of the first two over episodes (`gain`), with half the width of its 95 %
    interval.

    Args:
        corrupted: the share of labels that are replaced.
        support: whether labels of support sets are, or only those of query sets.
        tasks: training tasks.
        validation: validation tasks.
        way: classes of a task; 0: 3 of digits, 5 of Omniglot.
        shots: support images of each class.
        queries: query images of each class.
        filters: of each convolution.
        step: of the adaptation.
        outer_step: of the weights.
        batch: tasks of each side.
        max_steps: of a run.
        data: the file of Omniglot, see `bilevel.tasks.omniglot`; None: scikit-learn's digits.
        seed: of the tasks, the corruption, the order and the network.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if scikit-learn is needed and missing.
        ValueError: if an argument is out of its range.

    Example:
        >>> mislabelled_tasks(tasks=4, validation=2, filters=4).x0.shape  # 3 ways, 5 queries each
        torch.Size([4, 15])
    """
    if way == 1:
        raise ValueError("`mislabelled_tasks(way=...)` must be at least 2 classes, or 0 for its default. Got 1.")
    splits = _splits(data)
    ways = way or (3 if data is None else 5)
    size = splits.train.shape[-1]
    source = Episodes(splits.train, ways, shots, queries, rotations=True, dtype=torch.float32)
    truth = source.sample(tasks, seed)
    pool, wrong = dict(truth), torch.zeros_like(truth["query_y"], dtype=torch.bool)
    draws = generator(seed, 1)
    for side in ("support", "query") if support else ("query",):
        labels, found = corrupt(truth[f"{side}_y"].reshape(-1), corrupted, ways, draws)
        pool[f"{side}_y"] = labels.reshape(tasks, -1)
        wrong = found.reshape(tasks, -1) if side == "query" else wrong
    right = Episodes(splits.validation, ways, shots, queries, rotations=True, dtype=torch.float32).sample(
        validation, seed + 2**20
    )
    blocks = 3 if data is None else 4
    net = functional(made(lambda: conv_net(filters, blocks=blocks, size=size, classes=ways, seed=seed), seed))
    instance = task_weights(
        net,
        cross_entropy,
        pool,
        right,
        weighted="instances",
        step=step,
        rate=_RATE,
        outer_step=outer_step,
        batch=batch,
        max_steps=max_steps,
        seed=seed,
    )
    own = NestedMAML(net, cross_entropy, step)
    tests = Episodes(splits.test, ways, shots, 15, dtype=torch.float32)
    shown = _Shown(
        instance, own, wrong, {"maml": pool, "oracle": truth, "validation": right}, tests, (batch, max_steps, seed)
    )
    return replace(
        instance,
        description=f"weights of {instance.x0.numel()} query instances, {corrupted:.0%} with wrong labels",
        metrics=shown.metrics,
        plot=shown.plot,
    )


def _splits(data: str | Path | None) -> Splits:
    if data is None:
        return digits()
    with of_argument("mislabelled_tasks", "data"):
        return omniglot(data)


@final
@dataclass(frozen=True, eq=False)
class _Shown:
    """What a person is told of a solution; the baselines are trained when they are first asked for."""

    instance: Instance
    own: NestedMAML
    wrong: Tensor
    parts: dict[str, Tasks]
    tests: Episodes
    run: tuple[int, int, int]

    @functools.cached_property
    def baselines(self) -> dict[str, Tensor]:
        return {name: self._test(self._maml(part)) for name, part in self.parts.items()}

    def metrics(self, x: Tensor, y: Tree) -> dict[str, float]:
        found = {"auc": auc(-x.detach().reshape(-1), self.wrong.reshape(-1))} if bool(self.wrong.any()) else {}
        scores = {"nested": self._test(y)} | self.baselines
        gain = scores["nested"] - scores["maml"]
        found |= {f"test_accuracy_{name}": float(each.mean()) for name, each in scores.items()}
        return found | {"gain": float(gain.mean()), "gain_within": 1.96 * float(gain.std()) / len(gain) ** 0.5}

    def plot(self, figure: Any, x: Tensor, y: Tree) -> None:
        w, metrics = x.detach(), self.metrics(x, y)
        left, right = figure.subplots(1, 2)
        bins = torch.linspace(0, max(float(w.max()), 1.0), 25).tolist()
        for part, label, color in ((w[self.wrong], "wrong", COLORS[1]), (w[~self.wrong], "right", COLORS[0])):
            left.hist(part.tolist(), bins=bins, density=True, label=f"{label} labels", color=color, alpha=0.6)
        left.set_xlabel("weight of a query instance (1 at the start)")
        left.set_ylabel("density")
        left.legend()
        names = {"maml": "MAML", "nested": "NestedMAML", "oracle": "MAML, right labels (oracle)"}
        names["validation"] = "MAML, validation tasks only"
        draw_bars(right, {label: metrics[f"test_accuracy_{name}"] for name, label in names.items()}, "test accuracy")
        figure.tight_layout()

    def _test(self, y: Tree) -> Tensor:
        """The accuracy on each of the test tasks after adaptation."""
        found = []
        for k in range(_TEST // _AT_ONCE):
            tasks = self.tests.sample(_AT_ONCE, 2**21 + k)
            with torch.no_grad():
                there = self.own.adapted(y, tasks)
                logits = torch.vmap(self.own.net)(there, tasks["query_x"])
            found.append((logits.argmax(-1) == tasks["query_y"]).double().mean(1))
        return torch.cat(found)

    def _maml(self, tasks: Tasks) -> Tree:
        batch, steps, seed = self.run
        pool = Pool(tasks, batch, seed)

        def g(y: Tree, tasks: Any) -> Tensor:
            return self.own.f(self.instance.x0, y, tasks)

        return descent(g, self.instance.y0, map(pool, range(steps)), steps, lambda y: torch.optim.Adam(y, lr=_RATE))
