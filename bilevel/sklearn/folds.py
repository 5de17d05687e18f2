"""Folds side by side: one generalized linear model whose outputs are those of each fold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import SIZE, demand_ranges
from bilevel.inner_problems.linear_model import AbstractSampleLoss
from bilevel.problems.glm.losses import AbstractRowLoss, SumOfOutputs


@final
@dataclass(frozen=True)
class Folds(AbstractRowLoss):
    """l(z, b) = sum_k m_k l(z_k, t) for K folds: predictions `(K C, n)`, those of one fold after those of another.

    A target b is t, followed by a weight m_k for each fold: 1 / n_k where the sample trains in fold k (or is held out
    there), else 0. So X is read once for all folds, and sparse features stay sparse.

    Args:
        loss: of one fold.
        count: K.

    Example:
        >>> from bilevel.inner_problems import Squared
        >>> two = Folds(Squared(), 2)
        >>> two.value(
        ...     torch.tensor([[3.0], [5.0]]), torch.tensor([[1.0], [0.5], [0.0]])
        ... )  # the second fold omits it
        tensor([1.])
    """

    loss: AbstractRowLoss | AbstractSampleLoss
    count: int

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, count=SIZE)

    @property
    def is_smooth(self) -> bool:
        return self.loss.is_smooth

    @property
    def _rows(self) -> AbstractRowLoss:
        return self.loss if isinstance(self.loss, AbstractRowLoss) else SumOfOutputs(self.loss)

    def value(self, z: Tensor, b: Tensor) -> Tensor:
        t, m = self._parts(b)
        if isinstance(self.loss, AbstractSampleLoss):
            values = self.loss.value(self._apart(z), t).sum(1)
        else:
            values = torch.stack([self.loss.value(each, t) for each in self._apart(z)])
        return (m * values).sum(0)

    def expand(self, z: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t, m = self._parts(b)
        if isinstance(self.loss, AbstractSampleLoss):
            parts, each = self._apart(z), m.unsqueeze(1)
            values, slope = self.loss.value(parts, t).sum(1), each * self.loss.slope(parts, t)
            curvature = self.loss.curvature(parts, t)
        else:
            found = [self.loss.expand(each, t) for each in self._apart(z)]
            values, slope, curvature = (torch.stack(list(part)) for part in zip(*found, strict=True))
            slope = m.unsqueeze(1) * slope
        return (m * values).sum(0), slope.reshape(z.shape), torch.cat([curvature.reshape(z.shape), m])

    def bent(self, curvature: Tensor, u: Tensor) -> Tensor:
        known, m = self._apart(curvature[: u.shape[0]]), curvature[u.shape[0] :].unsqueeze(1)
        if isinstance(self.loss, AbstractSampleLoss):
            return (m * known * self._apart(u)).reshape(u.shape)
        bent = [self.loss.bent(c, each) for c, each in zip(known, self._apart(u), strict=True)]
        return (m * torch.stack(bent)).reshape(u.shape)

    def diagonal(self, curvature: Tensor) -> Tensor:
        rows = curvature.shape[0] - self.count
        found = torch.stack([self._rows.diagonal(each) for each in self._apart(curvature[:rows])])
        return (curvature[rows:].unsqueeze(1) * found).reshape(rows, -1)

    def _apart(self, z: Tensor) -> Tensor:
        return z.reshape(self.count, -1, z.shape[-1])

    def _parts(self, b: Tensor) -> tuple[Tensor, Tensor]:
        t = b[: -self.count]
        return (t if isinstance(self.loss, AbstractSampleLoss) else t[0].long()), b[-self.count :]
