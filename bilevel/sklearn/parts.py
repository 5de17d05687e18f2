"""Which samples train and which are held out, fold by fold."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.arguments.words import got
from bilevel.sklearn.checks import named

WANTED = "a share between 0 and 1, a number of folds (2 or more), a splitter, or pairs of indices (train, test)"


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
        TypeError: if it is none of these.
        ValueError: likewise, or if a fold has no samples, or such as there are not.
    """
    from sklearn.model_selection import ShuffleSplit, StratifiedShuffleSplit, check_cv

    if isinstance(cv, bool | str | bytes):
        raise TypeError(f"`{name}(cv=...)` must be {WANTED}. Got {got(cv)}.")
    with named(name, cv=cv):
        if isinstance(cv, numbers.Real) and not isinstance(cv, numbers.Integral):
            if not 0 < float(cv) < 1:
                raise ValueError(f"`{name}(cv=...)` must be {WANTED}. Got {got(cv)}.")
            one: Any = StratifiedShuffleSplit if classifier else ShuffleSplit
            cv = one(1, test_size=float(cv), random_state=random_state)
        elif isinstance(cv, Iterable):
            cv = list(cv)
        made: Any = check_cv
        splits = [
            (_chosen(trains, X.shape[0]), _chosen(tests, X.shape[0]))
            for trains, tests in made(cv, y, classifier=classifier).split(X, y)
        ]
        if not splits:
            raise ValueError(f"`{name}(cv=...)` must be {WANTED}. Got no folds.")
    train, held = torch.stack([part[0] for part in splits]), torch.stack([part[1] for part in splits])
    return train / train.sum(1, keepdim=True), held / held.sum(1, keepdim=True) / len(splits)


def _chosen(indices: Any, n: int) -> Tensor:
    """One for each sample that is among the indices, or that a mask says, and zero for the others `(n,)`."""
    indices = np.asarray(indices)
    if indices.ndim != 1 or not indices.size or not (indices.dtype == bool or np.issubdtype(indices.dtype, np.integer)):
        raise ValueError(
            f"A part of a fold must be indices of samples. Got an array of {indices.dtype}{indices.shape}."
        )
    chosen = np.zeros(n)
    try:
        chosen[indices] = 1.0
    except IndexError:
        raise ValueError(f"A part of a fold must be indices of {n} samples. Got others.") from None
    if not chosen.any():
        raise ValueError("A part of a fold must have samples. Got a mask without any.")
    return torch.from_numpy(chosen)
