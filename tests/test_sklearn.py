"""Estimators of scikit-learn: the models are its own at the penalties learned, and these minimize what is held out."""

from __future__ import annotations

import inspect
import os
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

sklearn = pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.datasets import load_iris, make_classification
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from bilevel.inner_problems import LogLoss, Squared
from bilevel.problems.glm import Softmax
from bilevel.sklearn import (
    SVCHO,
    ElasticNetHO,
    InfluenceScorer,
    LassoHO,
    LogisticRegressionHO,
    RidgeHO,
    SampleReweightingClassifier,
)
from bilevel.sklearn.folds import Folds

HO = (RidgeHO, LassoHO, ElasticNetHO, LogisticRegressionHO, SVCHO)
SMALL: dict[str, Any] = {"cv": 2, "max_iter": 1}


def regression(n: int = 50, d: int = 6, seed: int = 0) -> tuple[Any, Any]:
    draw = np.random.default_rng(seed)
    X = draw.normal(size=(n, d)) * (1 + np.arange(d)) + 2.0
    return X, X[:, 0] - X[:, 1] / 2 + draw.normal(size=n) + 5.0


def classification(classes: int = 2, seed: int = 0) -> tuple[Any, Any]:
    X, y = make_classification(80, 6, n_informative=4, n_redundant=0, n_classes=classes, flip_y=0.1, random_state=seed)
    return X * (1 + np.arange(6)), np.array(["a", "b", "c"])[y]


# The checks of scikit-learn


def _twice(estimator: Any, check: Any) -> bool:
    """Sparse inputs come as matrices and as arrays, in every format, and go the same way in the kin of an estimator."""
    name = getattr(check, "func", check).__name__
    return name == "check_estimator_sparse_matrix" or (
        name == "check_estimator_sparse_array" and isinstance(estimator, ElasticNetHO | SVCHO)
    )


CHECKED = [each("one", **SMALL) for each in HO] + [SampleReweightingClassifier(**SMALL), InfluenceScorer(cv=2)]


@parametrize_with_checks(CHECKED)  # type: ignore[untyped-decorator]
def test_scikit_learns_checks_pass(estimator: Any, check: Any) -> None:
    if _twice(estimator, check):
        pytest.skip("with the marker slow")
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks(
    [*(each("each", cv=2, max_iter=3) for each in HO), SampleReweightingClassifier(), InfluenceScorer()]
)  # type: ignore[untyped-decorator]
def test_scikit_learns_checks_pass_with_a_penalty_for_each_feature(estimator: Any, check: Any) -> None:
    check(estimator)


# The model is the one that it is said to be


@pytest.mark.parametrize("intercept", [True, False])
def test_with_one_penalty_the_models_are_those_of_scikit_learn(intercept: bool) -> None:
    X, y = regression()
    own: dict[str, Any] = {"cv": 3, "fit_intercept": intercept}
    models: list[Any] = [each("one", **own).fit(X, y) for each in (RidgeHO, LassoHO, ElasticNetHO)]
    ridge, lasso, net = models
    a, c = net.l1_penalties_[0], net.l2_penalties_[0]
    others = (
        Ridge(alpha=len(y) * ridge.penalties_[0], fit_intercept=intercept),
        Lasso(alpha=lasso.penalties_[0], fit_intercept=intercept, tol=1e-12),
        ElasticNet(alpha=a + c, l1_ratio=a / (a + c), fit_intercept=intercept, tol=1e-12),
    )
    for mine, theirs in zip(models, others, strict=True):
        theirs.fit(X, y)
        np.testing.assert_allclose(mine.coef_, theirs.coef_, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(mine.intercept_, theirs.intercept_, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("classes", [2, 3])
def test_with_one_penalty_logistic_regression_is_that_of_scikit_learn(classes: int) -> None:
    X, y = classification(classes)
    mine = LogisticRegressionHO("one", cv=3).fit(X, y)
    theirs = LogisticRegression(C=1 / (len(y) * mine.penalties_[0]), tol=1e-10, max_iter=5000).fit(X, y)
    np.testing.assert_allclose(mine.coef_, theirs.coef_, atol=1e-5)
    np.testing.assert_allclose(mine.predict_proba(X), theirs.predict_proba(X), atol=1e-5)
    assert mine.classes_.tolist() == theirs.classes_.tolist()


@pytest.mark.parametrize("classes", [2, 3])
def test_the_machine_is_a_minimizer_of_its_objective(classes: int) -> None:
    X, y = classification(classes)
    machine = SVCHO("each", cv=2, max_iter=2).fit(X, y)
    t = np.where(y[:, None] == machine.classes_[None, -len(machine.coef_) :], 1.0, -1.0)
    slack = np.maximum(1 - t * (X @ machine.coef_.T + machine.intercept_), 0)
    slope = -(t * slack).T @ X / len(y) + machine.penalties_ * machine.coef_
    assert np.abs(slope).max() < 1e-6 and np.abs((t * slack).mean(0)).max() < 1e-7
    assert machine.support_.tolist() == (slack > 0).any(1).nonzero()[0].tolist()


# The penalties minimize the loss that they are said to minimize


def held_out(X: Any, y: Any, penalties: Any) -> float:
    """The mean squared error of 3 folds, with a penalty for each feature: by features that are scaled."""
    Z, errors = X / np.sqrt(penalties), []
    for train, test in KFold(3).split(X):
        model = Ridge(alpha=len(train)).fit(Z[train], y[train])
        errors.append(np.mean((model.predict(Z[test]) - y[test]) ** 2))
    return float(np.mean(errors))


def test_ridge_is_at_a_minimum_of_the_held_out_error_that_scikit_learn_computes() -> None:
    X, y = regression()
    model = RidgeHO("each", cv=3, tol=1e-6, max_iter=200).fit(X, y)
    assert model.validation_loss_ == pytest.approx(held_out(X, y, model.penalties_), rel=1e-8)
    for j in range(X.shape[1]):
        for factor in (0.9, 1.1):
            other = model.penalties_.copy()
            other[j] *= factor
            assert held_out(X, y, other) > model.validation_loss_ * (1 - 1e-5)
    assert model.validation_loss_ < RidgeHO("one", cv=3).fit(X, y).validation_loss_


def test_the_loss_of_logistic_regression_is_the_one_that_scikit_learn_computes() -> None:
    X, y = classification()
    model = LogisticRegressionHO("each", cv=3, max_iter=5).fit(X, y)
    Z, losses = X / np.sqrt(model.penalties_), []
    for train, test in StratifiedKFold(3).split(X, y):
        fold = LogisticRegression(C=1 / len(train), tol=1e-10, max_iter=5000).fit(Z[train], y[train])
        p = fold.predict_proba(Z[test])[np.arange(len(test)), np.searchsorted(fold.classes_, y[test])]
        losses.append(-np.log(p).mean())
    assert model.validation_loss_ == pytest.approx(np.mean(losses), rel=1e-5)


def test_each_feature_has_a_penalty_only_where_there_are_ten_samples_for_each() -> None:
    for n, count in ((29, 1), (30, 3)):
        model = RidgeHO(**SMALL).fit(*regression(n, 3))
        assert len(np.unique((model.penalties_).round(9))) == count


def test_features_of_equal_labels_share_a_penalty() -> None:
    X, y = regression()
    model = RidgeHO(["a", "a", "b", "b", "b", "c"], cv=3, max_iter=5).fit(X, y)
    assert len(np.unique(model.penalties_.round(12))) == 3
    assert model.penalties_[1] == pytest.approx(model.penalties_[0], rel=1e-12)


# Inputs


@pytest.mark.parametrize("kind", HO)
def test_sparse_inputs_give_what_dense_ones_do(kind: Any) -> None:
    import scipy.sparse as sp

    X, y = regression(d=4) if kind in (RidgeHO, LassoHO, ElasticNetHO) else classification()
    X = X * (np.random.default_rng(0).random(X.shape) > 0.5)
    dense, sparse = (kind("one", **SMALL).fit(each, y) for each in (X, sp.csr_matrix(X)))
    np.testing.assert_allclose(dense.coef_, sparse.coef_, atol=1e-6)
    one, other = dense.predict(X[:3]), sparse.predict(sp.csr_matrix(X[:3]))
    assert (one == other).all() if y.dtype.kind == "U" else np.abs(one - other).max() < 1e-5


def test_names_of_columns_are_kept_and_compared() -> None:
    pandas = pytest.importorskip("pandas")
    X, y = regression(d=3)
    frame = pandas.DataFrame(X, columns=["a", "b", "c"])
    model: Any = RidgeHO("one", **SMALL).fit(frame, pandas.Series(y))
    assert model.feature_names_in_.tolist() == ["a", "b", "c"]
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame[["b", "a", "c"]])


def test_they_go_into_pipelines_and_searches_and_come_back_from_pickle() -> None:
    X, y = classification()
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegressionHO(cv=0.3, max_iter=1, random_state=0)),
        {"logisticregressionho__penalties": ["one", "each"]},
        cv=2,
    ).fit(X, y)
    best = pickle.loads(pickle.dumps(search)).best_estimator_
    assert (best.predict(X) == search.predict(X)).all()
    copied: Any = clone(best)
    again = copied.fit(X, y)
    np.testing.assert_array_equal(again[-1].penalties_, best[-1].penalties_)
    assert len(pickle.dumps(best)) < 100_000  # without the data


def test_the_package_does_not_hide_scikit_learn_and_says_which_extra_it_needs() -> None:
    import bilevel.sklearn

    assert sklearn.__name__ == "sklearn" and bilevel.sklearn.__name__ == "bilevel.sklearn"
    program = (
        "import sys; sys.modules['sklearn'] = None\n"
        "try:\n    import bilevel.sklearn\nexcept ImportError as error:\n    print(error)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    assert 'pip install "bilevel[sklearn]"' in run.stdout


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"penalties": "all"}, "'all'"),
        ({"penalties": [1, 2]}, r"\(2,\)"),
        ({"cv": 1.5}, "1.5"),
        ({"max_iter": 0}, "at least 1. Got 0"),
        ({"tol": -1.0}, "at least 0. Got -1.0"),
        ({"tol": 1.0}, "below 1. Got 1.0"),
        ({"cv": "five"}, "'five'"),
        ({"cv": True}, "True"),
        ({"cv": []}, "no folds"),
        ({"fit_intercept": 1}, "True or False. Got 1"),
    ],
)
def test_wrong_parameters_are_refused_by_name(arguments: dict[str, Any], what: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"RidgeHO\({next(iter(arguments))}=.*{what}"):
        RidgeHO(**arguments).fit(*regression(d=3))


@pytest.mark.parametrize(
    ("part", "what"),
    [([], "indices of samples"), ([0.5], "float64"), ([40], "of 40 samples"), (np.zeros(40, bool), "without any")],
)
def test_folds_of_ones_own_are_looked_at(part: Any, what: str) -> None:
    with pytest.raises(ValueError, match=what) as caught:
        RidgeHO(cv=[([0, 1, 2], part)]).fit(*regression(n=40, d=3))
    assert any("RidgeHO(cv=...)" in note for note in caught.value.__notes__)


def test_folds_as_masks_are_those_of_their_indices() -> None:
    X, y = regression(n=40, d=3)
    mask = np.arange(40) % 2 == 0
    one, other = (
        RidgeHO(cv=[pair]).fit(X, y) for pair in ((mask, ~mask), (np.flatnonzero(mask), np.flatnonzero(~mask)))
    )
    assert (one.coef_ == other.coef_).all() and one.validation_loss_ == other.validation_loss_


def test_errors_of_scikit_learn_say_whose_they_are() -> None:
    with pytest.raises(ValueError, match="NaN") as caught:
        RidgeHO().fit([[np.nan], [1.0]], [0.0, 1.0])
    assert any("RidgeHO.fit(X=..., y=...)" in note for note in caught.value.__notes__)
    with pytest.raises(TypeError, match=r"RidgeHO.fit\(X=..., y=...\)` cannot be made arrays. Got a tensor"):
        RidgeHO().fit(torch.ones(3, 1, requires_grad=True), [0.0, 1.0, 2.0])


# Samples


def flipped(share: float = 0.1) -> tuple[Any, Any, Any]:
    """Iris with wrong labels."""
    X, y = load_iris(return_X_y=True)
    draw = np.random.default_rng(0)
    wrong = draw.random(len(y)) < share
    return X, np.where(wrong, (y + 1) % 3, y), wrong


def test_wrong_labels_are_found_with_wrong_labels_held_out() -> None:
    X, y, wrong = flipped()
    model = SampleReweightingClassifier().fit(X, y)
    found = np.isin(np.arange(len(y)), model.suspects_)
    assert (found & wrong).sum() >= 0.9 * wrong.sum() and (found & wrong).sum() >= 0.6 * found.sum()
    assert (np.diff(model.sample_weights_[model.suspects_]) >= 0).all()
    assert model.sample_weights_[wrong].mean() < 0.3 < 0.6 < model.sample_weights_[~wrong].mean()


def test_samples_that_are_trusted_are_held_out_alone() -> None:
    X, y, wrong = flipped()
    truth = load_iris(return_X_y=True)[1]
    model = SampleReweightingClassifier().fit(X[::2], y[::2], X[1::2], truth[1::2])
    assert model.sample_weights_.shape == (75,)
    assert set(wrong[::2].nonzero()[0]) <= set(model.suspects_.tolist())
    with pytest.raises(ValueError, match="y_val"):
        SampleReweightingClassifier().fit(X, y, X, truth + 1)


def test_scores_are_the_change_of_the_held_out_loss_to_first_order() -> None:
    """Against fits without the sample: the sum of the others, over n, so that 1/n and l2 stay what they are."""
    X, y = regression(n=60, d=3)
    X_val, y_val = regression(n=30, d=3, seed=1)
    scorer = InfluenceScorer(l2=0.1).fit(X, y, X_val, y_val)
    mean, spread = y.mean(), y.std()
    Z, Z_val = (np.c_[(each - X.mean(0)) / X.std(0), np.ones(len(each))] for each in (X, X_val))
    t, t_val = (y - mean) / spread, (y_val - mean) / spread

    def loss(keep: Any) -> float:
        H = Z[keep].T @ Z[keep] / len(y) + 0.1 * np.eye(4)
        w = np.linalg.solve(H, Z[keep].T @ t[keep] / len(y))
        return float(np.mean((Z_val @ w - t_val) ** 2) / 2)

    every = np.ones(len(y), dtype=bool)
    exact = np.array([loss(every & (np.arange(len(y)) != i)) - loss(every) for i in range(len(y))])
    assert np.abs(scorer.scores_ - exact).max() < 0.15 * np.abs(exact).max()
    assert np.corrcoef(scorer.scores_, exact)[0, 1] > 0.99
    assert scorer.errors_.max() < 1e-5


def test_wrong_labels_have_the_lowest_scores() -> None:
    X, y, wrong = flipped(0.05)
    worst = InfluenceScorer().fit(X, y).most_harmful(int(wrong.sum()))
    assert wrong[worst].mean() > 0.7


# Folds


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["squared", "log", "softmax"]), st.integers(1, 3), st.integers(0, 100))
def test_derivatives_of_folds_are_those_of_autograd(name: str, count: int, seed: int) -> None:
    loss: Any = {"squared": Squared(), "log": LogLoss(), "softmax": Softmax()}[name]
    outputs, n, draw = 3 if name == "softmax" else 1, 4, torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    t = torch.randint(0, 3, (1, n), generator=draw).double() if name == "softmax" else normal(1, n).sign()
    b, z, u = torch.cat([t, normal(count, n).abs()]), normal(count * outputs, n), normal(count * outputs, n)
    folds = Folds(loss, count)
    z.requires_grad_()
    values = folds.value(z, b)
    (slope,) = torch.autograd.grad(values.sum(), z, create_graph=True)
    (bent,) = torch.autograd.grad((slope * u).sum(), z, retain_graph=True)
    found = folds.expand(z.detach(), b)
    assert torch.allclose(found[0], values) and torch.allclose(found[1], slope)
    assert torch.allclose(folds.bent(found[2], u), bent)
    for i in range(len(z)):
        e = torch.zeros_like(z)
        e[i] = 1.0
        assert torch.allclose(folds.diagonal(found[2])[i], folds.bent(found[2], e)[i])


def test_parameters_are_the_same_words_everywhere() -> None:
    names = {tuple(inspect.signature(each).parameters) for each in HO}
    assert len(names) == 1
