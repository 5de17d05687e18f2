"""What implicit estimators hold: the solvers of their two problems."""

from __future__ import annotations

from bilevel._calculus import AbstractProducts
from bilevel._estimate import AbstractEstimator
from bilevel._inner import AbstractInnerSolver
from bilevel._linear import AbstractLinearSolver


class AbstractImplicit(AbstractEstimator):
    """h = grad_x f - (d2g/dxdy) v with (d2g/dy2 + damping I) v = grad_y f, at an inner solution y.

    Both problems are solved by solvers that the estimator holds, so that a wrapper can ask them for another accuracy;
    see `Certified`.
    """

    inner: AbstractInnerSolver
    linear: AbstractLinearSolver
    damping: float
    products: AbstractProducts
