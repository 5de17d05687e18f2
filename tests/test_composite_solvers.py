"""Solvers of composite problems: they find the same y, on its manifold, in batches as alone, and what they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from composite_terms import Rows, Simplex
from hypothesis import given, strategies as st
from torch import Tensor

from bilevel import AID, ITD, BilevelProblem, Checkpointed, Constants, Forward, Reverse, Status, hypergradient
from bilevel._inner import AbstractInnerSolver, AbstractUnrollable, Objective
from bilevel.hypergrad.unrolling.form import AbstractUnrolling
from bilevel.prox import L1, LInfBall
from bilevel.solvers import ADMM, CG, FISTA, GMRES, BiCGStab, Dense, NormalCG, PrimalDual, ProximalGradient

DOUBLE = torch.float64
ALL: list[AbstractInnerSolver] = [
    ProximalGradient(tol=1e-11, max_steps=50_000),
    FISTA(tol=1e-11, max_steps=50_000),
    ADMM(tol=1e-11),
    PrimalDual(tol=1e-11, max_steps=50_000),
]


def least_squares(seed: int, n: int = 30, q: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(n, q, generator=generator, dtype=DOUBLE)
    return A, A[:, 0] - A[:, 1] + 0.3 * torch.randn(n, generator=generator, dtype=DOUBLE)


def objective(A: Tensor, b: Tensor, term: Any, codes: bool = True) -> Objective:
    """|A y - b|^2 / 2 + h(y) for one y or for several, one a row."""

    def mapped(method: Any) -> Any:
        def of(v: Tensor, step: Tensor | float) -> Tensor:
            steps = torch.as_tensor(step, dtype=DOUBLE).expand(*v.shape[:-1], 1).squeeze(-1)
            found: Tensor = method(v, steps) if v.dim() == 1 else torch.vmap(method)(v, steps)
            return found

        return of

    return Objective(
        lambda y: ((y @ A.T) - b).square().sum(-1) / 2,
        prox=mapped(term.prox),
        active=mapped(term.active) if codes else None,
    )


TERMS = {
    "L1": L1(1.0),
    "box": LInfBall(0.3),
    "rows": Rows(torch.tensor(2.0, dtype=DOUBLE)),
    "simplex": Simplex(torch.tensor(1.0, dtype=DOUBLE)),
}


def smooth_objective_and(name: str) -> tuple[Objective, int]:
    A, b = least_squares(1)
    if name != "rows":
        return objective(A, b, TERMS[name]), 8

    def prox(v: Tensor, step: Tensor | float) -> Tensor:
        found: Any = TERMS["rows"].prox(v.reshape(4, 2), torch.as_tensor(step, dtype=DOUBLE).squeeze())
        return found.reshape(-1)  # type: ignore[no-any-return]

    return Objective(lambda y: (A @ y - b).square().sum() / 2, prox=prox), 8


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("solver", ALL, ids=lambda each: type(each).__name__)
def test_every_solver_finds_the_fixed_point_of_proximal_steps(solver: AbstractInnerSolver, name: str) -> None:
    problem, q = smooth_objective_and(name)
    found = solver.solve(problem, torch.zeros(q, dtype=DOUBLE))
    assert found.status is Status.successful, found
    y = found.value
    assert problem.prox is not None
    for t in (0.01, 0.3):
        again = problem.prox(y - t * problem.gradient(y), t)
        assert float((again - y).norm()) <= 1e-10 * max(t, 1), (t, again, y)
    expected = ALL[1].solve(problem, torch.zeros(q, dtype=DOUBLE)).value
    assert torch.equal(y == 0, expected == 0)  # what the map sets to zero is zero, and not nearly so
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", ALL, ids=lambda each: type(each).__name__)
def test_rows_of_a_batch_are_independent_problems(solver: AbstractInnerSolver) -> None:
    """One of them solved at the start, and one that is NaN."""
    A, _ = least_squares(2)
    b = torch.stack([least_squares(seed)[1] for seed in (2, 3)] + [torch.zeros(30, dtype=DOUBLE)])
    whole = solver.solve(objective(A, b, L1(1.0)), torch.zeros(3, 8, dtype=DOUBLE))
    for row, target in enumerate(b):
        alone = solver.solve(objective(A, target, L1(1.0)), torch.zeros(8, dtype=DOUBLE))
        torch.testing.assert_close(whole.value[row], alone.value, rtol=0, atol=1e-9)
    b[1, 0] = torch.nan
    lost = solver.solve(objective(A, b, L1(1.0)), torch.zeros(3, 8, dtype=DOUBLE))
    assert [status.name for status in lost.statuses] == ["successful", "nonfinite", "successful"]
    torch.testing.assert_close(lost.value[0], whole.value[0], rtol=0, atol=1e-9)


def test_momentum_with_restarts_takes_some_square_root_of_the_condition_number_of_steps() -> None:
    """Curvatures from 1e-3 to 1: 437 steps; without restarts 3498, without momentum 11508."""
    D = torch.logspace(0, -3, 12, dtype=DOUBLE)
    b = torch.linspace(1, 2, 12, dtype=DOUBLE) * D
    made = Objective(lambda y: (D * y * y).sum(-1) / 2 - (b * y).sum(-1), prox=L1(1e-3).prox)
    found = FISTA(step=1.0, tol=1e-8, max_steps=2000).solve(made, torch.zeros(12, dtype=DOUBLE))
    assert found.status.ok and found.steps < 20 * 1000**0.5


@pytest.mark.parametrize("kind", [ProximalGradient, FISTA, PrimalDual, ADMM])
def test_no_more_steps_are_taken_than_were_allowed(kind: Any) -> None:
    A, b = least_squares(5, q=30)
    short = kind(tol=1e-12, max_steps=7).solve(objective(A, b, L1(0.2)), torch.zeros(30, dtype=DOUBLE))
    assert (short.status, short.steps) == (Status.max_steps, 7)


def test_a_support_that_still_changes_is_waited_for_and_one_that_does_not_is_not() -> None:
    """The codes here change for 20 steps, whatever y does."""
    A, b = least_squares(1)

    def steps(settled: int, restless: bool) -> int:
        seen = [0]

        def active(v: Tensor, step: Tensor | float) -> Tensor:
            seen[0] += 1
            return torch.tensor([min(seen[0], 20) if restless else 0])

        made = Objective(lambda y: (A @ y - b).square().sum() / 2, prox=L1(1.0).prox, active=active)
        found = FISTA(tol=1e-6, max_steps=1000, settled=settled).solve(made, torch.zeros(8, dtype=DOUBLE))
        assert found.status.ok
        return found.steps

    plain = steps(0, restless=False)
    assert steps(3, restless=False) - plain == 3
    assert steps(3, restless=True) - plain >= 20


def test_a_start_that_solves_the_problem_is_left_where_it_is() -> None:
    problem = objective(*least_squares(1), L1(100.0))
    for solver in ALL[:3]:  # the dual variable of the fourth has a way to go
        found = solver.solve(problem, torch.zeros(8, dtype=DOUBLE))
        assert found.status.ok and bool((found.value == 0).all()) and found.steps == 0


FORMS = [Reverse(), Checkpointed(), Forward()]


@pytest.mark.parametrize(("kind", "form"), [(FISTA, form) for form in FORMS] + [(PrimalDual, Reverse())])
def test_the_derivative_of_the_steps_tends_to_the_implicit_one(kind: Any, form: AbstractUnrolling) -> None:
    A, b = least_squares(4, n=40)
    problem = BilevelProblem(
        lambda x, y: y.sum() + y.square().sum(),
        lambda x, y: (A @ y - b).square().sum() / 2 + x[1] * y[0],
        prox=lambda x: L1(x[0].exp()),
    )
    x, y0 = torch.tensor([0.0, 0.3], dtype=DOUBLE), torch.zeros(8, dtype=DOUBLE)
    exact = hypergradient(problem, x, y0, estimator=AID(ALL[1], CG(1e-13)))
    steps = hypergradient(problem, x, y0, estimator=ITD(kind(max_steps=250, tol=None), form))
    torch.testing.assert_close(steps.grad, exact.grad, rtol=1e-8, atol=1e-8)
    solver: AbstractUnrollable = kind(max_steps=2000, tol=1e-8, min_steps=1)
    torch.testing.assert_close(
        hypergradient(problem, x, y0, estimator=ITD(solver, form)).grad, exact.grad, rtol=1e-3, atol=1e-4
    )


def test_the_bound_of_proximal_steps_holds_and_needs_a_step_that_is_known() -> None:
    A, b = least_squares(6)
    eigenvalues = torch.linalg.eigvalsh(A.T @ A)
    mu, L = float(eigenvalues[0]), float(eigenvalues[-1])
    constants, y0 = Constants(mu=mu, L=L), torch.zeros(8, dtype=DOUBLE)
    problem = objective(A, b, L1(1.0))
    exact = ALL[1].solve(problem, y0).value
    distance = float(exact.norm())
    for steps in (1, 10, 50):
        solver = ProximalGradient(step=1 / L, tol=None, max_steps=steps)
        error = float((solver.solve(problem, y0).value - exact).norm())
        bound = solver.solution_bound(constants, distance)
        assert error <= bound <= distance and bound == pytest.approx((1 - mu / L) ** steps * distance)
    for kind in (ProximalGradient, FISTA):
        early = kind(step=1 / L, tol=0.1, max_steps=10_000)
        error = float((early.solve(problem, y0).value - exact).norm())
        assert error <= early.solution_bound(constants, distance) == pytest.approx(0.1 / mu)
        with pytest.raises(ValueError, match="derives its step at run time"):
            kind().solution_bound(constants, distance)
        with pytest.raises(ValueError, match="must be at most"):
            kind(step=2 / L).solution_bound(constants, distance)
    with pytest.raises(ValueError, match="no bound is known"):
        FISTA(step=1 / L, tol=None).solution_bound(constants, distance)


# Linear systems without symmetry


@given(st.integers(0, 500), st.integers(1, 7), st.booleans())
def test_solvers_of_systems_without_symmetry_agree_with_a_factorization(seed: int, n: int, batch: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, n, n) if batch else (n, n)
    A = torch.eye(n, dtype=DOUBLE) + 0.5 * torch.randn(*shape, generator=generator, dtype=DOUBLE) / n**0.5
    b = torch.randn(*shape[:-1], generator=generator, dtype=DOUBLE)
    if float(torch.linalg.cond(A).max()) > 1e3:
        return
    from bilevel._linear import LinearOperator

    operator = LinearOperator(
        lambda v: (A @ v.unsqueeze(-1)).squeeze(-1),
        n,
        symmetric=False,
        transposed_mv=lambda v: (A.mT @ v.unsqueeze(-1)).squeeze(-1),
    )
    exact = torch.linalg.solve(A, b)
    for solver in (NormalCG(1e-12, max_steps=500), GMRES(1e-12), Dense()):
        found = solver.solve(operator, b)
        assert found.status.ok, (solver, found)
        torch.testing.assert_close(found.value, exact, rtol=1e-7, atol=1e-7)
    found = BiCGStab(1e-10, max_steps=500).solve(operator, b)
    true = torch.linalg.vector_norm(b - operator.mv(found.value), dim=-1)
    torch.testing.assert_close(found.residual, true)
    rows = zip(found.statuses, found.residual.reshape(-1), torch.linalg.vector_norm(b, dim=-1).reshape(-1), strict=True)
    for status, residual, size in rows:  # no bound: but what it calls a success is one
        assert status.ok == bool(residual <= 1e-10 * size), (status, residual, size)


def test_the_normal_equations_ask_for_the_transpose_and_a_symmetric_system_has_it() -> None:
    from bilevel._linear import LinearOperator

    A = torch.tensor([[0.0, 2.0], [-1.0, 1.0]], dtype=DOUBLE)
    b = torch.tensor([2.0, 0.0], dtype=DOUBLE)
    with pytest.raises(ValueError, match="`NormalCG` requires products with the transpose"):
        NormalCG().solve(LinearOperator(lambda v: A @ v, 2, symmetric=False), b)
    S = A + A.T
    found = NormalCG(1e-12).solve(LinearOperator(lambda v: S @ v, 2), b)
    torch.testing.assert_close(found.value, torch.linalg.solve(S, b))


def test_singular_systems_end_with_a_status() -> None:
    from bilevel._linear import LinearOperator

    A = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=DOUBLE)
    operator = LinearOperator(lambda v: A @ v, 2, symmetric=False, transposed_mv=lambda v: A.T @ v)
    b = torch.tensor([1.0, 1.0], dtype=DOUBLE)
    for solver in (NormalCG(1e-8), BiCGStab(1e-8)):
        found = solver.solve(operator, b)
        assert not found.status.ok
    torch.testing.assert_close(A @ NormalCG(1e-8).solve(operator, b).value, torch.tensor([1.0, 0.0], dtype=DOUBLE))
