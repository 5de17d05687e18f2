"""Bounds for the evolution-strategy Jacobian."""

from __future__ import annotations

import math
from typing import Literal

from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_0, AT_LEAST_1, POSITIVE
from bilevel.bounds.bound import Bound, assumed, known
from bilevel.bounds.unrolled import itd
from bilevel.certificates.certificate import Constants


@checked(
    "bounds.esj",
    step=POSITIVE,
    steps=AT_LEAST_0,
    distance=AT_LEAST_0,
    outer_gradient_norm=AT_LEAST_0,
    outer_size=AT_LEAST_1,
    directions=AT_LEAST_1,
    radius=AT_LEAST_0,
    smoothness=AT_LEAST_0,
)
def esj(
    constants: Constants,
    *,
    step: float,
    steps: int,
    distance: float,
    outer_gradient_norm: float,
    outer_size: int,
    directions: int,
    distribution: Literal["gaussian", "rademacher", "sphere", "orthonormal"] = "orthonormal",
    radius: float = 0.0,
    smoothness: float = 0.0,
) -> Bound:
    """ESJ: the bound of `itd`, the bias of a finite radius, and the deviation sqrt(a) |w|, w = J_N' grad_y f(y_N).

    With p outer variables and Q directions a = (p + 1)/Q (gaussian), (p - 1)/Q (rademacher, sphere), p/Q - 1
    (orthonormal); |w| <= (J + |J_N - J*|) |grad_y f(y_N)|, J = C_G / mu. Where x -> J_N(x)' grad_y f is
    S-Lipschitz the bias is at most r S sqrt(p) (gaussian: Stein's identity), r S p/(p + 1) (sphere, orthonormal:
    smoothing over a ball), r S p/2 (rademacher), and the deviation grows by r S m / (2 sqrt(Q)) with
    m = sqrt(p (p + 2) (p + 4)), p, p, p^(3/2) in that order.

    Args:
        constants: all but L_f_minus.
        step: of gradient descent.
        steps: N.
        distance: |y_0 - y*|.
        outer_gradient_norm: |grad_y f(x, y*)|.
        outer_size: p.
        directions: Q.
        distribution: of the directions.
        radius: r.
        smoothness: S; 0 where y_N is affine in x.

    Raises:
        ValueError: if a constant is missing, does not hold there, or a number is out of range.

    Example:
        >>> constants = Constants(mu=1.0, L=1.0, L_fyy=0.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0, C_G=1.0)
        >>> run = {"step": 1.0, "steps": 1, "distance": 0.0, "outer_gradient_norm": 3.0}
        >>> esj(constants, **run, outer_size=8, directions=4).sampling
        3.0
    """
    call, p, Q = "bounds.esj", outer_size, directions
    if distribution == "orthonormal" and p < Q:
        raise ValueError(
            f"`{call}(directions=...)` must be at most the number of outer variables, `outer_size` = {p}. Got {Q}."
        )
    laws = {  # the variance in units of |w|^2, the bias and the deviation in units of r S
        "gaussian": ((p + 1) / Q, math.sqrt(p), math.sqrt(p * (p + 2) * (p + 4))),
        "rademacher": ((p - 1) / Q, p / 2, p**1.5),
        "sphere": ((p - 1) / Q, p / (p + 1), float(p)),
        "orthonormal": (p / Q - 1, p / (p + 1), float(p)),
    }
    variance, bias, deviation = laws[distribution]
    unrolled = itd(constants, step=step, steps=steps, distance=distance, outer_gradient_norm=outer_gradient_norm)
    mu, C_G = known(call, constants, "mu", "C_G")
    size = C_G / mu * outer_gradient_norm + unrolled.total  # the total has J L_fyy |y_N - y*| and |J_N - J*| |b|
    curved = radius * smoothness
    return Bound(
        inner=unrolled.inner,
        linear=unrolled.linear,
        bias=curved * bias,
        sampling=math.sqrt(variance) * size + curved * deviation / (2 * math.sqrt(Q)),
        assumptions=assumed(
            constants,
            *unrolled.assumptions[-1:],
            "directions are drawn independently of f and g; the total bounds the root mean square of the error",
            "y_N is affine in x" if smoothness == 0 else f"x -> J_N(x)' grad_y f is {smoothness:.3g}-Lipschitz",
        ),
    )
