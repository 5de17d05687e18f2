"""What an estimator's error bound may be computed from before anything else is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, AT_LEAST_1, demand_ranges
from bilevel.certificates.certificate import Constants


@final
@dataclass(frozen=True)
class Beforehand:
    """What is known of a problem and of a start before an estimate is made there; see `error_bound`.

    Attributes:
        constants: of f and g.
        distance: |y_0 - y*|, or a bound on it.
        outer_gradient_norm: |grad_y f(x, y*)|, or a bound on it.
        outer_size: p.
        smoothness: the Lipschitz constant of x -> J_N(x)' grad_y f; 0 where y_N is affine in x.
        third_derivative: of Phi along the coordinates.
        value_error: the rounding of a value of Phi.
        reach: max(1, |x_i|) over i.
        quadratic: whether f and g are quadratic in y.
        linear_distance: |v_0 - v*|, v* = H^-1 grad_y f at y*, or a bound on it; None: not known.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a number is negative, infinite or NaN.
    """

    constants: Constants
    distance: float
    outer_gradient_norm: float
    outer_size: int | None = None
    smoothness: float | None = None
    third_derivative: float | None = None
    value_error: float = 0.0
    reach: float = 1.0
    quadratic: bool = False
    linear_distance: float | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, distance=AT_LEAST_0, outer_gradient_norm=AT_LEAST_0, outer_size=AT_LEAST_1)
        demand_ranges(
            self, smoothness=AT_LEAST_0, third_derivative=AT_LEAST_0, value_error=AT_LEAST_0, reach=AT_LEAST_1
        )
        demand_ranges(self, linear_distance=AT_LEAST_0)
