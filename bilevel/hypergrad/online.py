"""Estimates that go on with an inner problem which is never solved to the end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel.arguments.fits import demand_types
from bilevel.requirements.properties import Property


@final
@dataclass(frozen=True)
class Online(AbstractEstimator):
    """`first` from a cold start, `then` from the y and v of the estimate before: y follows x, and is never solved for.

    A run of `minimize` starts each of its estimates where the one before ended, without being asked: with few inner
    steps for each move of x, y stays near y*(x) as long as x moves slowly. What is estimated is h at that y, and the
    value that comes with it is f there: neither is a function of x alone. Elsewhere (`hypergradient`, `hyperobjective`)
    an estimate is cold unless a start is given or `warm_start=True`, so that it is one.

    Cost: that of the two estimators.

    Args:
        first: of a start without a v, such as `AID` whose inner solver takes many steps.
        then: of a start with one, such as the same with few.

    Example:
        >>> import torch
        >>> from bilevel import AID, BilevelProblem, minimize
        >>> from bilevel.solvers import CG, GradientDescent, Iterate
        >>> def aid(steps):
        ...     return AID(Iterate(GradientDescent(0.5), max_steps=steps), CG())
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> found = minimize(
        ...     problem, torch.tensor(0.0), torch.tensor(0.0), estimator=Online(aid(20), aid(1))
        ... )
        >>> abs(float(found.x) - 3) < 0.1
        True
    """

    first: AbstractEstimator
    then: AbstractEstimator

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def requires(self) -> frozenset[Property]:
        return self.first.requires | self.then.requires

    @property
    def takes_encoding(self) -> bool:
        return self.first.takes_encoding and self.then.takes_encoding

    @property
    def online(self) -> bool:
        return True

    def with_seed(self, seed: int) -> Online | None:
        first, then = self.first.with_seed(seed), self.then.with_seed(seed)
        if first is None and then is None:
            return None
        return replace(self, first=first or self.first, then=then or self.then)

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        return (self.first if start.v is None else self.then).estimate(problem, x, start)
