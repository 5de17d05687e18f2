"""Bounds for central differences of Phi."""

from __future__ import annotations

import math

from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_0, AT_LEAST_1, POSITIVE
from bilevel.bounds.bound import Bound, assumed, known
from bilevel.certificates.certificate import Constants


@checked(
    "bounds.finite_difference",
    step=POSITIVE,
    outer_size=AT_LEAST_1,
    third_derivative=AT_LEAST_0,
    distance=AT_LEAST_0,
    outer_gradient_norm=AT_LEAST_0,
    value_error=AT_LEAST_0,
    reach=AT_LEAST_1,
)
def finite_difference(
    constants: Constants,
    *,
    step: float,
    outer_size: int,
    third_derivative: float,
    distance: float,
    outer_gradient_norm: float,
    value_error: float = 0.0,
    reach: float = 1.0,
) -> Bound:
    """Central differences: |h_t - h| <= sqrt(p) [t^2 T / 6 + (|b| d + L_fyy d^2 / 2) / t + e / t].

    T bounds |d3Phi/dx_i^3|, d = |y - y*| the inner error of every evaluation, which moves Phi by at most
    |grad_y f(y*)| d + L_fyy d^2 / 2, and e the rounding of a value of Phi: two of each, over 2t. The first term
    falls with t and the others rise: the best t is about (3 (inner + e) / T)^(1/3).

    Args:
        constants: L_fyy.
        step: t, or the `step` of `FiniteDifference`, whose t_i is `step` max(1, |x_i|).
        outer_size: p.
        third_derivative: T.
        distance: |y - y*| at the 2p perturbed points, e.g. tol / mu.
        outer_gradient_norm: |grad_y f(x, y*)| there.
        value_error: e, a few rounding units times the largest term of f.
        reach: max(1, |x_i|) over i.

    Raises:
        ValueError: if a constant is missing, does not hold there, or a number is out of range.

    Example:
        >>> finite_difference(
        ...     Constants(mu=1.0, L_fyy=1.0),
        ...     step=0.1,
        ...     outer_size=1,
        ...     third_derivative=6.0,
        ...     distance=0.0,
        ...     outer_gradient_norm=1.0,
        ... ).bias
        0.010000000000000002
    """
    call = "bounds.finite_difference"
    (L_fyy,) = known(call, constants, "L_fyy", within=distance)
    root = math.sqrt(outer_size)
    return Bound(
        inner=root * (outer_gradient_norm * distance + L_fyy * distance * distance / 2) / step,
        bias=root * (step * reach) * (step * reach) * third_derivative / 6,
        rounding=root * value_error / step,
        assumptions=assumed(constants, "all of it holds at the perturbed points x +- t e_i, and between them"),
    )
