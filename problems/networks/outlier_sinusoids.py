"""Sinusoids, a share of which are something else: NestedMAML finds which, and learns from the others."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from bilevel._instance import Instance
from bilevel._tree import Tree
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import BETWEEN_0_AND_1, COUNT, POSITIVE, SEED, SIZE
from bilevel.problems._plots import COLORS, draw_bars
from bilevel.problems.networks._batches import generator
from bilevel.problems.networks._modules import made
from bilevel.problems.networks.nested_maml import Positive
from bilevel.problems.networks.noisy_labels import descent
from bilevel.problems.networks.task_weights import Pool, Tasks, task_weights
from bilevel.tasks.sinusoid import Sinusoid

Outliers: TypeAlias = Literal["line", "noise"]
_TEST = 600  # tasks
_RATE = 5e-3  # of Adam on the initialization, of a run and of the baselines


@checked(
    share=BETWEEN_0_AND_1,
    tasks=SIZE,
    validation=SIZE,
    shots=SIZE,
    step=POSITIVE,
    inner_steps=COUNT,
    outer_step=POSITIVE,
    batch=SIZE,
    max_steps=COUNT,
    seed=SEED,
)
def outlier_sinusoids(
    *,
    share: float = 0.3,
    outliers: Outliers = "line",
    tasks: int = 100,
    validation: int = 1000,
    shots: int = 10,
    positive: Positive = "projection",
    first_order: bool = False,
    step: float = 0.01,
    inner_steps: int = 1,
    outer_step: float = 0.1,
    batch: int = 20,
    max_steps: int = 1500,
    seed: int = 0,
) -> Instance:
    """Weights of training tasks, a share of which are lines y = 5 + 2 x, or noise, and no sinusoids as they should be.

    A network of 1 - 40 - 40 - 1 units learns an initialization for sinusoids (amplitudes 0.1 to 5, as in MAML) from 100
    tasks; see :class:`NestedMAML`. Validation tasks are right.

    Metrics: the mean weights of outliers and of others (`weight_out`, `weight_in`), the least of the others; the
    squared error on 600 new sinusoids after adaptation of what was learned (`test_loss_nested`), and of what as many
    steps of the same Adam learn from all tasks (`maml`), from the right ones (`oracle`, which nobody has), and from the
    validation tasks alone (`validation`).

    Args:
        share: of tasks that are outliers.
        outliers: "line", or "noise": uniform targets in [-5, 5].
        tasks: training tasks.
        validation: validation tasks.
        shots: points of each support set, and of each query set.
        positive: "projection" or "softplus".
        first_order: without second derivatives of the adaptation.
        step: of the adaptation.
        inner_steps: of the adaptation.
        outer_step: of the weights.
        batch: tasks of each side.
        max_steps: of a run.
        seed: of the tasks, their order and the network.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> outlier_sinusoids(tasks=50).x0.shape
        torch.Size([50])
    """
    source = Sinusoid(shots=shots, queries=shots, dtype=torch.float32)
    pool, few = dict(source.sample(tasks, seed)), round(share * tasks)
    draws = generator(seed, 1)
    for side in ("support", "query"):
        x = pool[f"{side}_x"][:few]
        noise = 10 * torch.rand(x.shape, generator=draws, device="cpu") - 5
        pool[f"{side}_y"][:few] = 5 + 2 * x if outliers == "line" else noise.to(x)
    right = source.sample(validation, seed + 2**20)
    module = made(lambda: nn.Sequential(*_layers()), seed)
    instance = task_weights(
        module,
        mse_loss,
        pool,
        right,
        positive=positive,
        step=step,
        inner_steps=inner_steps,
        first_order=first_order,
        rate=_RATE,
        outer_step=outer_step,
        batch=batch,
        max_steps=max_steps,
        seed=seed,
    )
    test = Sinusoid(shots=shots, queries=100, dtype=torch.float32).sample(_TEST, seed + 2**21)
    shown = _Shown(instance, instance.problem.f, few, pool, right, test, (batch, max_steps, seed), positive)
    return replace(
        instance,
        description=f"weights of {tasks} tasks, {few} of them no sinusoids, under an initialization",
        metrics=shown.metrics,
        plot=shown.plot,
    )


def _layers() -> list[nn.Module]:
    return [nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)]


@final
@dataclass(frozen=True, eq=False)
class _Shown:
    """What a person is told of a solution; the baselines are trained when they are first asked for."""

    instance: Instance
    f: Any
    few: int
    pool: Tasks
    right: Tasks
    test: Tasks
    run: tuple[int, int, int]
    positive: Positive

    @functools.cached_property
    def baselines(self) -> dict[str, float]:
        rows = len(self.pool["support_x"])
        parts = {"maml": self.pool, "validation": self.right}
        if 0 < self.few < rows:
            parts["oracle"] = {name: tensor[self.few :] for name, tensor in self.pool.items()}
        return {f"test_loss_{name}": self._test(self._maml(part)) for name, part in parts.items()}

    def metrics(self, x: Tensor, y: Tree) -> dict[str, float]:
        w = self._weights(x)
        found = {"weight_out": float(w[: self.few].mean())} if self.few else {}
        if self.few < len(w):
            found |= {"weight_in": float(w[self.few :].mean()), "weight_in_least": float(w[self.few :].min())}
        return found | {"test_loss_nested": self._test(y)} | self.baselines

    def plot(self, figure: Any, x: Tensor, y: Tree) -> None:
        w, metrics = self._weights(x), self.metrics(x, y)
        left, right = figure.subplots(1, 2)
        bins = torch.linspace(0, max(float(w.max()), 1.0), 25).tolist()
        for part, label, color in ((w[: self.few], "outliers", COLORS[1]), (w[self.few :], "sinusoids", COLORS[0])):
            left.hist(part.tolist(), bins=bins, label=label, color=color, alpha=0.7)
        left.set_xlabel("weight of a training task (1 at the start)")
        left.set_ylabel("tasks")
        left.legend()
        names = {"maml": "MAML, all tasks", "nested": "NestedMAML", "oracle": "MAML, right tasks only (oracle)"}
        names["validation"] = "MAML, validation tasks only"
        values = {
            label: metrics[f"test_loss_{name}"] for name, label in names.items() if f"test_loss_{name}" in metrics
        }
        draw_bars(right, values, "squared error on new sinusoids, adapted")
        figure.tight_layout()

    def _weights(self, x: Tensor) -> Tensor:
        return torch.nn.functional.softplus(x.detach()) if self.positive == "softplus" else x.detach()

    def _test(self, y: Tree) -> float:
        with torch.no_grad():
            return float(self.f(None, y, self.test))

    def _maml(self, tasks: Tasks) -> Tree:
        batch, steps, seed = self.run
        pool = Pool(tasks, batch, seed)

        def g(y: Tree, tasks: Any) -> Tensor:
            found: Tensor = self.f(None, y, tasks)
            return found

        return descent(g, self.instance.y0, map(pool, range(steps)), steps, lambda y: torch.optim.Adam(y, lr=_RATE))
