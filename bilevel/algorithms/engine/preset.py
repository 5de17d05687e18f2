"""Algorithms of the literature as combinations."""

from __future__ import annotations

import abc
from functools import cached_property
from typing import Any

from torch import Tensor

from bilevel.algorithms.algorithm import AbstractAlgorithm, Evaluated, RowStep
from bilevel.algorithms.oracle import Draws, Oracle
from bilevel.bounds.beforehand import Beforehand
from bilevel.bounds.bound import Bound
from bilevel.ranks.ranks import Ranks
from bilevel.requirements.properties import Property


class AbstractPreset(AbstractAlgorithm[Any]):
    """An algorithm of the literature as a combination: its fields are the letters of its paper."""

    @abc.abstractmethod
    def combination(self) -> AbstractAlgorithm[Any]:
        """What it is combined of."""

    @cached_property
    def loop(self) -> AbstractAlgorithm[Any]:
        """The combination, made once."""
        return self.combination()

    @property
    def requires(self) -> frozenset[Property]:
        return self.loop.requires

    @property
    def draws(self) -> Draws:
        return self.loop.draws

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> Any:
        return self.loop.init(oracle, x, y)

    def evaluate(self, oracle: Oracle, state: Any) -> Evaluated:
        return self.loop.evaluate(oracle, state)

    def step(self, oracle: Oracle, state: Any, found: Evaluated) -> Any:
        return self.loop.step(oracle, state, found)

    def beside(self, inner_step: RowStep, outer_step: RowStep) -> AbstractAlgorithm[Any] | None:
        return self.loop.beside(inner_step, outer_step)

    def stationarity(self, oracle: Oracle, state: Any, found: Evaluated) -> Tensor:
        return self.loop.stationarity(oracle, state, found)

    def error_bound(self, about: Beforehand) -> Bound:
        return self.loop.error_bound(about)

    @property
    def takes_shards(self) -> bool:
        return self.loop.takes_shards

    def is_apart(self, state: Any) -> bool:
        return self.loop.is_apart(state)

    def gathered(self, state: Any, ranks: Ranks) -> Any:
        return self.loop.gathered(state, ranks)

    def of_rank(self, state: Any, ranks: Ranks) -> Any:
        return self.loop.of_rank(state, ranks)

    def point(self, state: Any) -> tuple[Tensor, Tensor]:
        return self.loop.point(state)
