"""Policies over vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import final

from torch import Tensor, nn

from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import FINITE, SIZE, demand_ranges
from bilevel.arguments.words import got
from bilevel.modules.functional import Functional, functional
from bilevel.reinforcement.policy import AbstractPolicy, Params

_LOG_STD = "log_std"


@final
class GaussianModule(nn.Module):
    """What a `GaussianPolicy` is exported as: `mean`, the user's module, and `log_std`.

    Args:
        mean: observations -> means.
        log_std: the logarithms of the standard deviations.

    Example:
        >>> import torch
        >>> sorted(GaussianModule(nn.Linear(1, 1), torch.zeros(1)).state_dict())
        ['log_std', 'mean.bias', 'mean.weight']
    """

    def __init__(self, mean: nn.Module, log_std: Tensor) -> None:
        nn.Module.__init__(self)
        self.mean, self.log_std = mean, nn.Parameter(log_std.detach().clone())

    def forward(self, observation: Tensor) -> Tensor:
        """The means."""
        found: Tensor = self.mean(observation)
        return found


@final
@dataclass(frozen=True, eq=False)
class GaussianPolicy(AbstractPolicy):
    """p(a | o) = N(net(y; o), diag(exp(2 s))): the mean by the user's module, s a vector beside its parameters.

    s, the entry "log_std" of the parameters, is learned and adapted like the others.

    Args:
        module: observations `(*b, o)` -> means `(*b, actions)`.
        actions: the size of an action.
        log_std: where s starts.

    Raises:
        ValueError: if the module has a parameter "log_std" of its own, or there is no action.

    Example:
        >>> import torch
        >>> policy = GaussianPolicy(nn.Linear(2, 3), actions=3)
        >>> policy.log_prob(policy.params, torch.zeros(5, 2), torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    module: nn.Module | Functional
    actions: int
    log_std: float = 0.0
    net: Functional = field(init=False, repr=False)

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, actions=SIZE, log_std=FINITE)
        net = self.module if isinstance(self.module, Functional) else functional(self.module)
        if _LOG_STD in net.params:
            raise ValueError(
                f"`GaussianPolicy(module=...)` must have no parameter {_LOG_STD!r}, which is the policy's own. Got one."
                " Rename it."
            )
        object.__setattr__(self, "net", net)

    @property
    def noise(self) -> int:  # type: ignore[override]
        return self.actions

    @property
    def params(self) -> Params:  # type: ignore[override]
        like = next(iter(self.net.params.values()))
        return {**self.net.params, _LOG_STD: like.new_full((self.actions,), self.log_std)}

    def sample(self, params: Params, observation: Tensor, noise: Tensor) -> Tensor:
        mean, log_std = self._moments(params, observation)
        return mean + log_std.exp() * noise

    def log_prob(self, params: Params, observation: Tensor, action: Tensor) -> Tensor:
        mean, log_std = self._moments(params, observation)
        scaled: Tensor = (action - mean) / log_std.exp()
        return (-scaled.square() / 2 - log_std - math.log(2 * math.pi) / 2).sum(-1)

    def divergence(self, old: Params, new: Params, observation: Tensor) -> Tensor:
        mean, log_std = self._moments(old, observation)
        mean_after, log_std_after = self._moments(new, observation)
        spread = ((2 * (log_std - log_std_after)).exp() + ((mean - mean_after) / log_std_after.exp()).square()) / 2
        return (log_std_after - log_std + spread - 0.5).sum(-1)

    def export(self, params: Params) -> nn.Module:
        own = {name: leaf for name, leaf in params.items() if name != _LOG_STD}
        return GaussianModule(self.net.load(own), params[_LOG_STD])

    def _moments(self, params: Params, observation: Tensor) -> tuple[Tensor, Tensor]:
        own = {name: leaf for name, leaf in params.items() if name != _LOG_STD}
        mean: Tensor = self.net(own, observation)
        if mean.shape[-1:] != (self.actions,):
            raise ValueError(
                f"`GaussianPolicy(module=...)` must return means of {self.actions} numbers, as `actions` says. Got"
                f" {got(mean)}."
            )
        return mean, params[_LOG_STD]
