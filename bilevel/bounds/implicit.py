"""Bounds for implicit differentiation."""

from __future__ import annotations

from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_0, POSITIVE
from bilevel.bounds.bound import Bound, assumed, known
from bilevel.certificates.certificate import Constants


@checked("bounds.aid", distance=AT_LEAST_0, outer_gradient_norm=AT_LEAST_0, linear_error=AT_LEAST_0, damping=AT_LEAST_0)
def aid(
    constants: Constants,
    *,
    distance: float,
    outer_gradient_norm: float,
    linear_error: float = 0.0,
    damping: float = 0.0,
) -> Bound:
    """AID: |h_v - h| <= d [L_fxy + M_xy w + (C_G / mu) (L_fyy + M_yy w)] + C_G |v - H^-1 b|, w = |b| / mu.

    Here d = |y - y*|, and b = grad_y f and H at y: |b| <= |grad_y f(x, y*)| + L_fyy d. It follows from
    h_v - h = (a - a*) - (G - G*) H^-1 b - G* (H^-1 b - H*^-1 b*) - G (v - H^-1 b), stars at y*. Damping moves v by
    at most damping |b| / (mu (mu + damping)), the bias.

    Args:
        constants: mu, L_fyy, L_fxy, M_yy, M_xy and C_G.
        distance: |y - y*| at the inner solution, e.g. from `gradient_descent`.
        outer_gradient_norm: |grad_y f(x, y*)|.
        linear_error: |v - v_exact| in units of |b| / (mu + damping), e.g. from `cg` or `neumann`; a relative
            residual tolerance is one as well.
        damping: of the linear system.

    Raises:
        ValueError: if a constant is missing, does not hold there, or a number is out of range.

    Example:
        >>> constants = Constants(mu=1.0, L=2.0, L_fyy=1.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0, C_G=3.0)
        >>> aid(constants, distance=0.5, outer_gradient_norm=2.0, linear_error=0.125).linear
        0.9375
    """
    call = "bounds.aid"
    mu, L_fyy, L_fxy, M_yy, M_xy, C_G = known(
        call, constants, "mu", "L_fyy", "L_fxy", "M_yy", "M_xy", "C_G", within=distance
    )
    b = outer_gradient_norm + L_fyy * distance
    w = b / mu
    return Bound(
        inner=distance * (L_fxy + M_xy * w + C_G / mu * (L_fyy + M_yy * w)),
        linear=C_G * linear_error * b / (mu + damping),
        bias=C_G * b * (damping / (mu + damping)) / mu,
        assumptions=assumed(constants, "the linear solver starts at zero"),
    )


@checked(
    "bounds.nystrom",
    distance=AT_LEAST_0,
    outer_gradient_norm=AT_LEAST_0,
    damping=POSITIVE,
    remainder=AT_LEAST_0,
)
def nystrom(
    constants: Constants,
    *,
    distance: float,
    outer_gradient_norm: float,
    damping: float,
    remainder: float | None = None,
) -> Bound:
    """AID with v = (H_k + rho I)^-1 b, 0 <= E = H - H_k: the bound of `aid` with another linear error.

    |v - (H + rho I)^-1 b| <= |b| e / (rho (rho + e)) with e = |E| is the linear term, and the damping's
    rho |b| / (mu (mu + rho)) the bias.

    Args:
        constants: mu, L_fyy, L_fxy, M_yy, M_xy and C_G.
        distance: |y - y*| at the inner solution.
        outer_gradient_norm: |grad_y f(x, y*)|.
        damping: rho.
        remainder: |H - H_k|; None takes L, which holds for any columns; 0 if k = q.

    Raises:
        ValueError: if a constant is missing, does not hold there, or a number is out of range.

    Example:
        >>> constants = Constants(mu=1.0, L=2.0, L_fyy=0.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0, C_G=1.0)
        >>> nystrom(
        ...     constants, distance=0.0, outer_gradient_norm=1.0, damping=1.0, remainder=0.0
        ... ).total
        0.5
    """
    return aid(
        constants,
        distance=distance,
        outer_gradient_norm=outer_gradient_norm,
        linear_error=nystrom_error(constants, damping=damping, remainder=remainder),
        damping=damping,
    )


@checked("bounds.nystrom", damping=POSITIVE, remainder=AT_LEAST_0)
def nystrom_error(constants: Constants, *, damping: float, remainder: float | None = None) -> float:
    """(mu + rho) e / (rho (rho + e)): |v - (H + rho I)^-1 b| of `nystrom` in units of |b| / (mu + rho)."""
    if remainder is None:
        (remainder,) = known("bounds.nystrom", constants, "L")
    (mu,) = known("bounds.nystrom", constants, "mu")
    return (mu + damping) / damping * (remainder / (damping + remainder))
