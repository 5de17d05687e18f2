"""Regression with Gaussian noise: the likelihood of a known variance, and what a posterior predicts with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.arguments.checked import fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import POSITIVE, demand_ranges
from bilevel.few_shot.likelihood import AbstractLikelihood


@final
@dataclass(frozen=True)
class GaussianLikelihood(AbstractLikelihood):
    """-log p(t | o) = (t - o)^2 / (2 s) + log(2 pi s) / 2, the mean over all entries: a loss for noise of variance s.

    Draws of the outputs `(samples, n, ...)` from a posterior make a mixture of Gaussians with the mean of the draws as
    its mean, and their variance plus s as its variance.

    Args:
        variance: s.

    Raises:
        ValueError: if the variance is not positive.

    Example:
        >>> likelihood = GaussianLikelihood(variance=0.5)
        >>> round(float(likelihood(torch.zeros(3, 1), torch.ones(3, 1))), 3)  # 1 + log(pi) / 2
        1.572
        >>> mean, variance = likelihood.moments(torch.tensor([[[1.0]], [[3.0]]]))
        >>> mean, variance
        (tensor([[2.]]), tensor([[1.5000]]))
    """

    variance: float

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, variance=POSITIVE)
        if not self.variance > 0:
            raise ValueError(f"`GaussianLikelihood(variance=...)` must be positive. Got {self.variance}.")

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """The mean of -log p over all entries.

        Raises:
            ValueError: if the targets do not have the outputs' shape.
        """
        if output.shape != target.shape:
            raise ValueError(
                f"`GaussianLikelihood` needs targets of the outputs' shape, {tuple(output.shape)}."
                f" Got {tuple(target.shape)}. Change the last layer, or the targets."
            )
        return ((output - target).square() / self.variance).mean() / 2 + math.log(2 * math.pi * self.variance) / 2

    @fitting
    def moments(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """The predictive mean and variance `(n, ...)`, from draws `(samples, n, ...)`."""
        return outputs.mean(0), outputs.var(0, correction=0) + self.variance

    @fitting
    def interval(self, outputs: Tensor, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """The ends `(n, ...)` of a central predictive interval, of a Gaussian with the mixture's moments.

        Raises:
            ValueError: if the level is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise ValueError(f"`interval(level=...)` must be between 0 and 1. Got {level}.")
        mean, variance = self.moments(outputs)
        half = math.sqrt(2) * torch.erfinv(torch.tensor(level, dtype=mean.dtype, device=mean.device)) * variance.sqrt()
        return mean - half, mean + half

    @fitting
    def predictive_nll(self, outputs: Tensor, target: Tensor) -> Tensor:
        """-log of the mixture's density at the targets, the mean over all entries `()`."""
        square = (outputs - target).square() / self.variance
        log_density = -(square + math.log(2 * math.pi * self.variance)) / 2
        return (math.log(len(outputs)) - log_density.logsumexp(0)).mean()
