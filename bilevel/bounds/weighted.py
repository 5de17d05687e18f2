"""Bounds for the bias of F2SA at a fixed weight."""

from __future__ import annotations

import math

from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_0, POSITIVE
from bilevel.bounds.bound import Bound, assumed, known
from bilevel.bounds.value_function import penalty
from bilevel.certificates.certificate import Constants


@checked(
    "bounds.f2sa",
    weight=POSITIVE,
    outer_gradient_norm=AT_LEAST_0,
    distance=AT_LEAST_0,
    penalized_distance=AT_LEAST_0,
)
def f2sa(
    constants: Constants,
    *,
    weight: float,
    outer_gradient_norm: float,
    order: int = 2,
    quadratic: bool = False,
    distance: float = 0.0,
    penalized_distance: float = 0.0,
) -> Bound:
    """F2SA with copies near the minimizers y_j of g + j nu f, nu = 1 / weight. Order 1 is `penalty`.

    Order 2, where f and g are quadratic in y: with d_j = y_j - y*, H d_j = -j nu (C d_j + b), C = d2f/dy2 and b =
    grad_y f(y*), so that m = (d_1 + d_-1) / 2 and s = (d_1 - d_-1) / 2 nu have H m = -nu^2 C s and H s = -(C m + b),

        h_2 - h = d2f/dxdy m + G s + G H^-1 b = (d2f/dxdy + J' C) m,   m = nu^2 (H + nu C)^-1 C (H - nu C)^-1 b,
        |h_2 - h| <= (L_fxy + J L_fyy) L_fyy b / ((weight mu - L_f_minus) (weight mu - L_fyy)),   J = C_G / mu,

    which is O(1 / weight^2). Otherwise h_2 is the mean of h_w and of what `penalty` is for -f and negative weights,
    each O(1 / weight): the mean of their bounds is true, but does not show the order.

    Copies that are not at their minimizers add (L_fxy + weight C_G) |y~_j - y_j| (order 2, the larger of the two).
    Batches come on top.

    Args:
        constants: all but L.
        weight: so that weight mu > L_f_minus, and for order 2 > L_fyy as well.
        outer_gradient_norm: |grad_y f(x, y*)|.
        order: 1 or 2.
        quadratic: f and g are quadratic in y (their derivatives in x may be anything linear in y).
        distance: |y~_0 - y*|, for order 1.
        penalized_distance: |y~_1 - y_1|, and for order 2 |y~_-1 - y_-1| as well.

    Raises:
        ValueError: if a constant is missing, does not hold there, the weight is too small, there is no such order, or
            `quadratic` is contradicted by M_yy or M_xy.

    Example:
        >>> constants = Constants(
        ...     mu=1.0, L_fyy=1.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0, C_G=1.0, L_f_minus=0.0
        ... )
        >>> f2sa(constants, weight=5.0, outer_gradient_norm=2.0, order=1).bias
        0.4
        >>> f2sa(constants, weight=5.0, outer_gradient_norm=2.0, quadratic=True).bias
        0.1
    """
    call = "bounds.f2sa"
    if order not in (1, 2):
        raise ValueError(f"`{call}(order=...)` must be 1 or 2. Got {order}.")
    above = penalty(
        constants,
        weight=weight,
        outer_gradient_norm=outer_gradient_norm,
        quadratic=quadratic,
        distance=distance,
        penalized_distance=penalized_distance,
    )
    if order == 1:
        return above
    mu, L_fyy, L_fxy, C_G, negative = known(call, constants, "mu", "L_fyy", "L_fxy", "C_G", "L_f_minus")
    room = mu - L_fyy / weight
    if not room > 0:
        raise ValueError(
            f"`{call}(order=2, weight=...)` must exceed L_fyy / mu = {L_fyy / mu:.3g} for a bound. Got {weight:g}."
        )
    shift = outer_gradient_norm / (weight * room) if weight * room > 0 else math.inf
    known(call, constants, within=shift + penalized_distance)
    inner = (L_fxy + weight * C_G) * penalized_distance
    assumptions = assumed(constants, "y_1 and y_-1 are the minimizers of g + f / weight and g - f / weight near y*")
    if quadratic:
        m = L_fyy * shift / (weight * (mu - negative / weight))
        bias = (L_fxy + C_G / mu * L_fyy) * m
        return Bound(inner=inner, bias=bias, assumptions=(*assumptions, "f and g are quadratic in y"))
    M_yy, M_xy = known(call, constants, "M_yy", "M_xy")
    J = C_G / mu
    below = (L_fxy + J * L_fyy) * shift + weight * (M_xy + J * M_yy) * shift * shift / 2
    return Bound(inner=inner, bias=(above.bias + below) / 2, assumptions=assumptions)
