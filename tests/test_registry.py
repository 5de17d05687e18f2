"""Called by name, every default is safe: accurate as stated, or the failure is reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bilevel_strategies import Logistic, normal
from cases import PROBLEMS, distance, point, single
from torch import Tensor

from bilevel import AID, BilevelProblem, Status, estimators, hypergradient, minimize
from bilevel._calculus import Exact
from bilevel.problems.ill_posed import double_well, rank_deficient
from bilevel.problems.quadratic import quadratic
from bilevel.solvers.adam import Adam
from bilevel.solvers.dense import Dense
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.lbfgs import LBFGS

# relative errors in float64 and float32; the biased ones as large as their bias is on these problems
STATED = {
    "implicit": (1e-7, 2e-3),
    "aid-cg": (1e-7, 2e-3),
    "aid-dense": (1e-7, 2e-3),
    "kkt": (1e-7, 2e-3),
    "aid-minres": (1e-7, 2e-3),
    "aid-gmres": (1e-7, 2e-3),
    "aid-neumann": (1e-4, 2e-2),
    "aid-nystrom": (0.1, 0.1),
    "network": (0.02, 0.05),
    "itd": (1e-4, 2e-2),
    "itd-forward": (1e-4, 2e-2),
    "itd-checkpointed": (1e-4, 2e-2),
    "itd-truncated": (0.3, 0.3),
    "one-step": (1.0, 1.0),
    "esj": (1e-3, 0.1),
    "penalty": (1e-3, 5e-2),
    "finite-difference": (1e-4, 2e-2),
}
SCALES = [(1.0, 1.0), (1e-6, 1.0), (1e6, 1.0), (1.0, 1e-6), (1.0, 1e6)]
LOGISTIC = Logistic(normal(8, 3, seed=1), normal(8, seed=2).sign(), normal(8, 3, seed=3), normal(8, seed=4).sign())


def problem_of(name: str, c_g: float, c_f: float, double: bool) -> tuple[BilevelProblem, Any, Any, Any]:
    """A problem with g and f scaled, an outer point, a start and the hypergradient there."""
    if name == "quadratic":
        instance = quadratic(p=4, q=6, cross=0.5)
        f, g, x, y0 = instance.problem.f, instance.problem.g, point(instance), instance.y0
    else:
        f, g, x, y0 = LOGISTIC.f, LOGISTIC.g, 0.3 * normal(11, seed=5), torch.zeros(3)
    reference = hypergradient(BilevelProblem(f, g), x, y0, estimator=AID(LBFGS(1e-12), Dense())).grad * c_f

    def scaled(function: Any, c: float) -> Any:
        return (
            (lambda x, y: c * function(x, y))
            if double
            else (lambda x, y: (c * function(x.double(), y.double())).float())
        )

    problem = BilevelProblem(scaled(f, c_f), scaled(g, c_g))
    return (problem, x, y0, reference) if double else (problem, x.float(), y0.float(), reference)


def test_every_name_has_a_stated_accuracy() -> None:
    assert STATED.keys() == estimators().keys() - {"first-order"}  # which is of a start that depends on x
    assert all(estimators().values())


@pytest.mark.parametrize("name", STATED)
@pytest.mark.parametrize("kind", ["quadratic", "logistic"])
@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize(("c_g", "c_f"), SCALES)
def test_names_are_accurate_in_every_unit(name: str, kind: str, double: bool, c_g: float, c_f: float) -> None:
    problem, x, y0, reference = problem_of(kind, c_g, c_f, double)
    found = hypergradient(problem, x, y0, estimator=name, throw=False)
    error = distance(found.grad, reference)
    assert found.status is Status.successful, found.message
    assert error <= STATED[name][0 if double else 1]


@pytest.mark.parametrize("name", STATED)
def test_ill_conditioning_is_mastered_or_reported(name: str) -> None:
    instance = quadratic(p=2, q=4, kappa=1e3)
    x = point(instance)
    found = hypergradient(instance.problem, x, instance.y0, estimator=name, throw=False)
    assert instance.gradient is not None
    good = distance(found.grad, instance.gradient(x)) <= max(1e-2, STATED[name][0])
    told = found.substitute is not None and found.substitute.residual > 1e-2  # biased by design, and by how much
    assert good or told or not found.status.ok


# the others differentiate their iteration, the value function or the damped system, which have derivatives
@pytest.mark.parametrize(
    "name", ["aid-cg", "aid-dense", "aid-minres", "aid-gmres", "aid-neumann", "itd", "itd-checkpointed"]
)
def test_singular_hessian_without_a_hypergradient_is_reported(name: str) -> None:
    instance = rank_deficient()
    found = hypergradient(instance.problem, instance.x0 + 0.3, instance.y0, estimator=name, throw=False)
    assert not found.status.ok
    assert found.message != ""


@pytest.mark.parametrize("name", [name for name in STATED if name != "aid-nystrom"])
def test_consistent_singular_hessian_is_mastered_or_reported(name: str) -> None:
    instance = rank_deficient(consistent=True)
    x = instance.x0 + 0.3
    found = hypergradient(instance.problem, x, instance.y0, estimator=name, throw=False)
    assert instance.gradient is not None
    assert not found.status.ok or abs(float(found.grad - instance.gradient(x))) <= 1e-4


@pytest.mark.parametrize("name", ["aid-cg", "aid-dense", "aid-neumann", "aid-nystrom"])
def test_negative_curvature_is_reported(name: str) -> None:
    instance = double_well(start=0.0)
    found = hypergradient(instance.problem, instance.x0, instance.y0, estimator=name, throw=False)
    assert not found.status.ok
    if name == "aid-cg":
        assert found.status is Status.negative_curvature
    if name == "aid-dense":
        assert found.status is Status.not_positive_definite


@pytest.mark.parametrize("name", STATED)
def test_local_branch_of_a_double_well(name: str) -> None:
    """In a well, (y - 1) / (3 y^2 - 1) along the branch that y follows."""
    instance = double_well(start=1.3)
    x = torch.tensor(0.2)
    found = hypergradient(instance.problem, x, instance.y0, estimator=name)
    y = float(found.y)
    assert y**3 - y == pytest.approx(0.2, abs=1e-5)
    assert float(found.grad) == pytest.approx((y - 1) / (3 * y * y - 1), rel=max(STATED[name][0], 1e-3))


@pytest.mark.parametrize("name", STATED)
def test_nan_is_reported(name: str) -> None:
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y - x).square().sum() * float("nan"))
    found = hypergradient(problem, torch.ones(2), torch.zeros(2), estimator=name, throw=False)
    assert found.status is Status.nonfinite


@pytest.mark.parametrize("name", STATED)
def test_minimize_by_name_reaches_the_minimizer(name: str) -> None:
    """Tolerances are fixed where the problem is first met, and stay right along a warm-started run."""
    instance = quadratic(p=2, q=3, kappa=4.0)
    solution = minimize(
        instance.problem, instance.x0, instance.y0, estimator=name, outer=GradientDescent(0.6), max_steps=25
    )
    assert solution.status is Status.steps_used_up
    if name not in ("one-step", "itd-truncated", "aid-nystrom"):
        assert distance(solution.x, instance.minimizer) <= 3e-2
        assert instance.gradient is not None
        assert float((solution.estimate.grad - instance.gradient(solution.x)).norm()) <= 1e-3


@pytest.mark.parametrize("name", ["aid-cg", "itd", "itd-forward", "itd-checkpointed", "penalty", "esj"])
def test_start_at_the_solution_is_no_trap(name: str) -> None:
    instance = quadratic(p=2, q=3, kappa=4.0)
    family_solution = instance.solution
    assert family_solution is not None
    y0 = family_solution(instance.x0)
    shifted = BilevelProblem(lambda x, y: instance.problem.f(x, y + y0), lambda x, y: instance.problem.g(x, y + y0))
    for start in (torch.zeros(3), 1e-17 * torch.ones(3)):
        found = hypergradient(shifted, instance.x0, start, estimator=name)
        assert instance.gradient is not None
        assert distance(found.grad, instance.gradient(instance.x0)) <= STATED[name][0]
        solution = minimize(shifted, instance.x0, start, estimator=name, outer=Adam(0.1), max_steps=5)
        assert solution.status is Status.steps_used_up
        assert distance(solution.estimate.grad, instance.gradient(solution.x)) <= 10 * STATED[name][0]


@pytest.mark.parametrize("name", ["aid-cg", "aid-minres", "aid-gmres", "aid-dense", "aid-neumann", "penalty"])
def test_dependence_through_the_start_only_is_refused(name: str) -> None:
    problem = BilevelProblem(lambda x, y: y.square().sum(), lambda x, y: (y - 1).square().sum(), init=lambda x: x)
    with pytest.raises(ValueError, match="does not apply: g does not depend on x"):
        hypergradient(problem, torch.ones(2), torch.zeros(2), estimator=name)


@pytest.mark.parametrize("name", ["itd", "itd-forward", "itd-checkpointed", "esj", "finite-difference"])
def test_dependence_through_the_start_is_differentiated_by_name(name: str) -> None:
    """Ten steps of length 1 / L on (y_1^2 + y_2^2 / 2) from y_0 = x: y = (0, x_2 / 2^10)."""
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: y[0].square() + y[1].square() / 2, init=lambda x: 1 * x)
    found = hypergradient(problem, torch.ones(2), torch.zeros(2), estimator=name)
    assert found.grad.tolist() == pytest.approx([0.0, 2.0**-10], abs=1e-9)


def test_unknown_names_are_refused_with_a_suggestion() -> None:
    for wrong, near in (("aid_cg", "aid-cg"), ("penality", "penalty"), ("ITD", None)):
        with pytest.raises(ValueError, match="there is no estimator") as caught:
            hypergradient(quadratic().problem, torch.zeros(4), torch.zeros(6), estimator=wrong)
        assert near is None or f"Did you mean '{near}'" in str(caught.value)
        assert "finite-difference" in str(caught.value)


def test_defaults_cost_the_caller_nothing_they_count() -> None:
    """Curvature estimates behind the defaults are not in the statistics of the estimate."""
    problem, x, y0 = PROBLEMS["quadratic"]().problem, torch.zeros(4), torch.zeros(6)
    calls = [0]

    def g(x: Tensor, y: Tensor) -> Tensor:
        calls[0] += 1
        return problem.g(x, y)

    found = hypergradient(BilevelProblem(problem.f, g), x, y0, estimator="aid-cg")
    assert found.stats.gradients < calls[0]
    assert found.stats.hvps == found.stats.linear_steps + 1
    assert Exact() == Exact()


def test_single_precision_stays_single_by_name() -> None:
    problem, x, y0 = single(PROBLEMS["asinh"]())
    for name in STATED:
        found = hypergradient(problem, x, y0, estimator=name)
        assert found.grad.dtype == found.y.dtype == torch.float32
