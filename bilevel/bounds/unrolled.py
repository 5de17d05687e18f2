"""Bounds for derivatives of the steps of gradient descent."""

from __future__ import annotations

from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_0, AT_LEAST_1, POSITIVE
from bilevel.bounds.bound import Bound, assumed, known, power
from bilevel.bounds.iterations import contraction, farthest
from bilevel.certificates.certificate import Constants

_START = "the start does not depend on x, and the steps are those of gradient descent with this step"


@checked("bounds.itd", step=POSITIVE, steps=AT_LEAST_0, distance=AT_LEAST_0, outer_gradient_norm=AT_LEAST_0)
def itd(constants: Constants, *, step: float, steps: int, distance: float, outer_gradient_norm: float) -> Bound:
    """ITD: |h_N - h| <= (L_fxy + J L_fyy) rho^N d + [J rho^N + step (M_yy J + M_xy) N rho^(N-1) d] |b|, J = C_G / mu.

    Here d = |y_0 - y*| and |b| <= |grad_y f(x, y*)| + L_fyy rho^N d bounds grad_y f at y_N. The derivative J_k of y_k
    obeys J_{k+1} - J* = (I - step H_k)(J_k - J*) - step [(H_k - H*) J* + (G_k - G*)'], whose sum gives
    N rho^(N-1): slower than the iterates themselves. The term J rho^N, called linear, is left where y_0 = y*.

    Args:
        constants: all but L_f_minus.
        step: of gradient descent.
        steps: N.
        distance: |y_0 - y*|.
        outer_gradient_norm: |grad_y f(x, y*)|.

    Raises:
        ValueError: if a constant is missing, does not hold there, or a number is out of range.

    Example:
        >>> constants = Constants(mu=1.0, L=3.0, L_fyy=0.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0, C_G=1.0)
        >>> itd(constants, step=0.5, steps=3, distance=1.0, outer_gradient_norm=8.0).terms["linear"]
        1.0
    """
    inner, missing = _parts("bounds.itd", constants, step, steps, steps, distance, outer_gradient_norm)
    return Bound(inner=inner, linear=missing, assumptions=assumed(constants, _START))


@checked(
    "bounds.truncated_itd",
    step=POSITIVE,
    steps=AT_LEAST_0,
    truncate=AT_LEAST_1,
    distance=AT_LEAST_0,
    outer_gradient_norm=AT_LEAST_0,
)
def truncated_itd(
    constants: Constants, *, step: float, steps: int, truncate: int, distance: float, outer_gradient_norm: float
) -> Bound:
    """ITD through the last K of N steps: that of `itd` with J rho^K, a bias, and K rho^(N-1) in place of N rho^(N-1).

    Args:
        constants: all but L_f_minus.
        step: of gradient descent.
        steps: N.
        truncate: K; more than N is N.
        distance: |y_0 - y*|.
        outer_gradient_norm: |grad_y f(x, y*)|.

    Raises:
        ValueError: if a constant is missing, does not hold there, or a number is out of range.

    Example:
        >>> constants = Constants(mu=1.0, L=3.0, L_fyy=0.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0, C_G=1.0)
        >>> truncated_itd(
        ...     constants, step=0.5, steps=9, truncate=3, distance=1.0, outer_gradient_norm=8.0
        ... ).bias
        1.0
    """
    call = "bounds.truncated_itd"
    inner, missing = _parts(call, constants, step, steps, min(truncate, steps), distance, outer_gradient_norm)
    return Bound(inner=inner, bias=missing, assumptions=assumed(constants, _START))


@checked("bounds.one_step", step=POSITIVE, steps=AT_LEAST_1, distance=AT_LEAST_0, outer_gradient_norm=AT_LEAST_0)
def one_step(constants: Constants, *, step: float, steps: int, distance: float, outer_gradient_norm: float) -> Bound:
    """One step: |h_1 - h| <= (L_fxy + J L_fyy) rho^N d + [J rho + step M_xy rho^(N-1) d] |b|, J = C_G / mu.

    `truncated_itd` with K = 1, sharper: J_1 - J* = -step (G_{N-1} - G*)' - (I - step H*) J* has no M_yy.

    Args:
        constants: all but M_yy and L_f_minus.
        step: of gradient descent.
        steps: N, at least 1.
        distance: |y_0 - y*|.
        outer_gradient_norm: |grad_y f(x, y*)|.

    Raises:
        ValueError: if a constant is missing, does not hold there, or a number is out of range.

    Example:
        >>> constants = Constants(mu=1.0, L=3.0, L_fyy=0.0, L_fxy=0.0, M_xy=0.0, C_G=1.0)
        >>> one_step(constants, step=0.5, steps=9, distance=1.0, outer_gradient_norm=8.0).bias
        4.0
    """
    inner, missing = _parts("bounds.one_step", constants, step, steps, 1, distance, outer_gradient_norm, drift=False)
    return Bound(inner=inner, bias=missing, assumptions=assumed(constants, _START))


def _parts(
    call: str,
    constants: Constants,
    step: float,
    steps: int,
    last: int,
    distance: float,
    norm: float,
    *,
    drift: bool = True,
) -> tuple[float, float]:
    """The terms in the distance of the iterates, and that of the derivative where y_0 = y*."""
    rho = contraction(constants, step)
    factor = power(rho, steps)
    mu, L_fyy, L_fxy, M_xy, C_G = known(
        call, constants, "mu", "L_fyy", "L_fxy", "M_xy", "C_G", within=farthest(factor, distance)
    )
    J = C_G / mu
    change = M_xy
    if drift:
        (M_yy,) = known(call, constants, "M_yy")
        change += M_yy * J
    d = factor * distance if distance else 0.0
    b = norm + L_fyy * d
    late = last * power(rho, steps - 1) * distance if steps and distance else 0.0
    return (L_fxy + J * L_fyy) * d + step * change * late * b, J * power(rho, last) * b
