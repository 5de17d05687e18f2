"""Bounds for the value-function (penalty) estimator."""

from __future__ import annotations

import math

from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_0, POSITIVE
from bilevel.bounds.bound import Bound, assumed, known
from bilevel.certificates.certificate import Constants


@checked(
    "bounds.penalty",
    weight=POSITIVE,
    outer_gradient_norm=AT_LEAST_0,
    distance=AT_LEAST_0,
    penalized_distance=AT_LEAST_0,
)
def penalty(
    constants: Constants,
    *,
    weight: float,
    outer_gradient_norm: float,
    extrapolate: bool = False,
    quadratic: bool = False,
    distance: float = 0.0,
    penalized_distance: float = 0.0,
) -> Bound:
    """Penalty: |h_w - h| <= (L_fxy + J L_fyy) s + w (M_xy + J M_yy) s^2 / 2, s = |grad_y f(y*)| / (w mu - L_f_minus).

    J = C_G / mu, and s bounds |y_w - y*|: O(1/w). Extrapolated, 2 h_2w - h_w: where f and g are quadratic in y
    2 (y_2w - y*) - (y_w - y*) = -(H + C/2w)^-1 (C/2w) (H + C/w)^-1 grad_y f(y*) / w with C = d2f/dy2, so that
    s = L_fyy |grad_y f(y*)| / (2 w^2 (mu - L_f_minus/2w) (mu - L_f_minus/w)): O(1/w^2). Otherwise the triangle
    inequality is all that these constants give, 2 |h_2w - h| + |h_w - h|, which is true but does not show the order.

    Inexact inner solutions add (L_fxy + w C_G) |y~_w - y_w| + w C_G |y~ - y*|: raising w makes them count more.

    Args:
        constants: all but L.
        weight: w, so that w mu > L_f_minus.
        outer_gradient_norm: |grad_y f(x, y*)|.
        extrapolate: for 2 h_2w - h_w.
        quadratic: f and g are quadratic in y (their derivatives in x may be anything linear in y).
        distance: |y~ - y*| of the inner solution.
        penalized_distance: the same of the penalized ones.

    Raises:
        ValueError: if a constant is missing, does not hold there, the weight is too small, or `quadratic` is
            contradicted by M_yy or M_xy.

    Example:
        >>> constants = Constants(
        ...     mu=1.0, L_fyy=1.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0, C_G=1.0, L_f_minus=0.0
        ... )
        >>> penalty(constants, weight=10.0, outer_gradient_norm=2.0).bias
        0.2
        >>> penalty(
        ...     constants, weight=10.0, outer_gradient_norm=2.0, extrapolate=True, quadratic=True
        ... ).bias
        0.01
    """
    call = "bounds.penalty"
    mu, L_fyy, L_fxy, M_yy, M_xy, C_G, negative = known(
        call, constants, "mu", "L_fyy", "L_fxy", "M_yy", "M_xy", "C_G", "L_f_minus"
    )
    if quadratic and (M_yy > 0 or M_xy > 0):
        raise ValueError(f"`{call}(quadratic=True)` needs M_yy = M_xy = 0. Got {M_yy:g} and {M_xy:g}.")
    room = mu - negative / weight
    if not room > 0:
        raise ValueError(f"`{call}(weight=...)` must exceed L_f_minus / mu = {negative / mu:.3g}. Got {weight:g}.")
    J = C_G / mu
    shift = outer_gradient_norm / (weight * room) if weight * room > 0 else math.inf
    known(call, constants, within=max(shift + penalized_distance, distance))

    def plain(w: float) -> float:
        room = mu - negative / w
        s = outer_gradient_norm / (w * room) if w * room > 0 else math.inf
        return (L_fxy + J * L_fyy) * s + w * (M_xy + J * M_yy) * s * s / 2

    def inexact(w: float) -> float:
        return (L_fxy + w * C_G) * penalized_distance

    notes = ["y_w is the minimizer of f + w g near y*"]
    if not extrapolate:
        return Bound(
            inner=inexact(weight) + weight * C_G * distance,
            bias=plain(weight),
            assumptions=assumed(constants, *notes),
        )
    if quadratic:
        notes.append("f and g are quadratic in y")
        s = L_fyy * shift / (2 * weight * mu - negative)
        bias = (L_fxy + J * L_fyy) * s
    else:
        bias = 2 * plain(2 * weight) + plain(weight)
    return Bound(
        inner=2 * inexact(2 * weight) + inexact(weight) + 3 * weight * C_G * distance,
        bias=bias,
        assumptions=assumed(constants, *notes),
    )
