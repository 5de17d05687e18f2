"""Dropout whose masks are arguments, adaptation with it, and which samples a network that drops out is unsure of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bilevel._problem import BilevelProblem
from bilevel._tree import Tree
from bilevel.arguments.checked import checked, fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import BELOW_1, COUNT, POSITIVE, SEED, SIZE, demand_ranges
from bilevel.few_shot.learner import Learner
from bilevel.hypergrad.itd import ITD
from bilevel.modules.functional import Functional
from bilevel.problems.meta_learning._tasks import Side, task_loss
from bilevel.problems.networks._batches import generator
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate
from bilevel.tasks.source import Batch

Rule: TypeAlias = Literal["entropy", "bald"]


@final
@dataclass(frozen=True, eq=False)
class MaskedDropout:
    """g = CE(S; y, m_S),  f = CE(Q; y, m_Q): dropout between body and head, its masks m entries of the task.

    The features of a sample are multiplied by its mask, of zeros and 1 / (1 - rate). Masks are drawn by `prepare`, once
    for a batch and from its seed, so that the inner steps, the outer loss and every product with second derivatives see
    the same ones: f and g are functions. A network whose masks are drawn anew with each call has no Hessian that
    conjugate gradients could solve with. Without masks nothing is dropped.

    x = y_0 is {"body", "head"}; y takes gradient steps on g, as in MAML.

    Source: Yuan et al., "Few is enough: task-augmented active meta-learning for brain cell classification", MICCAI
    2020, arXiv 2007.05009; Gal, Ghahramani, "Dropout as a Bayesian approximation", ICML 2016.

    Args:
        body: the network up to the features, `(n, ...)` -> `(n, d)`.
        head: the layer from features to classes.
        features: d.
        rate: of features that are dropped.
        step: of the adaptation.
        inner_steps: of the adaptation.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> from bilevel import hypergradient
        >>> from bilevel.modules.functional import functional
        >>> own = MaskedDropout(
        ...     functional(nn.Linear(2, 4)), functional(nn.Linear(4, 2)), features=4
        ... )
        >>> tasks = {f"{side}_x": torch.ones(3, 5, 2) for side in ("support", "query")}
        >>> tasks |= {
        ...     f"{side}_y": torch.zeros(3, 5, dtype=torch.long) for side in ("support", "query")
        ... }
        >>> tasks = own.prepare(tasks, seed=0)
        >>> tasks["query_dropout"].shape
        torch.Size([3, 5, 4])
        >>> learner = own.learner
        >>> found = hypergradient(
        ...     learner.problem, learner.x0, learner.y0, estimator=learner.estimator, data=tasks
        ... )
        >>> found.grad["head"]["weight"].shape
        torch.Size([2, 4])
    """

    body: Functional
    head: Functional
    features: int
    rate: float = 0.2
    step: float = 0.4
    inner_steps: int = 1

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, features=SIZE, rate=BELOW_1, step=POSITIVE, inner_steps=COUNT)

    @property
    def x0(self) -> dict[str, Tree]:
        """Where learning begins."""
        return {"body": dict(self.body.params), "head": dict(self.head.params)}

    @property
    def problem(self) -> BilevelProblem:
        """The problem over tasks."""
        return BilevelProblem(self.f, self.g, init=_itself, tasks=True)

    @property
    def learner(self) -> Learner:
        """The method over tasks, for `train` and `evaluate`; predictions drop nothing."""
        inner = Iterate(GradientDescent(self.step), self.inner_steps)
        return Learner(
            name="MAML with dropout",
            problem=self.problem,
            x0=self.x0,
            y0=self.x0,
            estimator=ITD(inner),
            adapt=inner,
            predict=self._predict,
            export=self._export,
            prepare=self.prepare,
        )

    def _predict(self, _: Tree, y: Tree, task: Any) -> Tensor:
        return self.logits(y, task["query_x"]).log_softmax(-1)

    def _export(self, x: Tree) -> nn.Module:
        return nn.Sequential(self.body.load(x["body"]), self.head.load(x["head"]))

    @fitting
    def logits(self, y: Tree, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Of samples `(n, ...)` with a mask `(n, d)`: `(n, classes)`."""
        found = self.body(y["body"], inputs)
        logits: Tensor = self.head(y["head"], found if mask is None else found * mask)
        return logits

    def f(self, x: Tree, y: Tree, task: Any) -> Tensor:
        return self._loss(y, task, "query")

    def g(self, x: Tree, y: Tree, task: Any) -> Tensor:
        return self._loss(y, task, "support")

    def _loss(self, y: Tree, task: Any, side: Side) -> Tensor:
        logits = self.logits(y, task[f"{side}_x"], task.get(f"{side}_dropout"))
        return task_loss(cross_entropy, logits, task, side)

    @checked(seed=SEED)
    def prepare(self, batch: Any, seed: int) -> Batch:
        """The batch with its masks."""
        draws, found = generator(seed, 6), dict(batch)
        for side in ("support", "query"):
            found[f"{side}_dropout"] = self.masks(tuple(batch[f"{side}_y"].shape), draws).to(batch[f"{side}_x"])
        return found

    @checked()
    def masks(self, shape: tuple[int, ...], draws: torch.Generator) -> Tensor:
        """Of zeros and 1 / (1 - rate), `(*shape, d)`."""
        kept = torch.rand(*shape, self.features, generator=draws, device="cpu", dtype=torch.float32) >= self.rate
        return kept.float() / (1 - self.rate)

    @checked(samples=SIZE, seed=SEED)
    def drawn(self, y: Tree, inputs: Tensor, samples: int = 20, seed: int = 0) -> Tensor:
        """Probabilities of samples `(n, ...)` under so many masks, `(samples, n, classes)`: Monte Carlo dropout."""
        masks = self.masks((samples, len(inputs)), generator(seed, 8)).to(inputs)
        with torch.no_grad():
            found = self.body(y["body"], inputs)
            return torch.stack([self.head(y["head"], found * mask).softmax(-1) for mask in masks])


def _itself(x: Tree, _: Any) -> Tree:
    return x


@fitting
def predictive_entropy(probabilities: Tensor) -> Tensor:
    """H[mean_s p_s] of each sample `(n,)`, from probabilities of draws `(samples, n, classes)`.

    Example:
        >>> predictive_entropy(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])).exp()
        tensor([2.])
    """
    return _entropy(probabilities.mean(0))


@fitting
def bald(probabilities: Tensor) -> Tensor:
    """H[mean_s p_s] - mean_s H[p_s] of each sample `(n,)`, what a label would say of the draw: 0 where all draws agree.

    Source: Houlsby, Huszár, Ghahramani, Lengyel, "Bayesian active learning for classification and preference learning",
        2011.

    Example:
        >>> bald(torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]]))
        tensor([0.6931, 0.0000])
    """
    return predictive_entropy(probabilities) - _entropy(probabilities).mean(0)


def _entropy(p: Tensor) -> Tensor:
    found: Tensor = -torch.special.xlogy(p, p).sum(-1)
    return found


@checked(first=SIZE, batch=SIZE, count=SIZE)
def acquire(
    adapt: Callable[[Tensor], Tree],
    score: Callable[[Tree], Tensor],
    size: int,
    *,
    first: int,
    batch: int,
    count: int,
    seed: int = 0,
) -> Tensor:
    """Numbers of the samples of a pool that were asked for their labels, in the order of asking: active adaptation.

    It begins with a few at random: before any adaptation the samples that a start is least sure of are of one kind.
    Then, until there are `count`: adapt to those labelled so far, score the pool, and ask for the `batch` highest of
    the others.

    Args:
        adapt: numbers `(k,)` of labelled samples -> the adapted y.
        score: y -> how much each sample of the pool is wanted `(size,)`: `predictive_entropy` or `bald` of draws, or
            your own.
        size: of the pool.
        first: samples that are asked for at random.
        batch: samples of a round.
        count: samples in all.
        seed: of the first.

    Returns:
        The numbers, `(min(count, size),)`.

    Example:
        >>> acquire(
        ...     lambda rows: rows, lambda y: torch.arange(6.0), 6, first=1, batch=2, count=3, seed=0
        ... ).tolist()
        [4, 5, 3]
    """
    order = torch.randperm(size, generator=generator(seed, 9), device="cpu")
    labelled = order[: min(first, count)]
    while len(labelled) < min(count, size):
        wanted = score(adapt(labelled)).detach().cpu().clone()
        wanted[labelled] = -torch.inf
        more = wanted.argsort(descending=True, stable=True)[: min(batch, count - len(labelled))]
        labelled = torch.cat([labelled, more])
    return labelled
