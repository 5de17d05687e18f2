"""Logistic regression, binary and multinomial, with learned penalties: one, one for each feature, smoothed L1."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, final

import torch
from torch import Tensor
from torch.nn.functional import linear

from bilevel._instance import Instance
from bilevel._numerics.known_objective import AbstractKnownObjective
from bilevel._problem import BilevelProblem
from bilevel.arguments.checked import checked, fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import POSITIVE, SEED, SIZE, Range, demand_ranges
from bilevel.arguments.shapes import Shape, demand_shapes
from bilevel.certificates.certificate import Constants
from bilevel.problems._constants import RADIUS, structural
from bilevel.problems._data import Arrays, Dataset, load
from bilevel.problems._fit import fit
from bilevel.problems._linear_classifiers import classifier
from bilevel.problems._losses import accuracy, largest_moment, logit_bounds, outputs, sample_losses
from bilevel.problems._plots import draw_penalties
from bilevel.problems.glm.declare import Declared

Penalties: TypeAlias = Tensor | dict[str, Tensor]

_HUBER_THIRD = 48 / (25 * math.sqrt(5))  # the greatest |third derivative| of sqrt(y^2 + 1), at y = 1/2


@final
@dataclass(frozen=True, eq=False)
class Logistic:
    """g = mean_i CE(y z_i, b_i) + sum exp(x_j) y_cj^2 / 2,  f = mean CE on validation data.

    y is `(C, d)`, with C = 1 for two classes, so that `linear` multiplies along rows. x is one log-penalty `()` or
    one for each feature `(d,)`. With `eps`, x is a dict of that (`log_l2`) and of the log-weight `log_l1` `()` of
    the smoothed L1 norm sum (sqrt(y^2 + eps^2) - eps), which is added to g.

    C_G holds for |y - y*(x)| <= 1: g(x, y*) <= g(x, 0) gives sum exp(x_j) y*_cj^2 / 2 <= log(classes), and so a bound
    on d2g/dxdy at y*. The other constants hold for every y.

    Args:
        X: training inputs `(n, d)`.
        labels: `(n,)`, numbered from 0.
        X_val: validation inputs.
        labels_val: validation labels.
        outputs: C.
        eps: where the L1 norm is rounded; None leaves it out.
    """

    X: Tensor
    labels: Tensor
    X_val: Tensor
    labels_val: Tensor
    outputs: int
    eps: float | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, outputs=SIZE, eps=POSITIVE)
        demand_shapes(
            "Logistic",
            {
                "X": Shape("n d"),
                "labels": Shape("n", "integer"),
                "X_val": Shape("m d"),
                "labels_val": Shape("m", "integer"),
            },
            vars(self),
        )

    @fitting
    def f(self, _: Penalties, y: Tensor) -> Tensor:
        """The outer objective."""
        return sample_losses(linear(self.X_val, y), self.labels_val).mean()

    @fitting
    def g(self, x: Penalties, y: Tensor) -> Tensor:
        """The inner objective."""
        loss = sample_losses(linear(self.X, y), self.labels).mean()
        if not isinstance(x, dict):
            return loss + (x.exp() * y.square()).sum() / 2
        if self.eps is None:
            raise ValueError("`Logistic(eps=None)` has no smoothed L1 penalty: x must be a tensor. Got a dict.")
        smoothed = (y.square() + self.eps**2).sqrt() - self.eps
        return loss + (x["log_l2"].exp() * y.square()).sum() / 2 + x["log_l1"].exp() * smoothed.sum()

    def known(self) -> AbstractKnownObjective:
        """g with its own derivatives."""
        if self.eps is None:
            return Declared(self.g, classifier(self.X, self.labels, self.outputs, torch.exp))
        model = classifier(self.X, self.labels, self.outputs, _log_l2, rounded_l1=_log_l1, eps=self.eps)
        return Declared(self.g, model)

    @fitting
    def start(self, per_feature: bool) -> Penalties:
        """Penalties of 1e-2 (and 1e-3 for L1): strong enough for mu to be no formality."""
        l2 = self.X.new_full((self.X.shape[1],) if per_feature else (), math.log(1e-2))
        return l2 if self.eps is None else {"log_l2": l2, "log_l1": self.X.new_tensor(math.log(1e-3))}

    def zero(self) -> Tensor:
        """Where the inner iteration starts: y = 0."""
        return torch.zeros((self.outputs, self.X.shape[1]), dtype=self.X.dtype, device=self.X.device)

    @fitting
    def solution(self, x: Penalties) -> Tensor:
        """y*(x), by a numerical minimization to |grad_y g| <= 1e-10 (1e-4 in float32)."""
        tol = 1e-10 if self.X.dtype == torch.float64 else 1e-4
        return fit(lambda y: self.g(x, y), self.zero(), tol=tol)

    @fitting
    def constants(self, x: Penalties) -> Constants:
        """The constants at x."""
        l2 = (x["log_l2"] if isinstance(x, dict) else x).double().exp()
        _, second, third = logit_bounds(self.outputs)
        # |row of log_l2| <= sqrt(l2) (sum l2 y^2)^(1/2), for one penalty and for each feature alike
        C_G = math.sqrt(float(l2.max()) * 2 * math.log(max(self.outputs, 2))) + float(l2.max()) * RADIUS
        L1, eps, size = 0.0, 1.0, self.outputs * self.X.shape[1]
        if isinstance(x, dict):
            assert self.eps is not None
            L1, eps = float(x["log_l1"].exp()), self.eps
        norms = self.X.double().norm(dim=1)
        return structural(
            mu=float(l2.min()),
            L=second * largest_moment(self.X) + float(l2.max()) + L1 / eps,
            L_fyy=second * largest_moment(self.X_val),
            radius=RADIUS,
            M_yy=third * float(norms.pow(3).mean()) + L1 * _HUBER_THIRD / eps**2,
            M_xy=math.hypot(float(l2.max()), L1 / eps),
            C_G=math.hypot(C_G, L1 * math.sqrt(size)),
        )

    @fitting
    def instance(self, per_feature: bool, description: str) -> Instance:
        """The problem with what is known about it."""
        return Instance(
            problem=BilevelProblem(self.f, self.known()),
            x0=self.start(per_feature),
            y0=self.zero(),
            description=description,
            solution=self.solution,
            constants=self.constants,
            # Penalties of single features may run off to zero, and mu with them: fewer and shorter steps.
            settings={
                "estimator": "aid-cg",
                "outer_step": 0.05 if per_feature else 0.1,
                "max_steps": 60 if per_feature else 100,
            },
        )


def _log_l2(x: dict[str, Tensor]) -> Tensor:
    return x["log_l2"].exp()


def _log_l1(x: dict[str, Tensor]) -> Tensor:
    return x["log_l1"].exp()


@checked(n=Range(4, 2.0**31), d=SIZE, classes=Range(2, 2.0**31), seed=SEED)
def logistic(
    *,
    n: int = 200,
    d: int = 20,
    classes: int = 2,
    per_feature: bool = True,
    smoothed_l1: bool = False,
    seed: int = 0,
    double: bool = True,
) -> Instance:
    """Logistic regression on random Gaussian data; see :class:`Logistic`.

    With n = 10000, d = 500 or 2000, classes = 2 or 10 and double = False it is a benchmark of Hessian products.

    Args:
        n: training samples, and a quarter of them for validation.
        d: number of features.
        classes: 2 for one output, else an output for each class.
        per_feature: one log-penalty for each feature, else one for all.
        smoothed_l1: add a smoothed L1 norm with a weight of its own.
        seed: of the draw.
        double: float64, else float32.

    Raises:
        ValueError: if a size is too small.

    Example:
        >>> logistic(classes=3, d=4).y0.shape
        torch.Size([3, 4])
    """
    if n < 4 or d < 1 or classes < 2:
        raise ValueError(
            f"`logistic(n=..., d=..., classes=...)` needs n >= 4, d >= 1, classes >= 2. Got {n}, {d}, {classes}."
        )
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    X = torch.randn(n + n // 4, d, generator=generator, dtype=dtype, device="cpu")
    truth = torch.randn(classes, d, generator=generator, dtype=dtype, device="cpu") * (
        torch.arange(d, device="cpu") < (d + 1) // 2
    )
    noise = -torch.log(
        -torch.log(
            torch.rand(len(X), classes, generator=generator, dtype=torch.float64, device="cpu").clamp(1e-12, 1 - 1e-12)
        )
    )
    labels = (linear(X, truth) / d**0.5 * 2 + noise).argmax(1)  # Gumbel noise: a draw from the softmax
    family = Logistic(X[:n], labels[:n], X[n:], labels[n:], outputs(classes), 1e-2 if smoothed_l1 else None)
    kind = "a log-penalty for each feature" if per_feature else "one log-penalty"
    return family.instance(per_feature, f"logistic regression on random data, {classes} classes, {kind}")


@checked(seed=SEED)
def logistic_breast_cancer(
    *, per_feature: bool = False, smoothed_l1: bool = False, data: Arrays | None = None, seed: int = 0
) -> Instance:
    """Binary logistic regression on scikit-learn's breast cancer data (569 x 30), or on `data`.

    Half of the samples train, a quarter validates, a quarter tests. More than two classes in `data` make it
    multinomial. See :class:`Logistic`.

    Args:
        per_feature: one log-penalty for each feature, else one for all.
        smoothed_l1: add a smoothed L1 norm with a weight of its own.
        data: the user's own data; see `bilevel.problems.Arrays`.
        seed: of the split.

    Raises:
        ImportError: if scikit-learn is needed and missing.
    """
    parts = load(data, "breast_cancer", sizes=(0.5, 0.25), seed=seed)
    return _on(parts, per_feature, smoothed_l1, "breast cancer" if data is None else "your data")


@checked(seed=SEED)
def multinomial_digits(
    *, per_feature: bool = False, smoothed_l1: bool = False, data: Arrays | None = None, seed: int = 0
) -> Instance:
    """Multinomial logistic regression on scikit-learn's digits (1797 x 64), or on `data`.

    A third of the samples trains, a third validates, a third tests. See :class:`Logistic`.

    Args:
        per_feature: one log-penalty for each feature (pixel), else one for all.
        smoothed_l1: add a smoothed L1 norm with a weight of its own.
        data: the user's own data; see `bilevel.problems.Arrays`.
        seed: of the split.

    Raises:
        ImportError: if scikit-learn is needed and missing.
    """
    parts = load(data, "digits", sizes=(1 / 3, 1 / 3), seed=seed, per_feature=False)
    return _on(parts, per_feature, smoothed_l1, "digits" if data is None else "your data")


def _on(parts: Dataset, per_feature: bool, smoothed_l1: bool, name: str) -> Instance:
    eps = 1e-2 if smoothed_l1 else None
    family = Logistic(parts.X_train, parts.y_train, parts.X_val, parts.y_val, outputs(parts.classes), eps)
    kind = "a log-penalty for each feature" if per_feature else "one log-penalty"
    instance = family.instance(
        per_feature, f"logistic regression on {name}, {kind}{' and smoothed L1' if smoothed_l1 else ''}"
    )
    shown = _Shown(family, parts)
    return replace(instance, metrics=shown.metrics, plot=shown.plot)


@final
@dataclass(frozen=True, eq=False)
class _Shown:
    """What a person is told of a solution; the baselines are fitted when they are first asked for."""

    family: Logistic
    parts: Dataset

    @functools.cached_property
    def baselines(self) -> dict[str, float]:
        return _baselines(self.family, self.parts)

    def metrics(self, _: Penalties, y: Tensor) -> dict[str, float]:
        return _scores(self.parts, y, "") | self.baselines

    def plot(self, figure: Any, x: Penalties, y: Tensor) -> None:
        draw_penalties(figure, x, self.metrics(x, y), "cross entropy")


def _scores(parts: Dataset, y: Tensor, name: str) -> dict[str, float]:
    def loss(X: Tensor, labels: Tensor) -> float:
        return float(sample_losses(linear(X, y), labels).mean())

    return {
        f"validation_loss{name}": loss(parts.X_val, parts.y_val),
        f"test_loss{name}": loss(parts.X_test, parts.y_test),
        f"test_accuracy{name}": accuracy(linear(parts.X_test, y), parts.y_test),
    }


def _baselines(family: Logistic, parts: Dataset) -> dict[str, float]:
    """One L2 penalty: the best on a grid by validation, and exp(-10), as plain logistic regression may not exist."""
    plain = Logistic(family.X, family.labels, family.X_val, family.labels_val, family.outputs)
    y, path = plain.zero(), []
    for exponent in range(0, -11, -1):
        x = torch.tensor(float(exponent), dtype=family.X.dtype, device=family.X.device)
        y = fit(functools.partial(plain.g, x), y, tol=1e-6)
        path.append(y)
    best = min(path, key=lambda y: float(plain.f(plain.start(False), y)))
    return _scores(parts, path[-1], "_almost_unregularized") | _scores(parts, best, "_grid_search")
