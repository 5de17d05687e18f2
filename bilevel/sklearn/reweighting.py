"""A classifier that finds mislabelled training samples, and learns to do without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from torch import Tensor
from torch.nn.functional import pad

from bilevel._problem import BilevelProblem
from bilevel.arguments.ranges import AT_LEAST_0, AT_LEAST_1, POSITIVE
from bilevel.hypergrad.aid import AID
from bilevel.inner_problems.linear_model import LogLoss
from bilevel.outer.minimize import minimize
from bilevel.outer.solution import Solution
from bilevel.problems.glm._rows import blocks_of
from bilevel.problems.glm.losses import Softmax
from bilevel.sklearn.base import numbered
from bilevel.sklearn.checks import check_seed, held_out_inputs, new_inputs, number, training_inputs
from bilevel.sklearn.features import Features
from bilevel.sklearn.learning import Task, warn_of
from bilevel.sklearn.parts import weights_of_folds
from bilevel.solvers.adam import Adam
from bilevel.solvers.cg import CG
from bilevel.solvers.jacobi import Jacobi
from bilevel.solvers.newton_pcg import NewtonPCG


@final
class SampleReweightingClassifier(ClassifierMixin, BaseEstimator):
    """Logistic regression, mean_i w_i log-loss_i + l2 |y|^2 / 2, with a learned weight w_i in (0, 1) for each sample.

    The weights sigmoid(x_i) begin at 1/2 and minimize, by hypergradients, the probability of a wrong prediction for
    samples held out, averaged over folds: a sample whose label is wrong harms the predictions for others. Held-out
    labels may be wrong as well. That loss, 1 - p(label), is what makes it possible: with labels that are wrong for no
    reason its mean is that with right labels, times a number, plus another, which is not so of the log-loss; there the
    weights learn the wrong labels that are held out. Where some samples can be trusted, give them to
    `fit(..., X_val=, y_val=)`, and they alone are held out.

    Cost: `max_iter` hypergradients, whatever the number of samples; each is one inner solve of all folds.

    Source: Shaban et al., "Truncated back-propagation for bilevel optimization", AISTATS 2019, for learned weights;
    Ghosh, Kumar, Sastry, "Robust loss functions under label noise for deep neural networks", AAAI 2017, for the loss.

    Args:
        l2: of the inner problem, for features of spread 1. The intercept is not penalized.
        cv: a number of (stratified) folds, a share of samples to hold out once, or a splitter; without `X_val`.
        threshold: samples whose weight is below are suspects. Weights begin at 0.5.
        max_iter: outer steps.
        step: of the outer method, Adam, in x.
        random_state: of the one split, where `cv` is a share.

    Attributes:
        sample_weights_: w `(n,)`, in (0, 1).
        suspects_: the samples of weight below the threshold, the most suspicious first: their indices.
        classes_: the classes `(C,)`.
        coef_: `(1, d)`, or `(C, d)`.
        intercept_: `(1,)`, or `(C,)`.
        validation_loss_: the mean probability of a wrong prediction held out.
        n_iter_: outer steps.
        solution_: the outer run, a `bilevel.Solution`.

    Raises:
        ValueError: from `fit`, if a parameter is out of range, there is one class only, or data do not fit.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> wrong = y.copy()
        >>> wrong[[3, 60, 120]] = [1, 0, 0]
        >>> model = SampleReweightingClassifier().fit(X, wrong)
        >>> {3, 60, 120} <= set(model.suspects_.tolist())
        True
    """

    def __init__(
        self,
        *,
        l2: float = 0.05,
        cv: Any = 5,
        threshold: float = 0.25,
        max_iter: int = 10,
        step: float = 0.3,
        random_state: Any = None,
    ) -> None:
        self.l2 = l2
        self.cv = cv
        self.threshold = threshold
        self.max_iter = max_iter
        self.step = step
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = BaseEstimator.__sklearn_tags__(self)
        of_classifiers = ClassifierMixin.__sklearn_tags__(self)
        tags.estimator_type, tags.classifier_tags = of_classifiers.estimator_type, of_classifiers.classifier_tags
        tags.input_tags.sparse = tags.target_tags.required = True
        return tags

    def fit(self, X: Any, y: Any, X_val: Any = None, y_val: Any = None) -> SampleReweightingClassifier:
        """Learn the weights, and fit all samples with them.

        Args:
            X: training inputs `(n, d)`.
            y: training labels, some of them wrong.
            X_val: inputs with labels that can be trusted; None: folds of the training samples are held out.
            y_val: their labels.
        """
        name = type(self).__name__
        l2, threshold = number(self, "l2", float, AT_LEAST_0), number(self, "threshold", float, AT_LEAST_0)
        step, max_steps = number(self, "step", float, POSITIVE), number(self, "max_iter", int, AT_LEAST_1)
        check_seed(self)
        X, y = training_inputs(self, X, y)
        self.classes_, labels = numbered(name, y)
        features, n = Features.of(X, intercept=True), X.shape[0]
        binary = len(self.classes_) == 2
        targets = (2 * labels - 1 if binary else labels).double().unsqueeze(1)
        if X_val is None:
            folds = weights_of_folds(name, self.cv, X, labels.numpy(), classifier=True, random_state=self.random_state)
        else:
            folds = (torch.full((1, n), 1 / n, dtype=torch.float64),) * 2
        loss, outputs = (LogLoss(), 1) if binary else (Softmax(), len(self.classes_))
        task = Task(features.X, targets, loss, outputs, *folds)
        held = self._trusted(X_val, y_val, features) if X_val is not None else (features.X, labels, task.held)
        penalty = pad(torch.full((features.count,), l2, dtype=torch.float64), (0, 1))
        x = torch.zeros(n, dtype=torch.float64)
        found = minimize(
            BilevelProblem(error_probability(*held), task.model(task.train, penalty, torch.sigmoid)),
            x,
            torch.zeros(len(task.train) * outputs, features.X.shape[1], dtype=torch.float64),
            estimator=_estimator(1e-6),
            outer=Adam(step),
            max_steps=max_steps,
            throw=False,
        )
        warn_of(name, found)
        x, whole = found.x, task.everything()
        assert isinstance(x, Tensor)
        model = whole.model(whole.train, penalty, torch.sigmoid)
        y0 = torch.zeros(outputs, features.X.shape[1], dtype=torch.float64)
        last = minimize(BilevelProblem(model, model), x, y0, estimator=_estimator(1e-8), max_steps=0, throw=False)
        assert isinstance(last.y, Tensor)
        self.coef_, b = features.back(last.y)
        self.intercept_ = b if binary else b - b.mean()
        self.sample_weights_ = torch.sigmoid(x).numpy()
        order = self.sample_weights_.argsort(kind="stable")
        self.suspects_ = order[self.sample_weights_[order] < threshold]
        self.validation_loss_ = found.value
        self.n_iter_ = max(1, len(found.history) - 1)
        self.solution_ = Solution.from_dict(found.to_dict())  # without the data that it holds on to
        return self

    def decision_function(self, X: Any) -> Any:
        """The outputs `(n,)`, or `(n, C)` for more than two classes."""
        X = new_inputs(self, X, "decision_function")
        found = np.asarray(X @ self.coef_.T + self.intercept_)
        return found[:, 0] if len(self.classes_) == 2 else found

    def predict(self, X: Any) -> Any:
        """The classes `(n,)`."""
        found = self.decision_function(X)
        return self.classes_[(found > 0).astype(int) if found.ndim == 1 else found.argmax(1)]

    def predict_proba(self, X: Any) -> Any:
        """The probabilities of the classes `(n, C)`."""
        z = torch.from_numpy(self.decision_function(X))
        z = torch.stack([torch.zeros_like(z), z], 1) if z.dim() == 1 else z
        return torch.softmax(z, 1).numpy()

    def _trusted(self, X: Any, y: Any, features: Features) -> tuple[Tensor, Tensor, Tensor]:
        X, y = held_out_inputs(self, X, y)
        unknown = set(np.unique(y).tolist()) - set(self.classes_.tolist())
        if unknown:
            raise ValueError(
                f"`{type(self).__name__}.fit(y_val=...)` must have classes that y has. Got {sorted(unknown)} besides."
            )
        labels = torch.from_numpy(np.searchsorted(self.classes_, y).astype(np.int64))
        return features.like(X), labels, torch.full((1, len(labels)), 1 / len(labels), dtype=torch.float64)


def error_probability(X: Tensor, labels: Tensor, weights: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, y) -> sum_ki w_ki (1 - p_k(label_i)) for y of K folds, those of C outputs each after each other."""
    (block,) = blocks_of(X, whole=True)

    def f(_: Tensor, y: Tensor) -> Tensor:
        z = block.times(y).reshape(len(weights), -1, len(labels))
        if z.shape[1] == 1:
            p = torch.sigmoid(torch.where(labels == 1, z[:, 0], -z[:, 0]))
        else:
            p = torch.softmax(z, 1).gather(1, labels.expand(len(weights), 1, -1)).squeeze(1)
        return (weights * (1 - p)).sum()

    return f


def _estimator(tol: float) -> AID:
    return AID(NewtonPCG(tol), CG(rtol=1e-3, preconditioner=Jacobi()))
