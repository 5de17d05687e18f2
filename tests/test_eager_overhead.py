"""What an estimate does beside its derivatives: no more than is needed, and the same numbers whatever the structure."""

from __future__ import annotations

import math
import sys
from dataclasses import fields
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from bilevel import AID, BilevelProblem, Start, hypergradient, minimize
from bilevel._estimate import FlatEstimate
from bilevel._numerics.rows import all_finite, row_norms_and_numbers, safe_row_norms
from bilevel._result import Report, Solved, Stats, Status, Tally, report
from bilevel._tree import ravel
from bilevel.algorithms.algorithm import Evaluated
from bilevel.algorithms.oracle import Block
from bilevel.arguments.unchecked import unchecked
from bilevel.outer.solution import Record
from bilevel.solvers import CG, ClosedForm, GradientDescent, Iterate

D = torch.linspace(1.0, 3.0, 5, dtype=torch.float64)
X, Y = torch.linspace(-0.5, 0.5, 5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
PROBLEM = BilevelProblem(
    lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (D * (y - x).square()).sum() / 2 + y.cosh().log().sum()
)
STEPS = AID(Iterate(GradientDescent(0.2), 10), CG(rtol=0.0, max_steps=5))


def _library_calls(run: Any) -> int:
    """How many functions of the library are entered."""
    found = 0

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal found
        found += event == "call" and str(frame.f_globals.get("__name__")).startswith("bilevel.")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
    return found


@pytest.mark.skipif(sys.getprofile() is not None, reason="another profile is being made")
def test_a_later_estimate_enters_few_functions_beside_its_derivatives() -> None:
    start = Start(Y, None, 3)

    def once() -> None:
        hypergradient(PROBLEM, X, Y, estimator=STEPS, throw=False, start=start)

    once()
    assert _library_calls(once) <= 480  # beside 18 derivatives and 12 values of f and g


@pytest.mark.skipif(sys.getprofile() is not None, reason="another profile is being made")
def test_a_step_of_minimize_enters_few_functions_beside_an_estimate() -> None:
    def run(steps: int) -> int:
        outer = GradientDescent(0.1)
        return _library_calls(
            lambda: minimize(PROBLEM, X, Y, estimator=STEPS, outer=outer, max_steps=steps, tol=0.0, throw=False)
        )

    run(2)
    assert (run(12) - run(2)) / 10 <= 480


@pytest.mark.parametrize(
    ("kind", "arguments", "names"),
    [
        (Report, ("inner solver", Status.successful, 0.5), {"steps": 3}),
        (Solved, (Y, (Status.max_steps,)), {"steps": 3, "residual": Y[0]}),
        (Stats, (1, 2), {"values": 3}),
        (Record, (1, 0.5, 0.1, Status.successful, Stats(), 0.01), {"rejected": True}),
        (FlatEstimate, (X, X[0], Y, ()), {"value_error": 0.5}),
        (Evaluated, (FlatEstimate(X, X[0], Y, ()),), {"tol": 0.5}),
        (Block, (X,), {}),
    ],
)
def test_what_is_made_without_a_look_is_what_the_constructor_makes(kind: Any, arguments: Any, names: Any) -> None:
    made, own = unchecked(kind)(*arguments, **names), kind(*arguments, **names)
    assert type(made) is kind
    assert list(vars(made)) == [field.name for field in fields(kind)]  # the order in which they are listed
    pairs = ((vars(made)[name], value) for name, value in vars(own).items())
    assert all(one is other or (not isinstance(one, Tensor) and one == other) for one, other in pairs)


def test_norms_as_numbers_are_the_norms_though_their_squares_are_lost() -> None:
    for rows in (torch.tensor([3e-30, 4e-30]), torch.tensor([[3e30, 4e30], [3.0, 4.0]]), torch.ones(0, 3)):
        norms, numbers = row_norms_and_numbers(rows)
        assert norms.reshape(-1).tolist() == numbers
        torch.testing.assert_close(norms, safe_row_norms(rows), rtol=0.0, atol=0.0)
        torch.testing.assert_close(norms.double(), torch.linalg.vector_norm(rows.double(), dim=-1), rtol=1e-6, atol=0.0)


LEAVES: dict[str, Any] = {
    "one vector": lambda a: a(3),
    "no axes": lambda a: {"w": a(2, 2), "b": a()},
    "an empty leaf": lambda a: [a(3), a(0), a(1, 2)],
    "nested": lambda a: {"net": [{"w": a(2, 3), "b": a(2)}, (a(2), a(1, 1, 1))], "s": a()},
}


@pytest.mark.parametrize("name", LEAVES)
def test_the_estimate_is_that_of_a_dense_oracle_whatever_the_structure_of_y(name: str) -> None:
    """g = |A y - B x|^2 / 2 + c |y|^4 over the leaves, some of which f does not use: h = fx - G (H^-1 fy), by hand."""
    generator = torch.Generator().manual_seed(1)

    def a(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    y0 = LEAVES[name](a)
    flat, structure = ravel(y0)
    n, p = flat.numel(), 2
    A, B, x = a(n + 2, n), a(n + 2, p), a(p)

    def vector(y: Any) -> Tensor:
        return ravel(y)[0]

    def g_flat(x: Tensor, v: Tensor) -> Tensor:
        return (A @ v - B @ x).square().sum() / 2 + 0.1 * v.square().sum().square()

    def f(x: Tensor, y: Any) -> Tensor:
        return vector(y)[: n - 1].sin().sum() + (x**3).sum()  # the last entry is not seen

    problem = BilevelProblem(f, lambda x, y: g_flat(x, vector(y)))
    estimator = AID(ClosedForm(lambda _: y0), CG(rtol=1e-13))
    found = hypergradient(problem, x, y0, estimator=estimator, throw=False)
    H = torch.autograd.functional.hessian(lambda v: g_flat(x, v), flat)  # type: ignore[no-untyped-call]
    G = torch.autograd.functional.jacobian(  # type: ignore[no-untyped-call]
        lambda x: torch.autograd.grad(g_flat(x, v := flat.clone().requires_grad_()), v, create_graph=True)[0], x
    )
    fy = torch.zeros(n, dtype=torch.float64)
    fy[: n - 1] = flat[: n - 1].cos()
    expected = 3 * x**2 - G.T @ torch.linalg.solve(H, fy)
    torch.testing.assert_close(found.grad, expected, rtol=1e-10, atol=1e-10)
    assert structure.describe() == ravel(found.y)[1].describe()


def test_two_names_for_one_tensor_are_two_variables() -> None:
    shared = torch.ones(2, dtype=torch.float64)
    problem = BilevelProblem(
        lambda x, y: (y["a"] * y["b"]).sum(),
        lambda x, y: (y["a"] - x).square().sum() / 2 + (y["b"] - 2 * x).square().sum() / 2,
    )
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    estimator = AID(ClosedForm(lambda x: {"a": x, "b": 2 * x}), CG(rtol=1e-12))
    found = hypergradient(problem, x, {"a": shared, "b": shared}, estimator=estimator)
    torch.testing.assert_close(found.grad, 4 * x)


def test_a_leaf_that_g_does_not_use_ends_the_solve_as_negative_curvature_or_zero() -> None:
    problem = BilevelProblem(lambda x, y: y["a"].sum(), lambda x, y: (y["a"] - x).square().sum() / 2)
    x = torch.ones(2, dtype=torch.float64)
    y0 = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(3, dtype=torch.float64)}
    estimator = AID(ClosedForm(lambda x: {"a": x, "b": y0["b"]}), CG(rtol=1e-12))
    found = hypergradient(problem, x, y0, estimator=estimator)
    torch.testing.assert_close(found.grad, torch.ones(2, dtype=torch.float64))


def test_a_step_may_write_into_the_data_that_it_is_given() -> None:
    """What is made once a solve is not what a function may change."""

    def g(x: Tensor, y: Tensor, data: dict[str, Tensor]) -> Tensor:
        target = data.pop("t")
        return (y - x - target).square().sum() / 2

    problem = BilevelProblem(lambda x, y, data: (y - 3).square().sum() / 2, g)
    x = torch.zeros(2, dtype=torch.float64)
    estimator = AID(Iterate(GradientDescent(1.0), 3), CG(rtol=1e-12))
    found = hypergradient(problem, x, x, data={"t": torch.ones(2, dtype=torch.float64)}, estimator=estimator)
    torch.testing.assert_close(found.grad, torch.full((2,), -2.0, dtype=torch.float64))


@pytest.mark.parametrize("wrong", [True, 1.5, 2**63, "one"])
def test_what_arrived_before_makes_no_wrong_argument_right(wrong: Any) -> None:
    Stats(1, 2, 3)
    Report("solver", Status.successful, 0.0, 3)
    with pytest.raises((TypeError, ValueError), match=r"Stats\(hvps"):
        Stats(1, wrong)
    with pytest.raises((TypeError, ValueError), match=r"Report\(steps"):
        Report("solver", Status.successful, 0.0, wrong)
    with pytest.raises((TypeError, ValueError), match="Tally"):
        Tally(wrong if wrong != 2**63 else -1)
    assert Stats(1, torch.tensor(2)).hvps == 2  # type: ignore[arg-type]


@given(st.lists(st.floats(width=32), max_size=6))
@settings(max_examples=60, deadline=None)
def test_all_finite_is_that_every_entry_is(entries: list[float]) -> None:
    assert all_finite(torch.tensor(entries, dtype=torch.float32)) == all(map(math.isfinite, entries))


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1.0, 1e30, math.inf, math.nan, 0.0])
@pytest.mark.parametrize("rows", [(), (2,)])
def test_a_report_measures_gradients_whose_squares_are_lost(size: float, rows: tuple[int, ...]) -> None:
    gradient = torch.tensor([3.0, 4.0]).expand(*rows, 2) * size
    solved = Solved(gradient, (Status.successful,) * (rows or (1,))[0], torch.zeros(rows), 1)
    told = report("solver", solved, gradient).residual
    assert told == pytest.approx(5 * size, rel=1e-5, nan_ok=True)
    torch.testing.assert_close(safe_row_norms(gradient), torch.full(rows, 5 * size), equal_nan=True)


@given(st.lists(st.sampled_from(list(Status)), max_size=4))
@settings(max_examples=40, deadline=None)
def test_the_worst_status_is_the_last_of_the_enumeration(statuses: list[Status]) -> None:
    order = list(Status)
    assert Status.worst(statuses) is (max(statuses, key=order.index) if statuses else Status.successful)
