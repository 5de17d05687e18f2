"""What a surrogate of the return is: a function of the policy's parameters whose derivatives estimate something."""

from __future__ import annotations

import abc
from typing import Literal, TypeAlias

from torch import Tensor

from bilevel.portable.pickling import AbstractPortable
from bilevel.reinforcement.baseline import powers
from bilevel.reinforcement.policy import AbstractPolicy, Params
from bilevel.reinforcement.trajectories import Trajectories

Curvature: TypeAlias = Literal["expected", "sampled"]


class AbstractSurrogate(AbstractPortable, abc.ABC):
    """y -> a number: the mean discounted return of given episodes, with derivatives in y.

    A subclass sets `curvature`: "expected" where the second derivative at the policy that made the episodes estimates
    that of the expected return, d2J; "sampled" where it is that of the sampled gradient with the episodes held fixed.
    The two differ by the derivative of the distribution that the episodes come from.
    """

    curvature: Curvature

    @property
    @abc.abstractmethod
    def discount(self) -> float:
        """The factor by which a reward is worth less for each step that it is later."""

    def gain(self, trajectories: Trajectories) -> Tensor:
        """The mean discounted return of episodes: a scalar."""
        return (powers(self.discount, trajectories.rewards) * trajectories.rewards).sum(1).mean()

    @abc.abstractmethod
    def value(self, policy: AbstractPolicy, params: Params, trajectories: Trajectories) -> Tensor:
        """The surrogate of episodes: a scalar, differentiable in the parameters."""
