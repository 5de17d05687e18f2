"""Bounds for the directions of whole algorithms: at iterates that are on their way."""

from __future__ import annotations

from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_0, AT_LEAST_1, POSITIVE
from bilevel.bounds.bound import Bound, assumed, known
from bilevel.bounds.implicit import aid
from bilevel.bounds.iterations import neumann
from bilevel.certificates.certificate import Constants

_MEAN = "of the direction on all the data: on batches, of its mean given the iterates"


@checked("bounds.tracking", distance=AT_LEAST_0, linear_distance=AT_LEAST_0, outer_gradient_norm=AT_LEAST_0)
def tracking(constants: Constants, *, distance: float, linear_distance: float, outer_gradient_norm: float) -> Bound:
    """SOBA: |D_x - h| <= d (L_fxy + M_xy (|v*| + e)) + C_G e, d = |y - y*|, e = |v - v*|, |v*| <= |grad_y f(y*)| / mu.

    D_x = grad_x f - G v at any (x, y, v), as single loops have it while y and v follow y*(x) and v*(x) = H^-1 grad_y f:

        D_x - h = (grad_x f - grad_x f*) - (G - G*) v - G* (v - v*),   stars at y*

    and |v| <= |v*| + e. Zero at y = y*, v = v*: a single loop has no bias of its own, and is as far from h as its
    iterates are behind. The first term is called inner, the second linear. Attained where p = q = 1, f and g are
    quadratic and d2f/dxdy (y - y*) and -G (v - v*) are of one sign.

    Args:
        constants: mu, L_fxy, M_xy and C_G.
        distance: d.
        linear_distance: e.
        outer_gradient_norm: |grad_y f(x, y*)|.

    Raises:
        ValueError: if a constant is missing, does not hold there, or a number is out of range.

    Example:
        >>> constants = Constants(mu=1.0, L_fxy=2.0, M_xy=0.0, C_G=3.0)
        >>> bound = tracking(constants, distance=0.5, linear_distance=0.25, outer_gradient_norm=1.0)
        >>> bound.inner, bound.linear
        (1.0, 0.75)
    """
    mu, L_fxy, M_xy, C_G = known("bounds.tracking", constants, "mu", "L_fxy", "M_xy", "C_G", within=distance)
    length = outer_gradient_norm / mu + linear_distance
    return Bound(
        inner=distance * (L_fxy + M_xy * length) if distance else 0.0,
        linear=C_G * linear_distance,
        assumptions=assumed(constants, _MEAN),
    )


@checked(
    "bounds.truncated_series", distance=AT_LEAST_0, outer_gradient_norm=AT_LEAST_0, step=POSITIVE, terms=AT_LEAST_1
)
def truncated_series(
    constants: Constants, *, step: float, terms: int, distance: float, outer_gradient_norm: float
) -> Bound:
    """stocBiO: |E D_x - h| <= d [L_fxy + M_xy w + (C_G / mu) (L_fyy + M_yy w)] + C_G rho^K w, w = |grad_y f| / mu at y.

    v = step sum_{k < K} (I - step H)^k grad_y f, the mean of a Neumann series on batches, is (I - step H)^K H^-1
    grad_y f short of H^-1 grad_y f: the last term, a bias that no outer or inner steps remove. rho = 1 - step mu where
    step <= 2 / (mu + L). The first term is that of `aid`, d = |y - y*|. The bias is attained at y = y* where grad_y f
    is an eigenvector of mu, and |G v| = C_G |v| for it.

    Args:
        constants: mu, L, L_fyy, L_fxy, M_yy, M_xy and C_G.
        step: of the series.
        terms: K: Q + 1 for `StocBiO`, `MRBO` and `VRBO` with `linear_steps` Q; Q for `BSA`, `TTSA` and `SUSTAIN`.
        distance: d.
        outer_gradient_norm: |grad_y f(x, y*)|.

    Raises:
        ValueError: if a constant is missing, does not hold there, or a number is out of range.

    Example:
        >>> constants = Constants(mu=1.0, L=1.0, L_fyy=0.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0, C_G=2.0)
        >>> truncated_series(
        ...     constants, step=0.5, terms=3, distance=0.0, outer_gradient_norm=4.0
        ... ).bias
        1.0
    """
    bound = aid(
        constants,
        distance=distance,
        outer_gradient_norm=outer_gradient_norm,
        linear_error=neumann(constants, step=step, terms=terms),
    )
    return Bound(inner=bound.inner, bias=bound.linear, assumptions=assumed(constants, _MEAN))
