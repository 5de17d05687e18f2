"""A surrogate whose curvature has less variance, and a bias."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from bilevel.arguments.fits import demand_types
from bilevel.reinforcement.baseline import Advantages, powers
from bilevel.reinforcement.policy import AbstractPolicy, Params
from bilevel.reinforcement.surrogate import AbstractSurrogate, Curvature
from bilevel.reinforcement.trajectories import Trajectories


@final
@dataclass(frozen=True)
class LowVarianceCurvature(AbstractSurrogate):
    """mean_e sum_t discount^t [r_t + (w_t - 1) A_t],  w_t = p_y(a_t|o_t) / p(a_t|o_t): each action by itself.

    Its first derivative is that of `DiCE` (for lambda = 1), its second leaves out the products of the scores of
    different actions: biased for d2J, with a variance that does not grow as quickly with the horizon. With one action
    an episode nothing is left out.

    Source: Rothfuss, Lee, Clavera, Asfour, Abbeel, "ProMP: proximal meta-policy search", ICLR 2019, eq. 8 to 10.

    Args:
        advantages: A_t.

    Example:
        >>> LowVarianceCurvature().curvature
        'expected'
    """

    advantages: Advantages = Advantages()
    curvature: Curvature = field(init=False, default="expected", repr=False)

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def discount(self) -> float:
        return self.advantages.discount

    def value(self, policy: AbstractPolicy, params: Params, trajectories: Trajectories) -> Tensor:
        own = policy.log_prob(params, trajectories.observations, trajectories.actions) * trajectories.alive
        ratios = (own - trajectories.log_probs).exp()
        return _with_value(self.advantages, trajectories, ratios - 1)


@final
@dataclass(frozen=True)
class ScoreFunction(AbstractSurrogate):
    """mean_e sum_t discount^t [r_t + log(p_y(a_t|o_t) / p(a_t|o_t)) A_t]: its gradient is the policy gradient.

    Its second derivative is that of the sampled gradient with the episodes held fixed, mean_e sum_t d2 log p A_t. As
    an estimate of d2J it is biased: the product of the scores with themselves is missing.

    Source: Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement learning",
    Machine Learning 8 (1992).

    Args:
        advantages: A_t.

    Example:
        >>> ScoreFunction().curvature
        'sampled'
    """

    advantages: Advantages = Advantages()
    curvature: Curvature = field(init=False, default="sampled", repr=False)

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def discount(self) -> float:
        return self.advantages.discount

    def value(self, policy: AbstractPolicy, params: Params, trajectories: Trajectories) -> Tensor:
        own = policy.log_prob(params, trajectories.observations, trajectories.actions) * trajectories.alive
        return _with_value(self.advantages, trajectories, own - trajectories.log_probs)


def _with_value(advantages: Advantages, trajectories: Trajectories, factors: Tensor) -> Tensor:
    """The mean discounted return, plus the advantages (times discount^t) by factors that vanish at the behavior."""
    returns = (powers(advantages.discount, trajectories.rewards) * trajectories.rewards).sum(1)
    return (returns + (factors * advantages.of(trajectories)).sum(1)).mean()
