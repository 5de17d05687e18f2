"""Three small networks whose training is not convex: sample weights and weight decay on digits with wrong labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem
from bilevel._tree import Tree
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import BETWEEN_0_AND_1, SEED, SIZE
from bilevel.inner_problems.supervised_training import SupervisedTraining
from bilevel.modules.functional import Functional, functional
from bilevel.problems._data import Arrays, load
from bilevel.problems._losses import accuracy
from bilevel.problems.hyper_cleaning import auc, corrupt

Architecture: TypeAlias = Literal["mlp", "conv", "transformer"]


@final
@dataclass(frozen=True, eq=False)
class _SmallNetwork:
    """g = mean_i sigmoid(w_i) CE(net(y; z_i), b_i) + e^decay |y - y_0|^2 / 2,  f = mean CE on clean validation data.

    x = {"weights": w `(n,)`, "decay": `()`}. The decay is towards the initial weights y_0: one towards zero has no
    minimizer for weights in front of a normalization, whose outputs do not change with their scale.

    Args:
        net: the network as a function of its parameters, on images `(n, 8, 8)`.
        X: training images `(n, 8, 8)`.
        labels: training labels `(n,)`, some of them wrong.
        X_val: validation images.
        labels_val: validation labels.
        half: whether the network runs under `torch.autocast` to bfloat16.
    """

    net: Functional
    X: Tensor
    labels: Tensor
    X_val: Tensor
    labels_val: Tensor
    half: bool = False

    def __post_init__(self) -> None:
        demand_types(self)

    def logits(self, y: Any, X: Tensor) -> Tensor:
        """The outputs of the network `(n, 10)`, in bfloat16 where it runs in half precision."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.half):
            found: Tensor = self.net(y, X)
        return found

    def outputs(self, _: Tree, y: Any) -> Tensor:
        """The outputs on the training images."""
        return self.logits(y, self.X)

    def loss(self, x: Any, z: Tensor) -> Tensor:
        """The weighted loss of outputs."""
        each = cross_entropy(z.to(self.X.dtype), self.labels, reduction="none")
        found: Tensor = (x["weights"].sigmoid() * each).mean()
        return found

    def regularizer(self, x: Any, y: Any) -> Tensor:
        """The decay towards the initial weights."""
        squares = sum((weight - self.net.params[name]).square().sum() for name, weight in y.items())
        found: Tensor = x["decay"].exp() * squares / 2
        return found

    def f(self, _: Tree, y: Any) -> Tensor:
        """The loss on the validation data."""
        return cross_entropy(self.logits(y, self.X_val).to(self.X.dtype), self.labels_val)


@checked(n_train=SIZE, n_val=SIZE, corrupted=BETWEEN_0_AND_1, width=SIZE, seed=SEED)
def small_network(
    *,
    network: Architecture = "mlp",
    n_train: int = 300,
    n_val: int = 300,
    corrupted: float = 0.3,
    width: int = 8,
    decay: float = -5.0,
    half: bool = False,
    data: Arrays | None = None,
    seed: int = 0,
    double: bool = False,
    declared: bool = True,
) -> Instance:
    """Sample weights and weight decay of a small network, on scikit-learn's digits (8 x 8).

    g = mean_i sigmoid(w_i) CE(net(y; z_i), b_i) + e^decay |y - y_0|^2 / 2,  f = mean CE on clean validation data.

    Args:
        network: "mlp" (one hidden layer of tanh units), "conv" (two convolutions with batch normalization) or
            "transformer" (one layer of attention over the rows of an image, with dropout).
        n_train: training samples, each with a weight.
        n_val: validation samples.
        corrupted: the share of training labels that are replaced.
        width: 4 times so many hidden units, so many channels, or 2 times so many features.
        decay: the logarithm of the weight decay to start from.
        half: run the network under `torch.autocast` to bfloat16.
        data: the user's own data of 64 features, with clean labels.
        seed: of the split, of the corruption and of the initial weights.
        double: float64, else float32.
        declared: declare the outputs and the loss to the problem, for Gauss-Newton products.

    Raises:
        ImportError: if scikit-learn is needed and missing.
        ValueError: if an argument is out of its range.

    Example:
        >>> X, labels = (
        ...     torch.rand(40, 64, generator=torch.Generator().manual_seed(0)),
        ...     torch.arange(40) % 4,
        ... )
        >>> instance = small_network(n_train=20, n_val=10, width=2, data=(X, labels))
        >>> sorted(instance.x0), sorted(instance.y0)
        (['decay', 'weights'], ['1.bias', '1.weight', '3.bias', '3.weight'])
    """
    if network not in get_args(Architecture):
        raise ValueError(
            f"`small_network(network=...)` must be one of {', '.join(get_args(Architecture))}. Got {network!r}."
        )
    parts = load(data, "digits", sizes=(n_train, n_val), seed=seed, per_feature=False, bias=False, double=double)
    if parts.X_train.shape[1] != 64:
        raise ValueError(
            f"`small_network(data=...)` must have 64 features, the pixels of 8 x 8. Got {parts.X_train.shape[1]}."
        )
    labels, wrong = corrupt(parts.y_train, corrupted, parts.classes, torch.Generator().manual_seed(seed + 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _MODULES[network](width, parts.classes).to(parts.X_train.dtype)
    family = _SmallNetwork(functional(module), _images(parts.X_train), labels, _images(parts.X_val), parts.y_val, half)
    kind = SupervisedTraining(family.outputs, family.loss, family.regularizer)
    problem = BilevelProblem(family.f, inner=kind) if declared else BilevelProblem(family.f, kind.g)
    X_test, y_test = _images(parts.X_test), parts.y_test

    def metrics(x: Any, y: Any) -> dict[str, float]:
        found = {"AUC of the weights": auc(-x["weights"], wrong)}
        if len(y_test):
            found["test accuracy"] = accuracy(family.logits(y, X_test).float(), y_test)
        return found

    return Instance(
        problem=problem,
        x0={"weights": torch.zeros_like(parts.X_train[:, 0]), "decay": parts.X_train.new_tensor(decay)},
        y0=family.net.params,
        description=f"{network} on {'digits' if data is None else 'your data'} with {corrupted:.0%} wrong labels",
        metrics=metrics,
        settings={"estimator": "network", "outer_step": 0.1, "max_steps": 40},
    )


def _images(X: Tensor) -> Tensor:
    return X.reshape(-1, 8, 8)


def _mlp(width: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4 * width), nn.Tanh(), nn.Linear(4 * width, classes))


def _conv(width: int, classes: int) -> nn.Module:
    def block(of: int, to: int) -> list[nn.Module]:
        return [nn.Conv2d(of, to, 3, padding=1, bias=False), nn.BatchNorm2d(to), nn.GELU(), nn.AvgPool2d(2)]

    head = nn.Linear(8 * width, classes)
    return nn.Sequential(nn.Unflatten(1, (1, 8)), *block(1, width), *block(width, 2 * width), nn.Flatten(), head)


@final
class _Encoder(nn.Module):
    """One layer of attention over the eight rows of an image, and the mean over them."""

    def __init__(self, width: int, classes: int) -> None:
        nn.Module.__init__(self)
        size = 2 * width
        heads = 2 if size % 4 else 4
        self.embed = nn.Linear(8, size)
        self.place = nn.Parameter(0.1 * torch.randn(8, size))
        self.layer = nn.TransformerEncoderLayer(size, heads, 2 * size, dropout=0.1, activation="gelu", batch_first=True)
        self.head = nn.Linear(size, classes)

    def forward(self, images: Tensor) -> Tensor:
        rows = self.layer(self.embed(images) + self.place)
        found: Tensor = self.head(rows.mean(1))
        return found


_MODULES: dict[str, Callable[[int, int], nn.Module]] = {"mlp": _mlp, "conv": _conv, "transformer": _Encoder}
