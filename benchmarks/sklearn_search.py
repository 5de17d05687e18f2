"""Penalties of scikit-learn's models: by hypergradients, one by cross-validation, and random search and Optuna.

The last two get the CPU time that the first has taken. 400 samples, 500 features in p groups of
one penalty each, of which a quarter matters; 5 folds.
`python benchmarks/sklearn_search.py` prints the table of docs/sklearn.md.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import _threads  # noqa: F401
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso, LassoCV, LogisticRegression, LogisticRegressionCV, Ridge, RidgeCV
from sklearn.model_selection import KFold, StratifiedKFold

from bilevel.sklearn import LassoHO, LogisticRegressionHO, RidgeHO

FOLDS, LOWEST, HIGHEST = 5, -12.0, 3.0  # of log penalties, for searches
Array = Any


@dataclass(frozen=True)
class Data:
    """Training and test parts, and the group of each feature."""

    X: Array
    y: Array
    X_test: Array
    y_test: Array
    groups: Array


@dataclass(frozen=True)
class Model:
    """How a model is fitted with penalties of features, and what its loss is."""

    ours: Any
    one: Callable[[], Any]
    fitted: Callable[[Array, Array, Array], Any]
    loss: Callable[[Any, Array, Array], float]
    is_classifier: bool


class Scaled:
    """A model of features that are divided by what their penalty is to be."""

    def __init__(self, model: Any, by: Array) -> None:
        self.model, self.by = model, by

    def fit(self, X: Array, y: Array) -> Scaled:
        self.model.fit(X / self.by, y)
        return self

    def predict(self, X: Array) -> Array:
        return self.model.predict(X / self.by)

    def predict_proba(self, X: Array) -> Array:
        return self.model.predict_proba(X / self.by)


def squared(model: Any, X: Array, y: Array) -> float:
    return float(np.mean((model.predict(X) - y) ** 2))


def log_loss(model: Any, X: Array, y: Array) -> float:
    p = model.predict_proba(X)[np.arange(len(y)), y]
    return float(-np.log(p.clip(1e-15)).mean())


def ridge(X: Array, y: Array, a: Array) -> Any:
    return Scaled(Ridge(alpha=len(y)), np.sqrt(a)).fit(X, y)


def lasso(X: Array, y: Array, a: Array) -> Any:
    return Scaled(Lasso(alpha=1.0), a).fit(X, y)


def logistic(X: Array, y: Array, a: Array) -> Any:
    return Scaled(LogisticRegression(C=1 / len(y), max_iter=500), np.sqrt(a)).fit(X, y)


MODELS = {
    "ridge": Model(RidgeHO, lambda: RidgeCV(np.logspace(-3, 5, 30)), ridge, squared, False),
    "lasso": Model(LassoHO, lambda: LassoCV(cv=FOLDS), lasso, squared, False),
    "logistic": Model(
        LogisticRegressionHO,
        lambda: LogisticRegressionCV(
            Cs=np.logspace(-5, 2, 15), cv=FOLDS, scoring="neg_log_loss", max_iter=500, use_legacy_attributes=False
        ),
        logistic,
        log_loss,
        True,
    ),
}


def data(p: int, seed: int, classes: bool, n: int = 400, d: int = 500) -> Data:
    """Groups of d / p features; a quarter of the groups (at least one) matters, each with a scale of its own."""
    draw = np.random.default_rng(seed)
    groups = np.arange(d) % p
    scale = np.where(np.arange(p) < max(1, p // 4), np.exp(draw.normal(size=p)), 0.0)
    w = draw.normal(size=d) * scale[groups]
    w *= 2 / np.linalg.norm(w)
    X = draw.normal(size=(n + 5000, d))
    y = X @ w + draw.normal(size=len(X))
    y = (y > 0).astype(int) if classes else y
    return Data(X[:n], y[:n], X[n:], y[n:], groups)


def held_out(model: Model, given: Data, logs: Array) -> float:
    """The mean loss of the folds."""
    a = np.exp(logs)[given.groups]
    folds = (StratifiedKFold if model.is_classifier else KFold)(FOLDS)
    found = []
    for train, test in folds.split(given.X, given.y):
        found.append(model.loss(model.fitted(given.X[train], given.y[train], a), given.X[test], given.y[test]))
    return float(np.mean(found))


def random_search(model: Model, given: Data, p: int, seconds: float, seed: int) -> tuple[Array, int]:
    """The best of points drawn uniformly, and how many."""
    draw, begun, best, count = np.random.default_rng(seed), time.process_time(), (np.inf, np.full(p, -2.0)), 0
    while time.process_time() - begun < seconds:
        logs = np.full(p, -2.0) if count == 0 else draw.uniform(LOWEST, HIGHEST, p)
        value = held_out(model, given, logs)
        best, count = min(best, (value, logs), key=lambda each: each[0]), count + 1
    return best[1], count


def optuna_search(model: Model, given: Data, p: int, seconds: float, seed: int) -> tuple[Array, int]:
    """What its default sampler (TPE) finds, and after how many trials."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial({str(j): -2.0 for j in range(p)})

    def objective(trial: Any) -> float:
        return held_out(model, given, np.array([trial.suggest_float(str(j), LOWEST, HIGHEST) for j in range(p)]))

    begun = time.process_time()

    def stop(study: Any, _: Any) -> None:
        if time.process_time() - begun >= seconds:
            study.stop()

    study.optimize(objective, callbacks=[stop])
    return np.array([study.best_params[str(j)] for j in range(p)]), len(study.trials)


def row(name: str, p: int, seed: int) -> dict[str, float]:
    """Test losses and seconds of each method."""
    model = MODELS[name]
    given = data(p, seed, model.is_classifier)
    begun = time.process_time()
    ours = model.ours(given.groups, cv=FOLDS).fit(given.X, given.y)
    seconds = time.process_time() - begun
    begun = time.process_time()
    one = model.one().fit(given.X, given.y)
    found = {
        "seconds": seconds,
        "learned": model.loss(ours, given.X_test, given.y_test),
        "one seconds": time.process_time() - begun,
        "one": model.loss(one, given.X_test, given.y_test),
    }
    for key, search in (("random", random_search), ("optuna", optuna_search)):
        logs, count = search(model, given, p, seconds, seed)
        fitted = model.fitted(given.X, given.y, np.exp(logs)[given.groups])
        found |= {key: model.loss(fitted, given.X_test, given.y_test), f"{key} trials": count}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="ridge,lasso,logistic")
    parser.add_argument("--sizes", default="2,8,50,500")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)  # of coordinate descent at penalties far away
    warnings.simplefilter("ignore", FutureWarning)
    print("| model | penalties | learned | one, by CV | random search | Optuna | s | s of CV | trials |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name in options.models.split(","):
        for p in map(int, options.sizes.split(",")):
            rows = [row(name, p, seed) for seed in range(options.seeds)]
            mean = {key: float(np.mean([each[key] for each in rows])) for key in rows[0]}
            losses = [mean[key] for key in ("learned", "one", "random", "optuna")]
            cells = " | ".join(f"**{value:.3f}**" if value == min(losses) else f"{value:.3f}" for value in losses)
            times = f"{mean['seconds']:.2f} | {mean['one seconds']:.2f}"
            trials = f"{mean['random trials']:.0f}, {mean['optuna trials']:.0f}"
            print(f"| {name} | {p} | {cells} | {times} | {trials} |", flush=True)


if __name__ == "__main__":
    main()
