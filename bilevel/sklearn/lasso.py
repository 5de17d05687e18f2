"""The lasso with learned penalties."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from bilevel.inner_problems.linear_model import Squared
from bilevel.prox.l1 import L1
from bilevel.sklearn.base import AbstractLinearRegressorHO
from bilevel.sklearn.features import Features
from bilevel.sklearn.learning import Posed, Task

DEPTH, HIGH = 12.0, math.log(0.9)  # log penalties between log top - 12 and log top + log 0.9: above all is zero


@final
class LassoHO(AbstractLinearRegressorHO):
    """min_w |X w + b - y|^2 / 2n + sum_j a_j |w_j|, with penalties a_j that minimize a held-out loss.

    The penalties are learned by hypergradients, which the support alone enters: of the mean squared error, averaged
    over folds, in their logarithms, first one for all features and then each for itself. A feature without a
    coefficient in any fold has no say in its own penalty, so that it stays out. `Lasso(alpha=a)` is the same model
    where all features have one penalty a.

    Cost: see :class:`RidgeHO`; an inner solve is coordinate descent on a working set, fold after fold. Sparse inputs
    are made dense.

    Source: Bertrand et al., "Implicit differentiation for fast hyperparameter selection in non-smooth convex learning",
    JMLR 23 (2022).

    Args:
        penalties: "each": one for each feature; "one"; or a label for each feature, those of equal labels share one.
            "auto" is "each" where there are ten samples or more for each feature, else "one": more penalties than that
            fit what is held out, and predict worse than one.
        cv: a number of folds, a share of samples to hold out once (0.25), or a splitter of scikit-learn.
        fit_intercept: whether there is a b; it is not penalized.
        max_iter: outer steps of a stage, at most. Few are a way to choose the penalties less closely.
        tol: of the outer method, relative to the gradient at the start.
        random_state: of the one split, where `cv` is a share.

    Attributes:
        coef_: w `(d,)`.
        intercept_: b.
        penalties_: a `(d,)`, of the features as they came.
        validation_loss_: the mean squared error held out, at these penalties.
        n_iter_: outer steps.
        solution_: the outer run, a `bilevel.Solution`.

    Raises:
        ValueError: from `fit`, if a parameter is out of range, or data do not fit.

    Example:
        >>> import numpy as np
        >>> draw = np.random.default_rng(0)
        >>> X = draw.normal(size=(60, 8))
        >>> y = 3 * X[:, 0] + draw.normal(size=60)
        >>> model = LassoHO("each", cv=3, max_iter=10).fit(X, y)
        >>> bool(abs(model.coef_[0]) > 10 * abs(model.coef_[1:]).max())
        True
    """

    power = 1

    def fit(self, X: Any, y: Any) -> LassoHO:
        """Learn the penalties, and fit all samples with them."""
        X, y = self._inputs(X, y, y_numeric=True)
        features, targets, spread, mean = self._standard(X, y.astype(float))
        task = self._task(X, y, targets, features, Squared(), 1)
        task = replace(task, X=features.dense())
        reference = self._references(features, 1)
        top = highest(task, features, reference)

        def term(each: Callable[[Tensor], Tensor]) -> Callable[[Tensor], L1]:
            return lambda x: L1(pad(each(x).exp() * reference, (0, int(features.intercept))))

        posed: Posed = lambda task, each: task.sparse(term(each))  # noqa: E731
        start = torch.tensor(top - math.log(10.0), dtype=torch.float64)
        found, a = self._learn(task, posed, features, start, top - DEPTH, top + HIGH)
        w, b = features.back(found.y * spread)
        self.coef_, self.intercept_ = w, float(b) + mean
        self.penalties_ = (a * reference * features.scale * spread).numpy()
        self.validation_loss_ = 2 * spread**2 * found.solution.best.value
        return self


def highest(task: Task, features: Features, reference: Tensor) -> float:
    """log of the penalty from which on all coefficients are zero, of features and targets of spread 1."""
    slopes = (task.X.mT @ task.targets[:, 0])[: features.count] / task.X.shape[0]
    return math.log(max(float((slopes.abs() / reference).max()), 1e-10))
