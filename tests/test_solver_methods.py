"""What a solver or an estimator can be given is said by its methods; what says nothing is taken to have none of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import pytest
import torch
from torch import Tensor

from bilevel import (
    AID,
    ESJ,
    ITD,
    AbstractEstimator,
    AbstractInnerSolver,
    AbstractLinearSolver,
    AbstractOptimizer,
    LinearOperator,
    Solved,
    Status,
    hypergradient,
)
from bilevel._inner import Objective
from bilevel._numerics.quasi_newton import Pairs, Recycled
from bilevel.few_shot.adapt import with_steps
from bilevel.named.auto import Chosen
from bilevel.problems.quadratic import quadratic
from bilevel.solvers import (
    CG,
    GMRES,
    LBFGS,
    MINRES,
    Adam,
    Clipped,
    ClosedForm,
    Dense,
    GradientDescent,
    HeavyBall,
    Iterate,
    Nesterov,
    Neumann,
    Newton,
    Nystrom,
    QuadraticProgram,
    Scheduled,
    TorchOptim,
)

INSTANCE = quadratic(p=3, q=5, cross=1.0, seed=1)


@final
@dataclass(frozen=True)
class Mine(AbstractInnerSolver):
    """A user's solver that says nothing, although it has fields with telling names."""

    tol: float = 1e-10
    max_steps: int = 1

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        assert (self.tol, self.max_steps) == (1e-10, 1), "what says nothing is left as it is"
        return Newton(tol=self.tol, linear=Dense()).solve(objective, y0)


@final
@dataclass(frozen=True)
class MyLinear(AbstractLinearSolver):
    """The same."""

    rtol: float = 1e-10
    preconditioner: None = None

    def solve(self, operator: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Solved:
        assert self.rtol == 1e-10, "what says nothing is left as it is"
        return Dense().solve(operator, b, guess)


def operator(n: int) -> LinearOperator:
    diagonal = torch.linspace(1, 10, n, dtype=torch.float64)
    return LinearOperator(lambda v: diagonal * v, n, positive_definite=True)


ITERATIONS: list[AbstractInnerSolver] = [
    LBFGS(),
    Newton(),
    Iterate(GradientDescent(), max_steps=5000, min_steps=3),
    Iterate(GradientDescent(), max_steps=5000, tol=1e-3),
]


@pytest.mark.parametrize("solver", ITERATIONS, ids=repr)
@pytest.mark.parametrize("tol", [1e-1, 1e-4])
def test_an_inner_solver_with_a_tolerance_meets_it_and_stops_there(solver: AbstractInnerSolver, tol: float) -> None:
    diagonal = torch.linspace(1, 10, 8, dtype=torch.float64)
    objective = Objective(lambda y: (diagonal * (y - 1).square()).sum(-1) / 2)
    changed = solver.with_tolerance(tol)
    assert changed is not None
    found = changed.solve(objective, torch.zeros(8, dtype=torch.float64))
    tight = solver.with_tolerance(1e-12)
    assert tight is not None
    assert float(found.residual) <= tol
    assert found.steps < tight.solve(objective, torch.zeros(8, dtype=torch.float64)).steps


@pytest.mark.parametrize("solver", [*ITERATIONS, QuadraticProgram()], ids=repr)
def test_an_iteration_takes_as_many_steps_as_it_is_told(solver: AbstractInnerSolver) -> None:
    objective = Objective(lambda y: (y - 1).square().square().sum(-1) + (y - 1).square().sum(-1))
    changed = solver.with_steps(2)
    assert changed is not None
    assert changed.solve(objective, torch.full((2,), 9.0, dtype=torch.float64)).steps <= 2 * 20  # models of a program
    if not isinstance(solver, QuadraticProgram):
        assert changed.solve(objective, torch.full((2,), 9.0, dtype=torch.float64)).steps == 2


@pytest.mark.parametrize("solver", [CG(), MINRES(), GMRES(), Neumann(step=None, terms=5000)], ids=repr)
@pytest.mark.parametrize("tol", [1e-1, 1e-3])
def test_a_linear_solver_with_a_tolerance_meets_it_and_stops_there(solver: AbstractLinearSolver, tol: float) -> None:
    b = torch.linspace(-3, 4, 12, dtype=torch.float64)
    size = float(b.norm())
    changed, tight = solver.with_tolerance(tol, size), solver.with_tolerance(1e-11, size)
    assert changed is not None and tight is not None
    found = changed.solve(operator(12), b)
    assert float(found.residual) <= tol
    assert found.steps < tight.solve(operator(12), b).steps


def test_a_solver_that_may_trust_its_recurrence_saves_the_last_product() -> None:
    calls = []

    def mv(v: Tensor) -> Tensor:
        calls.append(0)
        return torch.linspace(1, 10, 12, dtype=torch.float64) * v

    b = torch.linspace(-3, 4, 12, dtype=torch.float64)
    spent = []
    for trusting in (False, True):
        calls.clear()
        CG().with_tolerance(1e-6, 1.0, trusting).solve(LinearOperator(mv, 12, positive_definite=True), b)
        spent.append(len(calls))
    assert spent[1] == spent[0] - 1


def test_a_solver_without_a_tolerance_says_so() -> None:
    for inner in (ClosedForm(lambda x: x), Mine()):
        assert inner.with_tolerance(1e-3) is None
        assert inner.with_steps(3) is None
    for linear in (Dense(), Nystrom(rank=2), MyLinear()):
        assert linear.with_tolerance(1e-3, 1.0) is None
        assert linear.with_preconditioner(Recycled(Pairs(2, torch.zeros(1, 2)))) is None


def test_certified_accuracy_uses_solvers_that_say_nothing_as_they_are() -> None:
    aid = AID(Mine(), MyLinear(), target_error=1e-6, constants=INSTANCE.constants)
    found = hypergradient(INSTANCE.problem, INSTANCE.x0, INSTANCE.y0, estimator=aid)
    assert found.bound is not None and found.bound <= 1e-6
    assert INSTANCE.gradient is not None
    assert float((found.grad - INSTANCE.gradient(INSTANCE.x0)).norm()) <= 1e-6
    warm = hypergradient(INSTANCE.problem, INSTANCE.x0 + 1.0, INSTANCE.y0, estimator=aid, start=found.start)
    assert warm.status is Status.successful


def test_adaptation_refuses_a_number_of_steps_for_a_solver_that_says_nothing_of_them() -> None:
    with pytest.raises(ValueError, match="This one uses Mine, which has no `with_steps`: leave it out"):
        with_steps(Mine(), 3)
    with pytest.raises(ValueError, match="must be at least 0"):
        with_steps(LBFGS(), -1)
    assert with_steps(LBFGS(), 3) == LBFGS(max_steps=3)
    iterate = Iterate(GradientDescent(0.1), max_steps=9, tol=1e-3, min_steps=4)
    assert with_steps(iterate, 2) == Iterate(GradientDescent(0.1), max_steps=2, tol=1e-3)


def test_an_estimator_that_draws_random_numbers_takes_a_seed_and_no_other_does() -> None:
    inner = Iterate(GradientDescent(0.1), max_steps=3)
    assert ESJ(inner).with_seed(7) == ESJ(inner, seed=7)
    assert ITD(inner).with_seed(7) is None
    assert AID(inner, CG()).with_seed(7) is None
    assert Chosen(ESJ(inner), "why").with_seed(7) == Chosen(ESJ(inner, seed=7), "why")
    estimators: list[AbstractEstimator] = [ITD(inner), AID(inner, CG())]
    assert all(Chosen(estimator, "why").with_seed(7) is None for estimator in estimators)


@pytest.mark.parametrize(
    "optimizer",
    [
        GradientDescent(1.0),
        HeavyBall(1.0, 0.5),
        Nesterov(1.0),
        Adam(1.0, beta1=0.5),
        Clipped(Adam(1.0), max_norm=1.0),
        Scheduled(GradientDescent(1.0), lambda k: 0.5**k),
    ],
    ids=lambda optimizer: type(optimizer).__name__,
)
def test_an_optimizer_with_another_step_length_moves_in_proportion(optimizer: AbstractOptimizer) -> None:
    changed: Any = optimizer.with_step(0.25)
    point, gradient = torch.zeros(2, dtype=torch.float64), torch.tensor([3.0, -4.0], dtype=torch.float64)
    whole, _ = optimizer.step(gradient, point, optimizer.init(point))
    quarter, _ = changed.step(gradient, point, changed.init(point))
    torch.testing.assert_close(quarter, whole / 4)
    assert type(changed) is type(optimizer)


def test_an_optimizer_without_a_step_length_of_its_own_says_so() -> None:
    sgd = TorchOptim(lambda params: torch.optim.SGD(params, lr=0.1))
    assert sgd.with_step(0.5) is None
    assert Clipped(sgd, max_norm=1.0).with_step(0.5) is None
    assert Scheduled(sgd, lambda k: 1.0).with_step(0.5) is None
