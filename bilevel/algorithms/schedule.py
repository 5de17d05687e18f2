"""Step lengths that fall as a power of the number of steps: of those taken, or of all that are to be taken."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, AT_LEAST_1, demand_ranges


@final
@dataclass(frozen=True)
class Power:
    """t -> (1 + t / after)^-exponent: constant for about `after` steps, then falling.

    Args:
        exponent: 0 is constant; 1/2 is the usual choice for a single loop on batches.
        after: how many steps it takes to fall to 2^-exponent.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if the exponent is negative, or `after` is not positive.

    Example:
        >>> Power(0.5)(0), Power(0.5)(3)
        (1.0, 0.5)
    """

    exponent: float = 0.5
    after: float = 1.0

    def __post_init__(self) -> None:
        demand_types(self)
        if not (0 <= self.exponent < math.inf and self.after > 0):
            raise ValueError(
                "`Power(exponent=..., after=...)` must be at least 0, and positive."
                f" Got {self.exponent} and {self.after}."
            )

    def __call__(self, step: int) -> float:
        factor: float = (1 + step / self.after) ** -self.exponent
        return factor


@final
@dataclass(frozen=True)
class Horizon:
    """t -> T^-exponent: constant, and shorter the more steps T there are to be.

    What theorems of constant steps choose: SOBA's, T^-2/5 for y and v and T^-3/5 for x.

    Args:
        steps: T.
        exponent: 0 is one.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if T is below 1, or the exponent is negative.

    Example:
        >>> Horizon(10_000, exponent=0.5)(0), Horizon(10_000, exponent=0.5)(9_999)
        (0.01, 0.01)
    """

    steps: int
    exponent: float = 0.5

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, steps=AT_LEAST_1, exponent=AT_LEAST_0)

    def __call__(self, step: int) -> float:
        factor: float = self.steps**-self.exponent
        return factor
