"""A learned representation with a linear head on top, by forward passes and one backward pass."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils.data import TensorDataset

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem, Split
from bilevel._tree import Tree
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import COUNT, POSITIVE, SEED, SIZE
from bilevel.hypergrad.esj import ESJ
from bilevel.modules.functional import Functional, functional
from bilevel.problems._data import Arrays, Dataset, load
from bilevel.problems._losses import accuracy
from bilevel.problems._plots import draw_bars
from bilevel.problems.networks._loaders import Shuffled, initial, loader
from bilevel.problems.networks._networks import Made, Network
from bilevel.solvers.closed_form import ClosedForm
from bilevel.solvers.gradient_descent import GradientDescent


@checked(
    width=SIZE,
    features=SIZE,
    regularization=POSITIVE,
    directions=SIZE,
    radius=POSITIVE,
    step=POSITIVE,
    support=SIZE,
    batch=SIZE,
    n_train=SIZE,
    n_val=SIZE,
    max_steps=COUNT,
    seed=SEED,
)
def representation(
    *,
    width: int = 2240,
    features: int = 64,
    regularization: float = 0.1,
    directions: int = 4,
    radius: float = 1e-4,
    step: float = 0.003,
    support: int = 150,
    batch: int = 150,
    n_train: int = 600,
    n_val: int = 600,
    max_steps: int = 25,
    network: Network | None = None,
    data: Arrays | None = None,
    seed: int = 0,
    double: bool = False,
) -> Instance:
    """f = |F_val(x) y - T_val|^2 / m,  g = |F(x) y - T|^2 / n + c |y|^2,  F(x) the features of a deep network, and 1.

    x are all weights of the network, ten million by default; y is the linear head of least squares on what the network
    makes of the inputs, T the classes, one-hot. The estimator is `ESJ`: grad_x f is backpropagated through the
    network once; how the head follows x is seen by solving for it at a few perturbed x, each a forward pass. No
    derivative of g is taken, and no graph of the training samples is kept.

    The implicit part has (p - 1) / Q times its square as variance, p the number of weights. So x takes plain gradient
    steps, short enough that noise in directions that f hardly sees does no harm; an optimizer that divides by the size
    of each entry, as Adam, would turn it into all of the step.

    Cost of an outer step: Q + 1 forward passes on `support` training samples, and a forward and a backward pass on
    `batch` validation samples. Memory: some vectors like x, whatever Q: directions are drawn one at a time.

    Source: Sow, Ji, Liang, "On the convergence theory for Hessian-free bilevel algorithms", NeurIPS 2022; why noise in
    so many directions can be borne: Malladi et al., "Fine-tuning language models with just forward passes", NeurIPS
    2023.

    Args:
        width: of the three hidden layers of the default network, of tanh units as is its output.
        features: its outputs.
        regularization: c.
        directions: Q.
        radius: how far every weight is moved to see how the head follows; the weights of a layer are about
            width^-1/2 in size.
        step: of x.
        support: training samples of an outer step, of which its head is made.
        batch: validation samples of an outer step.
        n_train: training samples.
        n_val: validation samples; the others are for testing, and a run does not see them.
        max_steps: outer steps of a run.
        network: makes a module from inputs to features, in the place of the default.
        data: the user's own data; None: scikit-learn's digits. See `bilevel.problems.Arrays`.
        seed: of the split, of the initial weights, of the order of samples and of the directions.
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
        >>> instance = representation(
        ...     width=8, features=4, n_train=30, n_val=20, data=(X, labels), max_steps=3
        ... )
        >>> solution = minimize(instance.problem, instance.x0, instance.y0, **instance.settings)
        >>> solution.y.shape, solution.stats.hvps
        (torch.Size([5, 3]), 0)
    """
    parts = load(data, "digits", sizes=(n_train, n_val), seed=seed, per_feature=False, bias=False, double=double)
    make = Made(network, (parts.X_train.shape[1], width, width, width, features), parts.X_train.dtype)
    x0 = initial(make, seed)
    own = _Head(functional(make()), network is None, regularization, parts.classes)
    with torch.no_grad():
        outputs = own.features(x0, parts.X_train[:2]).shape[-1]
    told = _Told(own, parts, x0)
    weights = sum(leaf.numel() for leaf in x0.values())

    def batches(X: Tensor, labels: Tensor, size: int) -> Any:
        return loader(TensorDataset(X, labels), batch_sampler=Shuffled(len(X), size, seed))

    return Instance(
        problem=BilevelProblem(own.f, own.g, encode=own.encode),
        x0=x0,
        y0=parts.X_train.new_zeros(outputs, parts.classes),
        description=f"a representation of {weights} weights, {'digits' if data is None else 'your data'}",
        metrics=told.metrics,
        plot=told.plot,
        settings={
            "estimator": ESJ(ClosedForm(own.solution), directions, radius, "rademacher", seed, chunk=1),
            "outer": GradientDescent(step),
            "max_steps": max_steps,
            "data": Split(f=batches(parts.X_val, parts.y_val, batch), g=batches(parts.X_train, parts.y_train, support)),
        },
    )


@final
@dataclass(frozen=True, eq=False)
class _Head:
    """The functions of the problem; z are features and a 1."""

    net: Functional
    bounded: bool  # whether the features still need a tanh
    c: float
    classes: int

    def features(self, x: Tree, inputs: Tensor) -> Tensor:
        found: Tensor = self.net(x, inputs).flatten(1)
        found = found.tanh() if self.bounded else found
        return torch.cat([found, torch.ones_like(found[:, :1])], dim=1)

    def encode(self, x: Tree, samples: Any) -> Tensor:
        return self.features(x, samples[0])

    def f(self, z: Tensor, y: Tensor, samples: Any) -> Tensor:
        value: Tensor = (z @ y - one_hot(samples[1], self.classes)).square().sum() / len(z)
        return value

    def g(self, z: Tensor, y: Tensor, samples: Any) -> Tensor:
        return self.f(z, y, samples) + self.c * y.square().sum()

    def solution(self, z: Tensor, samples: Any) -> Tensor:
        """(Z'Z / n + c)^-1 Z'T / n."""
        gram = z.T @ z / len(z) + self.c * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        head: Tensor = torch.linalg.solve(gram, z.T @ one_hot(samples[1], self.classes).to(z) / len(z))
        return head


@final
@dataclass(frozen=True, eq=False)
class _Told:
    """What a person is told: the head of all training samples on a representation, on samples that no run sees."""

    own: _Head
    parts: Dataset
    x0: Tree

    def metrics(self, x: Tree, y: Tree) -> dict[str, float]:
        return {"test_accuracy_learned": self._accuracy(x)} | self.baselines

    @functools.cached_property
    def baselines(self) -> dict[str, float]:
        """On the initial representation: the same head, and one that is fitted to the validation samples as well."""
        return {
            "test_accuracy_initial": self._accuracy(self.x0),
            "test_accuracy_initial_all": self._accuracy(self.x0, everything=True),
        }

    def _accuracy(self, x: Tree, everything: bool = False) -> float:
        parts = self.parts
        inputs, labels = parts.X_train, parts.y_train
        if everything:
            inputs, labels = torch.cat([inputs, parts.X_val]), torch.cat([labels, parts.y_val])
        with torch.no_grad():
            y = self.own.solution(self.own.features(x, inputs), (inputs, labels))
            return accuracy(self.own.features(x, parts.X_test) @ y, parts.y_test)

    def plot(self, figure: Any, x: Tree, y: Tree) -> None:
        metrics = self.metrics(x, y)
        grid = figure.add_gridspec(2, 2, height_ratios=(3, 1))
        for k, (name, at) in enumerate((("initial", self.x0), ("learned", x))):
            axes = figure.add_subplot(grid[0, k])
            with torch.no_grad():
                z = self.own.features(at, self.parts.X_test).double()
            z = z - z.mean(0)
            plane = z @ torch.linalg.eigh(z.T @ z).eigenvectors[:, -2:]
            for c in range(min(self.parts.classes, 10)):
                some = plane[self.parts.y_test == c][:40]
                axes.scatter(some[:, 0].tolist(), some[:, 1].tolist(), s=28, marker=f"${c}$", color=f"C{c}")
            axes.set_title(f"{name}: test accuracy {metrics[f'test_accuracy_{name}']:.3f}", fontsize=10)
            axes.set_xlabel("first principal component of the features", fontsize=8)
            axes.set_ylabel("second", fontsize=8)
            axes.set_xticks([])
            axes.set_yticks([])
        bars = figure.add_subplot(grid[1, :])
        shown = {
            "initial": metrics["test_accuracy_initial"],
            "initial, head on validation too": metrics["test_accuracy_initial_all"],
            "learned": metrics["test_accuracy_learned"],
        }
        draw_bars(bars, shown, "test accuracy of a linear head")
        bars.set_xlim(0, 1.15)
        figure.tight_layout()
