"""Linear classifiers as generalized linear models: which loss and which targets, for labels numbered from 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel.inner_problems.linear_model import LogLoss
from bilevel.problems.glm.losses import Softmax
from bilevel.problems.glm.model import Coefficient, GeneralizedLinearModel


def classifier(
    X: Tensor,
    labels: Tensor,
    outputs: int,
    penalty: Coefficient,
    *,
    weights: Callable[..., Tensor] | None = None,
    rounded_l1: Coefficient | None = None,
    eps: float | None = None,
) -> GeneralizedLinearModel:
    """sum_i w_i CE(y X_i, b_i) and penalties; with one output of labels 0 and 1."""
    targets = signs(labels, X) if outputs == 1 else labels
    width = 1e-2 if eps is None else eps
    return GeneralizedLinearModel(
        X, targets, LogLoss() if outputs == 1 else Softmax(), weights, penalty, rounded_l1, width
    )


def batch_classifier(outputs: int, penalty: Coefficient, weights: Callable[..., Tensor]) -> GeneralizedLinearModel:
    """The same on batches (inputs, labels, ...)."""
    if outputs == 1:
        return GeneralizedLinearModel(_inputs, _signs, LogLoss(), weights, penalty)
    return GeneralizedLinearModel(_inputs, _labels, Softmax(), weights, penalty)


def signs(labels: Tensor, like: Tensor) -> Tensor:
    """Labels 0 and 1 as -1 and 1."""
    return (2 * labels - 1).to(like.dtype)


def _inputs(batch: Any) -> Tensor:
    found: Tensor = batch[0]
    return found


def _labels(batch: Any) -> Tensor:
    found: Tensor = batch[1]
    return found


def _signs(batch: Any) -> Tensor:
    return signs(batch[1], batch[0])


def sigmoid_weights(x: Tensor) -> Tensor:
    """sigmoid(x_i) / n."""
    return torch.sigmoid(x) / x.numel()


def sigmoid_weights_of_batch(x: Tensor, batch: Any) -> Tensor:
    """The same for the samples of a batch (inputs, labels, numbers): a mean over them."""
    numbers: Tensor = batch[2]
    return torch.sigmoid(x[numbers]) / numbers.numel()
