"""Weights that grow as a power of the number of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, POSITIVE, demand_ranges


@final
@dataclass(frozen=True)
class Growth:
    """t -> start (1 + t / after)^exponent: constant for about `after` steps, then growing.

    For the weights of `F2SA`, `PBGD` and `MEHA`: what a finite weight leaves of a bias vanishes, while the noise of
    batches, which it multiplies, grows slowly. Kwon et al. let F2SA's grow with the exponent 1/7, MEHA takes 1/4.

    Args:
        start: the weight of the first step.
        exponent: 0 is constant.
        after: how many steps it takes to grow by 2^exponent.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if the exponent is negative, or another one is not positive.

    Example:
        >>> Growth(10.0, exponent=0.25)(0), Growth(10.0, exponent=0.25)(15)
        (10.0, 20.0)
    """

    start: float
    exponent: float = 1 / 7
    after: float = 1.0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, start=POSITIVE, exponent=AT_LEAST_0, after=POSITIVE)

    def __call__(self, step: int) -> float:
        weight: float = self.start * (1 + step / self.after) ** self.exponent
        return weight
