"""The elastic net with learned penalties."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from bilevel.inner_problems.linear_model import Squared
from bilevel.prox.elastic_net import ElasticNet
from bilevel.sklearn.base import AbstractLinearRegressorHO
from bilevel.sklearn.lasso import DEPTH, HIGH, highest
from bilevel.sklearn.learning import Posed


@final
class ElasticNetHO(AbstractLinearRegressorHO):
    """min_w |X w + b - y|^2 / 2n + sum_j a_j |w_j| + sum_j c_j w_j^2 / 2, with learned penalties a_j and c_j.

    Both are learned by hypergradients of the mean squared error held out, averaged over folds, in their logarithms,
    first one pair for all features and then each for itself: with `penalties="each"` 2 d of them. `ElasticNet(alpha=a +
    c, l1_ratio=a / (a + c))` is the same model where all features have one pair.

    Cost: see :class:`LassoHO`. Sparse inputs are made dense.

    Args:
        penalties: "each": a pair for each feature; "one"; or a label for each feature, those of equal labels share one.
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
        l1_penalties_: a `(d,)`, of the features as they came.
        l2_penalties_: c `(d,)`, likewise.
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
        >>> ElasticNetHO("one", cv=3, max_iter=10).fit(X, y).score(X, y) > 0.8
        True
    """

    def fit(self, X: Any, y: Any) -> ElasticNetHO:
        """Learn the penalties, and fit all samples with them."""
        X, y = self._inputs(X, y, y_numeric=True)
        features, targets, spread, mean = self._standard(X, y.astype(float))
        task = self._task(X, y, targets, features, Squared(), 1)
        task = replace(task, X=features.dense())
        l1, l2 = self._references(features, 1), self._references(features, 2)
        top, last = highest(task, features, l1), (0, int(features.intercept))

        def term(each: Callable[[Tensor], Tensor]) -> Callable[[Tensor], ElasticNet]:
            def at(x: Tensor) -> ElasticNet:
                a = each(x).exp()
                return ElasticNet(pad(a[0] * l1, last), pad(a[1] * l2, last))

            return at

        posed: Posed = lambda task, each: task.sparse(term(each))  # noqa: E731
        start = torch.full((2,), top - math.log(10.0), dtype=torch.float64)
        found, a = self._learn(task, posed, features, start, top - DEPTH, top + HIGH)
        w, b = features.back(found.y * spread)
        self.coef_, self.intercept_ = w, float(b) + mean
        self.l1_penalties_ = (a[0] * l1 * features.scale * spread).numpy()
        self.l2_penalties_ = (a[1] * l2 * features.scale**2).numpy()
        self.validation_loss_ = 2 * spread**2 * found.solution.best.value
        return self
