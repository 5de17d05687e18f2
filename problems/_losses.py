"""Cross entropies of linear models, and bounds on their derivatives."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

_PER_OUTPUT = {True: (1 / 4, 1 / (6 * math.sqrt(3))), False: (1 / 2, math.sqrt(2) / (3 * math.sqrt(3)))}


def sample_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross entropy of each sample: `(n, C), (n,) -> (n,)`; with C = 1, of labels 0 and 1 on one logit."""
    if logits.shape[-1] == 1:
        return -logsigmoid(logits.squeeze(-1) * (2 * labels - 1))
    return cross_entropy(logits, labels, reduction="none")


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of samples whose label gets the largest logit."""
    guess = (logits.squeeze(-1) > 0).long() if logits.shape[-1] == 1 else logits.argmax(-1)
    return float((guess == labels).double().mean())


def outputs(classes: int) -> int:
    """How many logits a model needs: one for two classes."""
    return 1 if classes == 2 else classes


def logit_bounds(outputs: int) -> tuple[float, float, float]:
    """Bounds on |first derivative|, the largest second and the largest third derivative of a loss in its logits."""
    return (1.0 if outputs == 1 else math.sqrt(2.0), *_PER_OUTPUT[outputs == 1])


def largest_moment(X: Tensor, weights: Tensor | None = None) -> float:
    """lambda_max(mean_i w_i z_i z_i')."""
    Z = X.double() if weights is None else X.double() * weights.double().sqrt().unsqueeze(1)
    return float(torch.linalg.eigvalsh(Z.T @ Z / X.shape[0])[-1])
