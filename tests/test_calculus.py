"""Derivatives of flat problems: against dense ones, in batches against loops, counted, and cached correctly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from bilevel import BilevelProblem, Exact, FiniteDifferences, Split, Stats, ravel
from bilevel._calculus import AbstractProducts, grad, inner_gradient_in_x, outer_gradients
from bilevel._flat import FlatProblem
from bilevel._result import Tally

jacobian: Callable[..., Any] = torch.autograd.functional.jacobian
hessian: Callable[..., Any] = torch.autograd.functional.hessian


@dataclass
class Case:
    """Objectives over some structures, and a point."""

    f: Callable[[Any, Any], Tensor]
    g: Callable[[Any, Any], Tensor]
    x: Any
    y: Any

    def flat(self) -> tuple[FlatProblem, Tensor, Tensor]:
        (x, x_structure), (y, y_structure) = ravel(self.x), ravel(self.y)
        return FlatProblem(BilevelProblem(self.f, self.g), x_structure, y_structure), x, y


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


A = normal(4, 3)
CASES = {
    "vectors": Case(
        lambda x, y: (A @ y).sin() @ x + (x * x).sum(),
        lambda x, y: (A @ y).cosh().log() @ x.exp() + y.square().sum(),
        normal(4, seed=1),
        normal(3, seed=2),
    ),
    "numbers": Case(lambda x, y: x * y.sin(), lambda x, y: (x * y).exp() + y**4, torch.tensor(0.3), torch.tensor(-0.7)),
    "dicts of matrices and numbers": Case(
        lambda x, y: (y["w"] @ x["a"]).tanh().sum() * y["b"],
        lambda x, y: (y["w"] @ x["a"]).exp().sum() + (y["b"] * x["c"]).sin() * y["w"].square().sum(),
        {"c": torch.tensor(0.5), "a": normal(2, 3, seed=3)},
        {"w": normal(3, 2, seed=4), "b": torch.tensor(1.5)},
    ),
    "lists": Case(
        lambda x, y: torch.stack([(a * b.sum()).sum() for a, b in zip(x, y, strict=True)]).sum() ** 2,
        lambda x, y: torch.stack([(b.square() * a.exp()).sum() ** 2 for a, b in zip(x, y, strict=True)]).sum(),
        [normal(2, seed=5), torch.tensor(0.2)],
        (normal(3, 2, seed=6), normal(1, seed=7)),
    ),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
PRODUCTS = [(Exact(), 1e-12), (FiniteDifferences(), 1e-8)]
products = pytest.mark.parametrize(("products", "error"), PRODUCTS, ids=["exact", "finite differences"])


def columns(operator: Callable[[Tensor], Tensor | None], like: Tensor) -> Tensor:
    found = [operator(unit) for unit in torch.eye(like.numel())]
    return torch.stack([column for column in found if column is not None], dim=-1)


# Against dense derivatives


@cases
@products
def test_products_are_columns_of_the_dense_derivatives(case: Case, products: AbstractProducts, error: float) -> None:
    flat, x, y = case.flat()
    at = products.linearize(flat, x, y)
    gradient = jacobian(lambda y: flat.g(x, y), y)
    H = hessian(lambda y: flat.g(x, y), y)
    G = jacobian(lambda x: jacobian(lambda y: flat.g(x, y), y, create_graph=True), x).T
    torch.testing.assert_close(at.gradient, gradient, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(columns(at.operator.mv, y), H, rtol=error, atol=error * float(H.norm()))
    torch.testing.assert_close(columns(at.cross, y), G, rtol=error, atol=error * float(1 + G.norm() + H.norm()))
    assert torch.equal(at.y, y)
    assert not any(t.requires_grad for t in (at.y, at.gradient, at.operator.mv(y), at.cross(y)))  # type: ignore[union-attr]


@cases
def test_outer_gradients_are_the_dense_ones(case: Case) -> None:
    flat, x, y = case.flat()
    value, fx, fy = outer_gradients(flat, x, y)
    torch.testing.assert_close(value, flat.f(x, y))
    torch.testing.assert_close(fx, jacobian(lambda x: flat.f(x, y), x))
    torch.testing.assert_close(fy, jacobian(lambda y: flat.f(x, y), y))
    assert not any(t.requires_grad for t in (value, fx, fy))


@cases
def test_inner_gradient_in_x_is_the_dense_one(case: Case) -> None:
    flat, x, y = case.flat()
    torch.testing.assert_close(inner_gradient_in_x(flat, x, y), jacobian(lambda x: flat.g(x, y), x))


@given(st.floats(-2, 2), st.floats(-2, 2))
def test_finite_differences_are_exact_on_quadratics_up_to_rounding(a: float, b: float) -> None:
    flat, x, y = Case(
        lambda x, y: y.sum(),
        lambda x, y: a * y.square().sum() + b * y.sum() ** 2 + (x * y).sum(),
        normal(3, seed=1),
        normal(3, seed=2),
    ).flat()
    v = normal(3, seed=3)
    at = FiniteDifferences().linearize(flat, x, y)
    torch.testing.assert_close(at.operator.mv(v), 2 * a * v + 2 * b * v.sum(), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(at.cross(v), v, rtol=1e-8, atol=1e-9)


def test_the_error_of_finite_differences_is_quadratic_in_the_step() -> None:
    flat, x, y = CASES["vectors"].flat()
    v = normal(3, seed=3)
    exact = Exact().linearize(flat, x, y).operator.mv(v)
    errors = [float((FiniteDifferences(t).linearize(flat, x, y).operator.mv(v) - exact).norm()) for t in (1e-2, 5e-3)]
    assert 3.8 < errors[0] / errors[1] < 4.2


def test_finite_differences_do_not_depend_on_the_length_of_the_vector() -> None:
    flat, x, y = CASES["vectors"].flat()
    v, at = normal(3, seed=3), FiniteDifferences().linearize(flat, x, y)
    for scale in (1e-12, 1e12):
        torch.testing.assert_close(at.operator.mv(scale * v) / scale, at.operator.mv(v), rtol=1e-6, atol=1e-8)


@products
def test_the_product_with_zero_is_zero(products: AbstractProducts, error: float) -> None:
    flat, x, y = CASES["vectors"].flat()
    at = products.linearize(flat, x, y)
    assert torch.equal(at.operator.mv(torch.zeros(3)), torch.zeros(3))
    assert torch.equal(at.cross(torch.zeros(3)), torch.zeros(4))  # type: ignore[arg-type]


# What a function does not depend on


def test_gradient_of_what_does_not_depend_is_zero() -> None:
    leaf = torch.ones(2, requires_grad=True)
    assert torch.equal(grad(torch.tensor(1.0), leaf), torch.zeros(2))
    assert torch.equal(grad(torch.ones(1, requires_grad=True).sum(), leaf), torch.zeros(2))


@pytest.mark.parametrize(
    ("f", "in_x", "in_y"),
    [
        (lambda x, y: y.square().sum(), 0.0, 2.0),
        (lambda x, y: 3 * x.sum(), 3.0, 0.0),
        (lambda x, y: torch.tensor(5.0), 0.0, 0.0),
    ],
)
def test_outer_gradients_are_zero_where_f_does_not_depend(f: Any, in_x: float, in_y: float) -> None:
    flat, x, y = Case(f, lambda x, y: y.sum(), torch.ones(2), torch.ones(3)).flat()
    value, fx, fy = outer_gradients(flat, x, y)
    assert torch.equal(fx, torch.full((2,), in_x))
    assert torch.equal(fy, torch.full((3,), in_y))
    assert float(value) == float(f(x, y))


@products
def test_an_inner_objective_linear_in_y_has_hessian_zero(products: AbstractProducts, error: float) -> None:
    flat, x, y = Case(lambda x, y: y.sum(), lambda x, y: (x.exp() * y).sum(), normal(3), normal(3, seed=1)).flat()
    at, v = products.linearize(flat, x, y), normal(3, seed=2)
    torch.testing.assert_close(at.operator.mv(v), torch.zeros(3), rtol=0, atol=error)
    torch.testing.assert_close(at.cross(v), x.exp() * v, rtol=error * 10, atol=error)


@products
def test_an_inner_objective_that_ignores_x_has_no_cross_product(products: AbstractProducts, error: float) -> None:
    flat, x, y = Case(lambda x, y: y.sum(), lambda x, y: y.square().sum(), normal(3), normal(3, seed=1)).flat()
    at = products.linearize(flat, x, y)
    assert at.cross(y) is None
    torch.testing.assert_close(at.operator.mv(y), 2 * y, rtol=error * 10, atol=error)
    assert inner_gradient_in_x(flat, x, y) is None


def test_a_constant_or_linear_inner_objective_without_x_is_flat() -> None:
    for g in (lambda x, y: torch.tensor(1.0), lambda x, y: y.sum()):
        flat, x, y = Case(lambda x, y: y.sum(), g, normal(3), normal(3, seed=1)).flat()
        at = Exact().linearize(flat, x, y)
        assert torch.equal(at.operator.mv(y), torch.zeros(3))
        assert at.cross(y) is None


# The cross product that a linear solver's last product has prepared


def counted(flat: FlatProblem) -> tuple[int, int, int]:
    stats = flat.tally.stats()
    return stats.gradients, stats.hvps, stats.cross_products


def test_cross_is_free_at_the_vector_of_the_last_product() -> None:
    flat, x, y = CASES["vectors"].flat()
    at, v = Exact().linearize(flat, x, y), normal(3, seed=3)
    expected = Exact().linearize(flat, x, y).cross(v)
    assert at.operator.last_mv is not None
    at.operator.last_mv(v)
    before = counted(flat)
    torch.testing.assert_close(at.cross(v), expected)
    assert counted(flat) == before


@pytest.mark.parametrize("change", ["in place", "another", "a view of it"])
def test_cross_is_computed_anew_at_any_other_vector(change: str) -> None:
    flat, x, y = CASES["vectors"].flat()
    at, v = Exact().linearize(flat, x, y), normal(3, seed=3)
    assert at.operator.last_mv is not None
    at.operator.last_mv(v)
    if change == "in place":
        v.mul_(2.0)
    elif change == "another":
        v = 2 * v
    else:
        v[:1].zero_()
    torch.testing.assert_close(at.cross(v), Exact().linearize(flat, x, y).cross(v.clone()))


# Counts


def test_every_oracle_call_is_counted() -> None:
    flat, x, y = CASES["vectors"].flat()
    outer_gradients(flat, x, y)
    assert flat.tally.stats() == Stats(outer_gradients=1)
    inner_gradient_in_x(flat, x, y)
    assert flat.tally.stats() == Stats(outer_gradients=1, gradients=1)
    flat = flat.with_tally(Tally())
    at = Exact().linearize(flat, x, y)
    assert counted(flat) == (1, 0, 0)
    at.operator.mv(y)
    assert counted(flat) == (1, 1, 0)
    at.cross(y)  # alone it takes no Hessian product
    assert counted(flat) == (1, 1, 1)
    flat = flat.with_tally(Tally())
    at = FiniteDifferences().linearize(flat, x, y)
    assert counted(flat) == (1, 0, 0)
    at.operator.mv(y)
    assert counted(flat) == (3, 1, 0)
    at.cross(y)
    assert counted(flat) == (5, 2, 1)


# Batches: directions (several x, each with its y), tasks (one x, several y with their data), and both


def task_f(x: Tensor, y: Tensor, data: Tensor) -> Tensor:
    return (data @ y).sin().sum() + x.square() @ y


def task_g(x: Tensor, y: Tensor, data: Tensor) -> Tensor:
    return (data @ y).cosh().log().sum() + x.exp() @ y.square()


DATA = normal(5, 4, 3, seed=8)
X, Y = normal(3, seed=9), normal(5, 3, seed=10)
ONE = ravel(torch.zeros(3))[1]


def single(i: int) -> FlatProblem:
    return FlatProblem(BilevelProblem(task_f, task_g), ONE, ONE, DATA[i])


def tasks() -> FlatProblem:
    return FlatProblem(BilevelProblem(task_f, task_g, tasks=True), ONE, ONE, DATA)


def test_directions_equal_a_loop() -> None:
    flat, xs, ys = single(0), normal(4, 3, seed=11), normal(4, 3, seed=12)
    torch.testing.assert_close(flat.g(xs, ys), torch.stack([flat.g(x, y) for x, y in zip(xs, ys, strict=True)]))
    torch.testing.assert_close(flat.f(xs, ys), torch.stack([flat.f(x, y) for x, y in zip(xs, ys, strict=True)]))


def test_tasks_equal_a_loop_and_f_is_their_mean() -> None:
    flat = tasks()
    torch.testing.assert_close(flat.g(X, Y), torch.stack([single(i).g(X, Y[i]) for i in range(5)]))
    each = torch.stack([single(i).f(X, Y[i]) for i in range(5)])
    torch.testing.assert_close(flat.f_each(X, Y), each)
    torch.testing.assert_close(flat.f(X, Y), each.mean())


def test_directions_of_tasks_equal_a_loop() -> None:
    flat, xs, ys = tasks(), normal(2, 3, seed=11), normal(2, 5, 3, seed=12)
    rows = [[single(i).g(xs[k], ys[k, i]) for i in range(5)] for k in range(2)]
    torch.testing.assert_close(flat.g(xs, ys), torch.stack([torch.stack(row) for row in rows]))
    torch.testing.assert_close(flat.f(xs, ys), torch.stack([flat.f(x, y) for x, y in zip(xs, ys, strict=True)]))


def test_outer_gradients_over_tasks_are_those_of_the_mean() -> None:
    flat = tasks()
    value, fx, fy = outer_gradients(flat, X, Y)
    alone = [outer_gradients(single(i), X, Y[i]) for i in range(5)]
    torch.testing.assert_close(value, torch.stack([a[0] for a in alone]).mean())
    torch.testing.assert_close(fx, torch.stack([a[1] for a in alone]).mean(0))
    torch.testing.assert_close(fy, torch.stack([a[2] for a in alone]) / 5)
    assert flat.tally.outer_gradients == 5


@products
def test_products_over_tasks_are_row_by_row_and_the_cross_product_is_their_sum(
    products: AbstractProducts, error: float
) -> None:
    flat, v = tasks(), normal(5, 3, seed=13)
    at = products.linearize(flat, X, Y)
    alone = [products.linearize(single(i), X, Y[i]) for i in range(5)]
    torch.testing.assert_close(at.gradient, torch.stack([a.gradient for a in alone]))
    rows = torch.stack([a.operator.mv(v[i]) for i, a in enumerate(alone)])
    torch.testing.assert_close(at.operator.mv(v), rows, rtol=10 * error, atol=10 * error)
    crosses = [a.cross(v[i]) for i, a in enumerate(alone)]
    summed = torch.stack([cross for cross in crosses if cross is not None]).sum(0)
    torch.testing.assert_close(at.cross(v), summed, rtol=10 * error, atol=10 * error)
    assert flat.tally.cross_products == 5


def test_split_data_give_each_level_its_own_also_over_tasks() -> None:
    split = Split(f=normal(5, 2, 3, seed=14), g=DATA)
    flat = FlatProblem(BilevelProblem(task_f, task_g, tasks=True), ONE, ONE, split)
    assert flat.tasks == 5
    torch.testing.assert_close(flat.g(X, Y), tasks().g(X, Y))
    each = [FlatProblem(BilevelProblem(task_f, task_g), ONE, ONE, split.f[i]).f(X, Y[i]) for i in range(5)]
    torch.testing.assert_close(flat.f(X, Y), torch.stack(each).mean())


def test_starts_of_tasks_and_directions_equal_a_loop() -> None:
    def init(x: Tensor, data: Tensor) -> Tensor:
        return x.sin() + data.sum(0)

    flat = FlatProblem(BilevelProblem(task_f, task_g, init=init, tasks=True), ONE, ONE, DATA)
    torch.testing.assert_close(flat.start(X, Y[0]), torch.stack([init(X, d) for d in DATA]))
    xs = normal(2, 3, seed=11)
    torch.testing.assert_close(flat.start(xs, Y[0]), torch.stack([flat.start(x, Y[0]) for x in xs]))
    assert torch.equal(tasks().start(X, Y[0]), Y[0].expand(5, 3))
    assert torch.equal(single(0).start(X, Y[0]), Y[0])
