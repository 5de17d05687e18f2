"""Which features share a penalty."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.arguments.words import got
from bilevel.sklearn.checks import named

ENOUGH = 10  # samples for each penalty: with fewer, penalties fit what is held out and nothing else


def group_numbers(name: str, penalties: Any, d: int, n: int) -> Tensor:
    """`"auto"`, `"each"`, `"one"`, or labels `(d,)` as numbers 0, ..., G - 1 of groups `(d,)`, for n samples.

    Raises:
        ValueError: if it is something else.

    Example:
        >>> group_numbers("RidgeHO", ["a", "b", "a"], 3, 10)
        tensor([0, 1, 0])
    """
    if isinstance(penalties, str) and penalties == "auto":
        penalties = "each" if n >= ENOUGH * d else "one"
    if isinstance(penalties, str) and penalties in ("each", "one"):
        return torch.arange(d) if penalties == "each" else torch.zeros(d, dtype=torch.int64)
    with named(name, penalties=penalties):
        labels = None if isinstance(penalties, str | bytes) else np.asarray(penalties)
        if labels is None or labels.shape != (d,):
            arrived = got(penalties) if labels is None else f"an array of shape {labels.shape}"
            raise ValueError(
                f'`{name}(penalties=...)` must be "auto", "each", "one", or a label for each feature, of shape ({d},).'
                f" Got {arrived}."
            )
        return torch.from_numpy(np.unique(labels, return_inverse=True)[1].astype(np.int64).reshape(-1))


def references(scale: Tensor, groups: Tensor, power: int) -> Tensor:
    """The mean of s^power in the group of each feature, over s^power `(d,)`.

    A group shares the penalty of its features as they came, not of scaled ones; x = 0 means about 1 of scaled ones.
    """
    each = scale**power
    count = int(groups.max()) + 1 if groups.numel() else 0
    total = torch.zeros(count, dtype=scale.dtype).index_add_(0, groups, each)
    mean = total / torch.bincount(groups, minlength=count)
    return mean[groups] / each
