"""Constants estimated from products: their confidence, what is called a heuristic, and that they certify."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from strategies import gaussian, spd

from bilevel import AID, BilevelProblem, Constants, certify, estimate_constants, hypergradient
from bilevel._linear import LinearOperator
from bilevel._numerics.spectrum import largest_eigenvalue
from bilevel.certificates.estimate_constants import overshoot
from bilevel.problems.logistic import logistic
from bilevel.problems.quadratic import quadratic, random_quadratic
from bilevel.solvers import CG, Dense, GradientDescent, Iterate, Newton


def diagonal(eigenvalues: torch.Tensor) -> BilevelProblem:
    """An inner problem with this spectrum."""
    return BilevelProblem(lambda x, y: y.sum(), lambda x, y: (eigenvalues * (y - x).square()).sum() / 2)


def test_on_quadratics_every_constant_is_the_exact_one() -> None:
    family = random_quadratic(3, 6, eigenvalues=[1.0, 2.0, 3.0, 4.0, 6.0, 9.0], cross=0.7, seed=2)
    exact = family.constants()
    found = estimate_constants(BilevelProblem(family.f, family.g), gaussian(3, seed=1), gaussian(6, seed=2))
    for name in ("mu", "L", "L_fyy", "L_fxy", "C_G"):
        assert getattr(found, name) == pytest.approx(getattr(exact, name), rel=1e-6)
    assert found.M_yy == pytest.approx(0.0, abs=1e-9)
    assert found.M_xy == pytest.approx(0.0, abs=1e-9)
    assert found.source == "estimated"
    assert found.heuristic == {"L_fyy", "L_fxy", "M_yy", "M_xy"}
    assert found.local == {"mu", "L", "C_G"}


def test_a_mu_that_is_given_is_kept() -> None:
    found = estimate_constants(diagonal(torch.tensor([2.0, 3.0])), torch.zeros(2), torch.zeros(2), mu=1.5)
    assert found.mu == 1.5
    assert "mu" not in found.local


@pytest.mark.parametrize("failure", [0.05, 0.2])
def test_upper_bounds_fail_at_most_as_often_as_they_say(failure: float) -> None:
    """A spectrum with one large eigenvalue just above many: the hardest for few steps."""
    eigenvalues = torch.cat([torch.linspace(0.0, 0.9, 299), torch.ones(1)])
    operator = LinearOperator(lambda v: eigenvalues * v, 300)
    runs = 200
    failures = sum(
        float(largest_eigenvalue(operator, torch.zeros(300), overshoot=0.02, failure=failure, seed=seed)) < 1.0
        for seed in range(runs)
    )
    assert failures <= failure * runs
    bound = float(largest_eigenvalue(operator, torch.zeros(300), overshoot=0.02, failure=failure))
    assert bound <= 1 / (1 - 0.02) + 1e-12


@pytest.mark.parametrize(("kappa", "steps"), [(10.0, 40), (100.0, 127)])
def test_the_shifted_bound_is_below_mu_and_within_its_resolution(kappa: float, steps: int) -> None:
    eigenvalues = torch.logspace(0, math.log10(kappa), 300)
    failure, low = 0.01, 0
    for seed in range(20):
        found = estimate_constants(
            diagonal(eigenvalues),
            torch.zeros(300),
            torch.zeros(300),
            seed=seed,
            shift_steps=steps,
            samples=1,
            failure=failure,
        )
        assert found.mu is not None and found.L is not None
        low += found.mu > 1.0
        resolution = overshoot(steps, 300, failure) * found.L
        assert found.mu >= 1.0 - 1.2 * resolution
        assert found.confidence == pytest.approx(1 - 3 * failure)
    assert low == 0


def test_a_shifted_bound_that_says_nothing_is_none() -> None:
    eigenvalues = torch.logspace(0, 4, 300)
    found = estimate_constants(diagonal(eigenvalues), torch.zeros(300), torch.zeros(300), shift_steps=40, samples=1)
    assert found.mu is None


@pytest.mark.parametrize("steps", [3, 20, 200])
@given(seed=st.integers(0, 10_000), failure=st.floats(1e-4, 0.3))
@settings(max_examples=10)
def test_the_resolution_inverts_the_number_of_steps(steps: int, seed: int, failure: float) -> None:
    n = 50 + seed
    e = overshoot(steps, n, failure)
    assert 0.5 * (1 + math.log(1.648 * math.sqrt(n) / failure) / math.sqrt(e)) == pytest.approx(steps)


def test_a_curvature_that_is_not_positive_is_no_mu() -> None:
    saddle = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y[0].square() - y[1].square()) * x)
    assert estimate_constants(saddle, torch.tensor(1.0), torch.zeros(2)).mu is None


def test_estimated_constants_are_extended_from_y_along_the_segment() -> None:
    """The curvature of g = log cosh y + m y^2 / 2 falls away from 0: the one at y is not a lower bound on the way."""
    m = 0.2
    problem = BilevelProblem(
        lambda x, y: (y - 2).square().sum() / 2,
        lambda x, y: (torch.log(torch.cosh(y)) + m * y.square() / 2 - x * y).sum(),
    )
    x, y = torch.tensor([0.3]), torch.tensor([0.15])
    measured = estimate_constants(problem, x, y)
    known = replace(measured, M_yy=0.77, M_xy=0.0, L_fxy=0.0, heuristic=frozenset())
    still = hypergradient(problem, x, y, estimator=AID(Iterate(GradientDescent(0.1), 0), CG()), throw=False)
    exact = hypergradient(problem, x, y, estimator=AID(Newton(tol=1e-13), Dense())).grad
    certificate = certify(problem, x, still, known)
    assert certificate.theorem == "B"
    assert certificate.proven
    used = {a.name: a.value for a in certificate.assumed}
    assert measured.mu is not None and used["mu"] < measured.mu
    assert float((still.grad - exact).norm()) <= certificate.bound


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25)
def test_certificates_from_estimated_constants_are_labelled_and_hold_on_logistic_problems(seed: int) -> None:
    instance = logistic(n=20, d=4, seed=seed)
    x = instance.x0 + 0.3 * gaussian(4, seed=seed)
    exact = hypergradient(instance.problem, x, instance.y0, estimator=AID(Newton(tol=1e-13), Dense())).grad
    crude = AID(Iterate(GradientDescent(), max_steps=5 + seed % 50), CG(rtol=1e-3))
    estimate = hypergradient(instance.problem, x, instance.y0, estimator=crude, throw=False)
    certificate = certify(instance.problem, x, estimate, estimate_constants(instance.problem, x, estimate.y))
    assert not certificate.proven
    assert certificate.confidence < 1
    assert 1e-9 <= float((estimate.grad - exact).norm()) <= certificate.bound
    assert any("heuristic" in a.source for a in certificate.assumed)


def test_arguments_out_of_range_are_refused() -> None:
    instance = quadratic()
    with pytest.raises(ValueError, match="failure < 1/3"):
        estimate_constants(instance.problem, instance.x0, instance.y0, failure=0.5)
    tasks = BilevelProblem(lambda x, y, d: y.sum(), lambda x, y, d: (y - x).square().sum(), tasks=True)
    with pytest.raises(ValueError, match="tasks=True"):
        estimate_constants(tasks, torch.zeros(2), torch.zeros(2), data=torch.zeros(3, 1))
    with pytest.raises(ValueError, match="must be positive"):
        Constants(mu=0.0)


def test_rounding_is_taken_off_a_computed_least_eigenvalue() -> None:
    A = spd(torch.tensor([1e-3, 1.0, 1e3]), seed=3)
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: y @ A @ y / 2 - (x * y).sum())
    found = estimate_constants(problem, torch.zeros(3), torch.zeros(3))
    assert found.mu is not None
    assert 0.999e-3 <= found.mu <= float(torch.linalg.eigvalsh(A)[0])
