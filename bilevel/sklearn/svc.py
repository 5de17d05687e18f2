"""Linear support vector machines with learned penalties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.arguments.checked import fitting
from bilevel.inner_problems.linear_model import AbstractSampleLoss
from bilevel.sklearn.base import AbstractLinearClassifierHO
from bilevel.sklearn.features import Features
from bilevel.sklearn.ridge import quadratic


@final
@dataclass(frozen=True)
class SquaredHinge(AbstractSampleLoss):
    """l = max(1 - b z, 0)^2 / 2 for b = 1 or -1. Its curvature jumps where b z = 1; the one taken there is 0.

    Example:
        >>> SquaredHinge().value(torch.tensor(0.0), torch.tensor(1.0))
        tensor(0.5000)
    """

    @fitting
    def value(self, z: Tensor, b: Tensor) -> Tensor:
        return (1 - b * z).relu().square() / 2

    @fitting
    def slope(self, z: Tensor, b: Tensor) -> Tensor:
        return -b * (1 - b * z).relu()

    @fitting
    def curvature(self, z: Tensor, b: Tensor) -> Tensor:
        return (b * z < 1).to(z.dtype)


@final
class SVCHO(AbstractLinearClassifierHO):
    """min_w mean_i max(1 - t_i (X_i w + b), 0)^2 / 2 + sum_j a_j w_j^2 / 2, t_i = 1 or -1, with learned penalties a_j.

    A linear support vector machine with the squared hinge loss, which is `LinearSVC`'s: of two classes one machine, of
    more one against the rest for each class, all with the same penalties. They are learned by hypergradients of the
    same loss held out, averaged over folds, in their logarithms, first one for all features and then each for itself.
    A sample on the margin is a kink of the second derivative only: the hypergradient exists, and jumps there.
    `LinearSVC(C=1 / (2 * n * a))` is the same machine where all features have one penalty a, but for its intercept,
    which it penalizes.

    The hinge loss itself, by the dual, with one learned cost: `bilevel.problems.support_vectors.svm`.

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
        support_: the samples inside of a margin, which are those that w depends on: their indices.
        validation_loss_: the mean loss held out, at these penalties, summed over the machines.
        n_iter_: outer steps.
        solution_: the outer run, a `bilevel.Solution`.

    Raises:
        ValueError: from `fit`, if a parameter is out of range, there is one class only, or data do not fit.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> model = SVCHO(cv=3, max_iter=5).fit(X, y == 0)
        >>> model.score(X, y == 0), len(model.support_) < 50
        (1.0, True)
    """

    def fit(self, X: Any, y: Any) -> SVCHO:
        """Learn the penalties, and fit all samples with them."""
        X, y = self._inputs(X, y)
        labels, features = self._labels(y), Features.of(X, self.fit_intercept)
        outputs = 1 if len(self.classes_) == 2 else len(self.classes_)
        positive = labels.unsqueeze(1) == (torch.arange(outputs) if outputs > 1 else torch.ones(1))
        targets = 2 * positive.double() - 1
        task = self._task(X, labels.numpy(), targets, features, SquaredHinge(), outputs)
        reference = self._references(features, 2)
        start = torch.tensor(-4.0, dtype=torch.float64)
        found, a = self._learn(task, quadratic(features, reference), features, start, -14.0, 6.0)
        self.coef_, self.intercept_ = features.back(found.y)
        self.penalties_ = (a * reference * features.scale**2).numpy()
        self.validation_loss_ = found.solution.best.value
        margins = targets.numpy() * (X @ self.coef_.T + self.intercept_)
        self.support_ = (margins < 1).any(1).nonzero()[0]
        return self
