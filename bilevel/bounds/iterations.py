"""How fast the iterations converge that estimators are made of."""

from __future__ import annotations

import math

from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_0, POSITIVE
from bilevel.bounds.bound import known, power
from bilevel.certificates.certificate import Constants


@checked("bounds.contraction", step=POSITIVE, damping=AT_LEAST_0)
def contraction(constants: Constants, step: float, *, damping: float = 0.0) -> float:
    """rho = max(|1 - step mu|, |1 - step L|): the factor of a gradient step, and of I - step H.

    It is 1 - step mu only for step <= 2 / (L + mu); at least 1, where nothing converges, for step >= 2 / L.

    Args:
        constants: mu and L.
        step: of gradient descent or of the Neumann series.
        damping: added to the eigenvalues.

    Raises:
        ValueError: if a constant is missing or a number out of range.

    Example:
        >>> contraction(Constants(mu=1.0, L=3.0), 0.5)
        0.5
    """
    mu, L = known("bounds.contraction", constants, "mu", "L")
    return max(abs(1 - step * (mu + damping)), abs(1 - step * (L + damping)))


@checked("bounds.gradient_descent", step=POSITIVE, steps=AT_LEAST_0, distance=AT_LEAST_0)
def gradient_descent(constants: Constants, *, step: float, steps: int, distance: float) -> float:
    """|y_k - y*| <= rho^k |y_0 - y*| after k steps of gradient descent on g(x, .).

    Since y_{k+1} - y* = (I - step Hbar)(y_k - y*) with Hbar the mean Hessian along the segment.

    Args:
        constants: mu and L.
        step: the step length.
        steps: k.
        distance: |y_0 - y*|, or a bound on it.

    Raises:
        ValueError: if a constant is missing, does not hold there, or a number is out of range.

    Example:
        >>> gradient_descent(Constants(mu=1.0, L=3.0), step=0.5, steps=2, distance=4.0)
        1.0
    """
    factor = power(contraction(constants, step), steps)
    known("bounds.gradient_descent", constants, within=farthest(factor, distance))
    return factor * distance if distance else 0.0


def farthest(factor: float, distance: float) -> float:
    """How far from y* iterates come that start within `distance` of it and end within `factor` times that."""
    return distance * max(1.0, factor) if distance else 0.0


def stationary(constants: Constants, tol: float) -> float:
    """|y - y*| <= tol / mu where |grad_y g(x, y)| <= tol.

    Raises:
        ValueError: if mu is unknown.
    """
    if constants.mu is None:
        raise ValueError("`error_bound` needs `Constants(mu=...)`. Got None. Give a lower bound.")
    return tol / constants.mu


@checked("bounds.cg", steps=AT_LEAST_0, damping=AT_LEAST_0)
def cg(constants: Constants, *, steps: int, damping: float = 0.0) -> float:
    """t_k = 2 q^k / (1 + q^2k), q = (sqrt(kappa) - 1) / (sqrt(kappa) + 1): k steps of conjugate gradients.

    |v_k - v|_H <= t_k |v_0 - v|_H, which no smaller function of kappa and k bounds. The factor 2 is often dropped,
    which makes it wrong. In the Euclidean norm |v_k - v| <= sqrt(kappa) t_k |v_0 - v|; from v_0 = 0, for H v = b,
    |v_k - v| <= t_k |b| / mu, without the root, as |v|_H^2 = b' H^-1 b.

    Args:
        constants: mu and L.
        steps: k.
        damping: added to the eigenvalues.

    Raises:
        ValueError: if a constant is missing or a number out of range.

    Example:
        >>> round(cg(Constants(mu=1.0, L=1.1), steps=1), 9) == round(
        ...     0.1 / 2.1, 9
        ... )  # (kappa - 1) / (kappa + 1)
        True
    """
    mu, L = known("bounds.cg", constants, "mu", "L")
    root = math.sqrt(max(1.0, (L + damping) / (mu + damping)))
    if math.isinf(root):
        return 1.0
    q = (root - 1) / (root + 1)
    return float(2 * q**steps / (1 + q ** (2 * steps)))


@checked("bounds.neumann", step=POSITIVE, terms=AT_LEAST_0, damping=AT_LEAST_0)
def neumann(constants: Constants, *, step: float, terms: int, damping: float = 0.0) -> float:
    """rho^terms: |v_k - v| <= rho^k |v| for v_k = step sum_{j < k} (I - step H)^j b, and the same for residuals.

    Attained where b is an eigenvector of an extreme eigenvalue. From another start, rho^k |v_0 - v|.

    Args:
        constants: mu and L.
        step: of the series.
        terms: k, one more than the products it takes from zero.
        damping: added to the eigenvalues.

    Raises:
        ValueError: if a constant is missing or a number out of range.

    Example:
        >>> neumann(Constants(mu=1.0, L=3.0), step=0.5, terms=3)
        0.125
    """
    return power(contraction(constants, step, damping=damping), terms)
