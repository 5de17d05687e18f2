"""Derivatives of constrained minimizers: against differences of re-solved problems, closed forms, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import distance
from hypothesis import given, settings, strategies as st
from strategies import SEEDS, gaussian, spd, spd_matrices
from torch import Tensor

from bilevel import (
    AID,
    ESJ,
    ITD,
    KKT,
    BilevelError,
    BilevelProblem,
    Constants,
    Estimate,
    FiniteDifference,
    Penalty,
    Polytope,
    Status,
    certify,
    check,
    compare,
    hypergradient,
)
from bilevel._estimate import AbstractEstimator
from bilevel._linear import LinearOperator, SaddleBlocks
from bilevel.inner_problems.activity import Activity
from bilevel.inner_problems.polytope import FlatPolytope
from bilevel.solvers.cg import CG
from bilevel.solvers.closed_form import ClosedForm
from bilevel.solvers.cvxpy_program import Cvxpy
from bilevel.solvers.dense import Dense
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.lbfgs import LBFGS
from bilevel.solvers.minres import MINRES
from bilevel.solvers.neumann import Neumann
from bilevel.solvers.quadratic_program import QuadraticProgram
from bilevel.solvers.saddle_cholesky import SaddleCholesky

SOLVER = QuadraticProgram()


def quadratic(Q: Tensor, seed: int, constraints: Callable[..., Polytope], p: int = 3) -> BilevelProblem:
    """g = y'Qy / 2 - <sin(Bx), y> + exp(x_1) |y|^2 / 2, f = |y - c|^2 / 2 + (sum x) y_1."""
    n = len(Q)
    B, c = gaussian(n * p, seed=seed).reshape(n, p), gaussian(n, seed=seed + 1)
    return BilevelProblem(
        lambda x, y: (y - c).square().sum() / 2 + x.sum() * y[0],
        lambda x, y: y @ Q @ y / 2 - 3 * (B @ x).sin() @ y + x[0].exp() * y.square().sum() / 2,
        constraints=constraints,
    )


def both(problem: BilevelProblem, x: Tensor, n: int, data: Any = None) -> tuple[Estimate, Estimate]:
    """By KKT, and by differences."""
    y0 = torch.zeros(n)
    return (
        hypergradient(problem, x, y0, data=data, estimator=KKT(SOLVER)),
        hypergradient(problem, x, y0, data=data, estimator=FiniteDifference(SOLVER)),
    )


def margin(estimate: Estimate) -> float:
    return estimate.reports[1].residual


# The right number


@settings(max_examples=10)
@given(spd_matrices(min_size=2, max_size=6), SEEDS)
def test_the_derivative_is_that_of_the_minimizer_solved_again(Q: Tensor, seed: int) -> None:
    n = len(Q)
    A = gaussian(n, seed=seed + 2).reshape(1, n)
    inside = 0.3 * gaussian(n, seed=seed + 3)
    problem = quadratic(Q, seed, lambda x: Polytope(A=A, b=A @ inside, lower=inside - 0.3, upper=inside + 0.2))
    exact, differences = both(problem, 0.5 * gaussian(3, seed=seed + 4), n)
    if margin(exact) > 1e-4:  # closer to a kink the difference straddles it
        assert distance(exact.grad, differences.grad) < 1e-6


@pytest.mark.parametrize("what", ["A", "b", "lower", "upper"])
def test_constraints_that_move_with_x_are_differentiated(what: str) -> None:
    n, seed = 5, 1
    A, inside = gaussian(n, seed=seed).reshape(1, n), 0.3 * gaussian(n, seed=seed + 1)

    def constraints(x: Tensor) -> Polytope:
        def moving(name: str) -> Tensor | float:
            return x[1].sin() if what == name else 0.0

        return Polytope(
            A=A + 0.3 * moving("A") * A.flip(1),
            b=A @ inside + 0.1 * moving("b"),
            lower=inside - 0.3 - 0.1 * moving("lower"),
            upper=inside + 0.2 + 0.2 * moving("upper"),
        )

    problem, x = quadratic(spd(torch.arange(1.0, 6.0), seed), seed, constraints), 0.5 * gaussian(3, seed=seed + 4)
    exact, differences = both(problem, x, n)
    still = both(quadratic(spd(torch.arange(1.0, 6.0), seed), seed, lambda _: constraints(x.detach())), x, n)[0]
    polytope = constraints(x)
    assert bool((exact.y == polytope.lower).any()) and bool((exact.y == polytope.upper).any()) and margin(exact) > 1e-3
    assert distance(still.grad, exact.grad) > 1e-3  # so that the motion of the constraints matters
    assert distance(exact.grad, differences.grad) < 1e-7


@given(SEEDS, st.integers(2, 8))
def test_the_projection_onto_the_simplex_has_the_derivative_of_its_face(seed: int, n: int) -> None:
    """P'(x) = I - 11' / |F| on the support F, and 0 off it."""
    c = gaussian(n, seed=seed + 1)
    problem = BilevelProblem(
        lambda x, y: c @ y,
        lambda x, y: (y - x).square().sum() / 2,
        constraints=lambda x: Polytope(A=torch.ones(1, n), b=1.0, lower=0.0),
    )
    found = hypergradient(problem, gaussian(n, seed=seed), torch.zeros(n), estimator=KKT(SOLVER))
    on = found.y > 0
    assert torch.allclose(found.grad, torch.where(on, c - c[on].mean(), torch.zeros(n)), rtol=0, atol=1e-12)


def test_an_entry_on_its_bound_moves_with_the_bound() -> None:
    problem = BilevelProblem(
        lambda x, y: y @ torch.tensor([1.0, 10.0]),
        lambda x, y: (y - 5).square().sum() / 2 + y[0] * y[1] / 2,
        constraints=lambda x: Polytope(upper=torch.stack([x[0], x[1] + 100])),
    )
    found = hypergradient(problem, torch.tensor([1.0, 1.0]), torch.zeros(2), estimator=KKT(SOLVER))
    assert torch.allclose(found.y, torch.tensor([1.0, 4.5]))
    assert torch.allclose(found.grad, torch.tensor([1.0 - 10 / 2, 0.0]))  # y_2 = 5 - y_1 / 2


@given(spd_matrices(min_size=2, max_size=6), SEEDS)
def test_without_constraints_it_is_the_implicit_gradient(Q: Tensor, seed: int) -> None:
    problem = quadratic(Q, seed, lambda x: Polytope())
    plain = BilevelProblem(problem.f, problem.g)
    x, y0 = gaussian(3, seed=seed + 4), torch.zeros(len(Q))
    aid = hypergradient(plain, x, y0, estimator=AID(LBFGS(tol=1e-11, max_steps=1000), Dense()), throw=False)
    for same in (problem, plain):
        assert distance(hypergradient(same, x, y0, estimator=KKT(SOLVER)).grad, aid.grad) < 1e-9


def test_rows_of_equalities_whose_entries_are_all_held_or_repeated_do_no_harm() -> None:
    """With y_1 = y_2 = 1 held, y_1 + y_2 = 2 says nothing new, and its multiplier is not unique."""
    A = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 2.0, 2.0]])
    problem = BilevelProblem(
        lambda x, y: y @ torch.tensor([1.0, 2.0, 3.0, 5.0]),
        lambda x, y: (y - x).square().sum() / 2,
        constraints=lambda x: Polytope(A=A, b=torch.tensor([2.0, 1.0, 2.0]), upper=1.0),
    )
    found = hypergradient(problem, torch.tensor([3.0, 4.0, 0.1, 0.2]), torch.zeros(4), estimator=KKT(SOLVER))
    assert torch.allclose(found.y, torch.tensor([1.0, 1.0, 0.45, 0.55]))
    assert torch.allclose(found.grad, torch.tensor([0.0, 0.0, -1.0, 1.0]), atol=1e-12)


def smooth() -> BilevelProblem:
    """g = sum exp(y) - <x, y> + (sum y)^2: not quadratic, with its second entry on the bound."""
    return BilevelProblem(
        lambda x, y: (y - 1).square().sum() + x[0] * y[1],
        lambda x, y: y.exp().sum() - (1 + x.square()) @ y + y.sum().square() / 4,
        constraints=lambda x: Polytope(upper=torch.tensor([1.0, 0.2, 1.0])),
    )


def test_a_smooth_objective_need_not_be_quadratic() -> None:
    exact, differences = both(smooth(), torch.tensor([0.5, 2.0, 0.1]), 3)
    assert exact.y[1] == 0.2 and exact.y[0] < 1
    assert distance(exact.grad, differences.grad) < 1e-7


def test_a_solution_found_elsewhere_will_do() -> None:
    """Without the multipliers of the solver, and off the bound by rounding."""
    n, c = 4, gaussian(4, seed=3)
    point = torch.tensor([0.9, 0.3, 0.2, -2.0])
    problem = BilevelProblem(
        lambda x, y: c @ y,
        lambda x, y: (y - x).square().sum() / 2,
        constraints=lambda x: Polytope(A=torch.ones(1, n), b=1.0, lower=0.0),
    )
    solved = hypergradient(problem, point, torch.zeros(n), estimator=KKT(SOLVER))
    found = hypergradient(problem, point, torch.zeros(n), estimator=KKT(ClosedForm(lambda x: solved.y + 1e-13)))
    assert torch.allclose(found.grad, solved.grad, rtol=0, atol=1e-12)
    assert found.status.ok


def test_a_solution_of_cvxpy_will_do() -> None:
    pytest.importorskip("cvxpy")
    x = torch.tensor([0.9, 0.3, -2.0])
    found = hypergradient(on_the_simplex(), x, torch.zeros(3), estimator=KKT(Cvxpy()))
    assert torch.allclose(found.grad, torch.tensor([-0.5, 0.5, 0.0]), rtol=0, atol=1e-12)
    far = hypergradient(on_the_simplex(), 1e3 * x, torch.zeros(3), estimator=KKT(Cvxpy()))
    assert far.status.ok
    assert float(far.reports[0].residual) < 1e-12


# Tasks


def tasks_problem(encode: bool) -> tuple[BilevelProblem, Tensor, dict[str, Tensor]]:
    def z_of(x: Tensor, task: Any) -> dict[str, Tensor]:
        return {"target": (task["B"] @ x).tanh(), "weight": x[0].exp()}

    def g(z: Any, y: Tensor, task: Any) -> Tensor:
        value: Tensor = (y - 2 * z["target"]).square().sum() / 2 + z["weight"] * y.sum().square() / 2
        return value

    def f(z: Any, y: Tensor, task: Any) -> Tensor:
        value: Tensor = (y - task["c"]).square().sum() * z["weight"]
        return value

    def constraints(z: Any, task: Any) -> Polytope:
        return Polytope(A=torch.ones(1, 4), b=z["weight"], lower=0.0, upper=task["upper"])

    data = {
        "B": gaussian(3 * 4 * 2, seed=1).reshape(3, 4, 2),
        "c": gaussian(12, seed=2).reshape(3, 4),
        "upper": torch.tensor([[1.0, 1.0, 0.7, 1.0], [torch.inf, 0.4, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]),
    }
    if encode:
        return BilevelProblem(f, g, encode=z_of, constraints=constraints, tasks=True), torch.tensor([0.1, -0.4]), data
    problem = BilevelProblem(
        lambda x, y, task: f(z_of(x, task), y, task),
        lambda x, y, task: g(z_of(x, task), y, task),
        constraints=lambda x, task: constraints(z_of(x, task), task),
        tasks=True,
    )
    return problem, torch.tensor([0.1, -0.4]), data


def test_tasks_are_a_loop_over_tasks() -> None:
    problem, x, data = tasks_problem(encode=False)
    together = hypergradient(problem, x, torch.zeros(4), data=data, estimator=KKT(SOLVER))
    alone = BilevelProblem(problem.f, problem.g, constraints=problem.constraints)
    each = [
        hypergradient(alone, x, torch.zeros(4), data={k: v[i] for k, v in data.items()}, estimator=KKT(SOLVER))
        for i in range(3)
    ]
    assert torch.allclose(together.grad, torch.stack([e.grad for e in each]).mean(0), rtol=0, atol=1e-12)
    assert torch.allclose(together.y, torch.stack([e.y for e in each]), rtol=0, atol=1e-12)
    differences = hypergradient(problem, x, torch.zeros(4), data=data, estimator=FiniteDifference(SOLVER))
    assert distance(together.grad, differences.grad) < 1e-7
    assert together.stats.hvps == sum(e.stats.hvps for e in each)


def test_encoding_and_chunks_change_nothing() -> None:
    (plain, x, data), encoded = tasks_problem(encode=False), tasks_problem(encode=True)[0]
    reference = hypergradient(plain, x, torch.zeros(4), data=data, estimator=KKT(SOLVER))
    for problem, size in ((encoded, None), (plain, 2), (encoded, 2)):
        found = hypergradient(problem, x, torch.zeros(4), data=data, estimator=KKT(SOLVER), chunk_size=size)
        assert torch.allclose(found.grad, reference.grad, rtol=0, atol=1e-12)


def test_evolution_strategies_agree() -> None:
    problem, x, data = tasks_problem(encode=True)
    exact = hypergradient(problem, x, torch.zeros(4), data=data, estimator=KKT(SOLVER))
    esj = ESJ(SOLVER, directions=2, radius=1e-6, distribution="orthonormal")
    assert distance(hypergradient(problem, x, torch.zeros(4), data=data, estimator=esj).grad, exact.grad) < 1e-4


def test_the_calls_are_counted() -> None:
    """Q for the solver and H for the system: n products each, a gradient with each; H y, and the true residual."""
    n = 3
    problem = quadratic(torch.eye(n), 0, lambda x: Polytope(upper=0.5))
    stats = hypergradient(problem, torch.zeros(3), torch.zeros(n), estimator=KKT(SOLVER)).stats
    assert (stats.gradients, stats.hvps, stats.cross_products, stats.outer_gradients) == (2, 2 * n + 2, 2, 1)


# What is said where it is not


def at_the_kink(x: float, weak: float | None = None, *, held: bool = True) -> Estimate:
    """y = min(x, 1), whose kink is at x = 1."""
    problem = BilevelProblem(
        lambda x, y: y.sum(), lambda x, y: (y - x).square().sum() / 2, constraints=lambda x: Polytope(upper=1.0)
    )
    return hypergradient(problem, torch.tensor([x]), torch.zeros(1), estimator=KKT(SOLVER, weak=weak), throw=False)


def test_a_bound_that_holds_only_just_is_reported() -> None:
    assert at_the_kink(1.0).status is Status.weakly_active
    assert at_the_kink(1.0).grad in (torch.tensor([0.0]), torch.tensor([1.0]))
    assert "Strict complementarity" in at_the_kink(1.0).message
    for x, slope in ((0.999, 1.0), (1.001, 0.0)):
        assert at_the_kink(x).status.ok and at_the_kink(x).grad == slope
        assert at_the_kink(x).reports[1].residual == pytest.approx(1e-3, rel=0.01)
        assert at_the_kink(x, weak=1e-2).status is Status.weakly_active


def test_a_weakly_active_bound_fails_one_task_only() -> None:
    problem = BilevelProblem(
        lambda x, y, c: y.sum(),
        lambda x, y, c: (y - x * c).square().sum() / 2,
        constraints=lambda x, c: Polytope(upper=1.0),
        tasks=True,
    )
    data = torch.tensor([[0.5], [1.0], [2.0]])
    found = hypergradient(problem, torch.ones(1), torch.zeros(1), data=data, estimator=KKT(SOLVER), throw=False)
    assert found.reports[1].statuses == (Status.successful, Status.weakly_active, Status.successful)


def test_a_fixed_entry_is_not_weakly_active() -> None:
    problem = BilevelProblem(
        lambda x, y: y.sum(),
        lambda x, y: (y - x).square().sum() / 2,
        constraints=lambda x: Polytope(lower=torch.tensor([1.0, 0.0]), upper=torch.tensor([1.0, 9.0])),
    )
    found = hypergradient(problem, torch.tensor([1.0, 2.0]), torch.zeros(2), estimator=KKT(SOLVER))
    assert torch.equal(found.grad, torch.tensor([0.0, 1.0]))


def test_too_few_steps_are_no_solution_and_say_so() -> None:
    problem = quadratic(torch.diag(torch.arange(1.0, 9.0)), 2, lambda x: Polytope(A=torch.ones(1, 8), b=0.5, lower=0.0))
    x = gaussian(3, seed=5)
    exact = hypergradient(problem, x, torch.zeros(8), estimator=KKT(SOLVER))
    early = KKT(QuadraticProgram(max_steps=1))
    found = hypergradient(problem, x, torch.zeros(8), estimator=early, throw=False)
    assert found.status is Status.max_steps and found.reports[0].residual > 1e-3
    assert distance(found.grad, exact.grad) > 1e-2
    with pytest.raises(BilevelError, match="maximum number of steps"):
        hypergradient(problem, x, torch.zeros(8), estimator=early)


def test_contradicting_constraints_end_the_estimate() -> None:
    problem = quadratic(torch.eye(2), 0, lambda x: Polytope(A=torch.ones(1, 2), b=9.0, upper=1.0))
    with pytest.raises(BilevelError, match="contradict each other") as caught:
        hypergradient(problem, torch.zeros(3), torch.zeros(2), estimator=KKT(SOLVER))
    assert caught.value.status is Status.infeasible


def test_a_minimizer_that_is_not_unique_is_reported() -> None:
    """A linear g: y is anywhere on an edge of the simplex."""
    problem = BilevelProblem(
        lambda x, y: y.square().sum(),
        lambda x, y: x[0] * (y[0] + y[1]) + y[2] * 3,
        constraints=lambda x: Polytope(A=torch.ones(1, 3), b=1.0, lower=0.0),
    )
    found = hypergradient(problem, torch.ones(1), torch.zeros(3), estimator=KKT(SOLVER), throw=False)
    assert found.status is Status.not_positive_definite
    assert "linear program has several solutions" in found.status.value
    by_products = AID(SOLVER, MINRES(rtol=1e-12))  # which finds the least squares solution of least norm, too
    torch.testing.assert_close(
        found.grad, hypergradient(problem, torch.ones(1), torch.zeros(3), estimator=by_products, throw=False).grad
    )


def test_a_batch_of_linear_programs_says_which_has_several_minimizers_and_solves_the_others() -> None:
    """y = (0, x) where the second price is higher; anything between (x, 0) and (0, x) where they are equal."""
    problem = BilevelProblem(
        lambda x, y, price: (y * price).sum(),
        lambda x, y, price: -(y * price).sum(),
        constraints=lambda x, price: Polytope(G=torch.ones(1, 2), h=x, lower=0.0),
        tasks=True,
    )
    x, y0, prices = torch.ones(1), torch.zeros(2), torch.tensor([[1.0, 2.0], [1.0, 1.0]])
    found = hypergradient(problem, x, y0, data=prices, estimator=KKT(SOLVER), throw=False)
    assert found.status is Status.not_positive_definite
    linear = next(report for report in found.reports if report.part == "linear solver")
    assert linear.statuses == (Status.successful, Status.not_positive_definite)
    unique = hypergradient(problem, x, y0, data=prices[:1], estimator=KKT(SOLVER))
    torch.testing.assert_close(unique.grad, torch.tensor([2.0]))


def test_matrices_that_are_not_finite_are_named_before_what_they_are_not() -> None:
    matrix = LinearOperator(lambda v: v * torch.tensor([1.0, torch.nan]), size=2, positive_definite=True)
    assert SaddleCholesky().solve(matrix, torch.ones(2)).status is Status.nonfinite
    flat = LinearOperator(lambda v: v * torch.tensor([1.0, 0.0]), size=2, positive_definite=True)
    found = SaddleCholesky().solve(flat, torch.ones(2))
    assert found.status is Status.not_positive_definite
    torch.testing.assert_close(found.value, torch.tensor([1.0, 0.0]))


REFUSING: list[tuple[str, AbstractEstimator]] = [
    ("AID", AID(LBFGS(), CG())),
    ("AID", AID(SOLVER, Neumann(step=None, terms=10))),
    ("AID", AID(LBFGS(), CG(), target_error=1e-3)),
    ("ITD", ITD(Iterate(GradientDescent(0.1), max_steps=5))),
    ("Penalty", Penalty(SOLVER)),
]


@pytest.mark.parametrize(("name", "estimator"), REFUSING)
def test_what_assumes_a_vanishing_gradient_refuses(name: str, estimator: AbstractEstimator) -> None:
    problem = quadratic(torch.eye(2), 0, lambda x: Polytope(upper=9.0))  # not even active
    with pytest.raises(ValueError, match=f"`{name}` does not apply: y is constrained.*`KKT`"):
        hypergradient(problem, torch.zeros(3), torch.zeros(2), estimator=estimator)


@pytest.mark.parametrize(
    "estimator", [KKT(LBFGS()), ESJ(Iterate(GradientDescent(0.1), max_steps=5)), FiniteDifference(LBFGS())]
)
def test_inner_solvers_that_ignore_constraints_are_refused(estimator: AbstractEstimator) -> None:
    problem = quadratic(torch.eye(2), 0, lambda x: Polytope(upper=0.1))
    with pytest.raises(
        ValueError, match=r"must heed the constraints on y.*which ignores them\. Use `QuadraticProgram`"
    ):
        hypergradient(problem, torch.zeros(3), torch.zeros(2), estimator=estimator)


def test_without_constraints_any_solver_will_do() -> None:
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y - x).square().sum())
    found = hypergradient(problem, torch.ones(2), torch.zeros(2), estimator=KKT(LBFGS(tol=1e-10)))
    assert torch.allclose(found.grad, torch.ones(2))


def test_a_start_that_depends_on_x_is_not_seen() -> None:
    for constraints in (None, lambda x: Polytope(upper=1.0)):
        problem = BilevelProblem(
            lambda x, y: y.sum(), lambda x, y: (y - 3).square().sum(), init=lambda x: x, constraints=constraints
        )
        with pytest.raises(ValueError, match=r"`KKT` does not apply: .*y depends on x only through its start"):
            hypergradient(problem, torch.zeros(2), torch.zeros(2), estimator=KKT(SOLVER))
    moving = BilevelProblem(
        lambda x, y: y.sum(),
        lambda x, y: (y - 3).square().sum(),
        init=lambda x: x,
        constraints=lambda x: Polytope(upper=x),
    )
    found = hypergradient(moving, torch.ones(2), torch.zeros(2), estimator=KKT(SOLVER))
    assert torch.equal(found.grad, torch.ones(2))


def test_what_is_not_known_of_constrained_problems_is_not_claimed() -> None:
    problem = quadratic(torch.eye(2), 0, lambda x: Polytope(upper=0.1))
    found = hypergradient(problem, torch.zeros(3), torch.zeros(2), estimator=KKT(SOLVER))
    assert found.error_estimate != found.error_estimate  # NaN
    constants = Constants(mu=1.0, L_fyy=1.0, L_fxy=1.0, M_yy=1.0, M_xy=1.0, C_G=1.0)
    curved = BilevelProblem(problem.f, problem.g, inequalities=lambda x, y: y - 0.1)
    found = hypergradient(curved, torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="Missing: L_cyy, L_cxy, M_cyy, M_cxy"):
        certify(curved, torch.zeros(3), found, constants)


def on_the_simplex() -> BilevelProblem:
    """f = c'y over the projection of x: x moves y through g."""
    return BilevelProblem(
        lambda x, y: y @ torch.tensor([1.0, 2.0, -1.0]),
        lambda x, y: (y - x).square().sum() / 2,
        constraints=lambda x: Polytope(A=torch.ones(1, 3), b=1.0, lower=0.0),
    )


def test_by_name_it_solves_and_differentiates() -> None:
    x, y0 = torch.tensor([0.5, 0.3, -1.0]), torch.zeros(3)
    for name in ("kkt", "aid-minres", "aid-gmres", "aid-dense", "finite-difference", "esj"):
        found = hypergradient(on_the_simplex(), x, y0, estimator=name)
        assert torch.allclose(found.grad, torch.tensor([-0.5, 0.5, 0.0]), atol=1e-6)
    for name in ("aid-cg", "aid-neumann", "aid-nystrom", "itd", "one-step", "penalty"):
        with pytest.raises(ValueError, match="does not apply: y is constrained"):
            hypergradient(on_the_simplex(), x, y0, estimator=name)
    with pytest.raises(ValueError, match=r"`Auto` does not apply to a problem with constraints.*'kkt'"):
        hypergradient(on_the_simplex(), x, y0, estimator="auto")


def test_check_says_which_bounds_hold_and_what_applies() -> None:
    found = check(on_the_simplex(), torch.tensor([0.5, 0.3, -1.0]), torch.zeros(3))
    assert found.ok
    said = {verdict.name: verdict.found for verdict in found.verdicts}
    assert "1 bounds hold" in said["inner solution"]
    assert said["hypergradient"]
    assert found.dependence == "inner objective"
    refused = {name for name, reason in found.estimators.items() if "Use `KKT`" in reason}
    assert {"aid-cg", "aid-neumann", "itd", "one-step", "penalty"} <= refused
    assert not found.estimators["kkt"] and not found.estimators["esj"]


def test_check_sees_x_in_the_constraints() -> None:
    problem = BilevelProblem(
        lambda x, y: y.sum(), lambda x, y: (y - 3).square().sum(), constraints=lambda x: Polytope(upper=x)
    )
    found = check(problem, torch.ones(2), torch.zeros(2))
    assert found.ok and found.dependence == "inner objective"


@pytest.mark.parametrize("budgets", [None, [50]])
def test_compare_has_a_row_or_a_reason_for_each(budgets: list[int] | None) -> None:
    x = torch.tensor([0.5, 0.3, -1.0])
    found = compare(on_the_simplex(), x, torch.zeros(3), budgets=budgets, memory=False)
    rows = {row.name: row for row in found.rows}
    assert found.reference == "the implicit gradient under constraints"
    assert found.norm == pytest.approx(0.5**0.5)
    right = {"kkt", "aid-minres", "aid-gmres", "aid-dense", "esj", "finite-difference"}
    assert {name for name, row in rows.items() if row.applies} == right
    for name in right:
        assert (rows[name].relative or 0.0) < 1e-6
    assert "y is constrained" in rows["aid-cg"].reason and "y is constrained" in rows["itd"].reason
    assert "not aid-cg: `AID` does not apply: y is constrained" in str(found)


def test_float32_is_good_to_float32() -> None:
    Q = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    problem = quadratic(Q, 0, lambda x: Polytope(A=torch.ones(1, 3, dtype=x.dtype), b=0.5, lower=0.0))
    x = torch.tensor([0.1, 0.2, 0.3])
    exact = hypergradient(problem, x, torch.zeros(3), estimator=KKT(SOLVER))

    def single(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, y: function(x.double(), y.double()).float()

    rounded = BilevelProblem(single(problem.f), single(problem.g), constraints=problem.constraints)
    found = hypergradient(rounded, x.float(), torch.zeros(3).float(), estimator=KKT(SOLVER))
    assert found.grad.dtype == torch.float32 and distance(found.grad.double(), exact.grad) < 1e-5


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"`KKT\(weak=...\)` must be at least 0"):
        KKT(SOLVER, weak=-1.0)
    with pytest.raises(TypeError, match=r"BilevelProblem\(constraints=...\)` must be a callable"):
        BilevelProblem(lambda x, y: y, lambda x, y: y, constraints=Polytope())  # type: ignore[arg-type]
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: y.sum(), constraints=lambda: Polytope())
    with pytest.raises(TypeError, match=r"`problem.constraints` will be called as constraints\(x\)"):
        hypergradient(problem, torch.zeros(2), torch.zeros(2), estimator=KKT(SOLVER))


def test_multipliers_are_fitted_again_to_the_entries_that_they_have_set_free() -> None:
    """By distance alone no entry of this y is held; the first fit tells which are, the second what pulls at them."""
    A, nu, pull = torch.tensor([[2.0, 3.0, 2.0, 1.0]]), torch.tensor([-2.0]), torch.tensor([0.25, 0.25, 0.0, 0.0])
    y, gradient = torch.tensor([1e-4, 1e-3, 1.0, 1.0]), pull - A.T @ nu
    polytope = FlatPolytope(A, A @ y, torch.zeros(4), torch.full((4,), torch.inf))
    found = Activity.of(polytope, y, gradient, torch.zeros(4), None)
    assert found.free.tolist() == [False, False, True, True]
    assert float(found.multipliers) == pytest.approx(-2.0)
    assert float(found.margin) == pytest.approx(0.25 / 6.25)  # relative to the largest entry of the gradient


def test_slacks_are_eliminated_without_a_trace() -> None:
    """A saddle-point system with slacks in its last unknowns, against the whole matrix: any right-hand side."""
    m, q, k = 1, 4, 3
    H, rows = spd(torch.linspace(1, 3, q), 0), gaussian((m + k) * q, seed=1).reshape(m + k, q)
    rows[-1], rows[-1, 2] = 0.0, 2.0  # and y_2 alone in a row that holds
    A = torch.cat([rows, torch.cat([torch.zeros(m, k), torch.eye(k)])], -1).expand(2, -1, -1)
    free = torch.ones(2, q + k, dtype=torch.bool)
    free[0, q], free[:, -1], free[1, 1] = False, False, False
    A = A * free.unsqueeze(-2)
    M = torch.nn.functional.pad(H, (0, k, 0, k)) * free.unsqueeze(-1) * free.unsqueeze(-2)
    M = M + torch.diag_embed((~free).double())
    whole = torch.cat([torch.cat([M, A.mT], -1), torch.cat([A, torch.zeros(2, m + k, m + k)], -1)], -2)

    def operator(of: Tensor, **known: Any) -> LinearOperator:
        return LinearOperator(lambda v: (of @ v.unsqueeze(-1)).squeeze(-1), of.shape[-1], **known)

    b = gaussian(2 * (q + k + m + k), seed=2).reshape(2, -1)
    b[:, -1] = 0.0  # of a row that fixes an entry
    found = SaddleCholesky().solve(operator(whole, blocks=SaddleBlocks(operator(M), A, free, k)), b)
    torch.testing.assert_close(found.value, torch.linalg.solve(whole, b), rtol=1e-9, atol=1e-9)
    assert float(found.residual.max()) < 1e-9
