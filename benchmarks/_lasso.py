"""Lasso data for benchmarks of hyperparameter optimization: correlated features, few of which matter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RHO, NONZEROS, SNR = 0.5, 75, 3.0
FULL, QUICK = (1000, 10_000), (100, 400)


@dataclass(frozen=True)
class LassoData:
    """Training and validation parts of n samples each; columns of the matrices are contiguous.

    Attributes:
        X: training inputs `(n, d)`.
        b: training targets `(n,)`.
        U: validation inputs `(n, d)`.
        c: validation targets `(n,)`.
    """

    X: Tensor
    b: Tensor
    U: Tensor
    c: Tensor


def lasso_data(n: int, d: int, seed: int) -> LassoData:
    """b = X y + e: rows of X are AR(1) across features, y has 75 normal entries at random, |X y| = 3 |e|."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    columns = normal(d, 2 * n)  # each row is one feature
    scale = math.sqrt(1 - RHO**2)
    for j in range(1, d):
        columns[j].mul_(scale).add_(columns[j - 1], alpha=RHO)
    truth = torch.zeros(d, dtype=torch.float64)
    support = torch.randperm(d, generator=generator)[:NONZEROS]
    truth[support] = normal(NONZEROS)[: len(support)]
    signal = truth @ columns
    noise = normal(2 * n)
    noise *= torch.linalg.vector_norm(signal) / (SNR * torch.linalg.vector_norm(noise))
    targets = signal + noise
    train, held = columns[:, :n].contiguous(), columns[:, n:].contiguous()
    return LassoData(train.T, targets[:n], held.T, targets[n:])
