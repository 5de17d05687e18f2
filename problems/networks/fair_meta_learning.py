"""Fair meta-learning on Gaussians, communities or occupations, beside MAML: accuracy against fairness."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from bilevel._instance import Instance
from bilevel._tree import Tree
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_0, COUNT, POSITIVE, SEED, SIZE
from bilevel.few_shot.networks import mlp
from bilevel.hypergrad.itd import ITD
from bilevel.modules.functional import functional
from bilevel.outside.of_argument import of_argument
from bilevel.problems._plots import COLORS
from bilevel.problems.networks._batches import generator
from bilevel.problems.networks._modules import made
from bilevel.problems.networks.adapted import adapted
from bilevel.problems.networks.ascending import Ascending
from bilevel.problems.networks.fair_adaptation import FairAdaptation, Measure, OuterLoss, measured
from bilevel.problems.networks.fair_sources import GaussianGroups, TableTasks, numbers, read_groups, scaled
from bilevel.problems.networks.noisy_labels import descent
from bilevel.solvers.adam import Adam
from bilevel.solvers.own_steps import OwnSteps
from bilevel.tasks.source import Batch, batches

_RATE = 1e-3  # of Adam on the start, of a run and of the baseline
_TRAIN, _TEST, _QUERIES = 90, 30, 400  # synthetic tasks, and points of each beside those of one support set
_MEASURES: tuple[Measure, ...] = ("covariance", "difference")
_LEAST, _EACH = 20, 4  # rows of a task of a table, and of either group in it


@checked(
    level=AT_LEAST_0,
    step=POSITIVE,
    dual_step=POSITIVE,
    steps=SIZE,
    shots=SIZE,
    queries=SIZE,
    outer_dual_step=POSITIVE,
    batch=SIZE,
    max_steps=COUNT,
    split=COUNT,
    seed=SEED,
)
def fair_meta_learning(
    *,
    level: float = 0.05,
    measure: Measure = "covariance",
    outer: OuterLoss = "lagrangian",
    first_order: bool = True,
    step: float = 0.05,
    dual_step: float = 0.1,
    steps: int = 10,
    shots: int = 50,
    queries: int = 100,
    outer_dual_step: float = 0.5,
    batch: int = 8,
    max_steps: int = 400,
    data: str | Path | None = None,
    split: int = 0,
    seed: int = 0,
) -> Instance:
    """A start, and a multiplier, from which a few steps give a classifier that is fair to a group of people (PDFM).

    A network of 40 and 40 hidden units; see :class:`FairAdaptation`. Without `data` tasks are pairs of Gaussians in the
    plane, 90 to learn from and 30 to test on (:class:`GaussianGroups`), each of `shots` and 400 points, of which a step
    draws those that it adapts to and is judged on, as from a table. `data` is a file of communities and crime,
    whose tasks are states, of Adult, whose tasks are occupations, or of your own (:func:`read_groups`): tasks with at
    least 20 rows and 4 of either group, of which 70 % are learned from and the others tested on, as `split` draws them.

    Metrics, after adaptation on the test tasks, of what was learned (`fair`) and of what as many steps of Adam make of
    MAML with as many inner steps (`maml`): the accuracy (`accuracy_...`), the mean over tasks of the absolute
    covariance of probabilities with the group (`covariance_...`), that over the points of all tasks together
    (`pooled_...`), and the mean absolute difference of the groups' mean probabilities (`difference_...`); and the
    multiplier that was learned.

    Args:
        level: c.
        measure: of unfairness, "covariance" or "difference".
        outer: the outer loss, "lagrangian" or "reference".
        first_order: without second derivatives, as published.
        step: of the adaptation.
        dual_step: of its multiplier.
        steps: of the adaptation.
        shots: points that are adapted to.
        queries: points of a task's outer loss.
        outer_dual_step: of the multiplier that is learned.
        batch: tasks of a step.
        max_steps: of a run.
        data: an `.npz` file; None: the Gaussians.
        split: which tasks of a file are tested on.
        seed: of the tasks and the network.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if an argument is out of its range, or the file has none of the forms, or too few tasks.

    Example:
        >>> fair_meta_learning(shots=5, queries=5).x0["dual"]
        tensor(1.)
    """
    if data is None:
        groups = GaussianGroups(shots=shots, queries=max(queries, _QUERIES))
        tests = groups.sample(_TEST, seed + 2**20)
        draw: Callable[[int], Batch] = functools.partial(
            _Redrawn(groups.sample(_TRAIN, seed), shots, queries).batch, batch, seed
        )
        inputs = 2
    else:
        with of_argument("fair_meta_learning", "data"):
            read = read_groups(data)
        rows, told = _parts(read, split)
        train, test = (TableTasks(**{key: part[own] for key, part in rows.items()}) for own in told)
        train, test = (TableTasks(t.x, t.y, t.z, t.task, shots, size) for t, size in ((train, queries), (test, 10**4)))
        test = TableTasks(test.x, test.y, test.z, test.task, shots, int(test.task.bincount().max()))
        draw, tests, inputs = batches(train, batch, seed), test.every(seed), rows["x"].shape[1]
    net = functional(made(lambda: mlp((inputs, 40, 40, 1), seed=seed), seed))
    loss = binary_cross_entropy_with_logits
    own = FairAdaptation(
        net, loss, level, step, dual_step, steps, measure=measure, outer=outer, first_order=first_order
    )
    shown = _Shown(own, draw, tests, max_steps)
    return Instance(
        problem=own.problem,
        x0=own.x0,
        y0=own.y0,
        description=f"a start for classifiers whose {measure} with a group is at most {level}, and its multiplier",
        metrics=shown.metrics,
        plot=shown.plot,
        settings={
            "estimator": ITD(OwnSteps()),
            "outer": Ascending(Adam(_RATE), outer_dual_step),
            "constraint": own.constraint,
            "data": draw,
            "max_steps": max_steps,
        },
    )


def _parts(rows: Mapping[str, Tensor], split: int) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """The rows, scaled by those that are learned from; which these are, and which are tested on."""
    names = [
        int(name)
        for name in numbers(rows["task"])
        if (here := rows["task"] == name).sum() >= _LEAST
        and min(int(rows["z"][here].sum()), int((1 - rows["z"][here]).sum())) >= _EACH
    ]
    few = round(0.7 * len(names))
    if not 0 < few < len(names):
        raise ValueError(
            f"`fair_meta_learning(data=...)` needs two tasks or more with at least {_LEAST} rows and {_EACH} of either"
            f" group. Got {len(names)}."
        )
    order = torch.randperm(len(names), generator=generator(split, 7), device="cpu").tolist()
    train, test = (torch.tensor([names[k] for k in part], device="cpu") for part in (order[:few], order[few:]))
    learned = torch.isin(rows["task"], train)
    return scaled(rows, learned), (learned, torch.isin(rows["task"], test))


@final
@dataclass(frozen=True, eq=False)
class _Redrawn:
    """Some of the given tasks at a time, each with other ones of its points to adapt to and to be judged on."""

    tasks: Batch
    shots: int
    queries: int

    def batch(self, size: int, seed: int, step: int) -> Batch:
        draws = generator(seed, step)
        each = torch.randperm(len(self.tasks["support_x"]), generator=draws, device="cpu")[:size].unsqueeze(1)
        points = self.tasks["support_x"].shape[1] + self.tasks["query_x"].shape[1]
        order = torch.rand(len(each), points, generator=draws, device="cpu").argsort(1)
        ends = {"support": (0, self.shots), "query": (self.shots, self.shots + self.queries)}
        found: Batch = {}
        for part in "xyz":
            whole = torch.cat([self.tasks[f"{side}_{part}"] for side in ends], 1)
            found |= {f"{side}_{part}": whole[each, order[:, slice(*ends[side])]] for side in ends}
        return found


@final
@dataclass(frozen=True, eq=False)
class _Shown:
    """What a person is told of a solution; the baseline is trained when it is first asked for."""

    own: FairAdaptation
    draw: Callable[[int], Batch]
    tests: Batch
    max_steps: int

    @property
    def plain(self) -> FairAdaptation:
        """MAML: the multiplier stays at zero."""
        own = self.own
        return FairAdaptation(own.net, own.loss, own.level, own.step, 0.0, own.steps, 0.0, first_order=own.first_order)

    @functools.cached_property
    def baseline(self) -> Tree:
        plain = self.plain
        none = plain.x0["dual"]

        def g(params: Tree, tasks: Batch) -> Tensor:
            y = adapted(plain.iteration, plain.init, {"params": params, "dual": none}, tasks, plain.steps, graph=True)
            return torch.vmap(lambda y, task: plain.f({"params": y["params"], "dual": none}, y, task))(y, tasks).mean()

        steps = map(self.draw, range(self.max_steps))
        return descent(g, dict(self.own.net.params), steps, self.max_steps, lambda p: torch.optim.Adam(p, lr=_RATE))

    def metrics(self, x: Tree, y: Tree) -> dict[str, float]:
        none = self.plain.x0["dual"]
        found = {f"{name}_fair": value for name, value in judged(self.own, x, self.tests).items()}
        plain = judged(self.plain, {"params": self.baseline, "dual": none}, self.tests)
        return found | {f"{name}_maml": value for name, value in plain.items()} | {"multiplier": float(x["dual"])}

    def plot(self, figure: Any, x: Tree, y: Tree) -> None:
        axes = figure.subplots(1, 1)
        none = self.plain.x0["dual"]
        pairs = (("MAML", self.plain, {"params": self.baseline, "dual": none}), ("PDFM", self.own, x))
        for k, (label, own, at) in enumerate(pairs):
            each = _each(own, at, self.tests)
            axes.scatter(each["covariance"].tolist(), each["accuracy"].tolist(), s=12, alpha=0.5, color=COLORS[k])
            means = [float(each[name].mean()) for name in ("covariance", "accuracy")]
            axes.scatter(means[:1], means[1:], s=90, marker="D", edgecolor="black", color=COLORS[k], label=label)
        axes.axvline(self.own.level, color=COLORS[3], linestyle=":", label="level asked for")
        axes.set_xlabel("covariance of probabilities with the group, absolute")
        axes.set_ylabel("accuracy after adaptation")
        axes.legend()
        figure.tight_layout()


def _each(own: FairAdaptation, x: Tree, tasks: Batch) -> dict[str, Tensor]:
    """Scores of every query point, and of every task the accuracy and both measures."""
    y = own.adapted(x, tasks)
    with torch.no_grad():
        scores = torch.vmap(lambda y, task: own.scores(y["params"], task, "query"))(y, tasks)
        mask = tasks.get("query_mask", torch.ones_like(scores))
        right = ((scores > 0.5) == (tasks["query_y"] > 0.5)).to(scores) * mask

        def unfair(name: Measure) -> Tensor:
            return torch.vmap(lambda s, task: measured(s, task, "query", name).abs())(scores, tasks)

        found: dict[str, Tensor] = {name: unfair(name) for name in _MEASURES}
    return {"scores": scores, "accuracy": right.sum(1) / mask.sum(1), **found}


@checked()
def judged(own: FairAdaptation, x: Tree, tasks: Any) -> dict[str, float]:
    """The accuracy over the query points of all tasks after adaptation, and their unfairness, by task and together."""
    found = _each(own, x, tasks)
    mask = tasks.get("query_mask", torch.ones_like(found["scores"]))
    there = mask.reshape(-1) > 0
    pooled = {"query_z": tasks["query_z"].reshape(-1)[there]}
    return {
        "accuracy": float((found["accuracy"] * mask.sum(1)).sum() / mask.sum()),
        "covariance": float(found["covariance"].mean()),
        "pooled": float(measured(found["scores"].reshape(-1)[there], pooled, "query").abs()),
        "difference": float(found["difference"].mean()),
    }
