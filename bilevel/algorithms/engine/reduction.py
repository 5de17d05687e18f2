"""Variance reduction: what directions from batches are combined with, so that a step follows less noise."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from bilevel.algorithms.engine.direction import AbstractDirection, Joint
from bilevel.algorithms.oracle import Oracle
from bilevel.arguments.fits import demand_types
from bilevel.portable.pickling import AbstractPortable
from bilevel.ranks.ranks import Ranks


class Reduced(NamedTuple):
    """What a step follows.

    Attributes:
        joint: the direction.
        value: f on its batch.
        memory: what the next step needs, of the structure that `init` gives.
    """

    joint: Joint
    value: Tensor
    memory: Any


class AbstractReduction(AbstractPortable, abc.ABC):
    """A map (direction, point, memory) -> (direction, memory) that modifies none of its arguments."""

    @property
    def keeps_direction(self) -> bool:
        """Whether on all the data what it gives is the direction itself. No, unless it says so; bounds rest on it."""
        return False

    def of_seeds(self, seeds: tuple[int, ...]) -> AbstractReduction | None:
        """The same for several runs side by side, what is left to chance decided by a seed for each; None, unless said.

        One that leaves nothing to chance but the batches is itself.
        """
        return None

    @abc.abstractmethod
    def init(self, oracle: Oracle, direction: AbstractDirection, at: Joint) -> Any:
        """The memory before the first step."""

    def is_apart(self, memory: Any) -> bool:
        """Whether a memory is this rank's own, where samples are over ranks. No, unless said."""
        return False

    def gathered(self, memory: Any, ranks: Ranks) -> Any:
        """The memory as one rank with all the samples would have it; every rank takes part."""
        return memory

    def of_rank(self, memory: Any, ranks: Ranks) -> Any:
        """From such a memory that of this rank."""
        return memory

    @abc.abstractmethod
    def reduce(self, oracle: Oracle, direction: AbstractDirection, at: Joint, memory: Any) -> Reduced:
        """The direction of this step at a point."""


@final
@dataclass(frozen=True)
class Plain(AbstractReduction):
    """None: the direction of the batches."""

    @property
    def keeps_direction(self) -> bool:
        return True

    def of_seeds(self, seeds: tuple[int, ...]) -> Plain:
        return self

    def init(self, oracle: Oracle, direction: AbstractDirection, at: Joint) -> Any:
        return None

    def reduce(self, oracle: Oracle, direction: AbstractDirection, at: Joint, memory: Any) -> Reduced:
        joint, value = direction.on_batches(oracle, at)
        return Reduced(joint, value, None)


@final
@dataclass(frozen=True, eq=False)
class Averaged:
    """The moving average of D_x; None before the first."""

    x: Tensor | None = None


@final
@dataclass(frozen=True)
class MovingAverage(AbstractReduction):
    """h <- (1 - theta_t) h + theta_t D_x in the place of D_x; it begins with the first D_x. theta = 1 is none.

    Args:
        theta: step -> theta_t in (0, 1].
    """

    theta: Callable[[int], float]

    def __post_init__(self) -> None:
        demand_types(self)

    def of_seeds(self, seeds: tuple[int, ...]) -> MovingAverage:
        return self

    def init(self, oracle: Oracle, direction: AbstractDirection, at: Joint) -> Averaged:
        return Averaged()

    def reduce(self, oracle: Oracle, direction: AbstractDirection, at: Joint, memory: Averaged) -> Reduced:
        joint, value = direction.on_batches(oracle, at)
        h = joint.x if memory.x is None else torch.lerp(memory.x, joint.x, self.theta(oracle.step))
        return Reduced(joint._replace(x=h), value, Averaged(h))


def demand_direction(reduction: AbstractReduction) -> None:
    """Refuse a bound where what is followed is not the direction even on all the data.

    Raises:
        ValueError: naming the reduction.
    """
    if not reduction.keeps_direction:
        raise ValueError(
            f"no bound is known for `{type(reduction).__name__}`, which follows directions of points that are left."
        )
