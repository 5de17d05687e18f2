"""Estimators against the exact formulas of what they compute: inexact solutions, truncation, momentum, weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bilevel_strategies import families, logistic, normal
from hypothesis import given, settings, strategies as st
from torch import Tensor

from bilevel import (
    AID,
    ESJ,
    ITD,
    BilevelProblem,
    FiniteDifference,
    Penalty,
    Status,
    hypergradient,
)
from bilevel.problems.quadratic import QuadraticFamily
from bilevel.solvers.adam import Adam
from bilevel.solvers.cg import CG
from bilevel.solvers.closed_form import ClosedForm
from bilevel.solvers.dense import Dense
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.heavy_ball import HeavyBall
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.lbfgs import LBFGS
from bilevel.solvers.nesterov import Nesterov
from bilevel.solvers.neumann import Neumann

FORMS: dict[str, dict[str, Any]] = {
    "reverse": {},
    "forward": {"forward": True},
    "checkpointed": {"checkpoint": True},
    "truncated": {"truncate": 10**6},
}


def problem_of(family: QuadraticFamily) -> BilevelProblem:
    return BilevelProblem(family.f, family.g)


def largest(family: QuadraticFamily) -> float:
    return float(torch.linalg.eigvalsh(family.A)[-1])


def outer_gradients(family: QuadraticFamily, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return family.E @ y + family.R @ x + family.s, family.C @ (y - family.t) + family.E.T @ x


def close(a: Tensor, b: Tensor, rtol: float) -> bool:
    scale = max(float(b.norm()), 1e-3)
    return float((a - b).norm()) <= rtol * scale


def powers(family: QuadraticFamily, step: float, k: int) -> Tensor:
    """(I - step A)^k."""
    power: Tensor = torch.linalg.matrix_power(torch.eye(family.A.shape[0]) - step * family.A, k)
    return power


# Implicit differentiation


@given(families(), st.integers(0, 6), st.integers(0, 3), st.integers(0, 9))
def test_aid_error_is_the_identity_of_inner_error_and_linear_residual(
    family: QuadraticFamily, inner_steps: int, linear_steps: int, seed: int
) -> None:
    """h - h* = E d + J'(C d - r): the same identity, however wrong y and v are."""
    x, y0 = normal(family.s.numel(), seed=seed), normal(family.c.numel(), seed=seed + 1)
    aid = AID(
        Iterate(GradientDescent(1 / largest(family)), max_steps=inner_steps), CG(rtol=0.0, max_steps=linear_steps)
    )
    found = hypergradient(problem_of(family), x, y0, estimator=aid)
    assert found.v is not None
    d = found.y - family.solution(x)
    r = outer_gradients(family, x, found.y)[1] - family.A @ found.v
    expected = family.E @ d + family.jacobian().T @ (family.C @ d - r)
    error = found.grad - family.gradient(x)
    assert float((error - expected).norm()) <= 1e-9 * (1 + float(family.jacobian().norm())) * (1 + float(d.norm()))
    assert found.reports[1].residual == pytest.approx(float(r.norm()), rel=1e-6, abs=1e-9)


@given(families(), st.integers(1, 12), st.integers(0, 9))
def test_neumann_series_of_k_terms(family: QuadraticFamily, terms: int, seed: int) -> None:
    """At the exact y: h - h* = -J'(I - step A)^k grad_y f."""
    x, step = normal(family.s.numel(), seed=seed), 1 / largest(family)
    aid = AID(ClosedForm(family.solution), Neumann(step=step, terms=terms))
    found = hypergradient(problem_of(family), x, torch.zeros_like(family.c), estimator=aid)
    left = outer_gradients(family, x, family.solution(x))[1]
    bias = -family.jacobian().T @ powers(family, step, terms) @ left
    assert close(found.grad, family.gradient(x) + bias, 1e-9)


@given(families(), st.sampled_from([1e-3, 0.1, 10.0]))
def test_damped_aid_solves_the_damped_system(family: QuadraticFamily, damping: float) -> None:
    x, q = normal(family.s.numel(), seed=3), family.c.numel()
    for linear in (CG(rtol=1e-13), Dense()):
        aid = AID(ClosedForm(family.solution), linear, damping=damping)
        found = hypergradient(problem_of(family), x, torch.zeros(q), estimator=aid)
        fx, fy = outer_gradients(family, x, family.solution(x))
        v = torch.linalg.solve(family.A + damping * torch.eye(q), fy)
        assert close(found.grad, fx + family.B.T @ v, 1e-9)


# Iterative differentiation


@given(families(), st.integers(0, 25), st.sampled_from(sorted(FORMS)), st.integers(0, 9))
def test_itd_through_gradient_descent(family: QuadraticFamily, steps: int, form: str, seed: int) -> None:
    """h = grad_x f + J'(I - P^N) grad_y f at y_N = y* + P^N (y0 - y*)."""
    x, y0 = normal(family.s.numel(), seed=seed), normal(family.c.numel(), seed=seed + 1)
    step = 0.9 / largest(family)
    P = powers(family, step, steps)
    y = family.solution(x) + P @ (y0 - family.solution(x))
    fx, fy = outer_gradients(family, x, y)
    itd = ITD(Iterate(GradientDescent(step), max_steps=steps), **FORMS[form])
    found = hypergradient(problem_of(family), x, y0, estimator=itd)
    assert close(found.y, y, 1e-9)
    assert close(found.grad, fx + family.jacobian().T @ (fy - P.T @ fy), 1e-9)


@given(families(), st.integers(0, 20), st.integers(1, 25), st.booleans())
def test_truncated_itd_sees_the_last_k_steps(family: QuadraticFamily, steps: int, k: int, adaptive: bool) -> None:
    """h = grad_x f + J'(I - P^min(K, N)) grad_y f at y_N; K = 1 is the one-step gradient."""
    x, y0 = normal(family.s.numel(), seed=1), normal(family.c.numel(), seed=2)
    step = 0.9 / largest(family)
    inner = Iterate(GradientDescent(step), max_steps=steps, tol=1e-300 if adaptive else None)
    found = hypergradient(problem_of(family), x, y0, estimator=ITD(inner, truncate=k), throw=False)
    fx, fy = outer_gradients(family, x, found.y)
    expected = fx + family.jacobian().T @ (fy - powers(family, step, min(k, steps)).T @ fy)
    assert close(found.grad, expected, 1e-9)


def test_one_step_gradient_is_a_cross_product_at_the_last_point_but_one() -> None:
    """h = grad_x f(y_N) - step G(y_{N-1}) grad_y f(y_N), where G changes with y."""
    problem = BilevelProblem(lambda x, y: (y - 1).pow(4).sum(), lambda x, y: (x * y.pow(3)).sum() / 3 + y.cosh().sum())
    x, y, step = torch.tensor([0.3, 0.2]), torch.tensor([1.0, 0.5]), 0.1
    before = y
    for _ in range(3):
        before, y = y, y - step * (x * y**2 + y.sinh())
    itd = ITD(Iterate(GradientDescent(step), max_steps=3), truncate=1)
    found = hypergradient(problem, x, torch.tensor([1.0, 0.5]), estimator=itd)
    assert close(found.grad, -step * before**2 * 4 * (y - 1) ** 3, 1e-12)


@given(families(), st.integers(1, 20), st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from(sorted(FORMS)))
def test_itd_through_heavy_ball(family: QuadraticFamily, steps: int, momentum: float, form: str) -> None:
    """J_N - J is the upper block of T^N (-J; -J), T = [[(1 + b) I - step A, -b I], [I, 0]]."""
    x, y0, q = normal(family.s.numel(), seed=4), normal(family.c.numel(), seed=5), family.c.numel()
    step, eye = 1 / largest(family), torch.eye(family.c.numel())
    T = torch.cat(
        [
            torch.cat([(1 + momentum) * eye - step * family.A, -momentum * eye], 1),
            torch.cat([eye, torch.zeros(q, q)], 1),
        ]
    )
    power, J, y_star = torch.linalg.matrix_power(T, steps), family.jacobian(), family.solution(x)
    J_N = J + (power @ torch.cat([-J, -J]))[:q]
    y = y_star + (power @ torch.cat([y0 - y_star, y0 - y_star]))[:q]
    fx, fy = outer_gradients(family, x, y)
    itd = ITD(Iterate(HeavyBall(step, momentum), max_steps=steps), **FORMS[form])
    found = hypergradient(problem_of(family), x, y0, estimator=itd)
    assert close(found.y, y, 1e-9)
    assert close(found.grad, fx + J_N.T @ fy, 1e-9)


@settings(max_examples=15)
@given(
    logistic(),
    st.integers(1, 30),
    st.sampled_from([GradientDescent(0.3), HeavyBall(0.2, 0.7), Nesterov(0.2), Adam(0.05)]),
    st.booleans(),
)
def test_all_forms_of_itd_agree_and_with_finite_differences(
    drawn: Any, steps: int, optimizer: Any, adaptive: bool
) -> None:
    data, x, y0 = drawn
    problem = BilevelProblem(data.f, data.g)
    y0 = y0 + 0.3
    inner = Iterate(optimizer, max_steps=steps, tol=1e-2 if adaptive else None)
    grads = {
        form: hypergradient(problem, x, y0, estimator=ITD(inner, **options), throw=False).grad
        for form, options in FORMS.items()
    }
    for grad in grads.values():
        assert close(grad, grads["reverse"], 1e-12)
    if not adaptive:
        reference = hypergradient(problem, x, y0, estimator=FiniteDifference(inner)).grad
        # Adam divides by |g| to the power one half: its differences are rough where a gradient is near zero
        assert close(grads["reverse"], reference, 1e-4 if isinstance(optimizer, Adam) else 1e-7)


@settings(max_examples=15)
@given(
    families(max_p=4, max_q=4, kappa=5.0),
    st.integers(0, 12),
    st.sampled_from(sorted(FORMS)),
    st.sampled_from(["descent", "ball", "nesterov"]),
    st.booleans(),
)
def test_start_that_depends_on_x_is_differentiated(
    family: QuadraticFamily, steps: int, form: str, kind: str, direct: bool
) -> None:
    """y_0 = sin(W x): the start's part of the hypergradient is W' cos(W x) P_N' grad_y f; the rest is as before."""
    p, q, step = family.s.numel(), family.c.numel(), 0.7 / largest(family)
    x, W = normal(p, seed=6), normal(q, p, seed=7)
    optimizer = {"descent": GradientDescent(step), "ball": HeavyBall(step, 0.4), "nesterov": Nesterov(step)}[kind]

    def g(x: Tensor, y: Tensor) -> Tensor:
        return family.g(x if direct else torch.zeros_like(x), y)

    problem = BilevelProblem(family.f, g, init=lambda x: (W @ x).sin())
    itd = ITD(Iterate(optimizer, max_steps=steps), **FORMS[form])
    found = hypergradient(problem, x, torch.zeros(q), estimator=itd)

    leaf = x.clone().requires_grad_()
    y = (W @ leaf).sin()
    state = optimizer.init(y)
    for _ in range(steps):
        right = family.B @ leaf + family.c if direct else family.c
        y, state = optimizer.step(family.A @ y - right, y, state)
    expected = torch.autograd.grad(family.f(leaf, y), leaf)[0]
    assert close(found.y, y.detach(), 1e-10)
    assert close(found.grad, expected, 1e-10)


def test_itd_stands_on_the_start_that_was_given() -> None:
    """y_0 is a constant unless there is an init: a warm start is not differentiated."""
    problem = BilevelProblem(lambda x, y: y.square().sum() / 2, lambda x, y: (y - x).square().sum() / 2)
    x, itd = torch.tensor([2.0]), ITD(Iterate(GradientDescent(0.5), max_steps=1))
    cold = hypergradient(problem, x, torch.zeros(1), estimator=itd)
    warm = hypergradient(problem, x, torch.zeros(1), estimator=itd, start=cold.start)
    assert cold.grad.tolist() == [0.5 * 1.0]
    assert warm.grad.tolist() == [0.5 * 1.5]


# Penalty


@given(families(kappa=10.0), st.integers(0, 9))
def test_penalty_is_its_closed_form(family: QuadraticFamily, seed: int) -> None:
    """h_w - h = (E + J'C)(y_w - y*), y_w - y* = -(C + w A)^-1 grad_y f(y*)."""
    x, J, mu = normal(family.s.numel(), seed=seed), family.jacobian(), float(torch.linalg.eigvalsh(family.A)[0])
    h = family.gradient(x)
    fy = outer_gradients(family, x, family.solution(x))[1]

    def biased(w: float) -> Tensor:
        shift: Tensor = torch.linalg.solve(family.C + w * family.A, fy)
        return h - (family.E + J.T @ family.C) @ shift

    inner = LBFGS(tol=1e-10 * mu)
    for w in (3.0 / mu, 100.0 / mu):
        for extrapolate in (False, True):
            penalty = Penalty(inner, weight=w, extrapolate=extrapolate)
            found = hypergradient(problem_of(family), x, torch.zeros_like(family.c), estimator=penalty, throw=False)
            expected = 2 * biased(2 * w) - biased(w) if extrapolate else biased(w)
            assert close(found.grad, expected, 1e-6)


@pytest.mark.parametrize(("extrapolate", "ratio"), [(False, 2.0), (True, 4.0)])
@pytest.mark.parametrize("curved", [False, True])
def test_penalty_error_halves_or_quarters_as_the_weight_doubles(extrapolate: bool, ratio: float, curved: bool) -> None:
    def g(x: Tensor, y: Tensor) -> Tensor:
        return y.square().sum() + (y.cosh().sum() if curved else 0.0) - (x * y).sum() + y[0] * y[1] / 2

    problem = BilevelProblem(lambda x, y: (y - 1).square().sum() + x.sum() * y[0], g)
    x, y0 = torch.tensor([0.4, -1.1]), torch.zeros(2)
    exact = hypergradient(problem, x, y0, estimator=AID(LBFGS(1e-13), Dense())).grad
    errors = []
    for w in (64.0, 128.0, 256.0):
        penalty = Penalty(LBFGS(tol=1e-13), weight=w, extrapolate=extrapolate)
        errors.append(float((hypergradient(problem, x, y0, estimator=penalty).grad - exact).norm()))
    assert errors[0] / errors[1] == pytest.approx(ratio, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(ratio, rel=0.03)


# Evolution strategies and finite differences


@given(families(), st.integers(0, 25), st.integers(0, 9), st.sampled_from([1e-3, 1.0, 100.0]))
def test_esj_with_a_full_basis_is_itd(family: QuadraticFamily, steps: int, seed: int, radius: float) -> None:
    x, y0 = normal(family.s.numel(), seed=seed), normal(family.c.numel(), seed=seed + 1)
    inner = Iterate(GradientDescent(0.9 / largest(family)), max_steps=steps)
    esj = ESJ(inner, directions=x.numel(), radius=radius, distribution="orthonormal", seed=seed)
    found = hypergradient(problem_of(family), x, y0, estimator=esj)
    assert close(found.grad, hypergradient(problem_of(family), x, y0, estimator=ITD(inner)).grad, 1e-6)
    assert found.standard_error == 0.0


def test_esj_tends_to_itd_with_the_radius_where_the_iteration_is_curved() -> None:
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: y.cosh().sum() - (x.sin() * y).sum())
    x, y0, inner = torch.tensor([0.5, 1.5, -2.0]), torch.zeros(3), Iterate(GradientDescent(0.5), max_steps=7)
    reference = hypergradient(problem, x, y0, estimator=ITD(inner)).grad
    errors = [
        float((hypergradient(problem, x, y0, estimator=ESJ(inner, directions=3, radius=r)).grad - reference).norm())
        for r in (1e-2, 5e-3, 2.5e-3)
    ]
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2.0, rel=0.1)


@settings(max_examples=10)
@given(families(kappa=5.0), st.integers(0, 9))
def test_finite_differences_of_a_quadratic_are_exact_at_any_step(family: QuadraticFamily, seed: int) -> None:
    """Phi is quadratic, so central differences have no truncation error."""
    x = normal(family.s.numel(), seed=seed)
    fd = FiniteDifference(ClosedForm(family.solution), step=0.5)
    found = hypergradient(problem_of(family), x, torch.zeros_like(family.c), estimator=fd)
    assert close(found.grad, family.gradient(x), 1e-9)


def test_finite_differences_step_with_the_size_of_x() -> None:
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y - x.square() / 2e3).square().sum())
    x = torch.tensor([1e3, 1.0, 0.0])
    fd = FiniteDifference(ClosedForm(lambda x: x.square() / 2e3))
    found = hypergradient(problem, x, torch.zeros(3), estimator=fd)
    assert float((found.grad - x / 1e3).abs().max()) <= 1e-8


def test_finite_differences_see_the_start_of_the_iteration() -> None:
    problem = BilevelProblem(lambda x, y: y.square().sum() / 2, lambda x, y: y.square().sum() / 2, init=lambda x: 2 * x)
    inner, x = Iterate(GradientDescent(0.5), max_steps=2), torch.tensor([1.0, -2.0])
    fd = hypergradient(problem, x, torch.zeros(2), estimator=FiniteDifference(inner)).grad
    assert float((fd - x / 4).norm()) <= 1e-9


# Too few steps for the derivative, though y is accurate


@pytest.mark.parametrize("form", ["reverse", "forward", "checkpointed"])
@settings(max_examples=10)
@given(family=families(kappa=10.0), seed=st.integers(0, 9))
def test_warm_started_itd_never_lacks_more_than_it_says(form: str, family: QuadraticFamily, seed: int) -> None:
    """With a tolerance, what is lacking is at most 10 times the error of y (1e-4 to 1e-2), or it is `truncated`.

    It is measured relative to grad_y f or |G|. With a least number of steps there are as many as it takes.
    """
    x, mu = normal(family.s.numel(), seed=seed), float(torch.linalg.eigvalsh(family.A)[0])
    warm = family.solution(x) * (1 + 10.0 ** -(seed % 5))
    problem, step, tol = problem_of(family), 1 / largest(family), 1e-4 * mu
    for least in (0, 150):
        inner = Iterate(GradientDescent(step), max_steps=4000, tol=tol, min_steps=least)
        found = hypergradient(problem, x, warm, estimator=ITD(inner, **FORMS[form]), throw=False)
        taken = found.reports[1].steps
        lacking = powers(family, step, taken)
        _, fy = outer_gradients(family, x, found.y)
        J, B, v = family.jacobian(), family.B, torch.linalg.solve(family.A, fy - lacking @ fy)
        left = float((lacking @ fy).norm() / fy.norm())
        response, gain = v.norm() / fy.norm(), (B.T @ v).norm() / v.norm()
        if form == "forward":
            Z = J - lacking @ J
            left = float((family.A @ lacking @ J).norm() / B.norm())
            response, gain = Z.norm() / B.norm(), B.norm()
        reach = max(float(x.abs().max()), 1.0)
        error = min(float(tol * response / found.y.norm()), float(tol / (gain * reach))) if taken else 0.0
        assert found.reports[1].residual == pytest.approx(left, rel=1e-5, abs=1e-9)
        assert found.status is (Status.truncated if left > min(max(10 * error, 1e-4), 1e-2) else Status.successful)
        assert taken >= least
        assert found.status is Status.successful or not least


def test_nothing_is_lacking_where_y_does_not_see_x() -> None:
    problem = BilevelProblem(lambda x, y: (x * x).sum() + y.sum(), lambda x, y: (y - 2).square().sum())
    for options in (FORMS["reverse"], FORMS["forward"]):
        itd = ITD(Iterate(GradientDescent(0.1), max_steps=100, tol=1e-6), **options)
        found = hypergradient(problem, torch.ones(2), torch.full((2,), 2.0), estimator=itd)
        assert found.stats.inner_steps == 0
        assert found.grad.tolist() == [2.0, 2.0]
