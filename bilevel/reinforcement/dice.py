"""A surrogate whose derivatives of every order are unbiased."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import SHARE, demand_ranges
from bilevel.reinforcement.baseline import AbstractBaseline, LinearBaseline, powers
from bilevel.reinforcement.policy import AbstractPolicy, Params
from bilevel.reinforcement.surrogate import AbstractSurrogate, Curvature
from bilevel.reinforcement.trajectories import Trajectories


@final
@dataclass(frozen=True)
class DiCE(AbstractSurrogate):
    """mean_e sum_t discount^t (W_t r_t + (W_{t-1} - W_t) V(o_t)),  W_t = prod_{l <= t} p_y(a_l|o_l) / p(a_l|o_l).

    p is the policy that chose the actions, a constant. E_p of this is J(y) for every y, baseline included, since
    E[W_t | the past of a_t] = W_{t-1}: so are all its derivatives, of every order, and at y = p the value is the return
    itself. There W_t is the "magic box" of DiCE.

    The variance of the derivatives grows with the horizon, that of the second quickly; V takes away much of it.

    Source: Foerster, Farquhar, Al-Shedivat, Rocktaschel, Xing, Whiteson, "DiCE: the infinitely differentiable Monte
    Carlo estimator", ICML 2018, eq. 5; the baseline of every order: Mao, Foerster, Rocktaschel, Al-Shedivat, Farquhar,
    Whiteson, "A baseline for any order gradient estimation in stochastic computation graphs", ICML 2019.

    Args:
        discount: in [0, 1].
        baseline: V.

    Raises:
        ValueError: if the discount is out of range.

    Example:
        >>> DiCE(discount=0.9).curvature
        'expected'
    """

    discount: float = 0.99
    baseline: AbstractBaseline = LinearBaseline()
    curvature: Curvature = field(init=False, default="expected", repr=False)

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, discount=SHARE)

    def value(self, policy: AbstractPolicy, params: Params, trajectories: Trajectories) -> Tensor:
        weights, before = cumulative_weights(policy, params, trajectories)
        with torch.no_grad():
            V = self.baseline.values(trajectories, self.discount) * trajectories.alive
        terms = weights * trajectories.rewards + (before - weights) * V
        return (powers(self.discount, terms) * terms).sum(1).mean()


def cumulative_weights(policy: AbstractPolicy, params: Params, trajectories: Trajectories) -> tuple[Tensor, Tensor]:
    """W_t and W_{t-1}, `(episodes, horizon)` each."""
    own = policy.log_prob(params, trajectories.observations, trajectories.actions) * trajectories.alive
    logs = (own - trajectories.log_probs).cumsum(1)
    weights = logs.exp()
    return weights, torch.cat([torch.ones_like(weights[:, :1]), weights[:, :-1]], 1)
