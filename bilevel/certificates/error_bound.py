"""The bound that belongs to an estimator, read off its configuration: it must see what solvers there are."""

from __future__ import annotations

from bilevel import bounds
from bilevel._calculus import Exact
from bilevel._estimate import AbstractEstimator
from bilevel._inner import AbstractInnerSolver
from bilevel._linear import AbstractLinearSolver
from bilevel.bounds import Bound
from bilevel.certificates.certificate import Constants


def error_bound(
    estimator: AbstractEstimator,
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
) -> Bound:
    """|estimate - h| <= total, before anything is computed, from the configuration of the estimator.

    Which function of `bilevel.bounds` it calls: `aid` for `AID` (with `gradient_descent` for `Iterate`, tol / mu for
    solvers with a tolerance, `cg`, `neumann` or `nystrom` for the linear solver), `itd`, `truncated_itd`, `one_step`,
    `esj`, `penalty`, `finite_difference`. Solvers with a tolerance are assumed to succeed. Rounding is not in it.

    Args:
        estimator: with all its steps given: what is derived at run time cannot be bounded in advance.
        constants: of f and g; see `Constants`.
        distance: |y_0 - y*|, or a bound on it.
        outer_gradient_norm: |grad_y f(x, y*)|, or a bound on it.
        outer_size: p, for `ESJ` and `FiniteDifference`.
        smoothness: for `ESJ`: the Lipschitz constant of x -> J_N(x)' grad_y f; 0 where y_N is affine in x.
        third_derivative: for `FiniteDifference`: of Phi along the coordinates.
        value_error: for `FiniteDifference`: the rounding of a value of Phi.
        reach: for `FiniteDifference`: max(1, |x_i|) over i.
        quadratic: for `Penalty(extrapolate=True)`: f and g are quadratic in y.

    Raises:
        TypeError: if it is not an estimator.
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
    from bilevel.hypergrad.aid import AID
    from bilevel.hypergrad.esj import ESJ
    from bilevel.hypergrad.finite_difference import FiniteDifference
    from bilevel.hypergrad.itd import ITD
    from bilevel.hypergrad.penalty import Penalty

    if not isinstance(estimator, AbstractEstimator):
        raise TypeError(f"`error_bound(estimator=...)` must be an estimator. Got {type(estimator).__name__}.")
    norm = outer_gradient_norm
    if isinstance(estimator, AID):
        return _aid(estimator, constants, distance, norm)
    if isinstance(estimator, ITD):
        step, steps = _descent(estimator.inner, "bounds.itd")
        last = estimator.truncate
        if last is None:
            return bounds.itd(constants, step=step, steps=steps, distance=distance, outer_gradient_norm=norm)
        if last == 1 and steps:
            return bounds.one_step(constants, step=step, steps=steps, distance=distance, outer_gradient_norm=norm)
        return bounds.truncated_itd(
            constants, step=step, steps=steps, truncate=last, distance=distance, outer_gradient_norm=norm
        )
    if isinstance(estimator, ESJ):
        if outer_size is None or smoothness is None:
            raise ValueError(
                "`error_bound(ESJ(...))` needs outer_size and smoothness. Pass smoothness=0 where y_N is affine in x."
            )
        step, steps = _descent(estimator.inner, "bounds.esj")
        return bounds.esj(
            constants,
            step=step,
            steps=steps,
            distance=distance,
            outer_gradient_norm=norm,
            outer_size=outer_size,
            directions=estimator.directions,
            distribution=estimator.distribution,
            radius=estimator.radius,
            smoothness=smoothness,
        )
    if isinstance(estimator, Penalty):
        return _penalty(estimator, constants, distance, norm, quadratic)
    if isinstance(estimator, FiniteDifference):
        if estimator.step is None or outer_size is None or third_derivative is None:
            raise ValueError(
                "`error_bound(FiniteDifference(...))` needs step, outer_size and third_derivative. Call"
                " `bounds.finite_difference` with the step that it derives."
            )
        return bounds.finite_difference(
            constants,
            step=estimator.step,
            outer_size=outer_size,
            third_derivative=third_derivative,
            distance=_solution(estimator.inner, constants, distance),
            outer_gradient_norm=norm,
            value_error=value_error,
            reach=reach,
        )
    raise ValueError(
        f"no bound is known for {type(estimator).__name__}. Bound a computed hypergradient by `certify`, or call the"
        f" function of `bilevel.bounds` that describes it."
    )


def _aid(estimator: AbstractEstimator, constants: Constants, distance: float, norm: float) -> Bound:
    from bilevel.hypergrad.aid import AID
    from bilevel.solvers.nystrom import Nystrom

    assert isinstance(estimator, AID)
    if estimator.target_error is not None or estimator.relative_error is not None:
        raise ValueError(
            "`AID(target_error=...)` certifies its own error. Read `Estimate.bound`, or call `bounds.aid` with the"
            " distance and the linear error that are reached."
        )
    if not isinstance(estimator.products, Exact):
        raise ValueError("no bound is known for `AID(products=FiniteDifferences())`. Call `bounds.aid` for exact ones.")
    reached = _solution(estimator.inner, constants, distance)
    linear = estimator.linear
    if isinstance(linear, Nystrom):
        if linear.damping is None or estimator.damping:
            raise ValueError(
                "`AID(inner, Nystrom(damping=None))` derives its damping at run time, and `AID(damping=...)` adds"
                " another. Call `bounds.nystrom` with the damping."
            )
        return bounds.nystrom(constants, distance=reached, outer_gradient_norm=norm, damping=linear.damping)
    return bounds.aid(
        constants,
        distance=reached,
        outer_gradient_norm=norm,
        linear_error=_linear_error(linear, constants, estimator.damping),
        damping=estimator.damping,
    )


def _linear_error(linear: AbstractLinearSolver, constants: Constants, damping: float) -> float:
    """|v - v_exact| in units of |b| / (mu + damping)."""
    from bilevel.solvers.cg import CG
    from bilevel.solvers.dense import Dense
    from bilevel.solvers.gmres import GMRES
    from bilevel.solvers.minres import MINRES
    from bilevel.solvers.neumann import Neumann

    if isinstance(linear, Dense):
        return 0.0
    if isinstance(linear, CG) and linear.atol == 0:
        if linear.max_steps is None:
            return linear.rtol
        if linear.preconditioner is None:
            return max(linear.rtol, bounds.cg(constants, steps=linear.max_steps, damping=damping))
    if isinstance(linear, Neumann) and linear.step is not None:
        return max(linear.rtol, bounds.neumann(constants, step=linear.step, terms=linear.terms, damping=damping))
    if isinstance(linear, MINRES | GMRES) and linear.max_steps is None:
        return linear.rtol
    raise ValueError(
        f"no bound is known for {linear!r}: what it reaches is not known in advance. Call `bounds.aid` with"
        f" linear_error=..., the relative residual that it reaches."
    )


def _descent(inner: AbstractInnerSolver, call: str) -> tuple[float, int]:
    """The step and the number of steps of plain gradient descent."""
    from bilevel.solvers.gradient_descent import GradientDescent
    from bilevel.solvers.iterate import Iterate

    plain = isinstance(inner, Iterate) and isinstance(inner.optimizer, GradientDescent) and inner.line_search is None
    if not plain:
        raise ValueError(
            f"no bound is known for {inner!r}: only for `Iterate(GradientDescent(step), max_steps=N)`. Where its"
            f" iterates contract as those do, call `{call}` with that step and number of steps."
        )
    assert isinstance(inner, Iterate) and isinstance(inner.optimizer, GradientDescent)
    step = inner.optimizer.step_size
    if not isinstance(step, int | float):
        raise ValueError(f"`GradientDescent(step=None)` derives its step at run time. Call `{call}` with that step.")
    if inner.tol:
        raise ValueError(
            f"`Iterate(tol=...)` takes a number of steps that is not known in advance. Leave it out, or call `{call}`"
            f" with the number that it took."
        )
    return float(step), inner.max_steps


def _solution(inner: AbstractInnerSolver, constants: Constants, distance: float) -> float:
    """A bound on |y - y*| where the inner solver stops."""
    from bilevel.solvers.closed_form import ClosedForm
    from bilevel.solvers.iterate import Iterate
    from bilevel.solvers.lbfgs import LBFGS
    from bilevel.solvers.newton import Newton
    from bilevel.solvers.scipy_inner import Scipy

    if isinstance(inner, ClosedForm):
        return 0.0
    if isinstance(inner, LBFGS | Newton | Scipy | Iterate) and inner.tol:
        if constants.mu is None:
            raise ValueError("`error_bound` needs `Constants(mu=...)`. Got None. Give a lower bound.")
        return inner.tol / constants.mu
    step, steps = _descent(inner, "bounds.gradient_descent")
    return bounds.gradient_descent(constants, step=step, steps=steps, distance=distance)


def _penalty(
    estimator: AbstractEstimator, constants: Constants, distance: float, norm: float, quadratic: bool
) -> Bound:
    from dataclasses import replace

    from bilevel.hypergrad.penalty import Penalty

    assert isinstance(estimator, Penalty)
    w, negative = estimator.weight, constants.L_f_minus
    exact = bounds.penalty(  # also checks the constants
        constants, weight=w, outer_gradient_norm=norm, extrapolate=estimator.extrapolate, quadratic=quadratic
    )
    assert constants.mu is not None and constants.L_fyy is not None
    negative = constants.L_fyy if negative is None else negative
    reached = _solution(estimator.inner, constants, distance)
    # The penalized problem is g + f / w: from the solution before it, with curvature between mu - L_f_minus / w and
    # L + L_fyy / w, which is also so, by a margin, for 2w.
    L = None if constants.L is None else constants.L + constants.L_fyy / w
    shift = norm / (w * constants.mu - negative)
    penalized = replace(constants, mu=constants.mu - negative / w, L=L, radius=constants.radius - shift)
    start = reached + shift  # |y~ - y_w|; for 2w: |y~_w - y_2w| <= |y~_w - y_w| + |y_w - y*| + |y* - y_2w|
    late = _solution(estimator.inner, penalized, start)
    if estimator.extrapolate:
        late = max(late, _solution(estimator.inner, penalized, late + 2 * shift))
    if reached == late == 0:
        return exact
    return bounds.penalty(
        constants,
        weight=w,
        outer_gradient_norm=norm,
        extrapolate=estimator.extrapolate,
        quadratic=quadratic,
        distance=reached,
        penalized_distance=late,
    )
