"""How good a learner is on new tasks."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from bilevel._result import Stats, Status
from bilevel._tree import Tree
from bilevel.arguments.checked import checked, fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import COUNT, SEED, SIZE
from bilevel.few_shot.adapt import (
    Adapted,
    adapted,
    check_padding,
    check_tasks,
    demand_tasks,
    draws,
    noise_seed,
    predict,
    ready,
    scored,
)
from bilevel.few_shot.learner import Learner
from bilevel.few_shot.likelihood import AbstractLikelihood
from bilevel.ranks.ranks import demand_ranks, everywhere
from bilevel.tasks._random import seed_of_step
from bilevel.tasks.source import AbstractTasks

_LEVEL = 0.9  # of predictive intervals

Metric: TypeAlias = Literal["accuracy", "mse", "return"]


@final
@dataclass(frozen=True)
class Score:
    """A mean over episodes and its 95 % interval, mean +- interval.

    Attributes:
        mean: of the episodes.
        interval: 1.96 sd / sqrt(n), sd the standard deviation over the n episodes (divisor n - 1); NaN for n = 1.

    Example:
        >>> print(Score.of(torch.tensor([1.0, 2.0, 3.0])))
        2 +- 1.1
    """

    mean: float
    interval: float

    def __post_init__(self) -> None:
        demand_types(self)

    @staticmethod
    @fitting
    def of(values: Tensor) -> Score:
        """The score of `(episodes,)` values."""
        values = values.double()
        spread = float(values.std()) if len(values) > 1 else math.nan
        return Score(float(values.mean()), 1.96 * spread / math.sqrt(len(values)))

    def __str__(self) -> str:
        return f"{self.mean:.4g} +- {self.interval:.2g}"


@final
@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        metric: what a score is: "accuracy" (of integer targets), "mse", or the "return" that `learner.score` gives.
        episodes: how many tasks.
        score: the metric after adaptation.
        before: the metric without adaptation: at the start of the inner iteration.
        loss: after adaptation: minus the mean log-probability of the targets, or again the mean squared error; minus
            the return.
        curve: the metric after other numbers of steps, by that number.
        failed: how many tasks' adaptation did not succeed, by the name of the status. They are scored all the same,
            also those whose solver diverged, so that an x at which many do is not taken for a good one. A prediction
            that is not finite counts as wrong, and makes a mean squared error NaN.
        settled: the score without the tasks whose adaptation diverged or met NaN; None: there are no others.
        stats: the oracle calls of the adaptation.
        seconds: the wall-clock time.
        scores: the metric of each episode `(episodes,)`.
        log_probabilities: of all queries of all episodes `(queries, classes)`; None for regression.
        targets: their classes `(queries,)`; None for regression.
        nll: minus the log-density of the query targets under the average of the posterior's draws; None where there
            is no posterior, or no likelihood of numbers.
        coverage: the share of the query targets in their central 90 % predictive intervals; None likewise.
    """

    metric: Metric
    episodes: int
    score: Score
    before: Score
    loss: Score
    curve: Mapping[int, Score]
    failed: Mapping[str, int]
    stats: Stats
    seconds: float
    scores: Tensor = field(repr=False)
    log_probabilities: Tensor | None = field(default=None, repr=False)
    targets: Tensor | None = field(default=None, repr=False)
    nll: Score | None = None
    coverage: Score | None = None
    settled: Score | None = None

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def lost(self) -> int:
        """How many tasks' adaptation diverged, or met NaN."""
        return sum(count for name, count in self.failed.items() if Status[name].lost)

    def as_dict(self) -> dict[str, Any]:
        """The numbers as plain data, without those of single episodes."""
        found: dict[str, Any] = {
            "metric": self.metric,
            "episodes": self.episodes,
            "score": asdict(self.score),
            "before": asdict(self.before),
            "loss": asdict(self.loss),
            "nll": None if self.nll is None else asdict(self.nll),
            "coverage": None if self.coverage is None else asdict(self.coverage),
            "curve": {str(steps): asdict(score) for steps, score in self.curve.items()},
            "failed": dict(self.failed),
            "settled": None if self.settled is None else asdict(self.settled),
            "stats": self.stats.as_dict(),
            "seconds": self.seconds,
        }
        return found

    def __str__(self) -> str:
        return f"{self.metric} {self.score} (before adaptation {self.before}) on {self.episodes} tasks"


@checked(episodes=SIZE, batch=SIZE, seed=SEED, steps=COUNT, curve=COUNT)
def evaluate(
    learner: Learner,
    x: Tree,
    tasks: AbstractTasks,
    *,
    episodes: int = 600,
    batch: int = 50,
    seed: int = 0,
    steps: int | None = None,
    curve: Sequence[int] = (),
    group: Any = None,
) -> Evaluation:
    """The mean over tasks of the accuracy (or squared error) on the queries, after adapting on the support set.

    Cost: that of adapting, once for each number of steps asked for, and no derivative in x; memory that of `batch`
    tasks. Whether targets are classes or numbers is seen from their dtype; predictions of classes that are no
    log-probabilities are taken for logits. Padded queries do not count.

    Source: the protocol of Finn, Abbeel, Levine, "Model-agnostic meta-learning", ICML 2017: 600 tasks, 95 % intervals.

    Args:
        learner: the method.
        x: what was learned; `learner.x0` for the untrained one.
        tasks: where they come from.
        episodes: how many.
        batch: how many at a time; they are also drawn so many at a time, so that another number means other tasks.
        seed: of the tasks. Equal arguments give equal numbers.
        steps: how many steps the inner solver takes; None: `learner.adapt`'s own number.
        curve: other numbers of steps to report the score after, on the same tasks.
        group: a process group of `torch.distributed` whose ranks all call this alike: of each `batch` every one adapts
            its share, and all return the evaluation of all tasks, with the sum of their oracle calls. One message.

    Raises:
        ValueError: if a number is out of range, a batch of tasks is malformed, predictions do not match the targets, or
            the padding of the first batch that has some changes values.
        TypeError: if `learner` is none, or `tasks` has no `sample`.
        BilevelError: if another rank has not answered within the timeout of the group, or something was raised there.

    Example:
        >>> from bilevel import ITD, BilevelProblem
        >>> from bilevel.extending import Learner
        >>> from bilevel.solvers import GradientDescent, Iterate
        >>> from bilevel.tasks.sinusoid import Sinusoid
        >>> problem = BilevelProblem(
        ...     f=lambda x, y, task: (y - task["query_y"]).square().mean(),
        ...     g=lambda x, y, task: (y - task["support_y"]).square().mean() / 2,
        ...     init=lambda x, task: x,
        ...     tasks=True,
        ... )
        >>> inner, x0 = Iterate(GradientDescent(1.0), max_steps=1), torch.tensor(0.0)
        >>> predict = lambda x, y, task: y.expand(task["query_y"].shape)
        >>> learner = Learner("mean", problem, x0, x0, ITD(inner), inner, predict, lambda x: None)
        >>> found = evaluate(learner, x0, Sinusoid(phase=(0, 0)), episodes=100)
        >>> found.metric, found.before.mean > 3
        ('mse', True)
    """
    for name, value in (("episodes", episodes), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`evaluate({name}=...)` must be a positive integer. Got {value!r}.")
    demand_tasks("evaluate", learner, tasks=tasks)
    ranks = demand_ranks("evaluate", group)
    ranks = None if ranks is None or ranks.size == 1 else ranks
    began = time.perf_counter()

    def found() -> list[_Found]:
        """What each batch gave, of this rank's tasks; there may be none."""
        parts, looked = [], False
        for part, first in enumerate(range(0, episodes, batch)):
            count = min(batch, episodes - first)
            sampled = tasks.sample(count, seed_of_step(seed, part))
            check_tasks(learner, sampled, count)
            rows = None if ranks is None else ranks.rows(count)

            def at(steps: int | None, sampled: Any = sampled, part: int = part, rows: Any = rows) -> Adapted:
                return adapted(learner, x, sampled, steps=steps, seed=noise_seed(seed, part), rows=rows)

            looked = looked or check_padding(learner, x, ready(learner, x, sampled, noise_seed(seed, part)))
            parts.append(_Found())
            if rows is None or rows.stop > rows.start:
                parts[-1].add(learner, x, at, steps, curve)
        return parts

    each = [found()] if ranks is None else everywhere(ranks, found)
    return _Found.of(zip(*each, strict=True)).evaluation(time.perf_counter() - began)


@final
class _Found:
    """What the batches so far gave."""

    def __init__(self) -> None:
        self.metric: Metric = "mse"
        self.after: list[Tensor] = []
        self.before: list[Tensor] = []
        self.loss: list[Tensor] = []
        self.densities: list[tuple[Tensor, Tensor]] = []
        self.curve: dict[int, list[Tensor]] = {}
        self.failed: Counter[str] = Counter()
        self.settled: list[bool] = []
        self.stats = Stats()
        self.log_probabilities: list[Tensor] = []
        self.targets: list[Tensor] = []

    @staticmethod
    def of(batches: Iterable[Sequence[_Found]]) -> _Found:
        """Of all batches, of each what every rank has: the last has a share of any."""
        whole = _Found()
        for parts in batches:
            whole.metric = parts[-1].metric
            for part in parts:
                whole.stats = whole.stats + part.stats
                whole.failed.update(part.failed)
                for name in ("after", "before", "loss", "densities", "settled", "log_probabilities", "targets"):
                    vars(whole)[name].extend(vars(part)[name])
                for number, scores in part.curve.items():
                    whole.curve.setdefault(number, []).extend(scores)
        return whole

    def add(
        self, learner: Learner, x: Tree, at: Callable[[int | None], Adapted], steps: int | None, curve: Sequence[int]
    ) -> None:
        own = at(steps)
        self.metric = metric_of(learner, own.batch)
        self.failed.update(status.name for status in own.statuses if not status.ok)
        self.settled += [not status.lost for status in own.statuses]
        self.stats = self.stats + own.stats
        scores = scores_of(learner, x, own)
        self.after.append(scores)
        self.before.append(scores if steps == 0 else scores_of(learner, x, at(0)))
        for number in curve:
            found = self.before[-1] if number == 0 else scores_of(learner, x, at(number))
            self.curve.setdefault(number, []).append(found)
        if self.metric == "return":
            self.loss.append(-scores)
            return
        if self.metric == "mse":
            self.loss.append(scores)
            if learner.draws is not None and learner.likelihood is not None:
                self.densities.append(_score_draws(learner.likelihood, draws(learner, x, own), own.batch))
            return
        predictions, targets = predict(learner, x, own), own.batch["query_y"]
        if bool(((predictions.exp().sum(-1) - 1).abs() > 1e-3).any()):  # logits: the learner did not know its loss
            predictions = predictions.log_softmax(-1)
        losses = nll_loss(predictions.transpose(1, 2), targets.long(), reduction="none")
        self.loss.append(_mean(losses, own.batch))
        kept = own.batch["query_mask"].bool() if "query_mask" in own.batch else torch.ones_like(targets).bool()
        self.log_probabilities.append(predictions[kept].cpu())
        self.targets.append(targets[kept].long().cpu())

    def evaluation(self, seconds: float) -> Evaluation:
        scores = torch.cat(self.after)
        settled = scores[torch.tensor(self.settled, device=scores.device)]
        nll, coverage = [Score.of(torch.cat(v)) for v in zip(*self.densities, strict=True)] or (None, None)
        return Evaluation(
            metric=self.metric,
            episodes=len(scores),
            score=Score.of(scores),
            before=Score.of(torch.cat(self.before)),
            loss=Score.of(torch.cat(self.loss)),
            nll=nll,
            coverage=coverage,
            curve={steps: Score.of(torch.cat(values)) for steps, values in sorted(self.curve.items())},
            failed=dict(self.failed),
            settled=Score.of(settled) if len(settled) else None,
            stats=self.stats,
            seconds=seconds,
            scores=scores,
            log_probabilities=torch.cat(self.log_probabilities) if self.log_probabilities else None,
            targets=torch.cat(self.targets) if self.targets else None,
        )


def metric_of(learner: Learner, batch: Any) -> Metric:
    """What the scores of a learner are on such tasks."""
    if learner.score is not None:
        return "return"
    return "mse" if batch["query_y"].is_floating_point() else "accuracy"


def scores_of(learner: Learner, x: Tree, adapted: Adapted) -> Tensor:
    """The metric of each task `(tasks,)`."""
    if learner.score is not None:
        return scored(learner, x, adapted)
    return score_tasks(predict(learner, x, adapted), adapted.batch)


def score_tasks(predictions: Tensor, batch: Any) -> Tensor:
    """The accuracy, or mean squared error, on the queries of each task: `(tasks,)`.

    Args:
        predictions: `(tasks, queries, classes)` log-probabilities, or `(tasks, queries, ...)` values.
        batch: the tasks, with `query_y` and optionally `query_mask`.

    Raises:
        ValueError: if predictions and targets do not match.
    """
    targets: Tensor = batch["query_y"]
    if targets.is_floating_point():
        if predictions.numel() != targets.numel():
            raise ValueError(
                f"`learner.predict` must return one value for each query target: {tuple(targets.shape[1:])} a task."
                f" Got {tuple(predictions.shape[1:])}."
            )
        errors = (predictions.reshape(targets.shape) - targets).square()
        return _mean(errors.reshape(*targets.shape[:2], -1).mean(-1), batch)
    if predictions.dim() != 3 or predictions.shape[:2] != targets.shape:
        raise ValueError(
            f"`learner.predict` must return log-probabilities ({targets.shape[1]}, classes) a task."
            f" Got {tuple(predictions.shape[1:])}."
        )
    right = (predictions.argmax(-1) == targets) & ~predictions.isnan().any(-1)
    return _mean(right.to(predictions.dtype), batch)


def _score_draws(likelihood: AbstractLikelihood, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """-log density of the query targets, and the share of them inside 90 % intervals, of each task: `(tasks,)`."""
    rows = []
    for task, drawn in enumerate(outputs):
        kept = batch["query_mask"][task].bool() if "query_mask" in batch else slice(None)
        targets = batch["query_y"][task].reshape(drawn.shape[1:])[kept]
        drawn = drawn[:, kept]
        low, high = likelihood.interval(drawn, _LEVEL)
        inside = ((low <= targets) & (targets <= high)).to(drawn.dtype)
        rows.append(torch.stack((likelihood.predictive_nll(drawn, targets), inside.mean())))
    nll, coverage = torch.stack(rows, dim=1)
    return nll, coverage


def _mean(values: Tensor, batch: Any) -> Tensor:
    """The mean of `(tasks, queries)` over the queries that are no padding."""
    if "query_mask" not in batch:
        return values.mean(1)
    mask = batch["query_mask"].to(values.dtype)
    mean: Tensor = (torch.where(mask > 0, values, 0.0) * mask).sum(1) / mask.sum(1)
    return mean
