"""Certified accuracy: the target is met, the error is below it, the run ends, and failure is reported."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import pytest
import torch
from certificate_cases import Drawn, drawn, normal
from hypothesis import given, settings, strategies as st

from bilevel import (
    AID,
    ITD,
    AbstractEstimator,
    AbstractOptimizer,
    BilevelProblem,
    Certified,
    Constants,
    Estimate,
    Start,
    Status,
    certify,
    hypergradient,
    minimize,
)
from bilevel._calculus import FiniteDifferences
from bilevel.extending import FlatEstimate, FlatProblem, FlatStart
from bilevel.problems.hyper_cleaning import hyper_cleaning
from bilevel.problems.logistic import logistic, logistic_breast_cancer
from bilevel.problems.quadratic import quadratic, random_quadratic
from bilevel.solvers import CG, LBFGS, MINRES, ClosedForm, Dense, GradientDescent, HeavyBall, Iterate, Neumann, Newton

STRONG = ("quadratic", "logistic", "cleaning", "curved")
SOLVERS: dict[str, tuple[Any, Any]] = {
    "lbfgs-cg": (LBFGS(), CG()),
    "descent-cg": (Iterate(GradientDescent(), max_steps=2000), CG()),
    "newton-minres": (Newton(), MINRES()),
    "lbfgs-dense": (LBFGS(), Dense()),
    "few-steps-neumann": (Iterate(GradientDescent(), max_steps=200), Neumann(step=None, terms=5000)),
}


def error(case: Drawn, estimate: Estimate) -> float:
    return float((estimate.grad.double() - case.h).norm())


@pytest.mark.parametrize("solvers", SOLVERS)
@given(case=drawn(STRONG, (torch.float64,)), decade=st.integers(-8, 0), warm=st.booleans())
@settings(max_examples=12)
def test_the_certificate_and_the_error_are_below_the_target(solvers: str, case: Drawn, decade: int, warm: bool) -> None:
    target = 10.0**decade
    inner, linear = SOLVERS[solvers]
    aid = AID(inner, linear, target_error=target, constants=case.constants)
    start = Start((case.y + 0.1 * normal(case.y.numel(), seed=1)).reshape(case.y0.shape), case.y0 + 1.0)
    estimate = hypergradient(case.user, case.x, case.y0, estimator=aid, start=start if warm else None, throw=False)
    assert estimate.status.ok, estimate.message
    assert estimate.bound is not None
    assert error(case, estimate) <= estimate.bound <= target
    checked = certify(case.user, case.x, estimate, case.constants)
    assert checked.bound <= 1.5 * target + 1e-12  # which measures C_G anew, at the end


@given(case=drawn(STRONG, (torch.float64,)), relative=st.sampled_from([0.5, 0.1, 1e-3]))
@settings(max_examples=20)
def test_a_relative_target_certifies_descent(case: Drawn, relative: float) -> None:
    aid = AID(LBFGS(), CG(), relative_error=relative, target_error=1e-10, constants=case.constants)
    estimate = hypergradient(case.user, case.x, case.y0, estimator=aid, throw=False)
    assert estimate.bound is not None and estimate.status.ok
    norm = float(estimate.grad.norm())
    assert error(case, estimate) <= estimate.bound <= max(relative * norm, 1e-10)
    assert norm <= 1e-9 or float(estimate.grad @ case.h) > 0


@given(case=drawn(STRONG, (torch.float32,)))
@settings(max_examples=15)
def test_a_target_below_the_rounding_floor_is_reported_and_the_best_is_returned(case: Drawn) -> None:
    aid = AID(LBFGS(), CG(), target_error=1e-14, constants=case.constants)
    estimate = hypergradient(case.user, case.x, case.y0, estimator=aid, throw=False)
    if estimate.bound is not None and estimate.bound <= 1e-14:  # h vanishes identically
        assert estimate.status.ok
        return
    assert estimate.status is Status.stagnated
    assert "certified accuracy" in [report.part for report in estimate.reports]
    assert estimate.stats.gradients <= 2500
    assert error(case, estimate) <= 1e-2 * (1 + float(case.h.norm()))


def test_more_accuracy_costs_more_and_every_call_is_counted() -> None:
    calls = {"g": 0}
    instance = logistic(n=40, d=6)
    assert instance.constants is not None

    def g(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls["g"] += 1
        return instance.problem.g(x, y)

    problem, costs = BilevelProblem(instance.problem.f, g), []
    for target in (1e-1, 1e-4, 1e-8):
        calls["g"] = 0
        aid = AID(LBFGS(), CG(), target_error=target, constants=instance.constants)
        later = Start(instance.y0, count=1)  # the first estimate of a run looks at f and g besides
        stats = hypergradient(problem, instance.x0, instance.y0, estimator=aid, start=later).stats
        assert stats.gradients + stats.values == calls["g"]
        costs.append(stats.gradients + stats.hvps)
    assert costs == sorted(costs)
    assert costs[0] < costs[2]


def test_a_warm_start_that_is_accurate_enough_costs_a_gradient_and_a_product() -> None:
    instance = logistic(n=40, d=6)
    aid = AID(LBFGS(), CG(), target_error=1e-6, constants=instance.constants)
    first = hypergradient(instance.problem, instance.x0, instance.y0, estimator=aid)
    stats = hypergradient(instance.problem, instance.x0, instance.y0, estimator=aid, start=first.start).stats
    assert (stats.gradients, stats.hvps, stats.cross_products, stats.outer_gradients) == (1, 1, 1, 1)


def test_a_closed_form_is_used_as_it_is() -> None:
    instance = quadratic(p=3, q=5, cross=1.0, seed=1)
    assert instance.solution is not None and instance.gradient is not None
    aid = AID(ClosedForm(instance.solution), CG(), target_error=1e-9, constants=instance.constants)
    x = normal(3, seed=1)
    far = Start(normal(5, seed=2), normal(5, seed=3))
    for start in (None, far):
        found = hypergradient(instance.problem, x, instance.y0, estimator=aid, start=start)
        assert float((found.grad - instance.gradient(x)).norm()) <= 1e-9


def test_constants_that_hold_nearby_only_are_not_used_from_afar() -> None:
    instance = quadratic(p=3, q=5, cross=1.0, seed=1)
    assert instance.constants is not None
    known = replace(instance.constants(instance.x0), radius=1e-4)
    aid = AID(LBFGS(), CG(), target_error=1e3, constants=known)
    found = hypergradient(instance.problem, normal(3, seed=1), 10 + instance.y0, estimator=aid)
    assert certify(instance.problem, normal(3, seed=1), found, known).distance <= 1e-4


@pytest.mark.parametrize("target", [1e-2, 1e-6])
@pytest.mark.parametrize("warm", [False, True])
def test_the_target_holds_for_the_mean_over_tasks(target: float, warm: bool) -> None:
    families = [random_quadratic(3, 4, eigenvalues=[1.0, 2.0, 5.0, 9.0], cross=0.5, seed=i) for i in range(3)]
    names, kind = ("A", "B", "c", "C", "t", "E", "R", "s"), type(families[0])
    data = {name: torch.stack([getattr(f, name) for f in families]) for name in names}
    problem = BilevelProblem(lambda x, y, d: kind(**d).f(x, y), lambda x, y, d: kind(**d).g(x, y), tasks=True)
    each = [f.constants() for f in families]
    worst = {n: max(getattr(c, n) for c in each) for n in ("L", "L_fyy", "L_fxy", "M_yy", "M_xy", "C_G")}
    known = Constants(min(c.mu for c in each if c.mu is not None), **worst)
    x = normal(3, seed=7)
    aid = AID(LBFGS(), CG(), target_error=target, constants=known)
    start = Start(normal(3, 4, seed=8), normal(3, 4, seed=9)) if warm else None
    found = hypergradient(problem, x, torch.zeros(4), data=data, estimator=aid, start=start)
    h = torch.stack([f.gradient(x) for f in families]).mean(0)
    assert found.bound is not None
    assert float((found.grad - h).norm()) <= found.bound <= target


def test_estimated_constants_meet_the_target_too() -> None:
    instance = logistic(n=30, d=4)
    reference = hypergradient(instance.problem, instance.x0, instance.y0, estimator=AID(Newton(tol=1e-12), Dense()))
    found = hypergradient(
        instance.problem, instance.x0, instance.y0, estimator=AID(LBFGS(), CG(), target_error=1e-5), throw=False
    )
    assert found.status.ok
    assert float((found.grad - reference.grad).norm()) <= 1e-5


@pytest.mark.parametrize("name", ["breast cancer", "hyper-cleaning"])
def test_adaptive_runs_end_certified_at_half_the_cost_of_a_tight_tolerance(name: str) -> None:
    outer: AbstractOptimizer
    constants: Any
    pytest.importorskip("sklearn")
    if name == "breast cancer":
        instance, outer, tight = logistic_breast_cancer(), GradientDescent(10.0), 1e-10
        assert instance.constants is not None
        of = instance.constants
        constants = lambda x: replace(of(x), C_G=None)  # noqa: E731
    else:
        instance, outer, tight = hyper_cleaning(n_train=50, n_val=200, regularization=0.02), HeavyBall(1000.0), 1e-10
        constants = instance.constants
    runs = {}
    for accuracy in ("fixed", "adaptive"):
        solvers = AID(LBFGS(), CG()) if accuracy == "adaptive" else AID(LBFGS(tol=tight), CG(rtol=tight))
        runs[accuracy] = minimize(
            instance.problem,
            instance.x0,
            instance.y0,
            estimator=solvers,
            outer=outer,
            max_steps=600,
            tol=1e-6,
            accuracy=accuracy,
            constants=constants if accuracy == "adaptive" else None,
            throw=False,
        )
        assert runs[accuracy].status.ok
    final = runs["adaptive"]
    exact = hypergradient(
        instance.problem, final.x, final.y, estimator=AID(Newton(tol=1e-12), CG(rtol=1e-12)), throw=False
    )
    assert float(exact.grad.norm()) <= final.history[-1].grad_norm <= 1e-6
    assert math.isfinite(final.value)
    costs = {accuracy: run.stats.gradients + run.stats.hvps for accuracy, run in runs.items()}
    assert costs["adaptive"] <= 0.5 * costs["fixed"], costs


def test_what_certified_accuracy_cannot_do_is_refused() -> None:
    instance = quadratic()
    with pytest.raises(ValueError, match="damping = 0"):
        AID(LBFGS(), CG(), damping=0.1, target_error=1e-3)
    with pytest.raises(ValueError, match=r"needs `Exact\(\)` products"):
        AID(LBFGS(), CG(), products=FiniteDifferences(), target_error=1e-3)
    with pytest.raises(ValueError, match="one of them positive"):
        AID(LBFGS(), CG(), target_error=0.0)
    unknown = AID(LBFGS(), CG(), target_error=1e-3, constants=Constants(mu=None))
    with pytest.raises(ValueError, match="needs the constants mu, L_fyy"):
        hypergradient(instance.problem, instance.x0, instance.y0, estimator=unknown)


@pytest.mark.parametrize("solvers", SOLVERS)
@pytest.mark.parametrize("targets", [(1e-5, None), (None, 0.3), (1e-9, 1e-4)])
@pytest.mark.parametrize("warm", [False, True])
def test_the_older_form_gives_the_bits_of_the_wrapper(
    solvers: str, targets: tuple[float | None, float | None], warm: bool
) -> None:
    instance = logistic(n=40, d=6)
    inner, linear = SOLVERS[solvers]
    old = AID(inner, linear, target_error=targets[0], relative_error=targets[1], constants=instance.constants)
    new = Certified(
        AID(inner, linear), target_error=targets[0], relative_error=targets[1], constants=instance.constants
    )
    start = Start(instance.y0 + 0.1, instance.y0 + 1.0) if warm else None
    a, b = (hypergradient(instance.problem, instance.x0, instance.y0, estimator=e, start=start) for e in (old, new))
    for one, other in zip((a.grad, a.y, a.v), (b.grad, b.y, b.v), strict=True):
        assert isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)
    assert (a.bound, a.value, a.stats, a.reports) == (b.bound, b.value, b.stats, b.reports)
    assert b.bound is not None and b.status.ok


def test_other_targets_keep_the_estimator_and_its_constants() -> None:
    known = quadratic().constants
    certified = Certified(AID(LBFGS(), CG()), relative_error=0.5, constants=known)
    assert certified.certified(1e-3, None, None) == Certified(AID(LBFGS(), CG()), target_error=1e-3, constants=known)
    older = AID(LBFGS(), CG(), relative_error=0.5, constants=known)
    assert older.certified(1e-3, None, None) == certified.certified(1e-3, None, None)
    other = Constants(mu=2.0)
    assert older.certified(1e-3, None, other) == Certified(AID(LBFGS(), CG()), target_error=1e-3, constants=other)


@final
@dataclass(frozen=True)
class Exactly(AbstractEstimator):
    """A user's estimator, which knows the hypergradient to whatever it is asked for."""

    gradient: Callable[[Any], Any]
    target: float | None = None
    relative: float | None = None

    def estimate(self, problem: FlatProblem, x: torch.Tensor, start: FlatStart) -> FlatEstimate:
        h = self.gradient(x)
        bound = None if self.relative is None else max(self.target or 0.0, self.relative * float(h.norm()))
        return FlatEstimate(h, torch.zeros(()), start.y, (), bound=bound)

    def certified(self, target_error: float | None, relative_error: float | None, constants: Any) -> Exactly:
        return Exactly(self.gradient, target_error, relative_error)


def test_an_estimator_of_a_users_own_takes_part_in_adaptive_accuracy() -> None:
    problem = BilevelProblem(lambda x, y: (y - 3).square().sum(), lambda x, y: (y - x).square().sum())
    x, mine = torch.ones(2, dtype=torch.float64), Exactly(lambda x: 2 * (x - 3))
    run = minimize(problem, x, x, estimator=mine, outer=GradientDescent(0.25), tol=1e-3, accuracy="adaptive")
    norms = [2 * 2.0**0.5 * 2 * 0.5**k for k in range(len(run.history))]
    bounds = [max(1e-3 / 4, 0.5 * norm) for norm in norms]
    assert [record.grad_norm for record in run.history] == pytest.approx(
        [a + b for a, b in zip(norms, bounds, strict=True)]
    )
    assert run.status.ok and run.history[-1].grad_norm <= 1e-3 < run.history[-2].grad_norm


def test_an_estimator_that_certifies_nothing_is_refused_for_adaptive_accuracy() -> None:
    instance, itd = quadratic(), ITD(Iterate(GradientDescent(0.1), max_steps=3))
    with pytest.raises(TypeError, match="Got ITD, which has no `certified`"):
        minimize(instance.problem, instance.x0, instance.y0, estimator=itd, accuracy="adaptive")


def test_what_is_no_implicit_estimator_is_not_wrapped() -> None:
    with pytest.raises(TypeError, match=r"must be an implicit estimator such as `AID\(LBFGS\(\), CG\(\)\)`. Got ITD"):
        Certified(ITD(Iterate(GradientDescent(0.1), max_steps=3)), target_error=1e-3)  # type: ignore[arg-type]


def test_constants_of_tasks_must_be_given() -> None:
    problem = BilevelProblem(
        lambda x, y, d: (y - d).square().sum(), lambda x, y, d: (y - x).square().sum() + y.cosh().sum() * 0, tasks=True
    )
    aid = AID(LBFGS(), CG(), target_error=1e-4)
    with pytest.raises(ValueError, match="certified accuracy of a problem with tasks needs `constants=`"):
        hypergradient(problem, torch.ones(2), torch.zeros(2), data=torch.ones(3, 2), estimator=aid)


def test_a_mean_over_tasks_takes_no_more_solves_than_one_of_them() -> None:
    """Each system is solved to its share of the target at once: the mean put 1 / tasks into its right-hand side."""
    family = random_quadratic(3, 40, eigenvalues=torch.logspace(0, 3, 40).tolist(), cross=0.5, seed=1)
    names, kind = ("A", "B", "c", "C", "t", "E", "R", "s"), type(family)
    attempts = []
    for tasks in (1, 30):
        data = {name: torch.stack([getattr(family, name)] * tasks) for name in names}
        problem = BilevelProblem(lambda x, y, d: kind(**d).f(x, y), lambda x, y, d: kind(**d).g(x, y), tasks=True)
        exact = ClosedForm(lambda x, d: family.solution(x))
        aid = Certified(AID(exact, CG()), target_error=1e-3, constants=family.constants())
        found = hypergradient(problem, normal(3, seed=7), torch.zeros(40), data=data, estimator=aid)
        attempts.append(next(report.steps for report in found.reports if report.part == "certified accuracy"))
        assert float((found.grad - family.gradient(normal(3, seed=7))).norm()) <= 1e-3
    assert attempts[1] == attempts[0]


def test_what_was_measured_at_the_start_is_extended_by_how_far_y_has_moved() -> None:
    """And measured once where y has not moved, however far from 0 it is: |G| = |y| may change by M_xy |y - start|."""
    problem = BilevelProblem(
        lambda x, y: (y - 1).square().sum() / 2, lambda x, y: ((1 + x.square()) * y.square() / 2 - 3 * y).sum()
    )
    x, known = torch.ones(1), Constants(2.0, 2.0, 1.0, 0.0, 0.0, 2.0)
    certified = Certified(AID(Newton(), CG()), target_error=1e-6, constants=known)
    first = hypergradient(problem, x, torch.full((1,), 1.4), estimator=certified)
    again = hypergradient(problem, x, torch.zeros(1), estimator=certified, start=first.start)
    given = Certified(AID(Newton(), CG()), target_error=1e-6, constants=replace(known, C_G=3.1))
    without = hypergradient(problem, x, torch.zeros(1), estimator=given, start=first.start)
    measured = again.stats.cross_products - without.stats.cross_products
    assert measured == 2  # one product with G and one with G' suffice for one variable


def test_where_the_largest_curvature_is_not_given_it_is_measured_only_where_rounding_would_matter() -> None:
    """A warm start that is accurate enough costs no product for it; a target near rounding costs some, at each try."""
    family = random_quadratic(3, 8, eigenvalues=torch.logspace(0, 2, 8).tolist(), cross=0.5, seed=1)
    problem, x = BilevelProblem(family.f, family.g), normal(3, seed=1)
    open_ = replace(family.constants(), L=None)
    for target, extra in ((1e-2, False), (1e-9, True)):
        products = []
        for constants in (family.constants(), open_):
            certified = Certified(AID(LBFGS(), CG()), target_error=target, constants=constants)
            first = hypergradient(problem, x, torch.zeros(8), estimator=certified)
            found = hypergradient(problem, x, torch.zeros(8), estimator=certified, start=first.start)
            products.append(found.stats.hvps)
            assert found.bound is not None and float((found.grad - family.gradient(x)).norm()) <= found.bound <= target
        assert (products[1] > products[0]) is extra


@pytest.mark.parametrize(
    "target", [{"target_error": math.inf}, {"relative_error": math.inf}, {"target_error": math.nan}]
)
def test_targets_are_finite(target: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be (finite|at least 0)\. Got (inf|nan)"):
        Certified(AID(LBFGS(), CG()), **target)


@pytest.mark.parametrize("known", [Constants(2.0, 2.0, 2.0, 0.0, 0.0, 0.0), None])
def test_where_nan_is_met_that_is_the_status_and_the_bound_is_infinite(known: Constants | None) -> None:
    def broken(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (y - x).square().sum() + (y * math.nan).square().sum()

    problem = BilevelProblem(lambda x, y: y.square().sum(), broken)
    certified = Certified(AID(LBFGS(), CG()), target_error=1e-3, constants=known)
    found = hypergradient(problem, torch.ones(2), torch.ones(2), estimator=certified, throw=False)
    assert found.status is Status.nonfinite
    assert found.bound == math.inf
    plain = hypergradient(problem, torch.ones(2), torch.ones(2), estimator=AID(LBFGS(), CG()), throw=False)
    for constants in (Constants(2.0, 2.0, 2.0, 0.0, 0.0, 0.0), Constants(2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 2.0)):
        certificate = certify(problem, torch.ones(2), plain, constants)
        assert (certificate.bound, certificate.proven) == (math.inf, False)
        assert "NaN or Inf" in certificate.reason
