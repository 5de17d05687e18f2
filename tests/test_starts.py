"""Where the estimates of a run start, and closed forms that are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bilevel import (
    AID,
    ESJ,
    ITD,
    BilevelProblem,
    Penalty,
    Polytope,
    Status,
    hypergradient,
    hyperobjective,
    minimize,
    prox,
)
from bilevel.hypergrad import FiniteDifference
from bilevel.inner_problems import Iteration
from bilevel.solvers import (
    CG,
    LBFGS,
    Adam,
    ClosedForm,
    GradientDescent,
    Iterate,
    Neumann,
    OwnSteps,
    ScipyMinimize,
)

X = torch.tensor([0.4], dtype=torch.float64)
Y0 = torch.tensor([3.0], dtype=torch.float64)
FEW = Iterate(GradientDescent(0.1), max_steps=5)
PROBLEM = BilevelProblem(lambda x, y: (y - 2).square().sum() + x.square().sum(), lambda x, y: (y - x).square().sum())
REMEMBERING: dict[str, Any] = {
    "aid": AID(FEW, CG()),
    "aid, linear": AID(LBFGS(), Neumann(step=0.2, terms=3)),
    "aid, cg": AID(LBFGS(), CG(rtol=0.0, max_steps=1)),
    "itd": ITD(FEW),
    "esj": ESJ(FEW, directions=1),
    "penalty": Penalty(FEW, weight=10.0),
    "differences": FiniteDifference(FEW),
    "l-bfgs without a tolerance": AID(LBFGS(tol=0.0, max_steps=1), CG()),
}


@pytest.mark.parametrize("name", REMEMBERING)
def test_phi_is_a_function_of_x_where_the_start_is_part_of_the_answer(name: str) -> None:
    phi = hyperobjective(PROBLEM, Y0, estimator=REMEMBERING[name])
    values = [float(phi(X)) for _ in range(3)]
    grads = [phi.last.grad.clone() for _ in range(2) if phi(X) is not None and phi.last is not None]
    assert values[0] == values[1] == values[2]
    torch.testing.assert_close(
        grads[0], hypergradient(PROBLEM, X, Y0, estimator=REMEMBERING[name]).grad, rtol=0, atol=0
    )


@pytest.mark.parametrize("outer", [Adam(0.1), ScipyMinimize()])
def test_minimize_minimizes_the_phi_of_so_many_steps(outer: Any) -> None:
    solution = minimize(PROBLEM, X, Y0, estimator=ITD(FEW), outer=outer, max_steps=200)
    left = 0.8**5  # y_5 = x + left (y0 - x)
    expected = (1 - left) * (2 - left * 3) / ((1 - left) ** 2 + 1)  # argmin (y_5 - 2)^2 + x^2
    torch.testing.assert_close(solution.x, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-3)
    again = hypergradient(PROBLEM, solution.x, Y0, estimator=ITD(FEW))
    assert solution.value == again.value


def test_a_warm_start_is_had_by_asking_for_it() -> None:
    phi = hyperobjective(PROBLEM, Y0, estimator=ITD(FEW), warm_start=True)
    values = [float(phi(X)) for _ in range(3)]
    assert values[0] != values[1] != values[2]
    online = minimize(PROBLEM, X, Y0, estimator=ITD(FEW), outer=Adam(0.1), max_steps=5, warm_start=True)
    assert online.value != minimize(PROBLEM, X, Y0, estimator=ITD(FEW), outer=Adam(0.1), max_steps=5).value


def test_steps_of_an_iteration_start_cold() -> None:
    problem = BilevelProblem(lambda x, y: y.sum(), inner=Iteration(lambda x, y, k: x * y, steps=2))
    phi = hyperobjective(problem, Y0, estimator=ITD(OwnSteps()))
    assert float(phi(X)) == float(phi(X)) == pytest.approx(3 * 0.16)
    iterative = BilevelProblem(PROBLEM.f, PROBLEM.g, iterative=True)
    phi = hyperobjective(iterative, Y0, estimator=FiniteDifference(LBFGS(tol=1e-3, max_steps=5)))
    assert float(phi(X)) == float(phi(X))


@pytest.mark.parametrize(
    "estimator", ["aid-cg", "aid-neumann", "aid-dense", "itd", "penalty", AID(LBFGS(tol=1e-8), CG())]
)
def test_estimates_that_forget_their_start_start_warm(estimator: Any) -> None:
    problem = BilevelProblem(PROBLEM.f, lambda x, y: PROBLEM.g(x, y) + (y - x).pow(4).sum())
    phi = hyperobjective(problem, Y0, estimator=estimator)
    steps = [phi.last.reports[0].steps for _ in range(2) if phi(X) is not None and phi.last is not None]
    assert steps[1] < steps[0]
    cold = hyperobjective(problem, Y0, estimator=estimator, warm_start=False)
    assert [cold.last.reports[0].steps for _ in range(2) if cold(X) is not None and cold.last is not None] == [
        steps[0]
    ] * 2


def test_warm_start_is_true_false_or_none() -> None:
    wrong: Any = "no"
    for call in (minimize, hyperobjective):
        start: Any = (X, Y0) if call is minimize else (Y0,)
        with pytest.raises(TypeError, match=r"warm_start=\.\.\..*must be True or False or None"):
            call(PROBLEM, *start, warm_start=wrong)


# -- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("curvature", [1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_closed_form_that_is_another_formula_is_not_successful(
    scale: float, curvature: float, dtype: torch.dtype
) -> None:
    weights = torch.tensor([1.0, curvature, 1.0], dtype=dtype) * scale
    problem = BilevelProblem(
        lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (weights * (y - x).square()).sum() / 2
    )
    x, y0 = torch.tensor([0.5, 1.0, 2.0], dtype=dtype), torch.zeros(3, dtype=dtype)
    for form, right in ((lambda x: x, True), (lambda x: x * (1 + 1e-6), True), (lambda x: 7 * x, False)):
        for estimator in (AID(ClosedForm(form), CG()), ESJ(ClosedForm(form), 3), FiniteDifference(ClosedForm(form))):
            found = hypergradient(problem, x, y0, estimator=estimator, throw=False)
            assert (found.reports[0].status is Status.not_a_solution) is not right, estimator


def test_a_closed_form_is_held_against_constraints_and_proximal_terms() -> None:
    def status(problem: BilevelProblem, form: Any) -> Status:
        return hypergradient(
            problem, X3, torch.zeros_like(X3), estimator=FiniteDifference(ClosedForm(form)), throw=False
        ).status

    X3 = torch.tensor([0.7, 0.5, -1.0], dtype=torch.float64)
    target = torch.tensor([2.0, 0.2, 1.0], dtype=torch.float64)

    on_simplex = BilevelProblem(
        lambda x, y: (y * target).sum(), lambda x, y: (y - x).square().sum() / 2,
        constraints=lambda x: Polytope(A=torch.ones(1, 3), b=1.0, lower=0.0),
    )  # fmt: skip
    step = FiniteDifference(ClosedForm(lambda x: torch.tensor([0.5, 0.5, 0.0]).double() + _projected(x)), step=1e-5)
    assert hypergradient(on_simplex, X3, torch.zeros_like(X3), estimator=step, throw=False).status.ok
    assert status(on_simplex, lambda x: torch.tensor([1.0, 0.0, 0.0]).double()) is Status.not_a_solution
    assert status(on_simplex, lambda x: x) is Status.not_a_solution  # not feasible
    lasso = BilevelProblem(
        lambda x, y: (y * target).sum(), lambda x, y: (y - target).square().sum() / 2, prox=lambda x: prox.L1(x[0])
    )

    def soft(x: torch.Tensor) -> torch.Tensor:
        return target.sign() * (target.abs() - x[0]).clamp_min(0.0)

    assert status(lasso, soft) is Status.successful
    assert status(lasso, lambda x: target - x[0]) is Status.not_a_solution
    assert status(lasso, lambda x: target) is Status.not_a_solution


def _projected(x: torch.Tensor) -> torch.Tensor:
    """How far the projection of x on the simplex is from (0.5, 0.5, 0), where the last entry is held at zero."""
    half = (x[0] - x[1]) / 2
    return torch.stack([half, -half, torch.zeros_like(half)])


def test_a_closed_form_on_a_kink_is_a_solution() -> None:
    x = torch.tensor([0.7, -0.4], dtype=torch.float64)
    kinked = BilevelProblem(
        lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (2 * torch.relu(y - x) - y + (y - x).square()).sum()
    )  # y* = x, where the gradient is -1 by autograd
    found = hypergradient(kinked, x, x, estimator=FiniteDifference(ClosedForm(lambda x: x), step=1e-5))
    torch.testing.assert_close(found.grad, x - 3)


def test_a_formula_of_steps_is_taken_at_its_word() -> None:
    left = 0.8**5
    iterative = BilevelProblem(PROBLEM.f, PROBLEM.g, iterative=True)
    found = hypergradient(
        iterative, X, Y0, estimator=FiniteDifference(ClosedForm(lambda x: x + left * (3 - x)), step=1e-5)
    )
    torch.testing.assert_close(found.grad, hypergradient(iterative, X, Y0, estimator=ITD(FEW)).grad)
