"""What the estimators of this package share: arguments, their checks, and predictions of a linear model."""

from __future__ import annotations

import abc
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.preprocessing import LabelEncoder
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from torch import Tensor

from bilevel.arguments.ranges import AT_LEAST_1, BELOW_1
from bilevel.outer.solution import Solution
from bilevel.sklearn.checks import check_seed, named, new_inputs, number, training_inputs
from bilevel.sklearn.features import Features
from bilevel.sklearn.groups import group_numbers, references
from bilevel.sklearn.learning import Learned, Posed, Search, Task
from bilevel.sklearn.parts import weights_of_folds


class AbstractLinearHO(BaseEstimator, abc.ABC):
    """A linear model whose penalties are learned. Parameters are those of the constructor; `fit` looks at them."""

    coef_: Any
    intercept_: Any
    power = 2  # of the coefficients in the penalty

    def __init__(
        self,
        penalties: Any = "auto",
        *,
        cv: Any = 5,
        fit_intercept: bool = True,
        max_iter: int = 30,
        tol: float = 1e-3,
        random_state: Any = None,
    ) -> None:
        self.penalties = penalties
        self.cv = cv
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = BaseEstimator.__sklearn_tags__(self)
        tags.input_tags.sparse = True
        tags.target_tags.required = True
        return tags

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _inputs(self, X: Any, y: Any, **others: Any) -> tuple[Any, Any]:
        number(self, "max_iter", int, AT_LEAST_1)
        number(self, "tol", float, BELOW_1)
        number(self, "fit_intercept", bool)
        check_seed(self)
        return training_inputs(self, X, y, **others)

    def _predicted(self, X: Any) -> Any:
        X = new_inputs(self, X)
        return np.asarray(X @ self.coef_.T + self.intercept_)

    def _task(self, X: Any, y: Any, targets: Tensor, features: Features, loss: Any, outputs: int) -> Task:
        classifier = isinstance(self, ClassifierMixin)
        folds = weights_of_folds(self._name, self.cv, X, y, classifier=classifier, random_state=self.random_state)
        return Task(features.X, targets, loss, outputs, *folds)

    def _learn(
        self, task: Task, posed: Posed, features: Features, start: Tensor, lower: float, upper: float
    ) -> tuple[Learned, Tensor]:
        """What is learned, and the penalties of the features as they came `(..., d)`."""
        groups = group_numbers(self._name, self.penalties, features.count, features.X.shape[0])
        search = Search(
            self._name, groups, start, lower, upper, number(self, "max_iter", int), number(self, "tol", float)
        )
        found = search.learn(task, posed)
        self.n_iter_ = found.steps
        self.solution_ = Solution.from_dict(found.solution.to_dict())  # without the data that it holds on to
        return found, found.x[..., groups].exp()

    def _references(self, features: Features, power: int) -> Tensor:
        groups = group_numbers(self._name, self.penalties, features.count, features.X.shape[0])
        return references(features.scale, groups, power)


class AbstractLinearRegressorHO(RegressorMixin, AbstractLinearHO, abc.ABC):
    """A linear model of numbers."""

    def __sklearn_tags__(self) -> Any:
        tags = AbstractLinearHO.__sklearn_tags__(self)
        of_regressors = RegressorMixin.__sklearn_tags__(self)
        tags.estimator_type, tags.regressor_tags = of_regressors.estimator_type, of_regressors.regressor_tags
        return tags

    def predict(self, X: Any) -> Any:
        """The predictions `(n,)`."""
        return self._predicted(X)

    def _standard(self, X: Any, y: Any) -> tuple[Features, Tensor, float, float]:
        """Features and targets of spread 1, and what gives the targets back: spread and mean."""
        features = Features.of(X, self.fit_intercept)
        mean = float(y.mean()) if self.fit_intercept else 0.0
        spread = float(np.sqrt(np.mean((y - mean) ** 2))) or 1.0
        return features, torch.from_numpy((y - mean) / spread).unsqueeze(1), spread, mean


class AbstractLinearClassifierHO(ClassifierMixin, AbstractLinearHO, abc.ABC):
    """A linear model of classes: one output for two of them, else one for each."""

    classes_: Any

    def __sklearn_tags__(self) -> Any:
        tags = AbstractLinearHO.__sklearn_tags__(self)
        of_classifiers = ClassifierMixin.__sklearn_tags__(self)
        tags.estimator_type, tags.classifier_tags = of_classifiers.estimator_type, of_classifiers.classifier_tags
        return tags

    def decision_function(self, X: Any) -> Any:
        """The outputs `(n,)`, or `(n, C)` for more than two classes."""
        found = self._predicted(X)
        return found[:, 0] if len(self.classes_) == 2 else found

    def predict(self, X: Any) -> Any:
        """The classes `(n,)`."""
        found = self.decision_function(X)
        return self.classes_[(found > 0).astype(int) if found.ndim == 1 else found.argmax(1)]

    def _labels(self, y: Any) -> Tensor:
        """The numbers of the classes `(n,)`."""
        self.classes_, numbers = numbered(self._name, y)
        return numbers


def numbered(name: str, y: Any) -> tuple[Any, Tensor]:
    """The classes, and labels as their numbers.

    Raises:
        ValueError: if they are not classes, or there is only one.
    """
    encoder: Any = LabelEncoder()
    with named(f"{name}.fit", y=y):
        check_classification_targets(y)
        numbers = encoder.fit_transform(y)
    if len(encoder.classes_) < 2:
        raise ValueError(f"`{name}.fit(y=...)` must have at least two classes. Got one class: {encoder.classes_[0]!r}.")
    return encoder.classes_, torch.from_numpy(numbers.astype(np.int64))


def is_classification(y: Any) -> bool:
    """Whether targets are classes: texts, booleans or whole numbers."""
    return type_of_target(y) in ("binary", "multiclass")
