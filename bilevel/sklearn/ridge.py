"""Ridge regression with learned penalties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from bilevel.inner_problems.linear_model import Squared
from bilevel.sklearn.base import AbstractLinearRegressorHO
from bilevel.sklearn.features import Features
from bilevel.sklearn.learning import Posed


@final
class RidgeHO(AbstractLinearRegressorHO):
    """min_w |X w + b - y|^2 / 2n + sum_j a_j w_j^2 / 2, with penalties a_j that minimize a held-out loss.

    The penalties are learned by hypergradients: of the mean squared error, averaged over folds, in the logarithms of
    all penalties, first one for all features and then each for itself. With what was best the model is fitted to all
    samples. `Ridge(alpha=n * a)` is the same model where all features have one penalty a.

    Cost: some `max_iter` evaluations of each stage, one inner solve of all folds each, from where the last ended; a
    gradient reads X once for all folds. 500 penalties cost about what 5 do, times the time of a product.

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
        solution_: the outer run, a `bilevel.Solution`: its history, its status, its hypergradient.

    Raises:
        ValueError: from `fit`, if a parameter is out of range, or data do not fit.

    Example:
        >>> import numpy as np
        >>> draw = np.random.default_rng(0)
        >>> X = draw.normal(size=(60, 8))
        >>> y = 3 * X[:, 0] + draw.normal(size=60)
        >>> model = RidgeHO("each").fit(X, y)
        >>> bool(model.penalties_[0] < model.penalties_[1:].min())
        True
    """

    def fit(self, X: Any, y: Any) -> RidgeHO:
        """Learn the penalties, and fit all samples with them."""
        X, y = self._inputs(X, y, y_numeric=True)
        features, targets, spread, mean = self._standard(X, y.astype(float))
        task = self._task(X, y, targets, features, Squared(), 1)
        reference = self._references(features, 2)
        start = torch.tensor(-2.0, dtype=torch.float64)
        found, a = self._learn(task, quadratic(features, reference), features, start, -14.0, 9.0)
        w, b = features.back(found.y[0] * spread)
        self.coef_, self.intercept_ = w, float(b) + mean
        self.penalties_ = (a * reference * features.scale**2).numpy()
        self.validation_loss_ = 2 * spread**2 * found.solution.best.value
        return self


def quadratic(features: Features, reference: Tensor) -> Posed:
    """The penalty exp(x) for each feature, none for the intercept, as part of a problem."""

    def penalty_of(each: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: pad(each(x).exp() * reference, (0, int(features.intercept)))

    return lambda task, each: task.smooth(penalty_of(each))
