"""What the draws of a posterior predict together: intervals and densities."""

from __future__ import annotations

import abc

from torch import Tensor

from bilevel.portable.pickling import AbstractPortable


class AbstractLikelihood(AbstractPortable, abc.ABC):
    """p(target | output) for numbers, and what draws of the outputs `(draws, n, ...)` predict with it.

    A loss that is one, such as `GaussianLikelihood`, makes `few_shot.evaluate` report densities and intervals.
    """

    @abc.abstractmethod
    def predictive_nll(self, outputs: Tensor, target: Tensor) -> Tensor:
        """-log mean_s p(target | output_s), the mean over all entries `()`."""

    @abc.abstractmethod
    def interval(self, outputs: Tensor, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """The ends `(n, ...)` of a central predictive interval."""
