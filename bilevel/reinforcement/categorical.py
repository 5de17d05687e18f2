"""Policies over finitely many actions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn

from bilevel.arguments.fits import demand_types
from bilevel.modules.functional import Functional, functional
from bilevel.reinforcement.policy import AbstractPolicy, Params


@final
@dataclass(frozen=True, eq=False)
class CategoricalPolicy(AbstractPolicy):
    """p(a | o) = softmax(net(y; o))_a, with the user's module for net.

    An action is drawn by the inverse of its distribution function, from one normal number.

    Args:
        module: observations `(*b, o)` -> logits `(*b, actions)`.

    Example:
        >>> policy = CategoricalPolicy(nn.Linear(2, 3))
        >>> policy.sample(policy.params, torch.zeros(5, 2), torch.randn(5, 1)).shape
        torch.Size([5])
    """

    module: nn.Module | Functional
    net: Functional = field(init=False, repr=False)
    noise: int = field(init=False, default=1, repr=False)

    def __post_init__(self) -> None:
        demand_types(self)
        net = self.module if isinstance(self.module, Functional) else functional(self.module)
        object.__setattr__(self, "net", net)

    @property
    def params(self) -> Params:  # type: ignore[override]
        return dict(self.net.params)

    def sample(self, params: Params, observation: Tensor, noise: Tensor) -> Tensor:
        reached = self._log_probs(params, observation).exp().cumsum(-1)[..., :-1]
        found: Tensor = (torch.special.ndtr(noise) > reached).sum(-1)
        return found

    def log_prob(self, params: Params, observation: Tensor, action: Tensor) -> Tensor:
        found: Tensor = self._log_probs(params, observation).gather(-1, action.long().unsqueeze(-1))
        return found.squeeze(-1)

    def divergence(self, old: Params, new: Params, observation: Tensor) -> Tensor:
        before, after = self._log_probs(old, observation), self._log_probs(new, observation)
        return (before.exp() * (before - after)).sum(-1)

    def export(self, params: Params) -> nn.Module:
        return self.net.load(params)

    def _log_probs(self, params: Params, observation: Tensor) -> Tensor:
        logits: Tensor = self.net(params, observation)
        return logits.log_softmax(-1)
