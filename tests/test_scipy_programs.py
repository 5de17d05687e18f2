"""Minimizers of scipy under constraints, as inner solvers: against our own, and closed forms."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import KKT, BilevelProblem, Polytope, Status, hypergradient
from bilevel._inner import AbstractInnerSolver
from bilevel.solvers import SLSQP, InteriorPoint, QuadraticProgram, TrustConstr

pytest.importorskip("scipy")
D = torch.float64
BOTH = pytest.mark.parametrize("solver", [SLSQP(), TrustConstr()], ids=["slsqp", "trust-constr"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def linear(x: Tensor) -> Polytope:
    return Polytope(
        A=torch.ones(1, 5, dtype=D), b=x.sum(), G=normal(3, 5, seed=1), h=x[:3].exp(), lower=-0.6, upper=0.9
    )


def log_cosh(x: Tensor, y: Tensor) -> Tensor:
    return (y - x).cosh().log().sum() + y.square().sum() / 4


@BOTH
def test_linear_constraints_give_the_hypergradient_and_multipliers_of_the_own_solver(
    solver: AbstractInnerSolver,
) -> None:
    problem, x, y0 = (
        BilevelProblem(lambda x, y: (y**3).sum(), log_cosh, constraints=linear),
        normal(5),
        torch.zeros(5).double(),
    )
    ours = hypergradient(problem, x, y0, estimator=KKT(InteriorPoint()))
    theirs = hypergradient(problem, x, y0, estimator=KKT(solver))
    assert torch.allclose(theirs.y, ours.y, rtol=0, atol=1e-11)
    assert torch.allclose(theirs.grad, ours.grad, rtol=0, atol=1e-9)
    assert ours.multipliers is not None and theirs.multipliers is not None
    for name in ("linear_inequalities", "linear_equalities", "lower", "upper"):
        assert torch.allclose(getattr(theirs.multipliers, name), getattr(ours.multipliers, name), atol=1e-9)


@BOTH
def test_nonlinear_constraints_give_the_hypergradient_of_the_own_solver(solver: AbstractInnerSolver) -> None:
    problem = BilevelProblem(
        lambda x, y: (y**3).sum(),
        log_cosh,
        inequalities=lambda x, y: {"ball": y.square().sum() - 0.5, "far": y[0].exp() - 9},
        equalities=lambda x, y: y[1] + y[2] - x[0],
        constraints=lambda x: Polytope(lower=-0.4),
    )
    x, y0 = normal(5) / 2, torch.zeros(5, dtype=D)
    ours, theirs = (hypergradient(problem, x, y0, estimator=KKT(each)) for each in (InteriorPoint(), solver))
    assert torch.allclose(theirs.grad, ours.grad, rtol=0, atol=1e-9)


@BOTH
def test_rows_of_a_batch_are_solved_one_by_one(solver: AbstractInnerSolver) -> None:
    problem = BilevelProblem(
        lambda x, y, t: (y * t).sum(),
        lambda x, y, t: (y - x * t).square().sum(),
        constraints=lambda x, t: Polytope(A=torch.ones(1, 3, dtype=D), b=1.0, lower=0.0),
        tasks=True,
    )
    x, tasks, y0 = torch.ones(3, dtype=D), normal(4, 3, seed=2), torch.zeros(3, dtype=D)
    ours, theirs = (
        hypergradient(problem, x, y0, data=tasks, estimator=KKT(each)) for each in (QuadraticProgram(), solver)
    )
    assert torch.allclose(theirs.y, ours.y, rtol=0, atol=1e-12)
    assert torch.allclose(theirs.grad, ours.grad, rtol=0, atol=1e-12)


@BOTH
def test_what_cannot_be_solved_has_a_status(solver: AbstractInnerSolver) -> None:
    x, y0 = torch.ones(2, dtype=D), torch.zeros(2, dtype=D)

    def status(g, constraints, how: AbstractInnerSolver = solver) -> Status:  # type: ignore[no-untyped-def]
        problem = BilevelProblem(lambda x, y: y.sum(), g, constraints=constraints)
        return hypergradient(problem, x, y0, estimator=KKT(how), throw=False).reports[0].status

    both = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=D)
    kind: Any = type(solver)
    few = kind(max_steps=50)
    assert status(lambda x, y: (y - x).square().sum(), lambda x: Polytope(G=both, h=-1.0), few) is Status.infeasible
    assert status(lambda x, y: -(x * y).sum(), lambda x: Polytope(lower=0.0), few) is Status.unbounded
    no_steps = kind(max_steps=0)
    box = lambda x: Polytope(lower=0.5)  # noqa: E731
    assert status(lambda x, y: (y - x).square().sum() + (y**4).sum(), box, no_steps) in (
        Status.max_steps,
        Status.successful,
    )
    assert status(lambda x, y: (y - x).cosh().sum().log() + (3 - y).exp().sum(), box, kind(tol=0.0)) is Status.stagnated


@BOTH
def test_without_scipy_the_extra_is_named(solver: AbstractInnerSolver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    problem = BilevelProblem(lambda x, y: y.sum(), log_cosh, constraints=linear)
    with pytest.raises(ImportError, match=rf"`{type(solver).__name__}` needs scipy"):
        hypergradient(problem, normal(5), torch.zeros(5, dtype=D), estimator=KKT(solver))


@BOTH
def test_bounds_that_leave_one_point_are_solved_without_a_step(solver: AbstractInnerSolver) -> None:
    """scipy counts no steps there."""
    for upper, status in ((0.0, Status.dependent_constraints), (1.0, Status.successful)):
        problem = BilevelProblem(
            lambda x, y: y.sum(),
            lambda x, y: (y - x).square().sum(),
            constraints=lambda x, upper=upper: Polytope(lower=0.0, upper=upper * x.exp() if upper else x),
        )
        found = hypergradient(
            problem, torch.zeros(1, dtype=D), torch.zeros(1, dtype=D), estimator=KKT(solver), throw=False
        )
        assert found.reports[0].status.ok and abs(float(found.y)) < 1e-9
        assert found.status is status or (upper and found.status is Status.weakly_active)
