"""How much each training sample helps or harms predictions for others."""

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.nn.functional import linear

from bilevel.arguments.fits import demand_type
from bilevel.arguments.ranges import COUNT, POSITIVE, demand_range
from bilevel.attribution.influence import influence
from bilevel.inner_problems.linear_model import AbstractSampleLoss, LogLoss, Squared
from bilevel.problems.glm.losses import AbstractRowLoss, Softmax, SumOfOutputs
from bilevel.sklearn.base import is_classification, numbered
from bilevel.sklearn.checks import check_seed, held_out_inputs, number, training_inputs
from bilevel.sklearn.features import Features
from bilevel.sklearn.learning import Task, run
from bilevel.sklearn.parts import weights_of_folds
from bilevel.solvers.cg import CG


@final
class InfluenceScorer(BaseEstimator):
    """Scores of training samples: to first order, by how much a held-out loss would rise without sample i.

    The model is linear, logistic regression for classes (texts, booleans, whole numbers) and least squares for other
    targets, with l2 |y|^2 / 2 added to the mean loss. A negative score is that of a sample which harms, as one with a
    wrong label does. Without `X_val` each fold is held out once, and a score is the mean over the folds that the sample
    trains in. See :func:`bilevel.influence` for what the first order misses.

    Cost: one fit of all folds side by side, and for each fold one linear system. Sparse inputs are made dense.

    Args:
        l2: for features of spread 1 (and targets of spread 1), on the intercept too.
        cv: a number of folds, a share of samples to hold out once, or a splitter; without `X_val`.
        random_state: of the one split, where `cv` is a share.

    Attributes:
        scores_: `(n,)`; NaN for a sample that trains in no fold.
        errors_: an estimate of what the linear systems leave of error in them `(n,)`.
        influences_: what `bilevel.influence` has found, fold by fold.

    Raises:
        ValueError: from `fit`, if a parameter is out of range, or data do not fit.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> y[3] = 2
        >>> InfluenceScorer().fit(X, y).most_harmful(1)
        array([3])
    """

    def __init__(self, *, l2: float = 1e-2, cv: Any = 5, random_state: Any = None) -> None:
        self.l2 = l2
        self.cv = cv
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = BaseEstimator.__sklearn_tags__(self)
        tags.input_tags.sparse = tags.target_tags.required = True
        return tags

    def fit(self, X: Any, y: Any, X_val: Any = None, y_val: Any = None) -> InfluenceScorer:
        """Fit the model, and score the samples.

        Args:
            X: training inputs `(n, d)`.
            y: targets or labels.
            X_val: inputs whose loss is what samples are scored for; None: folds of the training samples are held out.
            y_val: their targets.
        """
        name = type(self).__name__
        penalty = number(self, "l2", float, POSITIVE)
        check_seed(self)
        X, y = training_inputs(self, X, y)
        features = Features.of(X, intercept=True)
        targets, loss, outputs, encode = self._model(name, y)
        classifier, n = not isinstance(loss, Squared), X.shape[0]
        if X_val is None:
            folds = weights_of_folds(name, self.cv, X, y, classifier=classifier, random_state=self.random_state)
        else:
            folds = (torch.full((1, n), 1 / n, dtype=torch.float64),) * 2
        task = Task(features.X, targets, loss, outputs, *folds)
        l2 = torch.tensor(penalty, dtype=torch.float64)
        fit = run(task, task.smooth(lambda x: l2 + 0 * x), torch.zeros((), dtype=torch.float64), 0).y
        assert isinstance(fit, Tensor)
        rows = features.dense()
        given = None
        if X_val is not None:
            X_val, y_val = held_out_inputs(self, X_val, y_val)
            given = features.like(X_val).to_dense(), encode(y_val)
        total, errors, count = torch.zeros(3, n, dtype=torch.float64)
        found = []
        fits, losses = fit.reshape(len(task.train), outputs, -1), losses_of(loss)
        for params, train, held in zip(fits, task.train > 0, task.held > 0, strict=True):
            test = (rows[held], targets[held]) if given is None else given
            data = (rows[train], targets[train]), test
            one = influence(losses, params, *data, l2=penalty, solver=CG(rtol=1e-6), throw=False)
            found.append(one)
            total[train] += one.scores
            errors[train] += one.errors
            count[train] += 1
        self.scores_, self.errors_ = (total / count).numpy(), (errors / count).numpy()
        self.influences_ = tuple(found)
        return self

    def most_harmful(self, count: int) -> Any:
        """The samples with the lowest scores, the worst first: `(count,)` indices."""
        check_is_fitted(self)
        call = f"{type(self).__name__}.most_harmful"
        demand_type(call, "count", count, int)
        demand_range(call, "count", count, COUNT)
        return self.scores_.argsort(kind="stable")[:count]

    def _model(self, name: str, y: Any) -> tuple[Tensor, AbstractRowLoss | AbstractSampleLoss, int, Any]:
        """Targets `(n, 1)`, the loss, the number of outputs, and how other targets are written."""
        if not is_classification(y):
            y = y.astype(float)
            mean, spread = y.mean(), y.std() or 1.0

            def scaled(y: Any) -> Tensor:
                return torch.from_numpy((np.asarray(y, dtype=float) - mean) / spread).unsqueeze(1)

            return scaled(y), Squared(), 1, scaled
        self.classes_, _ = numbered(name, y)
        binary = len(self.classes_) == 2

        def labels(y: Any) -> Tensor:
            if not np.isin(y, self.classes_).all():
                raise ValueError(f"`{name}.fit(y_val=...)` must have classes that y has: {self.classes_.tolist()}.")
            numbers = torch.from_numpy(np.searchsorted(self.classes_, y).astype(np.int64)).double().unsqueeze(1)
            return 2 * numbers - 1 if binary else numbers

        return labels(y), LogLoss() if binary else Softmax(), 1 if binary else len(self.classes_), labels


def losses_of(loss: AbstractRowLoss | AbstractSampleLoss) -> Any:
    """(params, (X, targets)) -> the losses of the samples."""

    def losses(y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        X, targets = batch
        z = linear(X, y).mT
        if isinstance(loss, AbstractSampleLoss):
            return SumOfOutputs(loss).value(z, targets.mT)
        return loss.value(z, targets[:, 0].long())

    return losses
