"""Logistic regression with learned penalties."""

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch

from bilevel.inner_problems.linear_model import LogLoss
from bilevel.problems.glm.losses import Softmax
from bilevel.sklearn.base import AbstractLinearClassifierHO
from bilevel.sklearn.features import Features
from bilevel.sklearn.ridge import quadratic


@final
class LogisticRegressionHO(AbstractLinearClassifierHO):
    """min_w mean_i log-loss(X_i w + b, y_i) + sum_j a_j |w_j|^2 / 2, with penalties a_j that minimize a held-out loss.

    Two classes have one w, more of them a row of w for each class, which share the penalty of a feature. The penalties
    are learned by hypergradients of the mean log-loss over folds, in their logarithms, first one for all features and
    then each for itself. `LogisticRegression(C=1 / (n * a))` is the same model where all features have one penalty a.

    Cost: see :class:`RidgeHO`; an inner solve is Newton's method with conjugate gradients, from where the last ended.

    Args:
        penalties: "each": one for each feature; "one"; or a label for each feature, those of equal labels share one.
            "auto" is "each" where there are ten samples or more for each feature, else "one": more penalties than that
            fit what is held out, and predict worse than one.
        cv: a number of (stratified) folds, a share of samples to hold out once (0.25), or a splitter of scikit-learn.
        fit_intercept: whether there is a b; it is not penalized.
        max_iter: outer steps of a stage, at most. Few are a way to choose the penalties less closely.
        tol: of the outer method, relative to the gradient at the start.
        random_state: of the one split, where `cv` is a share.

    Attributes:
        classes_: the classes `(C,)`.
        coef_: w `(1, d)`, or `(C, d)`.
        intercept_: b `(1,)`, or `(C,)`.
        penalties_: a `(d,)`, of the features as they came.
        validation_loss_: the mean log-loss held out, at these penalties.
        n_iter_: outer steps.
        solution_: the outer run, a `bilevel.Solution`.

    Raises:
        ValueError: from `fit`, if a parameter is out of range, there is one class only, or data do not fit.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> model = LogisticRegressionHO(cv=3, max_iter=5).fit(X, y)
        >>> model.score(X, y) > 0.95, model.penalties_.shape
        (True, (4,))
    """

    def fit(self, X: Any, y: Any) -> LogisticRegressionHO:
        """Learn the penalties, and fit all samples with them."""
        X, y = self._inputs(X, y)
        labels, features = self._labels(y), Features.of(X, self.fit_intercept)
        binary = len(self.classes_) == 2
        targets = (2 * labels - 1 if binary else labels).double().unsqueeze(1)
        loss, outputs = (LogLoss(), 1) if binary else (Softmax(), len(self.classes_))
        task = self._task(X, labels.numpy(), targets, features, loss, outputs)
        reference = self._references(features, 2)
        start = torch.tensor(-4.0, dtype=torch.float64)
        found, a = self._learn(task, quadratic(features, reference), features, start, -14.0, 6.0)
        self.coef_, b = features.back(found.y)
        self.intercept_ = b if binary else b - b.mean()  # of more than two, only differences matter
        self.penalties_ = (a * reference * features.scale**2).numpy()
        self.validation_loss_ = found.solution.best.value
        return self

    def predict_proba(self, X: Any) -> Any:
        """The probabilities of the classes `(n, C)`."""
        return np.exp(self.predict_log_proba(X))

    def predict_log_proba(self, X: Any) -> Any:
        """Their logarithms `(n, C)`."""
        z = torch.from_numpy(np.asarray(self.decision_function(X), dtype=float))
        z = torch.stack([torch.zeros_like(z), z], 1) if z.dim() == 1 else z
        return torch.log_softmax(z, 1).numpy()
