"""What is asked of f and g at the first estimate: derivatives that are lost, functions that are none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import (
    AID,
    ESJ,
    ITD,
    BilevelError,
    BilevelProblem,
    Checkpointed,
    FiniteDifferences,
    Penalty,
    Polytope,
    Status,
    compare,
    hypergradient,
    hyperobjective,
    minimize,
    prox,
)
from bilevel._numerics.graphs import leads_to
from bilevel.algorithms import SOBA
from bilevel.hypergrad import FiniteDifference, FirstOrder
from bilevel.inner_problems import Iteration
from bilevel.solvers import CG, LBFGS, Adam, Dense, GradientDescent, Iterate, OwnSteps, ProximalGradient

X = torch.tensor([0.5, -0.3], dtype=torch.float64)
Y0 = torch.zeros(2, dtype=torch.float64)
STEPS = Iterate(GradientDescent(0.3), max_steps=60)
ESTIMATORS = {
    "aid": AID(LBFGS(tol=1e-10), CG(rtol=1e-10)),
    "aid-differences": AID(LBFGS(tol=1e-8), CG(rtol=1e-8), products=FiniteDifferences()),
    "itd": ITD(STEPS),
    "penalty": Penalty(LBFGS(tol=1e-10), weight=1e4),
    "esj": ESJ(STEPS, directions=2),
    "differences": FiniteDifference(LBFGS(tol=1e-10)),
}
DIFFERENTIATING = ("aid", "aid-differences", "itd", "penalty")  # what x does to g is differentiated
every = pytest.mark.parametrize("name", ESTIMATORS)


def f(x: Tensor, y: Tensor) -> Tensor:
    return (y - 3).square().sum() / 2


def g(x: Tensor, y: Tensor) -> Tensor:
    return (y - x).square().sum() / 2


def no_grad(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def called(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            return function(x, y)

    return called


def numpy_sum(v: Tensor) -> Tensor:
    return torch.as_tensor(v.detach().numpy().sum())


def estimate(problem: BilevelProblem, name: str, **keywords: Any) -> Any:
    return hypergradient(problem, X, Y0, estimator=ESTIMATORS[name], **keywords)


# -- f --------------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize(
    "cut",
    [
        lambda x, y: f(x, y.detach()),
        lambda x, y: f(x, y.data),
        lambda x, y: torch.tensor(f(x, y).item(), dtype=torch.float64),
        lambda x, y: numpy_sum((y - 3) ** 2) / 2,
        no_grad(f),
        lambda x, y: f(x, y.detach()) + x.sum(),  # a graph, but not from y
    ],
)
def test_an_f_whose_derivative_in_y_is_lost_is_refused_by_name(name: str, cut: Callable[..., Tensor]) -> None:
    if name == "differences":
        values = (cut(X, X + 1e-4) - cut(X, X - 1e-4)) / 2e-4  # it sees values only: what it gives is right
        found = estimate(BilevelProblem(cut, g), name)
        assert math.isfinite(float(values)) and found.status.ok and bool((found.grad != 0).all())
        return
    with pytest.raises(ValueError, match="f changes with y, but no path"):
        estimate(BilevelProblem(cut, g), name)


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "differences"])
def test_an_f_whose_derivative_in_x_is_lost_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match="f changes with x, but no path"):
        estimate(BilevelProblem(lambda x, y: f(x, y) + x.data.square().sum(), g), name)


@every
def test_an_f_of_x_alone_succeeds(name: str) -> None:
    found = estimate(BilevelProblem(lambda x, y: x.square().sum(), g), name)
    assert found.status.ok
    torch.testing.assert_close(found.grad, 2 * X, rtol=1e-6, atol=1e-6)


@every
def test_a_zero_of_numbers_succeeds(name: str) -> None:
    zeros = [
        BilevelProblem(lambda x, y: 0 * y.sum(), g),
        BilevelProblem(lambda x, y: (y - X).square().sum(), g),  # f is least at y*
        BilevelProblem(f, lambda x, y: (y - 0 * x).square().sum()),
        BilevelProblem(f, lambda x, y: (y - torch.relu(x - 9)).square().sum()),
    ]
    for problem in zeros:
        found = estimate(problem, name)
        assert found.status.ok and float(found.grad.abs().max()) < 1e-6


# -- g --------------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("cut", [lambda x, y: g(x, y.detach()), no_grad(g), lambda x, y: g(x, y.detach()) + x.sum()])
def test_a_g_whose_derivative_in_y_is_lost_is_refused_by_name(name: str, cut: Callable[..., Tensor]) -> None:
    for problem in (BilevelProblem(f, cut), BilevelProblem(f, cut, init=lambda x: x)):
        if problem.init is not None and name not in ("itd", "esj"):
            continue
        with pytest.raises(ValueError, match="g changes with y, but no path") as caught:
            estimate(problem, name)
        assert "negative curvature" not in str(caught.value)


@every
def test_a_g_that_does_not_depend_on_y_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="g does not depend on y"):
        estimate(BilevelProblem(f, lambda x, y: x.square().sum()), name)


@pytest.mark.parametrize("name", DIFFERENTIATING)
@pytest.mark.parametrize(
    "cut",
    [
        lambda x, y: g(x.detach(), y),
        lambda x, y: g(x.data, y),
        lambda x, y: g(x.detach(), y) + x.square().sum(),  # x is in the graph of g, and not in that of its gradient
        lambda x, y: float(x.detach().sum()) * y.sum() + y.square().sum(),
    ],
)
@pytest.mark.parametrize("outer", [f, lambda x, y: f(x, y) + x.sum()])
def test_a_g_whose_derivative_in_x_is_lost_is_refused_by_name(
    name: str, cut: Callable[..., Tensor], outer: Callable[..., Tensor]
) -> None:
    with pytest.raises(ValueError, match="grad_y g changes with x, but no path") as caught:
        estimate(BilevelProblem(outer, cut), name)
    assert "negative curvature" not in str(caught.value)


@pytest.mark.parametrize("name", ["esj", "differences"])
def test_values_are_enough_for_estimators_that_take_no_derivative_of_g_in_x(name: str) -> None:
    found = estimate(BilevelProblem(f, lambda x, y: g(x.detach(), y)), name)
    torch.testing.assert_close(found.grad, X - 3, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DIFFERENTIATING)
def test_a_number_of_x_in_g_that_does_not_move_y_is_harmless(name: str) -> None:
    found = estimate(
        BilevelProblem(lambda x, y: f(x, y) + x.sum(), lambda x, y: y.square().sum() + x.detach().sum().item()), name
    )
    assert found.status.ok
    torch.testing.assert_close(found.grad, torch.ones_like(X))


# -- structural zeros -----------------------------------------------------------------------------------------------


@every
def test_an_x_that_occurs_nowhere_is_refused_unless_it_is_allowed(name: str) -> None:
    with pytest.raises(ValueError, match="no path of any graph leads from x through f or g"):
        estimate(BilevelProblem(f, lambda x, y: (y - 1).square().sum()), name)
    allowed = BilevelProblem(f, lambda x, y: (y - 1).square().sum(), allow_unused=True)
    found = estimate(allowed, name)
    assert found.status.ok and not found.grad.any()


@every
def test_a_captured_x_is_refused_by_name(name: str) -> None:
    x = X.clone().requires_grad_()
    for problem in (
        BilevelProblem(f, lambda _, y: (y - x).square().sum()),
        BilevelProblem(lambda z, y: f(z, y) + z.sum(), lambda _, y: (y - x).square().sum()),
    ):
        with pytest.raises(ValueError, match="g uses the tensor that was passed as x from around it"):
            hypergradient(problem, x, Y0, estimator=ESTIMATORS[name])
    with pytest.raises(ValueError, match="f uses the tensor that was passed as x from around it"):
        hypergradient(BilevelProblem(lambda _, y: (y * x).sum(), g), x, Y0, estimator=ESTIMATORS[name])


@every
def test_a_captured_start_beside_the_argument_is_right(name: str) -> None:
    anchored = BilevelProblem(
        lambda x, y: f(x, y) + (x - X).square().sum(), lambda x, y: g(x, y) + (y - X).square().sum()
    )
    found = hypergradient(anchored, X, Y0, estimator=ESTIMATORS[name])
    torch.testing.assert_close(found.grad, (X - 3) / 3, rtol=1e-3, atol=1e-4)


def test_x_in_the_start_alone_is_right_where_the_start_counts_and_refused_elsewhere() -> None:
    problem = BilevelProblem(f, lambda x, y: (y - 1).square().sum() / 2, init=lambda x: x)
    few = Iterate(GradientDescent(0.3), max_steps=3)
    for estimator in (ITD(few), ESJ(few, directions=2)):
        found = hypergradient(problem, X, Y0, estimator=estimator)
        torch.testing.assert_close(found.grad, 0.7**3 * (0.7**3 * (X - 1) + 1 - 3))
    first = hypergradient(problem, X, Y0, estimator=FirstOrder(Iterate(GradientDescent(0.3), max_steps=1)))
    torch.testing.assert_close(first.grad, 0.7 * X + 0.3 - 3)
    for name in ("aid", "penalty"):
        with pytest.raises(ValueError, match="only through its start"):
            estimate(problem, name)


def test_first_order_without_a_start_in_x_is_refused_though_f_depends_on_x() -> None:
    for outer in (f, lambda x, y: f(x, y) + x.sum()):
        with pytest.raises(ValueError, match="the start of y does not depend on x"):
            hypergradient(BilevelProblem(outer, g), X, Y0, estimator="first-order")


def test_x_in_the_step_alone_is_right_and_detached_there_refused() -> None:
    def problem(step: Callable[..., Tensor]) -> BilevelProblem:
        return BilevelProblem(lambda x, y: y.sum(), inner=Iteration(step, steps=2))

    def right(x: Tensor, y: Tensor, k: int) -> Tensor:
        return x * y

    ones = torch.ones_like(X)
    found = hypergradient(problem(right), X, ones, estimator=ITD(OwnSteps()))
    torch.testing.assert_close(found.grad, 2 * X)
    with pytest.raises(ValueError, match="step changes with x, but no path"):
        hypergradient(problem(lambda x, y, k: right(x.detach(), y, k)), X, ones, estimator=ITD(OwnSteps()))
    with pytest.raises(ValueError, match="no path of any graph leads from x"):
        hypergradient(problem(lambda x, y, k: y / 2), X, ones, estimator=ITD(OwnSteps()))


def test_x_in_the_proximal_map_or_the_constraints_alone_is_right_and_detached_there_refused() -> None:
    def lasso(level: Callable[[Tensor], Tensor]) -> BilevelProblem:
        return BilevelProblem(f, lambda x, y: (y - 2).square().sum() / 2, prox=lambda x: prox.L1(level(x)))

    def bounded(level: Callable[[Tensor], Tensor]) -> BilevelProblem:
        return BilevelProblem(
            f, lambda x, y: (y - 2).square().sum() / 2, constraints=lambda x: Polytope(upper=level(x))
        )

    proximal = AID(ProximalGradient(tol=1e-10), CG(rtol=1e-10))
    at = torch.tensor(0.5, dtype=torch.float64)
    found = hypergradient(lasso(lambda x: x), at, Y0, estimator=proximal)
    torch.testing.assert_close(found.grad, torch.tensor(3.0, dtype=torch.float64))  # y* = 2 - x
    with pytest.raises(ValueError, match="prox changes with x, but no path"):
        hypergradient(lasso(lambda x: x.detach()), at, Y0, estimator=proximal)
    found = hypergradient(bounded(lambda x: x), X, Y0, estimator="kkt")
    torch.testing.assert_close(found.grad, X - 3)  # y* = x
    with pytest.raises(ValueError, match="constraints changes with x, but no path"):
        hypergradient(bounded(lambda x: x.detach()), X, Y0, estimator="kkt")


# -- functions that are none ----------------------------------------------------------------------------------------


class Drifting:
    """Another value at each call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> float:
        self.calls += 1
        return 1 + 0.01 * self.calls


@every
@pytest.mark.parametrize("where", ["f", "g"])
@pytest.mark.parametrize("how", ["noise", "state"])
def test_a_function_that_changes_from_call_to_call_is_not_successful(name: str, where: str, how: str) -> None:
    drift = Drifting()

    def factor() -> Any:
        return 1 + 0.1 * torch.rand((), dtype=torch.float64) if how == "noise" else drift()

    problem = BilevelProblem(
        (lambda x, y: factor() * f(x, y)) if where == "f" else f,
        (lambda x, y: g(x, factor() * y)) if where == "g" else g,
    )
    found = estimate(problem, name, throw=False)
    assert found.status is Status.not_repeatable
    assert found.message.startswith(f"{where}, which gave") and "`data=`" in found.message
    assert "curvature" not in found.message
    with pytest.raises(BilevelError, match=f"{where}, which gave"):
        estimate(problem, name)


@every
def test_noise_that_multiplies_a_zero_is_seen(name: str) -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    noisy = BilevelProblem(f, lambda x, y: (y * (1 + 0.2 * torch.rand((), dtype=torch.float64)) - x).square().sum())
    found = hypergradient(noisy, zero, zero, estimator=ESTIMATORS[name], throw=False)  # y* = 0 whatever the factor is
    assert found.status is Status.not_repeatable


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_steps_that_are_taken_again_are_taken_however_g_changes(seed: int) -> None:
    """The second time their residuals may be below the tolerance."""
    torch.manual_seed(seed)
    noisy = BilevelProblem(f, lambda x, y: (1 + 3 * torch.rand((), dtype=torch.float64)) * g(x, y))
    inner = Iterate(GradientDescent(0.05), max_steps=100, tol=0.3)
    found = hypergradient(noisy, X, Y0, estimator=ITD(inner, Checkpointed()), throw=False)
    assert found.status is Status.not_repeatable and found.stats.inner_steps > 4


def test_a_fixed_mask_and_a_batch_are_repeatable() -> None:
    mask = (torch.rand(2) > 0.5).double() + 0.5
    problem = BilevelProblem(lambda x, y, b: f(x, mask * y) + b, lambda x, y, b: g(x, mask * y) + b)
    found = hypergradient(problem, X, Y0, estimator="aid-cg", data=torch.rand((), dtype=torch.float64))
    assert found.status.ok


# -- entry points ---------------------------------------------------------------------------------------------------


def test_every_entry_point_looks_first() -> None:
    lost = BilevelProblem(lambda x, y: f(x, y) + x.sum(), lambda x, y: g(x.detach(), y))
    with pytest.raises(ValueError, match="grad_y g changes with x"):
        minimize(lost, X, Y0, max_steps=2)
    with pytest.raises(ValueError, match="grad_y g changes with x"):
        hyperobjective(lost, Y0)(X)
    with pytest.raises(ValueError, match="grad_y g changes with x"):
        minimize(lost, X, Y0, algorithm=SOBA(0.1, 0.1), max_steps=2)
    rows = compare(lost, X, Y0, estimators=["aid-cg", "itd", "finite-difference"]).rows
    assert [row.name for row in rows if row.applies] == ["finite-difference"]


def test_algorithms_look_first_too() -> None:
    unused = BilevelProblem(f, lambda x, y: (y - 1).square().sum())
    with pytest.raises(ValueError, match="no path of any graph"):
        minimize(unused, X, Y0, algorithm=SOBA(0.1, 0.1), max_steps=2)
    noisy = BilevelProblem(f, lambda x, y: (1 + 0.1 * torch.rand((), dtype=torch.float64)) * g(x, y))
    found = minimize(noisy, X, Y0, algorithm=SOBA(0.1, 0.1), max_steps=2, throw=False)
    assert found.status is Status.not_repeatable
    assert minimize(BilevelProblem(f, g), X, Y0, algorithm=SOBA(0.1, 0.1), max_steps=2).status.ok


def test_later_estimates_are_not_looked_at_again() -> None:
    calls = []

    def counted(x: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        return f(x, y)

    problem = BilevelProblem(counted, g)
    first = hypergradient(problem, X, Y0, estimator=ESTIMATORS["aid"])
    looked = len(calls)
    hypergradient(problem, X, Y0, estimator=ESTIMATORS["aid"], start=first.start)
    assert looked == 5 and len(calls) - looked == 1  # f does not see x: a fourth evaluation of the look
    minimize(problem, X, Y0, estimator=ESTIMATORS["aid"], outer=Adam(0.1), max_steps=5)
    assert len(calls) - looked == 1 + 4 + 6


def test_tasks_are_looked_at_side_by_side() -> None:
    data = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    tasks = BilevelProblem(lambda x, y, t: f(x, y), lambda x, y, t: g(x.detach() + t, y), tasks=True)
    for chunk_size in (None, 1):
        with pytest.raises(ValueError, match="grad_y g changes with x"):
            hypergradient(tasks, X, Y0, estimator=AID(LBFGS(), Dense()), data=data, chunk_size=chunk_size)
    right = BilevelProblem(lambda x, y, t: f(x, y), lambda x, y, t: g(x + t, y), tasks=True)
    found = hypergradient(right, X, Y0, estimator=AID(LBFGS(), Dense()), data=data)
    torch.testing.assert_close(found.grad, X + 1.5 - 3)


def test_a_leaf_of_a_subclass_is_seen_in_a_graph() -> None:
    marked: Any = type("Marked", (torch.Tensor,), {})
    x: Tensor = torch.ones(2).as_subclass(marked).clone().requires_grad_()
    y: Tensor = torch.ones(2).as_subclass(marked).clone().requires_grad_()
    assert leads_to((x * y.detach()).sum(), x, y) == [True, False]
