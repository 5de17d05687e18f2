"""Constants estimated from products: their confidence, what is called a heuristic, and that they certify."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

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


def test_lipschitz_constants_are_twice_the_largest_change_that_was_seen() -> None:
    """Of H = 3 + y and G = -2 - 5 y, which change alike everywhere."""
    problem = BilevelProblem(
        lambda x, y: y.sum(),
        lambda x, y: (3 * y.square() / 2 + y.pow(3) / 6 - 2 * x * y - 5 * x * y.square() / 2).sum(),
    )
    found = estimate_constants(problem, torch.zeros(1), torch.zeros(1))
    assert found.M_yy == pytest.approx(2.0)
    assert found.M_xy == pytest.approx(10.0)


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
    with pytest.raises(ValueError, match=r"the y of all tasks, must have the structure \(3,\). Got \(2,\)"):
        estimate_constants(tasks, torch.zeros(2), torch.zeros(2), data=torch.zeros(3, 1))
    with pytest.raises(ValueError, match="must be positive"):
        Constants(mu=0.0)


def test_constants_of_tasks_hold_for_each_and_are_those_of_the_worst() -> None:
    each = [random_quadratic(3, 4, eigenvalues=[1.0 + i, 2.0, 5.0, 9.0 - i], cross=0.5, seed=i) for i in range(3)]
    names, kind = ("A", "B", "c", "C", "t", "E", "R", "s"), type(each[0])
    data = {name: torch.stack([getattr(f, name) for f in each]) for name in names}
    problem = BilevelProblem(lambda x, y, d: kind(**d).f(x, y), lambda x, y, d: kind(**d).g(x, y), tasks=True)
    found = estimate_constants(problem, torch.zeros(3), torch.zeros(3, 4), data=data)
    known = [f.constants() for f in each]
    for name, worst in {"mu": min, "L": max, "L_fyy": max, "L_fxy": max, "C_G": max}.items():
        assert getattr(found, name) == pytest.approx(worst(getattr(c, name) for c in known), rel=1e-9), name
    assert 0.9 < found.confidence < 1 and found.heuristic >= {"L_fyy", "M_yy"}
    alone = BilevelProblem(each[0].f, each[0].g)
    x, one = torch.zeros(3), slice(0, 1)
    first = estimate_constants(problem, x, torch.zeros(1, 4), data={k: t[one] for k, t in data.items()})
    assert first == estimate_constants(alone, x, torch.zeros(4))


def test_rounding_is_taken_off_a_computed_least_eigenvalue() -> None:
    A = spd(torch.tensor([1e-3, 1.0, 1e3]), seed=3)
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: y @ A @ y / 2 - (x * y).sum())
    found = estimate_constants(problem, torch.zeros(3), torch.zeros(3))
    assert found.mu is not None
    assert 0.999e-3 <= found.mu <= float(torch.linalg.eigvalsh(A)[0])


@given(st.data())
@settings(max_examples=200)
def test_only_finite_constants_in_their_ranges_are_taken(data: st.DataObject) -> None:
    """All others are refused by name; so none of them can be part of a certificate or a bound."""
    number = st.one_of(st.none(), st.floats(), st.floats(1e-3, 1e3))
    names = ("mu", "L", "L_fyy", "L_fxy", "M_yy", "M_xy", "C_G", "L_f_minus")
    drawn: dict[str, Any] = {name: data.draw(number, name) for name in names}
    radius, confidence = data.draw(st.floats(), "radius"), data.draw(st.floats(), "confidence")
    mu, L = drawn["mu"], drawn["L"]
    right = all(value is None or 0 <= value < math.inf for value in drawn.values())
    right = right and mu != 0 and not (mu is not None and L is not None and mu > L * (1 + 1e-9))
    right = right and radius > 0 and 0 < confidence <= 1
    if right:
        Constants(**drawn, radius=radius, confidence=confidence)
        return
    with pytest.raises(ValueError, match=r"`Constants"):
        Constants(**drawn, radius=radius, confidence=confidence)


@pytest.mark.parametrize("wrong", [math.inf, math.nan, -1.0, -math.inf])
@pytest.mark.parametrize("name", ["mu", "L", "L_fyy", "L_fxy", "M_yy", "M_xy", "C_G", "L_f_minus"])
def test_a_constant_that_is_infinite_not_a_number_or_negative_is_named(name: str, wrong: float) -> None:
    with pytest.raises(ValueError, match=rf"`Constants\({name}=...\)` must be"):
        Constants(**cast(Any, {"mu": None, name: wrong}))


def test_constants_that_contradict_each_other_are_refused_and_equal_ones_are_not() -> None:
    with pytest.raises(ValueError, match=r"mu <= L\. Got mu = 2 and L = 1"):
        Constants(mu=2.0, L=1.0)
    assert Constants(mu=1.0, L=1.0).kappa == 1.0
    assert Constants(mu=1.0, L=1.0 - 1e-12).L == 1.0 - 1e-12  # the same eigenvalue, computed in two ways
    assert Constants(mu=2.0, L=1.0, local=frozenset({"L"})).mu == 2.0  # of two points: `certify` confronts them


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"local": frozenset({"M_yy"})}, r"local=.* among C_G, L, mu. Got 'M_yy'"),  # which cannot be extended
        ({"heuristic": frozenset({"kappa"})}, "heuristic=.* Got 'kappa'"),
        ({"source": "guessed"}, "one of given, structural, estimated. Got 'guessed'"),
        ({"radius": math.nan}, "radius > 0"),
        ({"confidence": math.nan}, "0 < confidence <= 1"),
    ],
)
def test_what_is_said_of_constants_must_make_sense(wrong: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Constants(mu=1.0, **wrong)


@pytest.mark.parametrize("name", ["mu", "radius"])
def test_what_estimates_start_from_is_finite(name: str) -> None:
    for wrong in (math.inf, math.nan, 0.0, -1.0):
        with pytest.raises(ValueError, match=rf"{name}=...\)` must be positive and finite"):
            estimate_constants(diagonal(torch.ones(2)), torch.zeros(2), torch.zeros(2), **cast(Any, {name: wrong}))


@pytest.mark.parametrize("level", ["f", "g"])
def test_where_a_derivative_is_not_finite_there_are_no_constants(level: str) -> None:
    def broken(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (y - x).square().sum() + (y * math.inf).square().sum()

    whole = diagonal(torch.ones(2))
    problem = BilevelProblem(broken, whole.g) if level == "f" else BilevelProblem(whole.f, broken)
    with pytest.raises(ValueError, match=r"finite second derivatives\. Met NaN or Inf"):
        estimate_constants(problem, torch.zeros(2), torch.ones(2))
