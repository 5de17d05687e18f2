"""A-priori bounds hold on random problems, are attained where they can be, and refuse what they do not cover."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import pytest
import torch
from bilevel_strategies import families, logistic, normal
from hypothesis import assume, given, settings, strategies as st
from torch import Tensor

from bilevel import (
    AID,
    ESJ,
    ITD,
    AbstractEstimator,
    AbstractInnerSolver,
    AbstractLinearSolver,
    BilevelProblem,
    Constants,
    FiniteDifference,
    FiniteDifferences,
    LinearOperator,
    Penalty,
    Solved,
    bounds,
    error_bound,
    hypergradient,
)
from bilevel.bounds import Bound
from bilevel.extending import Beforehand, FlatEstimate, FlatProblem, FlatStart, Objective
from bilevel.named.auto import Chosen
from bilevel.problems.quadratic import QuadraticFamily
from bilevel.solvers.adam import Adam
from bilevel.solvers.cg import CG
from bilevel.solvers.closed_form import ClosedForm
from bilevel.solvers.dense import Dense
from bilevel.solvers.gmres import GMRES
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.jacobi import Jacobi
from bilevel.solvers.lbfgs import LBFGS
from bilevel.solvers.minres import MINRES
from bilevel.solvers.neumann import Neumann
from bilevel.solvers.newton import Newton
from bilevel.solvers.nystrom import Nystrom
from bilevel.solvers.quadratic_program import QuadraticProgram


@dataclass(frozen=True, eq=False)
class Case:
    """A problem at a point where everything is known."""

    problem: BilevelProblem
    x: Tensor
    y: Tensor
    h: Tensor
    b: Tensor
    constants: Constants
    affine: bool

    @property
    def mu(self) -> float:
        assert self.constants.mu is not None
        return self.constants.mu

    @property
    def top(self) -> float:
        assert self.constants.L is not None
        return self.constants.L


@st.composite
def cases(draw: st.DrawFn) -> Case:
    if draw(st.booleans()):
        family = draw(families(kappa=10.0))
        x = normal(family.s.numel(), seed=draw(st.integers(0, 99)))
        y = family.solution(x)
        b = family.C @ (y - family.t) + family.E.T @ x
        return Case(BilevelProblem(family.f, family.g), x, y, family.gradient(x), b, family.constants(), True)
    data, x, y0 = draw(logistic())
    problem = data.problem()
    found = hypergradient(problem, x, y0, estimator=AID(Newton(1e-12, max_steps=50), Dense()))
    b = torch.func.grad(data.f, argnums=1)(x, found.y)
    return Case(problem, x, found.y, found.grad, b, data.constants(x, found.y, 50.0), False)


def descent(case: Case, fraction: float, steps: int) -> Iterate:
    return Iterate(GradientDescent(fraction / case.top), steps)


# (case, step length in units of 1 / L, number of steps) -> estimator
COVERED: dict[str, Callable[[Case, float, int], AbstractEstimator]] = {
    "aid-cg": lambda c, s, n: AID(descent(c, s, n), CG(rtol=0.0, max_steps=n)),
    "aid-cg-damped": lambda c, s, n: AID(descent(c, s, n), CG(rtol=0.0, max_steps=n), damping=0.3 * c.mu),
    "aid-cg-tolerance": lambda c, s, n: AID(LBFGS(1e-2 * c.top), CG(rtol=0.3)),
    "aid-minres-tolerance": lambda c, s, n: AID(Newton(1e-1 * c.top), MINRES(rtol=0.3)),
    "aid-gmres-tolerance": lambda c, s, n: AID(descent(c, s, n), GMRES(rtol=0.3)),
    "aid-neumann": lambda c, s, n: AID(descent(c, s, n), Neumann(step=s / c.top, terms=max(n, 1))),
    "aid-neumann-damped": lambda c, s, n: AID(
        descent(c, s, n), Neumann(step=s / (c.top + c.mu), terms=max(n, 1)), damping=c.mu
    ),
    "aid-dense": lambda c, s, n: AID(descent(c, s, n), Dense()),
    "aid-nystrom": lambda c, s, n: AID(descent(c, s, n), Nystrom(rank=2, damping=c.mu)),
    "itd": lambda c, s, n: ITD(descent(c, s, n)),
    "itd-forward": lambda c, s, n: ITD(descent(c, s, n), forward=True),
    "itd-truncated": lambda c, s, n: ITD(descent(c, s, n + 1), truncate=max(1, n // 2)),
    "one-step": lambda c, s, n: ITD(descent(c, s, n + 1), truncate=1),
    "penalty": lambda c, s, n: Penalty(Newton(1e-9 * c.top), weight=40 * (1 + 1 / c.mu)),
    "penalty-descent": lambda c, s, n: Penalty(descent(c, s, n), weight=4 * (2 + 1 / c.mu)),
    "penalty-extrapolated": lambda c, s, n: Penalty(Newton(1e-9 * c.top), weight=9 / c.mu + 1, extrapolate=True),
    "penalty-extrapolated-descent": lambda c, s, n: Penalty(
        descent(c, s, n), weight=4 * (2 + 1 / c.mu), extrapolate=True
    ),
}


@pytest.mark.parametrize("name", COVERED)
@settings(max_examples=40)
@given(cases(), st.sampled_from([0.3, 1.0, 1.7]), st.integers(0, 12), st.floats(0, 2), st.integers(0, 99))
def test_bound_holds(name: str, case: Case, fraction: float, steps: int, distance: float, seed: int) -> None:
    estimator = COVERED[name](case, fraction, steps)
    away = normal(case.y.numel(), seed=seed)
    y0 = case.y + distance * away / away.norm()
    inner = getattr(estimator, "inner", None)
    if isinstance(inner, Iterate) and "penalty" in name:
        assume(fraction <= 1)  # the penalized problem has a larger L
    found = hypergradient(case.problem, case.x, y0, estimator=estimator, throw=False)
    bound = error_bound(
        estimator,
        case.constants,
        distance=distance,
        outer_gradient_norm=float(case.b.norm()),
        quadratic=case.affine and "extrapolated" in name,
    )
    rounding = 1e-10 * (1 + float(case.h.norm()) + float(found.grad.norm())) * (1e2 if "penalty" in name else 1)
    assert float((found.grad - case.h).norm()) <= bound.total * (1 + 1e-9) + rounding
    assert math.isclose(bound.total, sum(bound.terms.values()))
    assert bound.assumptions


@settings(max_examples=40)
@given(cases(), st.sampled_from([0.3, 1.0, 1.7]), st.integers(0, 12), st.floats(0, 3), st.integers(0, 99))
def test_gradient_descent_contracts_at_least_so_fast(
    case: Case, fraction: float, steps: int, distance: float, seed: int
) -> None:
    away = normal(case.y.numel(), seed=seed)
    y0 = case.y + distance * away / away.norm()
    found = hypergradient(case.problem, case.x, y0, estimator=AID(descent(case, fraction, steps), Dense()), throw=False)
    bound = bounds.gradient_descent(case.constants, step=fraction / case.top, steps=steps, distance=distance)
    assert float((found.y - case.y).norm()) <= bound * (1 + 1e-9) + 1e-11


@settings(max_examples=40)
@given(cases(), st.integers(1, 3), st.sampled_from([1e-2, 1e-3]))
def test_bound_of_central_differences_holds(case: Case, tens: int, step: float) -> None:
    tol = 10.0**-tens * 1e-4 * case.mu
    estimator = FiniteDifference(Newton(tol, max_steps=50), step=step)
    found = hypergradient(case.problem, case.x, case.y, estimator=estimator, throw=False)
    if not case.affine:
        return  # the third derivative of Phi is not known there
    assert case.constants.L_fyy is not None and case.constants.C_G is not None
    reach = max(1.0, float(case.x.abs().max()))
    moved = case.constants.C_G / case.mu * step * reach  # of y*
    norm = float(case.b.norm()) + case.constants.L_fyy * moved + (case.constants.L_fxy or 0) * step * reach
    scale = float(case.problem.f(case.x, case.y).abs()) + float(case.h.norm()) + 1 + float(case.x.norm()) ** 2
    bound = error_bound(
        estimator,
        case.constants,
        distance=0.0,
        outer_gradient_norm=norm,
        outer_size=len(case.x),
        third_derivative=0.0,
        value_error=1e-14 * scale * (1 + float(case.y.norm()) ** 2 + float(case.b.norm()) ** 2),
        reach=reach,
    )
    assert bound.bias == 0
    assert float((found.grad - case.h).norm()) <= bound.total


# Attained. One variable each, x = 0, y* = 0 and J = 1 unless said otherwise; the constants hold for y >= 0 or near 0.


def scalar(
    f: Callable[[Tensor, Tensor], Tensor],
    g: Callable[[Tensor, Tensor], Tensor],
    estimator: AbstractEstimator,
    start: float,
    exact: float,
) -> float:
    problem = BilevelProblem(f, g)
    zero = torch.zeros((), dtype=torch.float64)
    found = hypergradient(problem, zero, zero + start, estimator=estimator, throw=False)
    return abs(float(found.grad) - exact)


PLAIN = Constants(mu=1.0, L=1.0, L_fyy=0.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0, C_G=1.0, L_f_minus=0.0)


def _plain(x: Tensor, y: Tensor) -> Tensor:
    return y**2 / 2 - x * y


def _mixed(x: Tensor, y: Tensor) -> Tensor:  # M_xy = 1, d2g/dxdy = -(1 + y)
    return y**2 / 2 - x * (y + y**2 / 2)


def _curved(x: Tensor, y: Tensor) -> Tensor:  # M_yy = 1, H = 1 + y
    return y**2 / 2 + y**3 / 6 - x * y


def _slope(x: Tensor, y: Tensor) -> Tensor:
    return 2 * y


def test_implicit_bound_is_attained_term_by_term() -> None:
    still = Iterate(GradientDescent(1.0), 0)
    aid = AID(still, Dense())

    def ratio(error: float, constants: Constants, estimator: AbstractEstimator = aid, norm: float = 2.0) -> float:
        return error / error_bound(estimator, constants, distance=0.5, outer_gradient_norm=norm).total

    def bowl(x: Tensor, y: Tensor) -> Tensor:  # grad_y f = 3 y, which is 0 at y*
        return 1.5 * y**2

    assert ratio(scalar(bowl, _plain, aid, 0.5, 0.0), replace(PLAIN, L_fyy=3.0), norm=0.0) == pytest.approx(1)
    assert ratio(scalar(lambda x, y: 3 * x * y, _plain, aid, 0.5, 0.0), replace(PLAIN, L_fxy=3.0), norm=0.0) == (
        pytest.approx(1)
    )
    wide = replace(PLAIN, M_xy=1.0, C_G=1.5)
    assert ratio(scalar(_slope, _mixed, aid, 0.5, 2.0), wide) == pytest.approx(1)
    bent = replace(PLAIN, M_yy=1.0, L=1.5)
    assert 0.6 < ratio(scalar(_slope, _curved, aid, 0.5, 2.0), bent) <= 1  # 1 / (1 + y) for 1: all of it is M_yy's
    damped = AID(ClosedForm(lambda x: x), Dense(), damping=0.25)
    assert ratio(scalar(_slope, _plain, damped, 0.0, 2.0), PLAIN, damped) == pytest.approx(1)
    nystrom = AID(ClosedForm(lambda x: x), Nystrom(rank=1, damping=0.25))
    error = scalar(_slope, _plain, nystrom, 0.0, 2.0)
    exact = bounds.nystrom(PLAIN, distance=0.0, outer_gradient_norm=2.0, damping=0.25, remainder=0.0)
    assert error == pytest.approx(exact.total)


def test_nystrom_term_is_attained_by_columns_that_miss_the_remainder() -> None:
    # H = diag(1, 3) and the first column: the remainder is 3, at the eigenvector along which b points.
    A = torch.tensor([1.0, 3.0], dtype=torch.float64)
    for seed in range(20):
        solver = Nystrom(rank=1, damping=0.5, seed=seed)
        problem = BilevelProblem(lambda x, y: 2 * y[1], lambda x, y: (A * y**2).sum() / 2 - x * y[1])
        zero = torch.zeros((), dtype=torch.float64)
        found = hypergradient(
            problem, zero, torch.zeros(2), estimator=AID(ClosedForm(lambda x: torch.zeros(2)), solver)
        )
        bound = bounds.nystrom(
            replace(PLAIN, mu=3.0, L=3.0), distance=0.0, outer_gradient_norm=2.0, damping=0.5, remainder=3.0
        )
        error = abs(float(found.grad) - 2 / 3)
        if abs(float(found.grad) - 4.0) < 1e-12:  # the other column was drawn: v = b / rho
            # (H + rho)^-1 lies between: the two terms have opposite signs, and their difference is attained
            assert error == pytest.approx(bound.linear - bound.bias)
            return
    raise AssertionError("the first column was never drawn")


@given(st.floats(0.01, 1.99), st.integers(1, 20), st.floats(1.0, 50.0), st.integers(0, 99))
def test_neumann_and_unrolling_are_attained_on_an_extreme_eigenvector(
    step: float, n: int, kappa: float, seed: int
) -> None:
    A = torch.diag(torch.tensor([1.0, kappa], dtype=torch.float64))
    step = step / kappa
    k = 0 if abs(1 - step) >= abs(1 - step * kappa) else 1  # where the factor rho is
    e = torch.eye(2, dtype=torch.float64)[k]
    zero = torch.zeros(1, dtype=torch.float64)
    family = QuadraticFamily(
        A, 3 * e[:, None], torch.zeros(2), torch.zeros(2, 2), torch.zeros(2), zero[:, None] * e, zero[None], zero
    )
    problem = BilevelProblem(lambda x, y: 2 * (e @ y), family.g)
    curvature = float(A[k, k])
    # mu enters J = C_G / mu: J is exact where the eigenvector is that of mu
    constants = replace(PLAIN, mu=1.0, L=kappa, C_G=3.0)
    for estimator in (
        AID(ClosedForm(lambda x: torch.zeros(2)), Neumann(step=step, terms=n)),
        ITD(Iterate(GradientDescent(step), n)),
        ITD(Iterate(GradientDescent(step), n + 3), truncate=n),
    ):
        found = hypergradient(problem, zero, torch.zeros(2), estimator=estimator, throw=False)
        error = abs(float(found.grad) - 6 / curvature)
        bound = error_bound(estimator, constants, distance=0.0, outer_gradient_norm=2.0).total
        assert error * curvature == pytest.approx(bound, rel=1e-8, abs=1e-10)


def test_unrolled_bound_is_attained_term_by_term() -> None:
    def bound(estimator: ITD, constants: Constants, distance: float, norm: float = 2.0) -> float:
        return error_bound(estimator, constants, distance=distance, outer_gradient_norm=norm).total

    half = ITD(Iterate(GradientDescent(0.5), 3))
    # f = 3 x y - 2 y at x = 0: grad_x f = 3 y is off by 3 rho^N d, and the derivative by J rho^N, with one sign
    error = scalar(lambda x, y: 3 * x * y - 2 * y, _plain, half, 0.5, -2.0)
    assert error == pytest.approx(bound(half, replace(PLAIN, L_fxy=3.0), 0.5))
    # grad_y f = 3 y: off by J L_fyy rho^N d, while (J_N - J*) grad_y f(y_N) has the other sign
    error = scalar(lambda x, y: 1.5 * y**2, _plain, half, 0.5, 0.0)
    assert error == pytest.approx(3 / 16 - 3 / 16 / 8)
    assert bound(half, replace(PLAIN, L_fyy=3.0), 0.5, 0.0) == pytest.approx(3 / 16 + 3 / 16 / 8)
    # step = 1 / H, so that only the change of d2g/dxdy is left
    for estimator in (ITD(Iterate(GradientDescent(1.0), 1)), ITD(Iterate(GradientDescent(1.0), 1), truncate=1)):
        error = scalar(_slope, _mixed, estimator, 0.5, 2.0)
        assert error == pytest.approx(bound(estimator, replace(PLAIN, M_xy=1.0, C_G=1.0), 0.5))
    # H = 1 + y: a derivative of N rho^(N-1) beside rho^N
    many = ITD(Iterate(GradientDescent(0.05), 80))
    error = scalar(_slope, _curved, many, 0.5, 2.0)
    bent = replace(PLAIN, M_yy=1.0, L=1.5)
    assert 0.4 * bound(many, bent, 0.5) < error <= bound(many, bent, 0.5)
    assert error > 1.2 * bound(many, replace(bent, M_yy=0.0), 0.5)
    short = ITD(Iterate(GradientDescent(0.05), 80), truncate=60)
    assert scalar(_slope, _curved, short, 0.5, 2.0) > 1.05 * bound(short, replace(bent, M_yy=0.0), 0.5)


def test_penalty_bound_is_attained_term_by_term() -> None:
    def total(estimator: Penalty, constants: Constants, norm: float, quadratic: bool = False) -> float:
        return error_bound(estimator, constants, distance=0.0, outer_gradient_norm=norm, quadratic=quadratic).total

    plain, better = Penalty(Newton(1e-13), weight=10.0), Penalty(Newton(1e-13), weight=10.0, extrapolate=True)

    def hill(x: Tensor, y: Tensor) -> Tensor:  # d2f/dy2 = -3 and d2f/dxdy = -5, grad_y f(y*) = 2
        return -1.5 * y**2 + 2 * y - 5 * x * y

    concave = replace(PLAIN, L_fyy=3.0, L_fxy=5.0, L_f_minus=3.0)
    assert scalar(hill, _plain, plain, 0.0, 2.0) == pytest.approx(total(plain, concave, 2.0), rel=1e-6)
    assert scalar(hill, _plain, better, 0.0, 2.0) == pytest.approx(total(better, concave, 2.0, True), rel=1e-6)
    error = scalar(_slope, _mixed, plain, 0.0, 2.0)
    assert error == pytest.approx(total(plain, replace(PLAIN, M_xy=1.0), 2.0), rel=1e-6)
    bent = replace(PLAIN, M_yy=1.0, mu=0.8, L=1.2, C_G=0.8)  # for |y| <= 0.2
    assert 0.5 * total(plain, bent, -2.0 * -1) < scalar(_slope, _curved, plain, 0.0, 2.0) <= total(plain, bent, 2.0)
    # inexact solutions: none of the steps is taken, at y = 1/2 instead of y* = 0
    still = Penalty(Iterate(GradientDescent(0.5), 0), weight=10.0)
    found = bounds.penalty(PLAIN, weight=10.0, outer_gradient_norm=0.0, distance=0.5, penalized_distance=0.5)
    assert found.inner == pytest.approx(10.0)
    assert scalar(lambda x, y: 0 * y, _plain, still, 0.5, 0.0) <= found.total


@given(st.floats(0.5, 3.0), st.floats(0.0, 1.0))
def test_inexact_solutions_of_the_penalty_problems_cost_their_weight(w: float, share: float) -> None:
    # g = y^2 / 2 - x y: grad_x g = -y, and so w (grad_x g(y~_w) - grad_x g(y~)) is off by w (d_w + d), at most
    d_w, d = share, 1 - share
    constants = replace(PLAIN, L_fxy=2.0)
    found = bounds.penalty(constants, weight=w, outer_gradient_norm=0.0, distance=d, penalized_distance=d_w)
    assert found.inner == pytest.approx(2 * d_w + w * (d_w + d))
    more = bounds.penalty(
        constants, weight=w, outer_gradient_norm=0.0, distance=d, penalized_distance=d_w, extrapolate=True
    )
    assert more.inner == pytest.approx(2 * (2 + 2 * w) * d_w + (2 + w) * d_w + 3 * w * d)


def test_extrapolation_gains_an_order_where_it_is_known_to() -> None:
    constants = replace(PLAIN, L_fyy=1.0)
    errors = [
        bounds.penalty(constants, weight=w, outer_gradient_norm=1.0, extrapolate=True, quadratic=True).total
        for w in (10.0, 20.0)
    ]
    assert errors[0] / errors[1] == pytest.approx(4)
    plain = bounds.penalty(constants, weight=10.0, outer_gradient_norm=1.0, extrapolate=True).total
    parts = [bounds.penalty(constants, weight=w, outer_gradient_norm=1.0).total for w in (10.0, 20.0)]
    assert plain == pytest.approx(parts[0] + 2 * parts[1])


def test_central_differences_are_attained_on_a_cubic() -> None:
    estimator = FiniteDifference(ClosedForm(lambda x: x), step=0.1)
    error = scalar(lambda x, y: y**3, _plain, estimator, 0.0, 0.0)
    bound = error_bound(estimator, PLAIN, distance=0.0, outer_gradient_norm=0.03, outer_size=1, third_derivative=6.0)
    assert error == pytest.approx(bound.total)
    inner = bounds.finite_difference(
        replace(PLAIN, L_fyy=2.0),
        step=0.1,
        outer_size=4,
        third_derivative=0.0,
        distance=0.5,
        outer_gradient_norm=3.0,
        value_error=1e-3,
    )
    assert inner.inner == pytest.approx(2 * (3 * 0.5 + 2 * 0.125) / 0.1)
    assert inner.rounding == pytest.approx(2 * 1e-3 / 0.1)


# Conjugate gradients


def test_the_factor_two_is_necessary() -> None:
    constants = Constants(mu=1.0, L=1.1)
    A, b = torch.tensor([1.0, 1.1], dtype=torch.float64), torch.tensor([1.1**0.5, 1.0], dtype=torch.float64)
    e0 = b / A
    e0 = torch.stack([torch.ones(()), torch.tensor(1 / 1.1**0.5)]).double()  # equal parts of the energy
    b = A * e0
    r = b.clone()
    e1 = e0 - (r @ r) / (r @ (A * r)) * r
    # The greatest ratio over all starts: gradient steps have the factor (kappa - 1) / (kappa + 1), attained below.
    e0 = torch.tensor([1.0, 1 / 1.1], dtype=torch.float64)
    r = A * e0
    e1 = e0 - (r @ r) / (r @ (A * r)) * r
    ratio = float(((e1 * A) @ e1).sqrt() / ((e0 * A) @ e0).sqrt())
    root = 1.1**0.5
    q = (root - 1) / (root + 1)
    assert ratio == pytest.approx(bounds.cg(constants, steps=1), rel=1e-9)
    assert ratio > root * q  # what is left of the bound, root of kappa and all, without the factor 2


@settings(max_examples=100)
@given(families(kappa=100.0), st.integers(0, 8), st.integers(0, 99))
def test_conjugate_gradients_stay_below_their_bounds(family: QuadraticFamily, steps: int, seed: int) -> None:
    from bilevel import LinearOperator

    b = normal(len(family.A), seed=seed)
    operator = LinearOperator(lambda v: family.A @ v, size=len(b), positive_definite=True)
    v = CG(rtol=0.0, max_steps=steps).solve(operator, b).value
    exact = torch.linalg.solve(family.A, b)
    constants = family.constants()
    t = bounds.cg(constants, steps=steps)
    assert constants.mu is not None
    e = v - exact
    assert float((e @ family.A @ e).clamp_min(0).sqrt()) <= t * float((exact @ b).sqrt()) * (1 + 1e-8) + 1e-11
    assert float(e.norm()) <= t * float(b.norm()) / constants.mu * (1 + 1e-8) + 1e-9 / constants.mu


# Sampling


@pytest.mark.parametrize(
    ("distribution", "variance"), [("gaussian", 7 / 3), ("rademacher", 5 / 3), ("sphere", 5 / 3), ("orthonormal", 1.0)]
)
def test_variance_law_is_attained(distribution: str, variance: float) -> None:
    w = torch.arange(1.0, 7.0).double()
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y - (w * x).sum()).square().sum() / 2)
    x, y0 = torch.zeros(6).double(), torch.zeros(1).double()
    constants = replace(PLAIN, C_G=float(w.norm()))
    squares, bound = [], Bound()
    for seed in range(800):
        esj = ESJ(Iterate(GradientDescent(1.0), 1), 3, radius=0.5, distribution=distribution, seed=seed)  # type: ignore[arg-type]
        bound = error_bound(esj, constants, distance=0.0, outer_gradient_norm=1.0, outer_size=6, smoothness=0.0)
        squares.append(float((hypergradient(problem, x, y0, estimator=esj).grad - w).square().sum()))
    measured = torch.tensor(squares)
    assert bound.total == pytest.approx(math.sqrt(variance) * float(w.norm()))
    assert abs(float(measured.mean()) - bound.total**2) <= 5 * float(measured.std()) / math.sqrt(800)


@pytest.mark.parametrize("distribution", ["rademacher", "sphere", "orthonormal", "gaussian"])
def test_a_finite_radius_is_paid_for(distribution: str) -> None:
    # y = |x|^2 / 2 at x = 0, where w = 0: each sample is r |u|^2 u / 2 (times p), S = 1
    p, Q, r = 5, 2, 0.25
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y - x.square().sum() / 2).square().sum() / 2)
    x, y0 = torch.zeros(p).double(), torch.zeros(1).double()
    squares, bound = [], Bound()
    for seed in range(400):
        esj = ESJ(Iterate(GradientDescent(1.0), 1), Q, radius=r, distribution=distribution, seed=seed)  # type: ignore[arg-type]
        bound = error_bound(
            esj, replace(PLAIN, C_G=0.0), distance=0.0, outer_gradient_norm=1.0, outer_size=p, smoothness=1.0
        )
        squares.append(float(hypergradient(problem, x, y0, estimator=esj).grad.square().sum()))
    measured = torch.tensor(squares)
    slack = 5 * float(measured.std()) / math.sqrt(400) + 1e-12
    assert abs(float(measured.mean()) - bound.sampling**2) <= slack  # the deviation is attained, the bias vanishes
    factor = {"gaussian": math.sqrt(p), "rademacher": p / 2, "sphere": p / (p + 1), "orthonormal": p / (p + 1)}
    assert bound.bias == pytest.approx(r * factor[distribution])


@settings(max_examples=20)
@given(cases(), st.integers(1, 8), st.floats(0, 1), st.integers(0, 99))
def test_all_orthonormal_directions_have_no_deviation(case: Case, steps: int, distance: float, seed: int) -> None:
    if not case.affine:
        return
    p = len(case.x)
    away = normal(case.y.numel(), seed=seed)
    esj = ESJ(descent(case, 1.0, steps), p, radius=0.1)
    found = hypergradient(case.problem, case.x, case.y + distance * away / away.norm(), estimator=esj)
    bound = error_bound(
        esj,
        case.constants,
        distance=distance,
        outer_gradient_norm=float(case.b.norm()),
        outer_size=p,
        smoothness=0.0,
    )
    assert bound.sampling == 0
    rounding = 1e-9 * (1 + float(case.h.norm()) + float(case.b.norm() * case.y.norm()))
    assert float((found.grad - case.h).norm()) <= bound.total + rounding


# Refusals


def _gd(step: float | None = 0.5, tol: float | None = None) -> Iterate:
    return Iterate(GradientDescent(step), max_steps=3, tol=tol)


@pytest.mark.parametrize(
    ("estimator", "call"),
    [
        (ITD(_gd(None)), "bounds.itd"),
        (ITD(_gd(tol=1e-3)), "bounds.itd"),
        (ITD(Iterate(Adam(0.1), 3)), "bounds.itd"),
        (AID(_gd(None), Dense()), "bounds.gradient_descent"),
        (AID(Iterate(Adam(0.1), 3), Dense()), "bounds.gradient_descent"),
        (AID(_gd(), Neumann(step=None, terms=3)), "bounds.aid"),
        (AID(_gd(), CG(max_steps=3, preconditioner=Jacobi())), "bounds.aid"),
        (AID(_gd(), CG(atol=1.0)), "bounds.aid"),
        (AID(_gd(), MINRES(max_steps=3)), "bounds.aid"),
        (AID(_gd(), Nystrom(rank=1)), "bounds.nystrom"),
        (AID(_gd(), Nystrom(rank=1, damping=1.0), damping=1.0), "bounds.nystrom"),
        (AID(LBFGS(), CG(), target_error=1.0), "Estimate.bound"),
        (AID(_gd(), Dense(), products=FiniteDifferences()), "bounds.aid"),
        (ESJ(_gd()), "outer_size"),
        (FiniteDifference(LBFGS()), "bounds.finite_difference"),
    ],
)
def test_a_configuration_without_a_bound_is_refused_with_what_to_call(estimator: AbstractEstimator, call: str) -> None:
    with pytest.raises(ValueError, match=call.replace(".", r"\.")):
        error_bound(estimator, PLAIN, distance=1.0, outer_gradient_norm=1.0)


def test_unknown_estimators_and_constants_are_refused() -> None:
    itd = ITD(_gd())
    with pytest.raises(TypeError, match="must be an estimator"):
        error_bound("itd", PLAIN, distance=1.0, outer_gradient_norm=1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="M_yy"):
        error_bound(itd, replace(PLAIN, M_yy=None), distance=1.0, outer_gradient_norm=1.0)
    with pytest.raises(ValueError, match="within 1 of"):
        error_bound(itd, replace(PLAIN, radius=0.5), distance=1.0, outer_gradient_norm=1.0)
    with pytest.raises(ValueError, match="measured at one point"):
        error_bound(itd, replace(PLAIN, local=frozenset({"mu"})), distance=1.0, outer_gradient_norm=1.0)
    with pytest.raises(ValueError, match="must be at least 0"):
        error_bound(itd, PLAIN, distance=-1.0, outer_gradient_norm=1.0)
    with pytest.raises(ValueError, match="must be at least 0"):
        error_bound(itd, PLAIN, distance=math.nan, outer_gradient_norm=1.0)
    with pytest.raises(ValueError, match="must exceed"):
        bounds.penalty(replace(PLAIN, L_f_minus=2.0), weight=2.0, outer_gradient_norm=1.0)
    with pytest.raises(ValueError, match="quadratic"):
        bounds.penalty(replace(PLAIN, M_yy=1.0), weight=2.0, outer_gradient_norm=1.0, quadratic=True)
    with pytest.raises(ValueError, match="at most the number"):
        bounds.esj(PLAIN, step=1.0, steps=1, distance=0, outer_gradient_norm=1, outer_size=1, directions=2)
    with pytest.raises(ValueError, match="must be one of gaussian, rademacher"):
        bounds.esj(PLAIN, **RUN, outer_size=1, directions=1, distribution="normal")  # type: ignore[arg-type]


RUN: dict[str, Any] = {"step": 0.5, "steps": 3, "distance": 1.0, "outer_gradient_norm": 2.0}
FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "aid": (bounds.aid, {"distance": 1.0, "outer_gradient_norm": 2.0, "linear_error": 0.1, "damping": 0.1}),
    "nystrom": (bounds.nystrom, {"distance": 1.0, "outer_gradient_norm": 2.0, "damping": 0.1, "remainder": 0.5}),
    "itd": (bounds.itd, RUN),
    "truncated_itd": (bounds.truncated_itd, {**RUN, "truncate": 2}),
    "one_step": (bounds.one_step, RUN),
    "esj": (bounds.esj, {**RUN, "outer_size": 4, "directions": 2, "radius": 0.1, "smoothness": 1.0}),
    "penalty": (
        bounds.penalty,
        {"weight": 9.0, "outer_gradient_norm": 2.0, "distance": 0.1, "penalized_distance": 0.1},
    ),
    "penalty extrapolated": (
        bounds.penalty,
        {"weight": 9.0, "outer_gradient_norm": 2.0, "distance": 0.1, "penalized_distance": 0.1, "extrapolate": True},
    ),
    "penalty quadratic": (
        lambda constants, **run: bounds.penalty(constants, extrapolate=True, quadratic=True, **run),
        {"weight": 9.0, "outer_gradient_norm": 2.0, "distance": 0.1, "penalized_distance": 0.1},
    ),
    "finite_difference": (
        bounds.finite_difference,
        {
            **{"step": 0.1, "outer_size": 3, "third_derivative": 1.0, "distance": 0.1},
            **{"outer_gradient_norm": 2.0, "value_error": 0.1, "reach": 2.0},
        },
    ),
    "contraction": (bounds.contraction, {"step": 0.5, "damping": 0.1}),
    "gradient_descent": (bounds.gradient_descent, {"step": 0.5, "steps": 3, "distance": 1.0}),
    "cg": (bounds.cg, {"steps": 3, "damping": 0.1}),
    "neumann": (bounds.neumann, {"step": 0.5, "terms": 3, "damping": 0.1}),
    "error_bound": (
        lambda constants, **run: error_bound(FiniteDifference(LBFGS(tol=0.1), step=0.1), constants, **run),
        {
            **{"distance": 1.0, "outer_gradient_norm": 2.0, "outer_size": 3, "third_derivative": 1.0},
            **{"smoothness": 1.0, "value_error": 0.1, "reach": 2.0},
        },
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_not_finite_or_negative_is_refused_by_every_bound_and_named(name: str) -> None:
    function, arguments = FUNCTIONS[name]
    known = replace(PLAIN, L_fyy=1.0, L_f_minus=1.0)
    found = function(known, **arguments)
    assert math.isfinite(found.total if isinstance(found, Bound) else found)
    for argument, value in arguments.items():
        if not isinstance(value, bool):
            for wrong in (math.inf, math.nan, -math.inf, -1.0):
                with pytest.raises((TypeError, ValueError), match=rf"\({argument}=...\)` must be"):
                    function(known, **{**arguments, argument: wrong})


def test_what_is_left_out_is_nothing() -> None:
    """No damping, no error of the linear system or of a value, no radius, no inexact solution."""
    known, run = replace(PLAIN, L_fyy=1.0), {"distance": 0.5, "outer_gradient_norm": 2.0}
    assert bounds.aid(known, **run) == bounds.aid(known, **run, linear_error=0.0, damping=0.0)
    assert bounds.cg(known, steps=2) == bounds.cg(known, steps=2, damping=0.0)
    assert bounds.neumann(known, step=0.3, terms=2) == bounds.neumann(known, step=0.3, terms=2, damping=0.0)
    assert bounds.contraction(known, 0.3) == bounds.contraction(known, 0.3, damping=0.0)
    sampled = {**RUN, "outer_size": 4, "directions": 2}
    assert bounds.esj(known, **sampled) == bounds.esj(known, **sampled, radius=0.0, smoothness=0.0)
    assert bounds.esj(known, **sampled, smoothness=1.0) == bounds.esj(known, **sampled, radius=0.0, smoothness=1.0)
    weighted: dict[str, Any] = {"weight": 9.0, "outer_gradient_norm": 2.0}
    assert bounds.penalty(known, **weighted) == bounds.penalty(
        known, **weighted, extrapolate=False, quadratic=False, distance=0.0, penalized_distance=0.0
    )
    moved: dict[str, Any] = {**run, "step": 0.1, "outer_size": 3, "third_derivative": 1.0}
    assert bounds.finite_difference(known, **moved) == bounds.finite_difference(
        known, **moved, value_error=0.0, reach=1.0
    )


def test_damping_is_added_to_both_ends_of_the_spectrum() -> None:
    known = Constants(mu=1.0, L=3.0)
    assert bounds.contraction(known, 0.25, damping=1.0) == 0.5  # |1 - (1 + 1) / 4|
    assert bounds.contraction(known, 0.5, damping=2.0) == 1.5  # |1 - (3 + 2) / 2|
    assert bounds.neumann(known, step=0.25, terms=2, damping=1.0) == 0.25
    assert bounds.cg(known, steps=1, damping=1.0) == bounds.cg(Constants(mu=2.0, L=4.0), steps=1)


def test_iterates_that_start_at_the_solution_stay_there_whatever_the_step() -> None:
    known = replace(PLAIN, radius=0.5)
    assert bounds.gradient_descent(known, step=9.0, steps=3, distance=0.0) == 0.0
    assert bounds.itd(known, step=0.5, steps=3, distance=0.0, outer_gradient_norm=1.0).inner == 0.0
    curved = replace(PLAIN, M_yy=1.0, M_xy=1.0, L_fyy=1.0, L_fxy=1.0)
    assert bounds.itd(curved, step=0.5, steps=3, distance=0.0, outer_gradient_norm=1.0).inner == 0.0
    still = bounds.itd(curved, step=1.0, steps=0, distance=1.0, outer_gradient_norm=1.0)
    assert (still.inner, still.linear) == (2.0, 2.0)  # (L_fxy + J L_fyy) d and J |b| with |b| = 1 + L_fyy d
    assert bounds.neumann(PLAIN, step=0.5, terms=0) == 1.0


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_bound_of_conjugate_gradients_is_that_of_chebyshev_polynomials(steps: int) -> None:
    """1 / T_k((kappa + 1) / (kappa - 1))."""
    t = 5 / 3  # for kappa = 4
    polynomial = {1: t, 2: 2 * t**2 - 1, 3: 4 * t**3 - 3 * t}[steps]
    assert bounds.cg(Constants(mu=1.0, L=4.0), steps=steps) == pytest.approx(1 / polynomial, rel=1e-12)


def test_inexact_solutions_of_an_extrapolated_penalty_add_up() -> None:
    """2 (L_fxy + 2 w C_G) and L_fxy + w C_G times those of 2w and of w, and (2 * 2w - w) C_G times that of y."""
    known = replace(PLAIN, L_fxy=3.0, C_G=2.0)
    found = bounds.penalty(
        known, weight=5.0, outer_gradient_norm=1.0, extrapolate=True, distance=0.25, penalized_distance=0.5
    )
    assert found.inner == pytest.approx(2 * (3 + 20) * 0.5 + (3 + 10) * 0.5 + 3 * 5 * 2 * 0.25)


def test_what_a_bound_of_sampling_rests_on_is_said() -> None:
    run = {**RUN, "outer_size": 4, "directions": 2}
    notes = bounds.esj(PLAIN, **run).assumptions
    assert any("start does not depend on x" in note for note in notes)
    assert notes[-1] == "y_N is affine in x"
    assert bounds.esj(PLAIN, **run, smoothness=0.5).assumptions[-1] == "x -> J_N(x)' grad_y f is 0.5-Lipschitz"


SF, SG, SX, SY = 2.0**3, 2.0**-4, 2.0**6, 2.0**-9  # units of f, g, x and y
UNITS = {
    **{"mu": SG / SY**2, "L": SG / SY**2, "L_fyy": SF / SY**2, "L_f_minus": SF / SY**2, "L_fxy": SF / SX / SY},
    **{
        "M_yy": SG / SY**3,
        "M_xy": SG / SX / SY**2,
        "C_G": SG / SX / SY,
        "damping": SG / SY**2,
        "remainder": SG / SY**2,
    },
    **{"distance": SY, "penalized_distance": SY, "outer_gradient_norm": SF / SY, "weight": SF / SG, "radius": SX},
    **{"smoothness": SF / SX**2, "third_derivative": SF / SX**3, "value_error": SF},
}
RESULTS = {"contraction": 1.0, "cg": 1.0, "neumann": 1.0, "gradient_descent": SY}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bounds_keep_the_units_of_what_they_bound(name: str) -> None:
    """With f, g, x and y in other units each term of a bound is that of df / dx: powers of 2, to the last digit."""
    function, arguments = FUNCTIONS[name]
    drift = 0.0 if "quadratic" in name else 0.3
    known = Constants(0.7, 1.5, 0.4, 0.3, drift, drift, 1.7, L_f_minus=0.2)
    names = ("mu", "L", "L_fyy", "L_fxy", "M_yy", "M_xy", "C_G", "L_f_minus")
    scaled = replace(known, **{key: UNITS[key] * getattr(known, key) for key in names})
    own = {"step": SX if "difference" in name else SY**2 / SG}
    units = {key: own.get(key, UNITS.get(key)) for key in arguments}
    moved = {key: value if units[key] is None else value * units[key] for key, value in arguments.items()}
    if name == "error_bound":
        return  # whose solver has a tolerance in units of its own
    before, after = function(known, **arguments), function(scaled, **moved)
    if isinstance(before, Bound):
        assert all(term > 0 for term in before.terms.values() if term)
        assert {key: SX / SF * term for key, term in after.terms.items()} == pytest.approx(before.terms, rel=1e-12)
    else:
        assert after == pytest.approx(RESULTS[name] * before, rel=1e-12)


@given(st.sampled_from(sorted(FUNCTIONS)), st.data())
@settings(max_examples=150)
def test_what_overflows_is_infinite_and_no_exception(name: str, data: st.DataObject) -> None:
    """Or refused, where a weight does not dominate; never an error of arithmetic, and never NaN."""
    extreme = st.sampled_from([5e-324, 1e-160, 1.0, 1e160, 1e308])
    function, arguments = FUNCTIONS[name]
    names = [key for key, value in arguments.items() if isinstance(value, float)]
    drawn = {key: data.draw(extreme) for key in names}
    least, largest = sorted((data.draw(extreme), data.draw(extreme)))
    values: dict[str, Any] = {key: data.draw(extreme) for key in ("L_fyy", "L_fxy", "C_G", "L_f_minus")}
    known = Constants(least, largest, **values, M_yy=0.0, M_xy=0.0)
    try:
        found = function(known, **{**arguments, **drawn})
    except ValueError:
        return
    assert (found.total if isinstance(found, Bound) else found) >= 0.0


@final
@dataclass(frozen=True)
class Halving(AbstractInnerSolver):
    """A user's solver, of which it is known where it ends; it need not be run."""

    steps: int

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        raise NotImplementedError

    def solution_bound(self, constants: Constants, distance: float) -> float:
        return math.ldexp(distance, -self.steps)


@final
@dataclass(frozen=True)
class Tenth(AbstractLinearSolver):
    """A user's linear solver that leaves a tenth of |b|, of a system with a damping of its own."""

    rho: float

    def solve(self, operator: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Solved:
        raise NotImplementedError

    @property
    def own_damping(self) -> float:
        return self.rho

    def relative_error(self, constants: Constants, damping: float) -> float:
        return 0.1


@final
@dataclass(frozen=True)
class Halved(AbstractEstimator):
    """A user's estimator: half of h, whatever the problem."""

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        raise NotImplementedError

    def error_bound(self, about: Beforehand) -> Bound:
        assert about.constants.mu is not None and about.constants.C_G is not None
        return Bound(bias=about.constants.C_G / about.constants.mu * about.outer_gradient_norm / 2)


@final
@dataclass(frozen=True)
class Silent(AbstractEstimator):
    """A user's estimator that says nothing of its error."""

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        raise NotImplementedError


def test_estimators_and_solvers_of_a_users_own_take_part() -> None:
    run: Any = {"distance": 4.0, "outer_gradient_norm": 3.0}
    assert error_bound(Halved(), replace(PLAIN, C_G=2.0, mu=0.5), **run).total == 6.0
    curved = replace(PLAIN, L_fyy=1.0, L_fxy=2.0)
    found = error_bound(AID(Halving(2), Tenth(0.25)), curved, **run)
    assert found == bounds.aid(curved, distance=1.0, outer_gradient_norm=3.0, linear_error=0.1, damping=0.25)
    penalty = error_bound(Penalty(Halving(60), weight=9.0), PLAIN, **run)
    exact = error_bound(Penalty(ClosedForm(lambda x: x), weight=9.0), PLAIN, **run)
    assert penalty.total == pytest.approx(exact.total, rel=1e-9)
    differences = FiniteDifference(Halving(1), step=0.1)
    more: Any = {"outer_size": 4, "third_derivative": 6.0}
    assert error_bound(differences, PLAIN, **run, **more) == bounds.finite_difference(
        PLAIN, step=0.1, distance=2.0, outer_gradient_norm=3.0, **more
    )
    assert error_bound(Chosen(Halved(), "why"), PLAIN, **run) == error_bound(Halved(), PLAIN, **run)


def test_what_says_nothing_has_no_bound_and_says_so() -> None:
    run: Any = {"distance": 4.0, "outer_gradient_norm": 3.0}
    with pytest.raises(ValueError, match=r"no bound is known for Silent\. Bound a computed hypergradient by `certify`"):
        error_bound(Silent(), PLAIN, **run)
    with pytest.raises(ValueError, match=r"no bound is known for Halving\(steps=2\): only for `Iterate"):
        error_bound(ESJ(Halving(2)), PLAIN, **run, outer_size=4, smoothness=0.0)
    with pytest.raises(ValueError, match=r"no bound is known for QuadraticProgram\(.*call `bounds.gradient_descent`"):
        error_bound(AID(QuadraticProgram(), Dense()), PLAIN, **run)
    with pytest.raises(ValueError, match=r"no bound is known for Nothing\(\): what it reaches is not known"):
        error_bound(AID(Halving(2), Nothing()), PLAIN, **run)


@final
@dataclass(frozen=True)
class Nothing(AbstractLinearSolver):
    """A user's linear solver that says nothing of its error."""

    def solve(self, operator: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Solved:
        raise NotImplementedError


def test_a_bound_prints_its_terms_and_assumptions() -> None:
    text = str(
        bounds.aid(
            replace(PLAIN, heuristic=frozenset({"mu"}), confidence=0.9), distance=0, outer_gradient_norm=1, damping=1.0
        )
    )
    assert "bias 0.5" in text and "inner" not in text
    assert "mu: estimated without a guarantee" in text and "probability 0.9" in text
