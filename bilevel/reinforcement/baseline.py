"""What is expected of the rest of an episode, and how much better it went."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import POSITIVE, SHARE, demand_ranges
from bilevel.portable.pickling import AbstractPortable
from bilevel.reinforcement.trajectories import Trajectories

_SCALE = 100.0  # of time in the features, so that its cube stays of the order of the others


class AbstractBaseline(AbstractPortable, abc.ABC):
    """V(o_t, t), the return that is expected from there on; of an episode it may not depend on the actions."""

    @abc.abstractmethod
    def values(self, trajectories: Trajectories, discount: float) -> Tensor:
        """V `(episodes, horizon)` for the discounted rewards from t on."""


@final
@dataclass(frozen=True)
class Zero(AbstractBaseline):
    """V = 0.

    Example:
        >>> Zero()
        Zero()
    """

    def values(self, trajectories: Trajectories, discount: float) -> Tensor:
        return torch.zeros_like(trajectories.rewards)


@final
@dataclass(frozen=True)
class LinearBaseline(AbstractBaseline):
    """V = w'phi(o_t, t), phi = (1, o, o^2, t, t^2, t^3), w by ridge regression on the discounted rewards from t on.

    w of the episodes with even numbers is fit to those with odd ones and the other way round, so that V is independent
    of an episode's own actions and derivatives stay unbiased; a single episode has V = 0.

    Source: Duan, Chen, Houthooft, Schulman, Abbeel, "Benchmarking deep reinforcement learning for continuous control",
    ICML 2016, for the features; the two halves are ours.

    Args:
        ridge: the weight of |w|^2, beside a mean of squares.

    Raises:
        ValueError: if it is not positive.

    Example:
        >>> LinearBaseline().ridge
        1e-05
    """

    ridge: float = 1e-5

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, ridge=POSITIVE)

    def values(self, trajectories: Trajectories, discount: float) -> Tensor:
        rewards, alive = trajectories.rewards, trajectories.alive
        episodes, horizon = rewards.shape
        if episodes < 2:
            return torch.zeros_like(rewards)
        goals = discounted(rewards, discount)
        o = trajectories.observations.flatten(2).to(rewards.dtype)
        t = (torch.arange(horizon, dtype=rewards.dtype, device=rewards.device) / _SCALE).expand(episodes, horizon)
        columns = [torch.ones_like(t), t, t.square(), t.pow(3)]
        features = torch.cat([torch.stack(columns, -1), o, o.square()], -1) * alive.unsqueeze(-1)
        odd = (torch.arange(episodes, device=rewards.device) % 2).bool()
        halves = torch.stack([self._fit(features[odd], goals[odd]), self._fit(features[~odd], goals[~odd])])
        return (features * halves[odd.long()].unsqueeze(1)).sum(-1)  # even ones by the weights of odd ones

    def _fit(self, features: Tensor, goals: Tensor) -> Tensor:
        """w of features as they are; fit in columns of size 1, and in float64, for their squares span many orders."""
        X, b = features.flatten(0, 1).double(), goals.flatten().double()
        size = X.square().mean(0).sqrt().clamp_min(torch.finfo(X.dtype).tiny)
        X = X / size
        ridge = self.ridge * torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
        found: Tensor = torch.linalg.solve_ex(X.mT @ X / len(X) + ridge, X.mT @ b / len(X))[0]
        return (found / size).to(features.dtype)


@final
@dataclass(frozen=True)
class Advantages:
    """A_t = sum_l (discount lambda)^l d_{t+l},  d_t = r_t + discount V(o_{t+1}) - V(o_t): how much better it went.

    With `normalized` they are divided by their root mean square over the episodes of a task, so that a step length does
    not depend on the scale of the rewards; gradients are then no longer those of the return, but in direction.

    lambda = 1 is the discounted return from t on, less V: its policy gradient is unbiased. Less is less variance and
    a bias, as far as V is no value function.

    Source: Schulman, Moritz, Levine, Jordan, Abbeel, "High-dimensional continuous control using generalized advantage
    estimation", ICLR 2016, eq. 16.

    Args:
        discount: in [0, 1].
        lambda_: in [0, 1].
        baseline: V.
        normalized: whether they are brought to size 1.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> Advantages(discount=0.9).lambda_
        1.0
    """

    discount: float = 0.99
    lambda_: float = 1.0
    baseline: AbstractBaseline = LinearBaseline()
    normalized: bool = False

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, discount=SHARE, lambda_=SHARE)

    def of(self, trajectories: Trajectories) -> Tensor:
        """A_t times discount^t, `(episodes, horizon)`: what multiplies grad log p(a_t | o_t)."""
        rewards, alive = trajectories.rewards, trajectories.alive
        with torch.no_grad():
            V = self.baseline.values(trajectories, self.discount) * alive
            following = torch.cat([V[:, 1:], torch.zeros_like(V[:, :1])], 1)
            d = rewards + self.discount * following - V
            A = discounted(d, self.discount * self.lambda_) * alive
            if self.normalized:
                size = (A.square().sum() / alive.sum()).sqrt()
                A = A / size.clamp_min(torch.finfo(A.dtype).eps)
            return A * powers(self.discount, rewards)


def discounted(rewards: Tensor, discount: float) -> Tensor:
    """sum_{l >= 0} discount^l r_{t+l} at each t, along the last axis.

    Example:
        >>> discounted(torch.ones(1, 3), 0.5)
        tensor([[1.7500, 1.5000, 1.0000]])
    """
    found, rest = [], torch.zeros_like(rewards[..., 0])
    for t in reversed(range(rewards.shape[-1])):
        rest = rewards[..., t] + discount * rest
        found.append(rest)
    return torch.stack(found[::-1], -1)


def powers(discount: float, like: Tensor) -> Tensor:
    """discount^t along the last axis.

    Example:
        >>> powers(0.5, torch.zeros(2, 3))
        tensor([1.0000, 0.5000, 0.2500])
    """
    t = torch.arange(like.shape[-1], dtype=like.dtype, device=like.device)
    return discount**t
