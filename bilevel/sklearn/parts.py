"""Which samples train and which are held out, fold by fold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def weights_of_folds(
    name: str, cv: Any, X: Any, y: Any, *, classifier: bool, random_state: Any
) -> tuple[Tensor, Tensor]:
    """Weights `(K, n)` of training samples, 1 / n_k, and of those held out, 1 / (K m_k).

    Args:
        name: of the estimator, for errors.
        cv: a number of folds, a share to hold out once, or a splitter or iterable as scikit-learn takes them.
        X: inputs.
        y: targets.
        classifier: whether folds are stratified.
        random_state: of the one split.

    Raises:
        ValueError: if it is none of these.
    """
    from sklearn.model_selection import ShuffleSplit, StratifiedShuffleSplit, check_cv

    if isinstance(cv, float):
        if not 0 < cv < 1:
            raise ValueError(
                f"`{name}(cv=...)` must be a share between 0 and 1, a number of folds, or a splitter. Got {cv}."
            )
        cv = (StratifiedShuffleSplit if classifier else ShuffleSplit)(1, test_size=cv, random_state=random_state)
    elif isinstance(cv, Iterable) and not isinstance(cv, str):
        cv = list(cv)
    made: Any = check_cv
    splitter = made(cv, y, classifier=classifier)
    splits = list(splitter.split(X, y))
    train, held = torch.zeros(2, len(splits), X.shape[0], dtype=torch.float64)
    for k, (trains, tests) in enumerate(splits):
        train[k, torch.as_tensor(trains)] = 1.0
        held[k, torch.as_tensor(tests)] = 1.0
    return train / train.sum(1, keepdim=True), held / held.sum(1, keepdim=True) / len(splits)
