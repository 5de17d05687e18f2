"""The bound that belongs to an estimator, read off its configuration."""

from __future__ import annotations

from bilevel._estimate import AbstractRequiring
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_0, AT_LEAST_1
from bilevel.bounds.beforehand import Beforehand
from bilevel.bounds.bound import Bound
from bilevel.certificates.certificate import Constants


@checked(
    distance=AT_LEAST_0,
    outer_gradient_norm=AT_LEAST_0,
    outer_size=AT_LEAST_1,
    smoothness=AT_LEAST_0,
    third_derivative=AT_LEAST_0,
    value_error=AT_LEAST_0,
    reach=AT_LEAST_1,
    linear_distance=AT_LEAST_0,
)
def error_bound(
    estimator: AbstractRequiring,
    constants: Constants,
    *,
    distance: float,
    outer_gradient_norm: float,
    outer_size: int | None = None,
    smoothness: float | None = None,
    third_derivative: float | None = None,
    value_error: float = 0.0,
    reach: float = 1.0,
    quadratic: bool = False,
    linear_distance: float | None = None,
) -> Bound:
    """|estimate - h| <= total, before anything is computed, from the configuration of the estimator or algorithm.

    The estimator's own method `error_bound` says it, from those of its solvers (`solution_bound`, `relative_error`) and
    the functions of `bilevel.bounds`: `aid` for `AID` (with `gradient_descent` for `Iterate`, tol / mu for solvers with
    a tolerance, `cg`, `neumann` or `nystrom` for the linear solver), `itd`, `truncated_itd`, `one_step`, `esj`,
    `penalty`, `finite_difference`. Solvers with a tolerance are assumed to succeed. Rounding is not in it.

    Of an algorithm it bounds the first direction that x moves along, on all the data, after the steps of y and v that
    come before: `tracking` for those with a linear iterate (`SOBA` and its kin, `AmIGO`), `truncated_series` for those
    with a Neumann series (`StocBiO`, `MRBO`, `VRBO`, ...), `f2sa` for `F2SA`; the `bias` of the latter two is a floor.
    At later steps it holds with the distances there. That of `Descent` is its estimator's.

    Args:
        estimator: an estimator or an algorithm, with all its steps given: what is derived at run time cannot be
            bounded in advance.
        constants: of f and g; see `Constants`.
        distance: |y_0 - y*|, or a bound on it.
        outer_gradient_norm: |grad_y f(x, y*)|, or a bound on it.
        outer_size: p, for `ESJ` and `FiniteDifference`.
        smoothness: for `ESJ`: the Lipschitz constant of x -> J_N(x)' grad_y f; 0 where y_N is affine in x.
        third_derivative: for `FiniteDifference`: of Phi along the coordinates.
        value_error: for `FiniteDifference`: the rounding of a value of Phi.
        reach: for `FiniteDifference`: max(1, |x_i|) over i.
        quadratic: for `Penalty(extrapolate=True)` and `F2SA(order=2)`: f and g are quadratic in y.
        linear_distance: for algorithms with a linear iterate: |v_0 - v*|, v* = H^-1 grad_y f at y*, or a bound on it;
            v_0 is zero at the start of a run.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if no bound is known for the configuration (the message says what to call instead), or a constant
            that it needs is unknown.

    Example:
        >>> from bilevel import ITD
        >>> from bilevel.solvers import GradientDescent, Iterate
        >>> constants = Constants(mu=1.0, L=3.0, L_fyy=0.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0, C_G=1.0)
        >>> itd = ITD(Iterate(GradientDescent(0.5), max_steps=3))
        >>> error_bound(itd, constants, distance=1.0, outer_gradient_norm=8.0).total
        1.0
    """
    return estimator.error_bound(
        Beforehand(
            constants,
            distance,
            outer_gradient_norm,
            outer_size,
            smoothness,
            third_derivative,
            value_error,
            reach,
            quadratic,
            linear_distance,
        )
    )
