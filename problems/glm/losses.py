"""Losses of rows of predictions: cross entropies over classes, and sums over outputs of losses of one number."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.arguments.checked import fitting
from bilevel.arguments.fits import demand_types
from bilevel.inner_problems.linear_model import AbstractSampleLoss
from bilevel.portable.pickling import AbstractPortable


class AbstractRowLoss(AbstractPortable, abc.ABC):
    """A convex loss l(z, b) of C predictions z and a target b, with two derivatives in z.

    Predictions are `(C, n)`: n samples side by side, along which memory is contiguous.
    """

    @property
    def is_smooth(self) -> bool:
        """Whether it has all derivatives everywhere. False unless it says so: kinks at y* are then looked for."""
        return False

    @abc.abstractmethod
    def value(self, z: Tensor, b: Tensor) -> Tensor:
        """l `(n,)`, differentiable twice by autograd."""

    @abc.abstractmethod
    def expand(self, z: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """l `(n,)`, dl/dz `(C, n)`, and what its second derivative is known by `(C, n)`."""

    @abc.abstractmethod
    def bent(self, curvature: Tensor, u: Tensor) -> Tensor:
        """(d2l/dz2) u `(C, n)`."""

    @abc.abstractmethod
    def diagonal(self, curvature: Tensor) -> Tensor:
        """The diagonal of d2l/dz2 `(C, n)`."""


@final
@dataclass(frozen=True)
class Softmax(AbstractRowLoss):
    """l = log sum_c exp(z_c) - z_b for a label b in 0, ..., C - 1; d2l/dz2 = diag(p) - pp' with p = softmax(z).

    Example:
        >>> Softmax().value(torch.zeros(2, 1), torch.tensor([0]))
        tensor([0.6931])
    """

    @property
    def is_smooth(self) -> bool:
        return True

    @fitting
    def value(self, z: Tensor, b: Tensor) -> Tensor:
        return torch.logsumexp(z, 0) - z.gather(0, b.unsqueeze(0)).squeeze(0)

    def expand(self, z: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p = torch.softmax(z, 0)
        is_label = torch.arange(z.shape[0], device=z.device).unsqueeze(1) == b
        return self.value(z, b), p - is_label.to(p.dtype), p

    def bent(self, curvature: Tensor, u: Tensor) -> Tensor:
        pu = curvature * u
        return pu - curvature * pu.sum(0, keepdim=True)

    def diagonal(self, curvature: Tensor) -> Tensor:
        return curvature * (1 - curvature)


@final
@dataclass(frozen=True)
class Poisson(AbstractSampleLoss):
    """l = exp(z) - b z for a count b, with mean exp(z): Poisson regression, up to a constant.

    Example:
        >>> Poisson().value(torch.tensor(0.0), torch.tensor(2.0))
        tensor(1.)
    """

    @property
    def is_smooth(self) -> bool:
        return True

    @fitting
    def value(self, z: Tensor, b: Tensor) -> Tensor:
        return z.exp() - b * z

    @fitting
    def slope(self, z: Tensor, b: Tensor) -> Tensor:
        return z.exp() - b

    @fitting
    def curvature(self, z: Tensor, b: Tensor) -> Tensor:
        return z.exp()


@final
@dataclass(frozen=True)
class SumOfOutputs(AbstractRowLoss):
    """l = sum_c l(z_c, b_c): a loss of one number, over the outputs.

    Args:
        loss: of one number.
    """

    loss: AbstractSampleLoss

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def is_smooth(self) -> bool:
        return self.loss.is_smooth

    @fitting
    def value(self, z: Tensor, b: Tensor) -> Tensor:
        values = self.loss.value(z, b)
        return values.squeeze(0) if z.shape[0] == 1 else values.sum(0)

    def expand(self, z: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.value(z, b), self.loss.slope(z, b), self.loss.curvature(z, b)

    def bent(self, curvature: Tensor, u: Tensor) -> Tensor:
        return curvature * u

    def diagonal(self, curvature: Tensor) -> Tensor:
        return curvature
