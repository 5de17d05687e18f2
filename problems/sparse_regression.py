"""Lasso, weighted lasso, elastic net and group lasso, for regression and classification, with learned penalties."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem
from bilevel._sets import Box
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_0, COUNT, POSITIVE, SEED, SIZE
from bilevel.diagnostics.path import solution_path
from bilevel.inner_problems.linear_model import LinearModel, LogLoss
from bilevel.problems._data import Arrays, load
from bilevel.problems._plots import COLORS
from bilevel.prox.elastic_net import ElasticNet
from bilevel.prox.group_lasso import GroupLasso
from bilevel.prox.l1 import L1
from bilevel.prox.term import AbstractProxTerm

_DEEP, _HIGH = 12.0, math.log(0.9)  # log lambda within [log lambda_max - 12, log lambda_max + log 0.9]
_START, _GRID, _LOW = 10.0, 30, 1e3  # from lambda_max / 10; points of a grid down to lambda_max / 1000
Criterion: TypeAlias = Literal["held-out", "cross-validation", "sure"]


@checked()
def highest_penalty(model: LinearModel) -> Tensor:
    """lambda_max = max_j |grad_j g(0)|, from which on y* = 0 solves the lasso with g: a scalar.

    Above it Phi is constant and the hypergradient exactly zero, so that searches are kept below.

    Example:
        >>> highest_penalty(LinearModel(torch.eye(2), torch.tensor([3.0, -4.0])))
        tensor(2.)
    """
    z = model.X.new_zeros(model.X.shape[0])
    slopes = (model.sample_weights() * model.loss.slope(z, model.sample_targets())) @ model.X
    slopes = slopes if model.linear is None else slopes + model.linear
    return slopes.abs().max()


@final
@dataclass(frozen=True, eq=False)
class SparseData:
    """What a sparse model is fitted to, validated and tested on.

    Attributes:
        train: the objective of the inner problem, without its term.
        held: the held-out loss.
        test: the loss on the test part.
        name: of the data.
    """

    train: LinearModel
    held: LinearModel
    test: LinearModel
    name: str


def l1_term(x: Tensor, *_: Any) -> L1:
    """exp(x) |y|_1, or sum_j exp(x_j) |y_j|."""
    return L1(x.exp())


def elastic_net_term(x: Tensor, *_: Any) -> ElasticNet:
    """exp(x_0) |y|_1 + exp(x_1) |y|^2 / 2."""
    return ElasticNet(x[0].exp(), x[1].exp())


@checked(n=SIZE, d=SIZE, nonzeros=COUNT, rho=AT_LEAST_0, snr=POSITIVE, seed=SEED)
def lasso(
    *,
    n: int = 150,
    d: int = 100,
    nonzeros: int = 10,
    rho: float = 0.5,
    snr: float = 5.0,
    criterion: Criterion = "held-out",
    folds: int = 5,
    seed: int = 0,
) -> Instance:
    """The lasso on generated data, y* = argmin |X y - b|^2 / 2n + exp(x) |y|_1, with one penalty for all features.

    Rows of X are Gaussian, with correlation rho^|i - j| between features; the targets are X y + e with `nonzeros`
    normal entries of y and |X y| = snr |e|. The start is lambda_max / 10.

    Criteria: "held-out", |U y - c|^2 / 2m on as many samples again; "cross-validation", the mean over folds of that on
    the fold left out, where folds are tasks that share X; "sure", Stein's unbiased risk estimate per sample, with the
    degrees of freedom by finite differences in a random direction, for which the noise's variance is known here.

    Source: Bertrand et al., JMLR 23 (2022), sections 2.1 and 5; Deledalle et al., "Stein Unbiased GrAdient estimator of
    the Risk (SUGAR) for multiple parameter selection", SIAM J. Imaging Sci. 7 (2014), for the estimate.

    Args:
        n: training samples.
        d: number of features.
        nonzeros: how many of them matter, at most.
        rho: the correlation of neighboring features.
        snr: signal to noise, of norms.
        criterion: what is minimized over x.
        folds: of the cross-validation.
        seed: of the draw.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> from bilevel import minimize
        >>> instance = lasso()
        >>> found = minimize(instance.problem, instance.x0, instance.y0, **instance.settings)
        >>> found.value < found.history[0].value
        True
    """
    data, variance = generated(n, d, nonzeros, rho, snr, seed)
    x0 = (highest_penalty(data.train) / _START).log()
    name = f"lasso on generated data, {criterion}"
    if criterion == "cross-validation":
        return _cross_validated(data, x0, folds, name)
    if criterion == "sure":
        return _sure(data, x0, variance, seed, name)
    return _instance(data, x0, l1_term, name)


@checked(n=SIZE, d=SIZE, nonzeros=COUNT, rho=AT_LEAST_0, snr=POSITIVE, seed=SEED)
def weighted_lasso(
    *, n: int = 150, d: int = 100, nonzeros: int = 10, rho: float = 0.5, snr: float = 5.0, seed: int = 0
) -> Instance:
    """:func:`lasso` with a penalty for each feature, exp(x_j) |y_j|, on held-out data.

    The start is the penalty that is best for all features together, on a grid: from a start where too many entries
    are zero their penalties have no influence.

    Args:
        n: training samples.
        d: number of features, and of penalties.
        nonzeros: how many of them matter.
        rho: the correlation of neighboring features.
        snr: signal to noise, of norms.
        seed: of the draw.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> weighted_lasso(n=20, d=8).x0.shape
        torch.Size([8])
    """
    data, _ = generated(n, d, nonzeros, rho, snr, seed)
    shown = _Shown(data, l1_term, (highest_penalty(data.train) / _START).log())
    x0 = shown.grid[shown.path.best].expand(d).clone()
    return _instance(data, x0, l1_term, "lasso on generated data, a penalty for each feature", steps=40)


@checked(seed=SEED)
def lasso_diabetes(*, per_feature: bool = False, data: Arrays | None = None, seed: int = 0) -> Instance:
    """The lasso on scikit-learn's diabetes data (442 x 10), or on `data`, by held-out loss; see :func:`lasso`.

    Half of the samples train, a quarter validates, a quarter tests.

    Args:
        per_feature: a penalty for each feature, else one for all.
        data: the user's own data; see `bilevel.problems.Arrays`.
        seed: of the split.

    Raises:
        ImportError: if scikit-learn is needed and missing.
    """
    parts = _diabetes(data, seed)
    x0 = (highest_penalty(parts.train) / _START).log()
    x0 = x0.expand(parts.train.X.shape[1]).clone() if per_feature else x0
    return _instance(parts, x0, l1_term, f"lasso on {parts.name}")


@checked(seed=SEED)
def elastic_net_diabetes(*, data: Arrays | None = None, seed: int = 0) -> Instance:
    """The elastic net, exp(x_0) |y|_1 + exp(x_1) |y|^2 / 2, on the data of :func:`lasso_diabetes`.

    Args:
        data: the user's own data; see `bilevel.problems.Arrays`.
        seed: of the split.

    Raises:
        ImportError: if scikit-learn is needed and missing.
    """
    parts = _diabetes(data, seed)
    x0 = (highest_penalty(parts.train) / _START).log().expand(2).clone()
    return _instance(parts, x0, elastic_net_term, f"elastic net on {parts.name}")


@checked(seed=SEED)
def sparse_logistic(*, data: Arrays | None = None, seed: int = 0) -> Instance:
    """Logistic regression with exp(x) |y|_1 on scikit-learn's breast cancer data (569 x 30), or on `data`.

    Two classes; half of the samples train, a quarter validates, a quarter tests.

    Args:
        data: the user's own data; see `bilevel.problems.Arrays`.
        seed: of the split.

    Raises:
        ImportError: if scikit-learn is needed and missing.
        ValueError: if there are more than two classes.
    """
    parts = load(data, "breast_cancer", sizes=(0.5, 0.25), seed=seed)
    train, held, test = (
        LinearModel(X, signs(y, parts.classes), LogLoss())
        for X, y in ((parts.X_train, parts.y_train), (parts.X_val, parts.y_val), (parts.X_test, parts.y_test))
    )
    found = SparseData(train, held, test, "breast cancer" if data is None else "your data")
    x0 = (highest_penalty(train) / _START).log()
    return _instance(found, x0, l1_term, f"sparse logistic regression on {found.name}")


@checked(n=SIZE, groups=SIZE, size=SIZE, active=COUNT, snr=POSITIVE, seed=SEED)
def group_lasso(
    *, n: int = 100, groups: int = 12, size: int = 4, active: int = 3, snr: float = 3.0, seed: int = 0
) -> Instance:
    """The group lasso, exp(x) sum_g |y_g|, on generated data of which a few groups of features matter.

    Args:
        n: training samples, and as many for validation and for testing.
        groups: how many groups.
        size: features in each.
        active: how many groups matter.
        snr: signal to noise, of norms.
        seed: of the draw.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> group_lasso(groups=3, size=2).y0.shape
        torch.Size([6])
    """
    data, _ = generated(n, groups * size, min(active, groups) * size, 0.5, snr, seed, blocks=size)
    labels = torch.arange(groups, device="cpu").repeat_interleave(size)
    slopes = data.train.X.mT @ data.train.sample_targets() / n
    top = torch.linalg.vector_norm(slopes.reshape(groups, size), dim=1).max()

    def term(x: Tensor, *_: Any) -> GroupLasso:
        return GroupLasso(x.exp(), labels)

    return _instance(data, (top / _START).log(), term, "group lasso on generated data")


def generated(
    n: int, d: int, nonzeros: int, rho: float, snr: float, seed: int, blocks: int = 1
) -> tuple[SparseData, float]:
    """Three parts of n samples each, and the variance of the noise; nonzero entries in blocks of so many."""
    if not rho < 1:
        raise ValueError(f"`rho=...` must be at least 0 and less than 1. Got {rho}.")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    columns = normal(d, 3 * n)
    for j in range(1, d):
        columns[j].mul_((1 - rho**2) ** 0.5).add_(columns[j - 1], alpha=rho)
    chosen = torch.randperm(d // blocks, generator=generator, device="cpu")[: max(nonzeros // blocks, 1)]
    truth = torch.zeros(d // blocks, blocks, dtype=torch.float64, device="cpu")
    truth[chosen] = normal(len(chosen), blocks)
    signal = truth.reshape(-1) @ columns
    noise = normal(3 * n)
    noise = noise * (torch.linalg.vector_norm(signal) / (snr * torch.linalg.vector_norm(noise)))
    targets = signal + noise
    parts = [
        LinearModel(columns[:, k * n : (k + 1) * n].contiguous().mT, targets[k * n : (k + 1) * n]) for k in range(3)
    ]
    return SparseData(parts[0], parts[1], parts[2], "generated data"), float(noise.square().mean())


def signs(labels: Tensor, classes: int) -> Tensor:
    """Labels 0 and 1 as -1 and 1.

    Raises:
        ValueError: if there are more classes.
    """
    if classes != 2:
        raise ValueError(f"`data=...` must have two classes. Got {classes}.")
    return (2 * labels - 1).double()


def _diabetes(data: Arrays | None, seed: int) -> SparseData:
    parts = load(data, "diabetes", sizes=(0.5, 0.25), seed=seed, regression=True, bias=False)
    name = "diabetes" if data is None else "your data"
    return SparseData(
        LinearModel(parts.X_train, parts.y_train),
        LinearModel(parts.X_val, parts.y_val),
        LinearModel(parts.X_test, parts.y_test),
        name,
    )


def clipped(x0: Tensor) -> Box:
    """The range of log lambda around a start at lambda_max / 10 for which the search makes sense."""
    top = float(x0.max()) + math.log(_START)
    return Box(top - _DEEP, top + _HIGH)


def _instance(
    data: SparseData, x0: Tensor, term: Callable[..., AbstractProxTerm], name: str, steps: int = 12
) -> Instance:
    start = x0 if x0.dim() == 0 else (highest_penalty(data.train) / _START).log()
    shown = _Shown(data, term, start)
    return Instance(
        problem=BilevelProblem(data.held, data.train, prox=term),
        x0=x0,
        y0=torch.zeros_like(data.train.X[0]),
        description=name,
        metrics=shown.metrics,
        plot=shown.plot,
        settings={"constraint": clipped(start), "max_steps": steps},
    )


def _cross_validated(data: SparseData, x0: Tensor, folds: int, name: str) -> Instance:
    n = data.train.X.shape[0]
    if not 2 <= folds <= n:
        raise ValueError(f"`lasso(folds=...)` must be at least 2 and at most n = {n}. Got {folds}.")
    held = torch.arange(folds, device="cpu").unsqueeze(1) == torch.arange(n, device="cpu") % folds
    data_of_folds = {
        "train": ~held / (~held).sum(1, keepdim=True).double(),
        "held": held / held.sum(1, keepdim=True).double(),
    }
    train = LinearModel(data.train.X, data.train.targets, weights=lambda fold: fold["train"])
    left_out = LinearModel(data.train.X, data.train.targets, weights=lambda fold: fold["held"])
    shown = _Shown(data, l1_term, x0)
    return Instance(
        problem=BilevelProblem(left_out, train, prox=l1_term, tasks=True),
        x0=x0,
        y0=torch.zeros_like(data.train.X[0]),
        description=f"{name} in {folds} folds",
        metrics=lambda x, _: shown.metrics(x, shown.refitted(x)),
        plot=lambda figure, x, _: shown.plot(figure, x, shown.refitted(x)),
        settings={"constraint": clipped(x0), "max_steps": 12, "data": data_of_folds},
    )


def _sure(data: SparseData, x0: Tensor, variance: float, seed: int, name: str) -> Instance:
    """SURE = |b - X y|^2 - n s + 2 s dof, dof = <X y(b + e u) - X y(b), u> / e: two lassos side by side, over 2 n."""
    X, b = data.train.X, data.train.sample_targets()
    n, generator = X.shape[0], torch.Generator().manual_seed((seed + 1_000_003) % 2**63)  # not that of X
    u = torch.randn(n, generator=generator, dtype=torch.float64, device="cpu")
    e = 2 * variance**0.5 / n**0.3
    both = {
        "targets": torch.stack([b, b + e * u]),
        "fits": torch.tensor([1.0, 0.0], dtype=torch.float64, device="cpu"),
        "sign": torch.tensor([-1.0, 1.0], dtype=torch.float64, device="cpu"),
    }

    def risk(_: Tensor, y: Tensor, part: dict[str, Tensor]) -> Tensor:
        z = torch.nn.functional.linear(X, y)
        fit = part["fits"] * ((z - b).square().sum() - n * variance)
        return (fit + part["sign"] * (2 * variance / e) * (z @ u)) / n  # the mean over the two is half of the sum

    shown = _Shown(data, l1_term, x0)
    return Instance(
        problem=BilevelProblem(risk, LinearModel(X, lambda part: part["targets"]), prox=l1_term, tasks=True),
        x0=x0,
        y0=torch.zeros_like(X[0]),
        description=name,
        metrics=lambda x, _: shown.metrics(x, shown.refitted(x)),
        plot=lambda figure, x, _: shown.plot(figure, x, shown.refitted(x)),
        settings={"constraint": clipped(x0), "max_steps": 12, "data": both},
    )


@final
@dataclass(frozen=True, eq=False)
class _Shown:
    """What a person is told: losses at (x, y), and those of the best of a grid with one penalty for all.

    Attributes:
        data: the parts.
        term: what is learned.
        start: log lambda_max / 10.
    """

    data: SparseData
    term: Callable[..., AbstractProxTerm]
    start: Tensor

    @functools.cached_property
    def grid(self) -> Tensor:
        """log lambda from lambda_max to lambda_max / 1000."""
        top = float(self.start) + math.log(_START)
        return torch.linspace(top, top - math.log(_LOW), _GRID, dtype=self.data.train.X.dtype, device="cpu")

    @functools.cached_property
    def path(self) -> Any:
        """The path over that grid: of the term, where it has one penalty, else of the lasso."""
        term = l1_term if self.term is elastic_net_term else self.term
        problem = BilevelProblem(self.data.held, self.data.train, prox=term)
        return solution_path(problem, list(self.grid), torch.zeros_like(self.data.train.X[0]))

    def refitted(self, x: Tensor) -> Tensor:
        """y*(x) on all training samples."""
        problem = BilevelProblem(self.data.held, self.data.train, prox=self.term)
        y: Tensor = solution_path(problem, [x], torch.zeros_like(self.data.train.X[0])).y[0]
        return y

    def metrics(self, _: Tensor, y: Tensor) -> dict[str, float]:
        best = self.path.y[self.path.best]
        return {
            "validation_loss": float(self.data.held(None, y)),
            "test_loss": float(self.data.test(None, y)),
            "nonzeros": float((y != 0).sum()),
            "validation_loss_grid": float(self.data.held(None, best)),
            "test_loss_grid": float(self.data.test(None, best)),
            "nonzeros_grid": float((best != 0).sum()),
        }

    def plot(self, figure: Any, x: Tensor, y: Tensor) -> None:
        left, right = figure.subplots(1, 2)
        draw_path(left, right, self.grid, self.path, [float(self.data.test(None, each)) for each in self.path.y])
        value = float(self.data.held(None, y))
        if x.numel() == 1:
            for axes in (left, right):
                axes.axvline(float(x), color=COLORS[1], linestyle=":")
            right.plot([float(x)], [value], "o", color=COLORS[1], label="learned")
        else:
            right.axhline(value, color=COLORS[1], linestyle=":", label="learned, several penalties")
        right.legend()
        figure.tight_layout()


def draw_path(left: Any, right: Any, grid: Tensor, path: Any, test: list[float]) -> None:
    """Coefficients, and the criterion and the test loss, over log lambda."""
    entries = torch.stack(path.y)
    for j in entries.abs().amax(0).topk(min(12, entries.shape[1])).indices.tolist():
        left.plot(grid.tolist(), entries[:, j].tolist(), linewidth=1)
    left.set_xlabel("log penalty")
    left.set_ylabel("coefficients (the 12 largest)")
    right.plot(grid.tolist(), list(path.values), color=COLORS[0], label="held-out loss")
    right.plot(grid.tolist(), test, color=COLORS[3], label="test loss")
    right.set_xlabel("log penalty")
