"""Lasso, weighted lasso, elastic net and group lasso, for regression and classification, with learned penalties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_0, COUNT, POSITIVE, SEED, SIZE
from bilevel.inner_problems.linear_model import LinearModel, LogLoss
from bilevel.problems._data import Arrays, load
from bilevel.problems._sparse import (
    START,
    Shown,
    SparseData,
    clipped,
    elastic_net_term,
    generated,
    highest_penalty,
    l1_term,
    signs,
)
from bilevel.prox.group_lasso import GroupLasso
from bilevel.prox.term import AbstractProxTerm

Criterion: TypeAlias = Literal["held-out", "cross-validation", "sure"]


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
    x0 = (highest_penalty(data.train) / START).log()
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
    shown = Shown(data, l1_term, (highest_penalty(data.train) / START).log())
    x0 = shown.grid[shown.path.best].expand(d).clone()
    return _instance(data, x0, l1_term, "lasso on generated data, a penalty for each feature", steps=100)


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
    x0 = (highest_penalty(parts.train) / START).log()
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
    x0 = (highest_penalty(parts.train) / START).log().expand(2).clone()
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
    x0 = (highest_penalty(train) / START).log()
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

    return _instance(data, (top / START).log(), term, "group lasso on generated data")


def _diabetes(data: Arrays | None, seed: int) -> SparseData:
    parts = load(data, "diabetes", sizes=(0.5, 0.25), seed=seed, regression=True, bias=False)
    name = "diabetes" if data is None else "your data"
    return SparseData(
        LinearModel(parts.X_train, parts.y_train),
        LinearModel(parts.X_val, parts.y_val),
        LinearModel(parts.X_test, parts.y_test),
        name,
    )


def _instance(
    data: SparseData, x0: Tensor, term: Callable[..., AbstractProxTerm], name: str, steps: int = 12
) -> Instance:
    start = x0 if x0.dim() == 0 else (highest_penalty(data.train) / START).log()
    shown = Shown(data, term, start)
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
    shown = Shown(data, l1_term, x0)
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
        total: Tensor = fit + part["sign"] * (2 * variance / e) * (z @ u)
        return total / n  # the mean over the two is half of the sum

    shown = Shown(data, l1_term, x0)
    return Instance(
        problem=BilevelProblem(risk, LinearModel(X, lambda part: part["targets"]), prox=l1_term, tasks=True),
        x0=x0,
        y0=torch.zeros_like(X[0]),
        description=name,
        metrics=lambda x, _: shown.metrics(x, shown.refitted(x)),
        plot=lambda figure, x, _: shown.plot(figure, x, shown.refitted(x)),
        settings={"constraint": clipped(x0), "max_steps": 12, "data": both},
    )
