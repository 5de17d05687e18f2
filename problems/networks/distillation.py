"""Distillation of a data set: a few synthetic samples on which a fresh network learns what the data teach."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem, Split
from bilevel._sets import Box
from bilevel._tree import Tree
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import COUNT, POSITIVE, SEED, SIZE
from bilevel.hypergrad.itd import ITD
from bilevel.modules.functional import Functional, functional
from bilevel.problems._data import Arrays, Dataset, load
from bilevel.problems._losses import accuracy
from bilevel.problems._plots import draw_bars
from bilevel.problems.networks._loaders import UNSEEN, Initializations, Rows, Shuffled, initial, loader
from bilevel.problems.networks._networks import Made, Network, losses, trained
from bilevel.solvers.adam import Adam
from bilevel.solvers.clipped import Clipped
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate

_FRESH = 5  # networks that the result is tested with


@checked(
    per_class=SIZE,
    hidden=SIZE,
    inner_steps=SIZE,
    step=POSITIVE,
    networks=SIZE,
    batch=SIZE,
    n_train=SIZE,
    max_steps=COUNT,
    seed=SEED,
)
def distillation(
    *,
    per_class: int = 1,
    hidden: int = 64,
    inner_steps: int = 20,
    step: float = 0.3,
    networks: int = 4,
    batch: int = 64,
    n_train: int = 1300,
    max_steps: int = 300,
    network: Network | None = None,
    data: Arrays | None = None,
    seed: int = 0,
    double: bool = False,
) -> Instance:
    """min_x E_{y_0} CE(y_N; real data),  y_{k+1} = y_k - s grad_y CE(y_k; images, labels),  x = (images, log s).

    The synthetic images, `per_class` for each class in turn, are to teach a network whatever weights it starts from:
    every outer step draws `networks` new starts y_0, trains each for N steps and tests it on real samples of its own.
    The starts are data, of which `init` makes y_0; y is what the steps make of them, and no minimizer, so that the
    derivative is that of the steps: `ITD`. The learned s multiplies the inner loss; left
    free it would grow to where training is hardly stable, and derivatives through it explode, so that it is at most 1.

    Cost of an outer step: with T networks and N steps, T N gradients, Hessian products and cross products on the
    synthetic samples, and T gradients on `batch` real samples. Memory: N graphs of T networks on the synthetic samples;
    where these are many, `ITD(..., Checkpointed())` keeps one.

    Source: Wang, Zhu, Torralba, Efros, "Dataset distillation", arXiv:1811.10959 (2018), with random starts.

    Args:
        per_class: synthetic samples a class.
        hidden: the width of the default network, 64 - hidden - 10 for digits, with tanh units.
        inner_steps: N.
        step: s at the start.
        networks: how many fresh networks an outer step trains, side by side.
        batch: real samples that each of them is tested on.
        n_train: real samples; the others are for testing, and a run does not see them.
        max_steps: outer steps of a run.
        network: makes a module, with random weights, in the place of the default.
        data: the user's own data; None: scikit-learn's digits. See `bilevel.problems.Arrays`.
        seed: of the split, of the starts and of the order of samples.
        double: float64, else float32.

    Raises:
        ImportError: if scikit-learn is needed and missing.
        ValueError: if an argument is out of its range.

    Example:
        >>> from bilevel import minimize
        >>> X, labels = (
        ...     torch.randn(60, 2, generator=torch.Generator().manual_seed(0)),
        ...     torch.arange(60) % 3,
        ... )
        >>> instance = distillation(
        ...     hidden=4, inner_steps=3, n_train=40, data=(X, labels), max_steps=3
        ... )
        >>> solution = minimize(instance.problem, instance.x0, instance.y0, **instance.settings)
        >>> solution.x["images"].shape
        torch.Size([3, 2])
    """
    parts = load(data, "digits", sizes=(n_train - 1, 1), seed=seed, per_feature=False, bias=False, double=double)
    X, labels = torch.cat([parts.X_train, parts.X_val]), torch.cat([parts.y_train, parts.y_val])
    if networks > len(X):
        raise ValueError(
            f"`distillation(n_train=..., networks=...)` needs at least as many training samples as networks. Got"
            f" {networks} networks and {len(X)} samples."
        )
    make = Made(network, (X.shape[1], hidden, parts.classes), X.dtype)
    like = initial(make, seed)
    own = _Distilled(functional(make()), torch.arange(parts.classes, device="cpu").repeat_interleave(per_class))
    generator = torch.Generator("cpu").manual_seed(seed)
    images = torch.randn(len(own.labels), X.shape[1], generator=generator, device="cpu").to(X)
    loaders = Split(
        f=loader(
            TensorDataset(X, labels),
            batch_sampler=Shuffled(len(X), networks * min(batch, len(X) // networks), seed),
            collate_fn=Rows(networks),
        ),
        g=loader(Initializations(make, seed * UNSEEN), batch_size=networks),
    )
    told = _Told(own, make, parts, X, labels, inner_steps, seed)
    of = "digits" if data is None else "your data"
    return Instance(
        problem=BilevelProblem(own.f, own.g, init=own.init, iterative=True, tasks=True),
        x0={"images": images, "log_step": X.new_tensor(math.log(step))},
        y0=like,
        description=f"{len(own.labels)} synthetic samples in the place of {len(X)} {of}",
        metrics=told.metrics,
        plot=told.plot,
        settings={
            "estimator": ITD(Iterate(GradientDescent(1.0), inner_steps)),
            "outer": Clipped(Adam(0.02), max_norm=0.2),
            "max_steps": max_steps,
            "data": loaders,
            "constraint": {"log_step": Box(upper=0.0)},
        },
    )


@final
@dataclass(frozen=True, eq=False)
class _Distilled:
    """The functions of the problem; the inner steps have length 1 on exp(log_step) times the loss."""

    net: Functional
    labels: Tensor

    def f(self, x: Tree, y: Tree, samples: Any) -> Tensor:
        inputs, labels = samples
        return losses(self.net(y, inputs), labels).mean()

    def g(self, x: Tree, y: Tree, start: Tree) -> Tensor:
        step: Tensor = x["log_step"]
        return step.exp() * losses(self.net(y, x["images"]), self.labels).mean()

    def init(self, x: Tree, start: Tree) -> Tree:
        return start


@final
@dataclass(frozen=True, eq=False)
class _Told:
    """What a person is told: how networks do that the run has not seen, on samples that it has not seen."""

    own: _Distilled
    make: Made
    parts: Dataset
    X: Tensor
    labels: Tensor
    steps: int
    seed: int

    def metrics(self, x: Tree, y: Tree) -> dict[str, float]:
        x = {name: leaf.detach() for name, leaf in x.items()}
        found = []
        for k in range(_FRESH):
            found.append(self._test(trained(lambda y, _: self.own.g(x, y, None), self._start(k), 1.0, self.steps)))
        return {
            "test_accuracy": sum(found) / _FRESH,
            "test_accuracy_least": min(found),
            "inner_step": float(x["log_step"].exp()),
        } | self.baselines

    @functools.cached_property
    def baselines(self) -> dict[str, float]:
        """The same networks on as many real samples, drawn anew for each; and on all of them."""
        few = [self._on(self._drawn(k), k) for k in range(_FRESH)]
        everything = torch.arange(len(self.labels), device="cpu")
        return {"test_accuracy_real": sum(few) / _FRESH, "test_accuracy_all": self._on(everything, 0)}

    def _drawn(self, k: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(UNSEEN + self.seed * _FRESH + k)
        order = torch.randperm(len(self.labels), generator=generator, device="cpu")
        each = len(self.own.labels) // self.parts.classes
        return torch.cat([order[self.labels[order] == c][:each] for c in range(self.parts.classes)])

    def _on(self, chosen: Tensor, k: int) -> float:
        """The test accuracy of network k, trained on these samples with the step that is best for it."""

        def loss(y: dict[str, Tensor], _: int) -> Tensor:
            return losses(self.own.net(y, self.X[chosen]), self.labels[chosen]).mean()

        return max(self._test(trained(loss, self._start(k), length, 100)) for length in (0.1, 0.3, 1.0))

    def _start(self, k: int) -> dict[str, Tensor]:
        return initial(self.make, UNSEEN * (self.seed + 1) - 1 - k)  # the last ones before the next seed's

    def _test(self, y: dict[str, Tensor]) -> float:
        with torch.no_grad():
            return accuracy(self.own.net(y, self.parts.X_test), self.parts.y_test)

    def plot(self, figure: Any, x: Tree, y: Tree) -> None:
        metrics, images = self.metrics(x, y), x["images"].detach()
        side = math.isqrt(images.shape[1])
        pictures = side >= 4 and side * side == images.shape[1]
        grid = figure.add_gridspec(2 if pictures else 1, 1, height_ratios=(1, 1) if pictures else (1,))
        if pictures:
            shown = min(len(images), 2 * self.parts.classes)
            columns = min(shown, 10)
            cells = grid[0].subgridspec(-(-shown // columns), columns)
            for k in range(shown):
                axes = figure.add_subplot(cells[k // columns, k % columns])
                axes.imshow(images[k].reshape(side, side).tolist(), cmap="gray_r")
                axes.set_xticks([])
                axes.set_yticks([])
                axes.set_title(int(self.own.labels[k]), fontsize=10)
        bars = figure.add_subplot(grid[-1])
        count, unseen = len(images), f"{_FRESH} fresh networks, mean"
        few = {f"{count} synthetic": metrics["test_accuracy"], f"{count} real": metrics["test_accuracy_real"]}
        draw_bars(bars, few | {f"all {len(self.X)} real": metrics["test_accuracy_all"]}, f"test accuracy ({unseen})")
        bars.set_xlim(0, 1.15)
        figure.suptitle(f"What is learned from {count} synthetic samples in {self.steps} steps", fontsize=11)
        figure.tight_layout()
