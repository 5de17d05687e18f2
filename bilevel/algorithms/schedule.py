"""Step lengths that fall as a power of the number of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from bilevel._validate import demand_types


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
