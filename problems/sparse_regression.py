"""Lasso, weighted lasso, elastic net and group lasso, for regression and classification, with learned penalties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_0, COUNT, POSITIVE, SEED, SIZE
from bilevel.inner_problems.linear_model import LinearModel, LogLoss
from bilevel.problems._criteria import Criterion, Validated, Validation, cross_validated, risk_estimated
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
    data = generated(n, d, nonzeros, rho, snr, seed)
    x0 = (highest_penalty(data.train) / START).log()
    by = _by("lasso", criterion, data, l1_term, folds, seed)
    return _instance(data, x0, l1_term, f"lasso on generated data, {criterion}", by=by)


@checked(n=SIZE, d=SIZE, nonzeros=COUNT, rho=AT_LEAST_0, snr=POSITIVE, seed=SEED)
def weighted_lasso(
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
    """:func:`lasso` with a penalty for each feature, exp(x_j) |y_j|, by the same criteria.

    The start is the penalty that is best for all features together on held-out data, on a grid: from a start where too
    many entries are zero their penalties have no influence.

    Args:
        n: training samples.
        d: number of features, and of penalties.
        nonzeros: how many of them matter.
        rho: the correlation of neighboring features.
        snr: signal to noise, of norms.
        criterion: what is minimized over x.
        folds: of the cross-validation.
        seed: of the draw.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> weighted_lasso(n=20, d=8).x0.shape
        torch.Size([8])
    """
    data = generated(n, d, nonzeros, rho, snr, seed)
    shown = Shown(data, l1_term, (highest_penalty(data.train) / START).log())
    x0 = shown.grid[shown.path.best].expand(d).clone()
    by = _by("weighted_lasso", criterion, data, l1_term, folds, seed)
    return _instance(data, x0, l1_term, f"lasso with a penalty for each feature, {criterion}", by=by, steps=100)


@checked(n=SIZE, d=SIZE, nonzeros=COUNT, rho=AT_LEAST_0, snr=POSITIVE, seed=SEED)
def elastic_net(
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
    """The elastic net, exp(x_0) |y|_1 + exp(x_1) |y|^2 / 2, on the data and by the criteria of :func:`lasso`.

    Both penalties start at a tenth of the largest one of the lasso.

    Source: Zou, Hastie, "Regularization and variable selection via the elastic net", JRSS B 67 (2005).

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
        >>> elastic_net(n=20, d=8, criterion="sure").x0.shape
        torch.Size([2])
    """
    data = generated(n, d, nonzeros, rho, snr, seed)
    x0 = (highest_penalty(data.train) / START).log().expand(2).clone()
    by = _by("elastic_net", criterion, data, elastic_net_term, folds, seed)
    return _instance(data, x0, elastic_net_term, f"elastic net on generated data, {criterion}", by=by)


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
def elastic_net_diabetes(
    *, criterion: Validation = "held-out", folds: int = 5, data: Arrays | None = None, seed: int = 0
) -> Instance:
    """The elastic net, exp(x_0) |y|_1 + exp(x_1) |y|^2 / 2, on the data of :func:`lasso_diabetes`.

    Args:
        criterion: what is minimized over x.
        folds: of the cross-validation, of the training samples.
        data: the user's own data; see `bilevel.problems.Arrays`.
        seed: of the split.

    Raises:
        ImportError: if scikit-learn is needed and missing.
    """
    parts = _diabetes(data, seed)
    x0 = (highest_penalty(parts.train) / START).log().expand(2).clone()
    by = _by("elastic_net_diabetes", criterion, parts, elastic_net_term, folds, seed)
    return _instance(parts, x0, elastic_net_term, f"elastic net on {parts.name}, {criterion}", by=by)


@checked(seed=SEED)
def sparse_logistic(
    *, criterion: Validation = "held-out", folds: int = 5, data: Arrays | None = None, seed: int = 0
) -> Instance:
    """Logistic regression with exp(x) |y|_1 on scikit-learn's breast cancer data (569 x 30), or on `data`.

    Two classes; half of the samples train, a quarter validates, a quarter tests.

    Args:
        criterion: what is minimized over x.
        folds: of the cross-validation, of the training samples.
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
    by = _by("sparse_logistic", criterion, found, l1_term, folds, seed)
    return _instance(found, x0, l1_term, f"sparse logistic regression on {found.name}, {criterion}", by=by)


@checked(n=SIZE, groups=SIZE, size=SIZE, active=COUNT, snr=POSITIVE, seed=SEED)
def group_lasso(
    *,
    n: int = 100,
    groups: int = 12,
    size: int = 4,
    active: int = 3,
    snr: float = 3.0,
    criterion: Criterion = "held-out",
    folds: int = 5,
    seed: int = 0,
) -> Instance:
    """The group lasso, exp(x) sum_g |y_g|, on generated data of which a few groups of features matter.

    By the criteria of :func:`lasso`.

    Args:
        n: training samples, and as many for validation and for testing.
        groups: how many groups.
        size: features in each.
        active: how many groups matter.
        snr: signal to noise, of norms.
        criterion: what is minimized over x.
        folds: of the cross-validation.
        seed: of the draw.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> group_lasso(groups=3, size=2).y0.shape
        torch.Size([6])
    """
    data = generated(n, groups * size, min(active, groups) * size, 0.5, snr, seed, blocks=size)
    labels = torch.arange(groups, device="cpu").repeat_interleave(size)
    slopes = data.train.X.mT @ data.train.sample_targets() / n
    top = torch.linalg.vector_norm(slopes.reshape(groups, size), dim=1).max()

    def term(x: Tensor, *_: Any) -> GroupLasso:
        return GroupLasso(x.exp(), labels)

    by = _by("group_lasso", criterion, data, term, folds, seed)
    return _instance(data, (top / START).log(), term, f"group lasso on generated data, {criterion}", by=by)


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
    data: SparseData,
    x0: Tensor,
    term: Callable[..., AbstractProxTerm],
    name: str,
    *,
    by: Validated | None = None,
    start: Tensor | None = None,
    steps: int = 12,
) -> Instance:
    """By held-out loss, or by a criterion of its own; the range of the search is that around `start`."""
    middle = start if start is not None else x0 if x0.dim() == 0 else (highest_penalty(data.train) / START).log()
    shown = Shown(data, term, middle)
    problem = BilevelProblem(data.held, data.train, prox=term) if by is None else by.problem
    settings: dict[str, Any] = {"constraint": clipped(middle), "max_steps": steps}
    return Instance(
        problem=problem,
        x0=x0,
        y0=torch.zeros_like(data.train.X[0]),
        description=name,
        metrics=shown.metrics if by is None else lambda x, _: shown.metrics(x, shown.refitted(x)),
        plot=shown.plot if by is None else lambda figure, x, _: shown.plot(figure, x, shown.refitted(x)),
        settings=settings if by is None else settings | {"data": by.data},
    )


def _by(
    call: str, criterion: Criterion, data: SparseData, term: Callable[..., AbstractProxTerm], folds: int, seed: int
) -> Validated | None:
    """The criterion; None: held-out loss."""
    if criterion == "cross-validation":
        return cross_validated(call, data.train, term, folds)
    if criterion == "sure":
        assert data.variance is not None
        return risk_estimated(data.train, term, data.variance, seed)
    return None
