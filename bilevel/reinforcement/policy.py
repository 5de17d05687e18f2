"""What a policy is: a distribution of actions, with parameters as arguments."""

from __future__ import annotations

import abc

from torch import Tensor, nn

from bilevel.portable.pickling import AbstractPortable

Params = dict[str, Tensor]


class AbstractPolicy(AbstractPortable, abc.ABC):
    """p(a | o), a distribution with parameters y that are an argument, on episodes side by side.

    A subclass sets `params`, from which learning starts, and `noise`, how many standard normal numbers an action takes.
    """

    params: Params
    noise: int

    @abc.abstractmethod
    def sample(self, params: Params, observation: Tensor, noise: Tensor) -> Tensor:
        """The actions that the noise `(*b, noise)` draws at observations `(*b, o)`."""

    @abc.abstractmethod
    def log_prob(self, params: Params, observation: Tensor, action: Tensor) -> Tensor:
        """log p(a | o): `(*b,)`."""

    @abc.abstractmethod
    def export(self, params: Params) -> nn.Module:
        """A module with these parameters, for `state_dict`."""

    @abc.abstractmethod
    def divergence(self, old: Params, new: Params, observation: Tensor) -> Tensor:
        """KL(p_old(. | o), p_new(. | o)): `(*b,)`."""
