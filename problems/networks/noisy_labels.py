"""Reweighting samples: which labels are wrong, by one weight for each sample that a network is trained on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem, Split
from bilevel._tree import Tree, tree_leaves
from bilevel.algorithms.soba import SOBA
from bilevel.arguments.checked import checked, fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, BETWEEN_0_AND_1, COUNT, SEED, SIZE, demand_ranges
from bilevel.modules.functional import Functional, functional
from bilevel.problems._data import Arrays, Dataset
from bilevel.problems._plots import draw_cleaning
from bilevel.problems.hyper_cleaning import auc, corrupt
from bilevel.problems.networks._batches import loader
from bilevel.problems.networks._modules import as_images, convolutions, images, made, scores, trained
from bilevel.solvers.adam import Adam

_RHO, _GAMMA, _RHO_V = 0.2, 0.05, 0.05  # steps of y, of x (by Adam) and of v


@final
@dataclass(frozen=True, eq=False)
class NoisyLabels:
    """g = mean_i sigmoid(x_i) CE(net(y; z_i), b_i) + c |y|^2,  f = mean CE(net(y; z), b) on samples with clean labels.

    Both are means over a batch: (inputs, labels, numbers) for g, where the numbers say whose weights they are, and
    (inputs, labels) for f. The network of g drops out, that of f does not; both normalize by the batch at hand.

    Args:
        net: of g, y are its parameters.
        clean: of f, with the same parameters.
        c: the weight of |y|^2.

    Example:
        >>> net = functional(torch.nn.Linear(2, 3))
        >>> problem = NoisyLabels(net, net, c=0.0)
        >>> batch = torch.ones(4, 2), torch.arange(4) % 3, torch.arange(4)
        >>> twice = 2 * problem.g(torch.zeros(4), net.params, batch)
        >>> bool(torch.isclose(twice, problem.f(torch.zeros(4), net.params, batch[:2])))
        True
    """

    net: Functional
    clean: Functional
    c: float

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, c=AT_LEAST_0)

    @fitting
    def f(self, _: Tensor, y: Tree, batch: Any) -> Tensor:
        """The outer objective."""
        inputs, labels = batch
        return cross_entropy(self.clean(y, inputs), labels)

    @fitting
    def g(self, x: Tensor, y: Tree, batch: Any) -> Tensor:
        """The inner objective."""
        inputs, labels, numbers = batch
        return self.weighted(torch.sigmoid(x[numbers]), y, inputs, labels)

    @fitting
    def weighted(self, weights: Tensor, y: Tree, inputs: Tensor, labels: Tensor) -> Tensor:
        """The inner objective with weights `(n,)` in the place of sigmoid(x_i)."""
        loss = (weights * cross_entropy(self.net(y, inputs), labels, reduction="none")).mean()
        for leaf in tree_leaves(y):
            loss = loss + self.c * leaf.square().sum()
        return loss


@checked(
    corrupted=BETWEEN_0_AND_1,
    n_train=SIZE,
    n_val=SIZE,
    channels=SIZE,
    dropout=BETWEEN_0_AND_1,
    regularization=AT_LEAST_0,
    batch=SIZE,
    max_steps=COUNT,
    seed=SEED,
)
def noisy_labels(
    *,
    corrupted: float = 0.4,
    n_train: int = 900,
    n_val: int = 400,
    channels: int = 16,
    dropout: float = 0.2,
    regularization: float = 5e-4,
    batch: int = 100,
    max_steps: int = 500,
    data: Arrays | None = None,
    seed: int = 0,
    double: bool = False,
) -> Instance:
    """Samples with wrong labels found by a convolutional network, on scikit-learn's digits (8 x 8), or on `data`.

    A share of the training labels is replaced by another class, drawn uniformly; those of the validation samples are
    right. The network has batch normalization and dropout; `DataLoader`s give batches at both levels. SOBA moves all
    iterates at once, the weights by Adam; see :class:`NoisyLabels`. Samples in neither part are for testing; a run does
    not see them.

    Metrics: `auc`, by which 1 - weight ranks wrong samples before right ones; test accuracies of the network of the
    run, and of the same network trained by as many steps with all weights 1 / 2 (`uniform`), and on right labels only
    (`oracle`).

    Args:
        corrupted: the share of training labels that are replaced.
        n_train: training samples, each with a weight.
        n_val: validation samples.
        channels: of the first convolution; the second has twice as many.
        dropout: the share of features that are dropped.
        regularization: c.
        batch: samples of a batch of each level.
        max_steps: steps of a run.
        data: the user's own square images, with right labels; see `bilevel.problems.Arrays`.
        seed: of the split, the corruption, the network and the batches.
        double: float64, else float32.

    Raises:
        ImportError: if scikit-learn is needed and missing.
        ValueError: if an argument is out of its range, or the data are no square images.

    Example:
        >>> X, labels = (
        ...     torch.randn(60, 16, generator=torch.Generator().manual_seed(0)),
        ...     torch.arange(60) % 3,
        ... )
        >>> noisy_labels(n_train=30, n_val=20, data=(X, labels)).x0.shape
        torch.Size([30])
    """
    parts, side = images(data, (n_train, n_val), seed, double)
    labels, wrong = corrupt(parts.y_train, corrupted, parts.classes, torch.Generator().manual_seed(seed + 1))
    module = made(lambda: convolutions(side, parts.classes, channels, dropout), seed)
    module = module.double() if double else module
    net = functional(module, seed=seed)
    family = NoisyLabels(net, functional(module, dropout="off"), regularization)
    X, X_val = as_images(parts.X_train, side), as_images(parts.X_val, side)
    training = loader((X, labels, torch.arange(len(labels), device="cpu")), batch, seed + 1)
    shown = _Shown(family, parts, side, labels, wrong, training, max_steps)
    return Instance(
        problem=BilevelProblem(family.f, family.g),
        x0=torch.zeros_like(parts.X_train[:, 0]),
        y0=net.params,
        description=f"{'digits' if data is None else 'your data'} with {corrupted:.0%} wrong labels, two convolutions",
        metrics=shown.metrics,
        plot=shown.plot,
        settings={
            "algorithm": SOBA(_RHO, Adam(_GAMMA), _RHO_V),
            "data": Split(f=loader((X_val, parts.y_val), batch, seed + 2), g=training),
            "max_steps": max_steps,
        },
    )


@final
@dataclass(frozen=True, eq=False)
class _Shown:
    """What a person is told of a solution; the baselines are trained when they are first asked for."""

    family: NoisyLabels
    parts: Dataset
    side: int
    labels: Tensor
    wrong: Tensor
    training: Any
    steps: int

    @functools.cached_property
    def baselines(self) -> dict[str, float]:
        half, right = torch.full_like(self.parts.X_train[:, 0], 0.5), (~self.wrong).to(self.parts.X_train)
        return {
            "test_accuracy_uniform": self._accuracy(self._descent(half)),
            "test_accuracy_oracle": self._accuracy(self._descent(right)),
        }

    def metrics(self, x: Tensor, y: Tree) -> dict[str, float]:
        suspicion = -x.detach()
        worst = suspicion.argsort(descending=True, stable=True)[: int(self.wrong.sum())]
        found = {"auc": auc(suspicion, self.wrong)} if bool(self.wrong.any()) else {}
        found["precision_at_true_count"] = float(self.wrong[worst].double().mean()) if len(worst) else 1.0
        return found | {"test_accuracy_learned": self._accuracy(y)} | self.baselines

    def plot(self, figure: Any, x: Tensor, y: Tree) -> None:
        names = {"uniform": "equal weights", "learned": "learned weights", "oracle": "right labels only (oracle)"}
        draw_cleaning(
            figure,
            torch.sigmoid(x.detach()),
            self.wrong,
            {"auc": 0.5} | self.metrics(x, y),
            self.parts.raw_train,
            self.labels,
            self.parts.y_train,
            names,
        )

    def _accuracy(self, y: Tree) -> float:
        module = trained(self.family.clean, y, as_images(self.parts.X_train, self.side))
        return scores(module, as_images(self.parts.X_test, self.side), self.parts.y_test)[1]

    def _descent(self, weights: Tensor) -> Tree:
        """The steps of y that a run takes, with these weights."""

        def g(y: Tree, batch: Any) -> Tensor:
            inputs, labels, numbers = batch
            return self.family.weighted(weights[numbers], y, inputs, labels)

        return descent(g, self.family.net.params, self.training, self.steps, lambda y: torch.optim.SGD(y, lr=_RHO))


def descent(
    g: Callable[[Tree, Any], Tensor],
    y0: dict[str, Tensor],
    batches: Any,
    steps: int,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
) -> Tree:
    """Y after so many steps of an optimizer along the gradients of g on batches: what a baseline is trained by."""
    y = {name: leaf.clone().requires_grad_() for name, leaf in y0.items()}
    moving = optimizer(list(y.values()))
    for _, batch in zip(range(steps), batches, strict=False):
        moving.zero_grad()
        g(y, batch).backward()  # type: ignore[no-untyped-call]
        moving.step()
    return {name: leaf.detach() for name, leaf in y.items()}
