"""Recursive variance reduction: differences of directions at two points, on the same batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel.algorithms.engine.direction import AbstractDirection, Drawn, Joint, generator as generator, summed
from bilevel.algorithms.engine.reduction import AbstractReduction, Reduced
from bilevel.algorithms.oracle import Oracle
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, WEIGHT, demand_ranges


@final
@dataclass(frozen=True, eq=False)
class Past:
    """Where a step was taken, and along what; None before the first."""

    x: Tensor | None = None
    y: Tensor | None = None
    v: Tensor | None = None
    d_x: Tensor | None = None
    d_y: Tensor | None = None
    d_v: Tensor | None = None

    @staticmethod
    def of(at: Joint, d: Joint) -> Past:
        """That of one step."""
        return Past(*at, *d)

    def point(self) -> Joint:
        """Where."""
        assert self.x is not None and self.y is not None
        return Joint(self.x, self.y, self.v)

    def direction(self) -> Joint:
        """Along what."""
        assert self.d_x is not None and self.d_y is not None
        return Joint(self.d_x, self.d_y, self.d_v)


def _recursive(
    oracle: Oracle, direction: AbstractDirection, at: Joint, memory: Past, forgets: float = 0.0
) -> tuple[Joint, Tensor]:
    """D(z) + (1 - e) (d - D(z_old)), the same batches at both points."""
    if oracle.like.across is not None:
        drawn = Drawn.batches(oracle, *direction.first)
        here, there = direction.part(drawn, at), direction.part(drawn, memory.point())
        if here is not None and there is not None:  # one message for both points
            change, value = summed(drawn.problem(0), here[0].plus(there[0], forgets - 1.0), here[1])
            return change.plus(memory.direction(), 1.0 - forgets), value
    new, value = direction.on_batches(oracle, at)
    old, _ = direction.on_batches(oracle, memory.point())
    return new.plus(memory.direction().plus(old, -1.0), 1.0 - forgets), value


@final
@dataclass(frozen=True)
class Sarah(AbstractReduction):
    """d = D on all the data every `period` steps, else d <- d + D(z; i, j) - D(z_old; i, j).

    Source: Dagreou, Moreau, Vaiter, Ablin, "A lower bound and a near-optimal algorithm for bilevel empirical risk
    minimization", AISTATS 2024.

    Args:
        period: how many steps from one full evaluation to the next; None: as many as see all samples once.
    """

    period: int | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, period=AT_LEAST_1)

    @property
    def keeps_direction(self) -> bool:
        return True

    def of_seeds(self, seeds: tuple[int, ...]) -> Sarah:
        return self

    def init(self, oracle: Oracle, direction: AbstractDirection, at: Joint) -> Past:
        return Past()

    def reduce(self, oracle: Oracle, direction: AbstractDirection, at: Joint, memory: Past) -> Reduced:
        if memory.x is None or oracle.step % (self.period or oracle.epoch) == 0:
            joint, value = direction.on_everything(oracle, at)
        else:
            joint, value = _recursive(oracle, direction, at, memory)
        return Reduced(joint, value, Past.of(at, joint))


@final
@dataclass(frozen=True)
class Page(AbstractReduction):
    """d = D on all the data with a probability, else d <- d + D(z; i, j) - D(z_old; i, j).

    Source: Chu, Xu, Yao, Zhang, "SPABA: a single-loop and probabilistic stochastic bilevel algorithm achieving optimal
    sample complexity", ICML 2024, after PAGE (Li et al., ICML 2021).

    Args:
        probability: of a full evaluation, in (0, 1]; None: one over the steps that see all samples once.
        seed: of the coin, a function of it and the number of the step; one for each of several runs side by side.
    """

    probability: float | None = None
    seed: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, probability=WEIGHT)

    @property
    def keeps_direction(self) -> bool:
        return True

    def init(self, oracle: Oracle, direction: AbstractDirection, at: Joint) -> Past:
        return Past()

    def reduce(self, oracle: Oracle, direction: AbstractDirection, at: Joint, memory: Past) -> Reduced:
        full = [memory.x is None or self._falls(oracle, seed) for seed in self._seeds]
        if all(full):
            joint, value = direction.on_everything(oracle, at)
        elif not any(full):
            joint, value = _recursive(oracle, direction, at, memory)
        else:
            joint, value = self._apart(oracle, direction, at, memory, torch.tensor(full, device="cpu"))
        return Reduced(joint, value, Past.of(at, joint))

    @property
    def _seeds(self) -> tuple[int, ...]:
        return self.seed if isinstance(self.seed, tuple) else (self.seed,)

    def _falls(self, oracle: Oracle, seed: int) -> bool:
        """Whether a coin asks for all the data at a step."""
        coin = torch.rand((), generator=generator(seed, oracle.step), device="cpu", dtype=torch.float64)
        return float(coin) < (self.probability or 1 / oracle.epoch)

    def _apart(
        self, oracle: Oracle, direction: AbstractDirection, at: Joint, memory: Past, full: Tensor
    ) -> tuple[Joint, Tensor]:
        """Of several runs those whose coins ask for all the data, and then the others."""
        some, rest = full.nonzero().squeeze(-1), (~full).nonzero().squeeze(-1)
        new, value = direction.on_everything(oracle.of_runs(some), at.of_runs(some))
        before = Past.of(memory.point().of_runs(rest), memory.direction().of_runs(rest))
        change, other = _recursive(oracle.of_runs(rest), direction, at.of_runs(rest), before)
        back = torch.cat([some, rest]).argsort()
        pairs = zip((*new, value), (*change, other), strict=True)
        x, y, v, f = (None if a is None or b is None else torch.cat([a, b])[back] for a, b in pairs)
        assert x is not None and y is not None and f is not None
        return Joint(x, y, v), f

    def of_seeds(self, seeds: tuple[int, ...]) -> Page:
        return replace(self, seed=seeds)


@final
@dataclass(frozen=True)
class Storm(AbstractReduction):
    """d <- D(z; i, j) + (1 - e_t) (d - D(z_old; i, j)), which begins with D at the first point.

    Its error is (1 - e_t) times that of the step before, plus noise that vanishes as steps do.

    Source: Cutkosky, Orabona, "Momentum-based variance reduction in non-convex SGD", NeurIPS 2019.

    Args:
        forgets: step -> e_t; 1 is no memory.
    """

    forgets: Callable[[int], float]

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def keeps_direction(self) -> bool:
        return True

    def of_seeds(self, seeds: tuple[int, ...]) -> Storm:
        return self

    def init(self, oracle: Oracle, direction: AbstractDirection, at: Joint) -> Past:
        return Past()

    def reduce(self, oracle: Oracle, direction: AbstractDirection, at: Joint, memory: Past) -> Reduced:
        if memory.x is None:
            joint, value = direction.on_batches(oracle, at)
        else:
            joint, value = _recursive(oracle, direction, at, memory, min(1.0, self.forgets(oracle.step)))
        return Reduced(joint, value, Past.of(at, joint))
