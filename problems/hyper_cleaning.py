"""Data hyper-cleaning: find mislabelled training samples by learning a weight for each of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import linear

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem, Split
from bilevel._tree import Tree, ravel, tree_leaves
from bilevel.arguments.checked import checked, fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, BETWEEN_0_AND_1, COUNT, POSITIVE, SEED, SIZE, Range, demand_ranges
from bilevel.arguments.shapes import Shape, demand_shapes
from bilevel.certificates.certificate import Constants
from bilevel.problems._constants import structural
from bilevel.problems._data import Arrays, Dataset, load
from bilevel.problems._fit import fit
from bilevel.problems._linear_classifiers import batch_classifier, classifier, sigmoid_weights, sigmoid_weights_of_batch
from bilevel.problems._losses import accuracy, largest_moment, logit_bounds, outputs, sample_losses
from bilevel.problems._plots import draw_cleaning
from bilevel.problems.glm.declare import Declared


@final
@dataclass(frozen=True, eq=False)
class HyperCleaning:
    """g = mean_i sigmoid(x_i) CE(y; z_i, b_i) + c |y|^2,  f = mean CE on validation data with clean labels.

    y is a matrix `(C, d)` of a linear softmax model, or a dict of the weights of a network with one hidden layer
    of tanh units (`hidden` `(h, d)`, `weight` `(C, h)`, `bias` `(C,)`).

    For the linear model mu = 2c, and all constants hold for every y; for a network g is not convex.

    Args:
        X: training inputs `(n, d)`.
        labels: training labels `(n,)`, some of them wrong.
        X_val: validation inputs.
        labels_val: validation labels.
        outputs: C.
        c: the weight of |y|^2.
    """

    X: Tensor
    labels: Tensor
    X_val: Tensor
    labels_val: Tensor
    outputs: int
    c: float

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, outputs=SIZE, c=AT_LEAST_0)
        demand_shapes(
            "HyperCleaning",
            {
                "X": Shape("n d"),
                "labels": Shape("n", "integer"),
                "X_val": Shape("m d"),
                "labels_val": Shape("m", "integer"),
            },
            vars(self),
        )

    @fitting
    def f(self, _: Tensor, y: Tree) -> Tensor:
        """The outer objective."""
        return sample_losses(logits(y, self.X_val), self.labels_val).mean()

    @fitting
    def g(self, x: Tensor, y: Tree) -> Tensor:
        """The inner objective."""
        return self.weighted(torch.sigmoid(x), y)

    @fitting
    def weighted(self, weights: Tensor, y: Tree) -> Tensor:
        """The inner objective with sample weights w_i in the place of sigmoid(x_i)."""
        return self._penalized((weights * sample_losses(logits(y, self.X), self.labels)).mean(), y)

    @fitting
    def _f_on(self, _: Tensor, y: Tree, batch: Any) -> Tensor:
        """The outer objective on some validation samples, (inputs, labels): a mean over them."""
        inputs, labels = batch
        return sample_losses(logits(y, inputs), labels).mean()

    @fitting
    def _g_on(self, x: Tensor, y: Tree, batch: Any) -> Tensor:
        """The inner objective on some training samples, (inputs, labels, their numbers): a mean over them."""
        inputs, labels, numbers = batch
        return self._penalized((torch.sigmoid(x[numbers]) * sample_losses(logits(y, inputs), labels)).mean(), y)

    @fitting
    def known(self, y: Tree, *, batches: bool = False) -> Callable[..., Tensor]:
        """g, on all samples or on batches; with its own derivatives where the model is linear in y."""
        if not isinstance(y, Tensor):
            return self._g_on if batches else self.g
        if batches:
            return Declared(self._g_on, batch_classifier(self.outputs, 2 * self.c, sigmoid_weights_of_batch))
        return Declared(self.g, classifier(self.X, self.labels, self.outputs, 2 * self.c, weights=sigmoid_weights))

    @property
    def samples(self) -> Split:
        """All of them: (inputs, labels) for f, (inputs, labels, their numbers) for g."""
        numbers = torch.arange(len(self.labels), device=self.labels.device)
        return Split(f=(self.X_val, self.labels_val), g=(self.X, self.labels, numbers))

    def _penalized(self, loss: Tensor, y: Tree) -> Tensor:
        for leaf in tree_leaves(y):
            loss = loss + self.c * leaf.square().sum()
        return loss

    @fitting
    def constants(self, x: Tensor) -> Constants:
        """The constants at x, of the linear model."""
        first, second, third = logit_bounds(self.outputs)
        w, norms = torch.sigmoid(x.double()), self.X.double().norm(dim=1)
        slopes = w * (1 - w) / x.numel()
        return structural(
            mu=2 * self.c,
            L=second * largest_moment(self.X, w) + 2 * self.c,
            L_fyy=second * largest_moment(self.X_val),
            M_yy=third * float((w * norms.pow(3)).mean()),
            M_xy=second * float((slopes * norms.square()).norm()),
            C_G=first * float((slopes * norms).norm()),
        )


def logits(y: Tree, X: Tensor) -> Tensor:
    """The model's outputs `(n, C)`."""
    if isinstance(y, Tensor):
        return linear(X, y)
    weight: Tensor = y["weight"]
    return linear(torch.tanh(linear(X, y["hidden"])), weight, y["bias"])


@checked(
    corrupted=BETWEEN_0_AND_1,
    n_train=SIZE,
    n_val=SIZE,
    hidden=COUNT,
    regularization=POSITIVE,
    max_steps=COUNT,
    seed=SEED,
)
def hyper_cleaning(
    *,
    corrupted: float = 0.4,
    n_train: int = 900,
    n_val: int = 400,
    hidden: int = 0,
    regularization: float = 5e-3,
    max_steps: int = 100,
    data: Arrays | None = None,
    seed: int = 0,
    double: bool = True,
) -> Instance:
    """Data hyper-cleaning on scikit-learn's digits (1797 x 64), or on `data`; see :class:`HyperCleaning`.

    A share of the training labels is replaced by another class, drawn uniformly. The samples that are neither in
    the training nor in the validation part are for testing; a run does not see them.

    Args:
        corrupted: the share of training labels that are replaced.
        n_train: training samples, each with a weight.
        n_val: validation samples.
        hidden: number of hidden units; 0 for a linear model.
        regularization: c.
        max_steps: outer steps of a run.
        data: the user's own data, with clean labels; see `bilevel.problems.Arrays`.
        seed: of the split, of the corruption and of the network's initial weights.
        double: float64, else float32.

    Raises:
        ImportError: if scikit-learn is needed and missing.
        ValueError: if an argument is out of its range.
    """
    family, shown, y0, description = set_up_cleaning(
        corrupted, n_train, n_val, hidden, regularization, data, seed, double
    )
    return Instance(
        problem=BilevelProblem(family.f, family.known(y0)),
        x0=torch.zeros_like(family.X[:, 0]),
        y0=y0,
        description=description,
        constants=None if hidden else family.constants,
        metrics=shown.metrics,
        plot=shown.plot,
        settings={"estimator": "aid-cg", "outer_step": 0.1, "max_steps": max_steps},
    )


@checked(corrupted=BETWEEN_0_AND_1, n_train=SIZE, n_val=SIZE, hidden=COUNT, regularization=POSITIVE, seed=SEED)
def hyper_cleaning_batches(
    *,
    corrupted: float = 0.4,
    n_train: int = 900,
    n_val: int = 400,
    hidden: int = 0,
    regularization: float = 5e-3,
    data: Arrays | None = None,
    seed: int = 0,
    double: bool = True,
) -> tuple[Instance, Split]:
    """The problem of :func:`hyper_cleaning` as sums over samples, and the samples: for algorithms on batches.

    f and g are called with batches and return means over them; a batch of training samples carries their numbers,
    which say whose weights they are.

    Returns:
        The instance, whose problem takes `data`, and all samples: (inputs, labels) for f, (inputs, labels, numbers)
        for g. A `FiniteSum` of each makes batches of them.

    Args:
        corrupted: the share of training labels that are replaced.
        n_train: training samples, each with a weight.
        n_val: validation samples.
        hidden: number of hidden units; 0 for a linear model.
        regularization: c.
        data: the user's own data, with clean labels; see `bilevel.problems.Arrays`.
        seed: of the split, of the corruption and of the network's initial weights.
        double: float64, else float32.

    Raises:
        ImportError: if scikit-learn is needed and missing.
        ValueError: if an argument is out of its range.

    Example:
        >>> from bilevel import FiniteSum, Split, minimize
        >>> X, labels = (
        ...     torch.randn(60, 2, generator=torch.Generator().manual_seed(0)),
        ...     torch.arange(60) % 3,
        ... )
        >>> instance, samples = hyper_cleaning_batches(n_train=30, n_val=20, data=(X, labels))
        >>> data = Split(f=FiniteSum(samples.f, 10), g=FiniteSum(samples.g, 10))
        >>> solution = minimize(
        ...     instance.problem,
        ...     instance.x0,
        ...     instance.y0,
        ...     algorithm="saba",
        ...     data=data,
        ...     max_steps=20,
        ... )
        >>> solution.x.shape, solution.stats.sample_calls > 0
        (torch.Size([30]), True)
    """
    family, shown, y0, description = set_up_cleaning(
        corrupted, n_train, n_val, hidden, regularization, data, seed, double
    )
    instance = Instance(
        problem=BilevelProblem(family._f_on, family.known(y0, batches=True)),
        x0=torch.zeros_like(family.X[:, 0]),
        y0=y0,
        description=description,
        constants=None if hidden else family.constants,
        metrics=shown.metrics,
        plot=shown.plot,
    )
    return instance, family.samples


def set_up_cleaning(
    corrupted: float,
    n_train: int,
    n_val: int,
    hidden: int,
    regularization: float,
    data: Arrays | None,
    seed: int,
    double: bool,
) -> tuple[HyperCleaning, _Shown, Tree, str]:
    """The objectives, what a person is told, the start of y and a line of description."""
    parts = load(data, "digits", sizes=(n_train, n_val), seed=seed, per_feature=False, double=double)
    generator = torch.Generator().manual_seed(seed + 1)
    labels, wrong = corrupt(parts.y_train, corrupted, parts.classes, generator)
    family = HyperCleaning(parts.X_train, labels, parts.X_val, parts.y_val, outputs(parts.classes), regularization)
    model = f"{hidden} hidden units" if hidden else "a linear model"
    y0 = _initial(family, hidden, generator)
    description = f"{'digits' if data is None else 'your data'} with {corrupted:.0%} wrong labels, {model}"
    return family, _Shown(family, parts, labels, wrong, y0), y0, description


@checked(
    n_train=SIZE,
    n_val=SIZE,
    d=SIZE,
    classes=Range(2, 2.0**31),
    hidden=COUNT,
    corrupted=BETWEEN_0_AND_1,
    regularization=POSITIVE,
    seed=SEED,
)
def hyper_cleaning_synthetic(
    *,
    n_train: int = 5000,
    n_val: int = 1000,
    d: int = 784,
    classes: int = 10,
    hidden: int = 0,
    corrupted: float = 0.4,
    regularization: float = 5e-3,
    seed: int = 0,
    double: bool = False,
) -> Instance:
    """Data hyper-cleaning on Gaussian classes of any size: a benchmark; see :class:`HyperCleaning`.

    Args:
        n_train: training samples.
        n_val: validation samples, and as many for testing.
        d: number of features.
        classes: number of classes.
        hidden: number of hidden units; 0 for a linear model.
        corrupted: the share of training labels that are replaced.
        regularization: c.
        seed: of the draw.
        double: float64, else float32.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> hyper_cleaning_synthetic(n_train=20, n_val=10, d=5, classes=3).y0.shape
        torch.Size([3, 6])
    """
    if min(n_train, n_val, d) < 1 or classes < 2:
        raise ValueError(
            "`hyper_cleaning_synthetic` needs n_train, n_val and d of at least 1, and at least 2 classes."
            f" Got {n_train}, {n_val}, {d} and {classes}."
        )
    generator = torch.Generator().manual_seed(seed)
    n = n_train + 2 * n_val
    y = torch.arange(n, device="cpu") % classes
    centers = 3 / d**0.5 * torch.randn(classes, d, generator=generator, device="cpu")
    X = centers[y] + torch.randn(n, d, generator=generator, device="cpu")
    return hyper_cleaning(
        corrupted=corrupted,
        n_train=n_train,
        n_val=n_val,
        hidden=hidden,
        regularization=regularization,
        data=(X, y),
        seed=seed,
        double=double,
    )


@final
@dataclass(frozen=True, eq=False)
class _Shown:
    """What a person is told of a solution; the baselines are trained when they are first asked for."""

    family: HyperCleaning
    parts: Dataset
    labels: Tensor
    wrong: Tensor
    y0: Tree

    @functools.cached_property
    def baselines(self) -> dict[str, float]:
        return _baselines(self.family, self.parts, self.wrong, self.y0)

    def metrics(self, x: Tensor, y: Tree) -> dict[str, float]:
        return _found(x, self.wrong) | {"test_accuracy_learned": _test(self.parts, y)} | self.baselines

    def plot(self, figure: Any, x: Tensor, y: Tree) -> None:
        weights, metrics, parts = torch.sigmoid(x.detach()), self.metrics(x, y), self.parts
        draw_cleaning(figure, weights, self.wrong, metrics, parts.raw_train, self.labels, parts.y_train)


def corrupt(labels: Tensor, share: float, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Replace a share of the labels by another class, drawn uniformly; the new labels, and which are wrong."""
    n = len(labels)
    wrong = torch.zeros(n, dtype=torch.bool, device="cpu")
    wrong[torch.randperm(n, generator=generator, device="cpu")[: round(share * n)]] = True
    shift = torch.randint(1, classes, (n,), generator=generator, device="cpu")
    return torch.where(wrong, (labels + shift) % classes, labels), wrong


def auc(score: Tensor, positive: Tensor) -> float:
    """The probability that a positive sample scores above a negative one, ties counted half."""
    order, counts = torch.unique(score, return_inverse=True, return_counts=True)[1:]
    ends = counts.cumsum(0).double()
    rank = (ends - (counts.double() - 1) / 2)[order]
    n = int(positive.sum())
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))


def _initial(family: HyperCleaning, hidden: int, generator: torch.Generator) -> Tree:
    d, C = family.X.shape[1], family.outputs
    if not hidden:
        return family.X.new_zeros((C, d))

    def normal(rows: int, columns: int) -> Tensor:
        weights = torch.randn(rows, columns, generator=generator, dtype=torch.float64, device="cpu") / math.sqrt(
            columns
        )
        return weights.to(family.X)

    return {"hidden": normal(hidden, d), "weight": normal(C, hidden), "bias": family.X.new_zeros(C)}


def _test(parts: Dataset, y: Tree) -> float:
    return accuracy(logits(y, parts.X_test), parts.y_test)


def _found(x: Tensor, wrong: Tensor) -> dict[str, float]:
    """How well 1 - sigmoid(x) ranks the corrupted samples."""
    suspicion = -x.detach()
    worst = suspicion.argsort(descending=True, stable=True)[: int(wrong.sum())]
    return {"auc": auc(suspicion, wrong), "precision_at_true_count": float(wrong[worst].double().mean())}


def _baselines(family: HyperCleaning, parts: Dataset, wrong: Tensor, y0: Tree) -> dict[str, float]:
    """The same model and regularization, trained on everything, and on the clean samples alone (an oracle)."""
    vector, structure = ravel(y0)
    tol = 1e-8 if vector.dtype == torch.float64 else 1e-3
    everything = torch.ones_like(family.X[:, 0])
    found = {}
    for name, weights in (("everything", everything), ("oracle", everything * ~wrong)):

        def loss(v: Tensor, weights: Tensor = weights) -> Tensor:
            return family.weighted(weights, structure.unravel(v))

        found[f"test_accuracy_{name}"] = _test(parts, structure.unravel(fit(loss, vector, tol=tol)))
    return found
