"""Constants from formulas, rounded to the safe side."""

from __future__ import annotations

import math

from bilevel.certificates.certificate import Constants

RADIUS = 1.0  # where a constant does not hold for every y, all are given for |y - y*(x)| <= RADIUS
_MARGIN = 1e-10  # far above the rounding of a norm in float64, far below anything that matters
_ROUNDING = 1e-14  # of an eigenvalue, relative to the largest one


def structural(
    *,
    mu: float,
    L: float,
    L_fyy: float,
    L_fxy: float = 0.0,
    M_yy: float = 0.0,
    M_xy: float = 0.0,
    C_G: float,
    L_f_minus: float = 0.0,
    radius: float = math.inf,
) -> Constants:
    """Constants that stay valid although they were computed in floating point: mu rounded down, the others up."""
    up = 1 + _MARGIN
    return Constants(
        mu=mu * (1 - _MARGIN) - _ROUNDING * L,
        L=L * up,
        L_fyy=L_fyy * up,
        L_fxy=L_fxy * up,
        M_yy=M_yy * up,
        M_xy=M_xy * up,
        C_G=C_G * up,
        L_f_minus=L_f_minus * up,
        radius=radius,
        source="structural",
    )
