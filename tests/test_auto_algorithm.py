"""Steps that nobody tuned: by name, and chosen with the algorithm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_single_loops import OF_F, OF_G, PROBLEM, X, Y, objective, run, solution, split
from torch import Tensor

import bilevel.algorithms.auto as auto
from bilevel import BilevelProblem, FiniteSum, Split, minimize
from bilevel._flat import FlatProblem
from bilevel._tree import ravel
from bilevel.algorithms import available
from bilevel.algorithms.registry import DESCENT
from bilevel.algorithms.sign_steps import RATE, adam_rates
from bilevel.named.setting import Setting

STOCHASTIC = [name for name in available() if name not in (DESCENT, "auto")]
START = float(objective(X, Y, OF_F))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_every_name_goes_downhill_with_its_own_steps(name: str) -> None:
    found = run(name, split(), {"vrbo": 6}.get(name, 20))  # type: ignore[arg-type]
    first = float((X - solution()).norm())
    assert float((found.x - solution()).norm()) < first
    assert found.status.ok


def test_auto_solves_a_finite_sum_to_rounding() -> None:
    found = run("auto", split(), 900)  # type: ignore[arg-type]
    torch.testing.assert_close(found.x, solution(), rtol=0, atol=1e-10)
    assert "SABA" in found.estimate.note and len(found.sweep) == 5


def chosen(problem: BilevelProblem = PROBLEM, data: Any = None, steps: int = 24) -> Any:
    return minimize(problem, X, Y, algorithm="auto", data=split() if data is None else data, max_steps=steps)


def test_without_room_for_tables_it_is_srba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "TABLES", 100)
    note = chosen().estimate.note
    assert "SRBA" in note and "tables would take" in note


class Once(torch.autograd.Function):
    """y -> y, without a second derivative."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.clone()


def _once(y: Tensor) -> Tensor:
    found: Tensor = Once.apply(y)  # type: ignore[no-untyped-call]
    return found


def test_without_a_double_backward_products_are_differences() -> None:
    problem = BilevelProblem(objective, lambda x, y, data: objective(x, _once(y), data))
    found = minimize(problem, X, Y, algorithm="auto", data=split(), max_steps=300)
    assert "SRBA" in found.estimate.note and "differences" in found.estimate.note
    assert float((found.x - solution()).norm()) < 0.1 * float((X - solution()).norm())


def test_on_batches_alone_x_is_stepped_by_adam() -> None:
    loader = [tuple(part[:10] for part in OF_G), tuple(part[9:19] for part in OF_G)]
    found = chosen(data=loader)
    assert "MA-SOBA with Adam: the data are batches only" in found.estimate.note and not found.sweep


def test_where_g_is_not_convex_x_is_stepped_by_adam() -> None:
    problem = BilevelProblem(objective, lambda x, y, data: objective(x, y, data) - 3 * y[0] ** 2 + y[0] ** 4)
    note = chosen(problem).estimate.note
    assert "MA-SOBA" in note and "not convex" in note


def test_on_data_that_are_the_same_at_every_step_it_is_descent() -> None:
    found = chosen(data=Split(f=OF_F, g=OF_G), steps=60)
    torch.testing.assert_close(found.x, solution(), rtol=0, atol=1e-5)
    assert found.history[-1].step <= 60 and not found.sweep


def test_a_problem_to_which_none_applies_is_refused() -> None:
    from bilevel import prox

    problem = BilevelProblem(objective, objective, prox=lambda x, data: prox.L1(0.1))
    with pytest.raises(ValueError, match="non-smooth term"):
        chosen(problem)


def test_the_worst_block_decides_the_step_of_y() -> None:
    scales = torch.ones(16, dtype=torch.float64)
    scales[8:10] = 100.0  # one block of eight
    problem = BilevelProblem(
        lambda x, y, s: (y - 1).square().sum() / 2, lambda x, y, s: s.mean() * (y - x).square().sum() / 2
    )
    one = torch.zeros(1, dtype=torch.float64)
    data = Split(f=FiniteSum(scales, 2), g=FiniteSum(scales, 2))
    found = minimize(problem, one, one, algorithm="saba", data=data, max_steps=1500)
    torch.testing.assert_close(found.x, torch.ones_like(one), rtol=0, atol=1e-3)


@pytest.mark.parametrize("other", [None, "f", "g"])
def test_an_isotropic_g_is_no_network_and_one_batch_is_one_block(other: str | None) -> None:
    all_of_it = torch.zeros(8, dtype=torch.float64)
    sums = FiniteSum(all_of_it, 2)
    data = Split(f=all_of_it if other == "f" else sums, g=all_of_it if other == "g" else sums)
    problem = BilevelProblem(
        lambda x, y, d: (y - 3 - d).square().mean() / 2, lambda x, y, d: (y - x - d).square().mean() / 2
    )
    zero = torch.tensor(0.0, dtype=torch.float64)
    found = minimize(problem, zero, zero, algorithm="auto", data=data, max_steps=400)
    assert "SABA" in found.estimate.note and float(found.x) == pytest.approx(3.0, abs=1e-6)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_no_name_diverges_on_a_quadratic(name: str) -> None:
    zero, data = torch.tensor(0.0, dtype=torch.float64), FiniteSum(torch.zeros(8, dtype=torch.float64), 2)
    problem = BilevelProblem(
        lambda x, y, d: (y - 3 - d).square().mean() / 2, lambda x, y, d: (y - x - d).square().mean() / 2
    )
    found = minimize(problem, zero, zero, algorithm=name, data=data, max_steps={"vrbo": 10}.get(name, 60))
    assert found.status.ok and abs(float(found.x) - 3) < 3


def _rates(f: Any, g: Any, x: Tensor, y: Tensor) -> tuple[float, float]:
    problem = FlatProblem(BilevelProblem(f, g), ravel(x)[1], ravel(y)[1], None)
    return adam_rates(Setting(problem, x, y), 10.0)


def _inner_slope(y: Tensor) -> Tensor:
    at = y.clone().requires_grad_()
    return torch.autograd.grad(objective(X, at, OF_G) + objective(X, at, OF_F) / 10, at)[0]


def test_learning_rates_are_in_the_units_of_x_and_of_y() -> None:
    """Along the signs s of a gradient d a quadratic of curvature B is least after |d|_1 / s'Bs."""

    def g(x: Tensor, y: Tensor) -> Tensor:
        return objective(x, y, OF_G)

    def f(x: Tensor, y: Tensor) -> Tensor:
        return objective(x, y, OF_F)

    d = _inner_slope(Y)
    B = torch.stack([_inner_slope(row) - _inner_slope(0 * Y) for row in torch.eye(len(Y)).double()])
    inner, outer = _rates(f, g, X, Y)
    assert inner == pytest.approx(0.01 * float(d.abs().sum() / (d.sign() @ B @ d.sign())), rel=1e-5)
    for a, c in ((1e3, 1.0), (1e-2, 1e2)):
        scaled = _rates(lambda x, y: f(x / c, y / a), lambda x, y: g(x / c, y / a), X * c, Y)  # noqa: B023  (called at once)
        assert scaled == pytest.approx((a * inner, c * outer), rel=1e-4)


def test_where_there_is_no_curvature_to_go_by_a_learning_rate_is_a_hundredth() -> None:
    """Where g is not convex Phi has none; at a maximum neither has g; and there may be no gradient."""

    def f(x: Tensor, y: Tensor) -> Tensor:
        return objective(x, y, OF_F)

    assert _rates(f, lambda x, y: objective(x, y, OF_G) - 3 * y[0] ** 2 + y[0] ** 4, X, Y)[1] == RATE
    assert _rates(f, lambda x, y: -objective(x, y, OF_G), X, Y) == (RATE, RATE)
    assert _rates(lambda _, y: 0 * y.sum(), lambda _, y: y.square().sum(), X, Y) == (RATE, RATE)
