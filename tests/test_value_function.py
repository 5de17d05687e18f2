"""Inner problems without a unique minimizer: the value-function method."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import BilevelProblem, Box, Polytope, Status, minimize
from bilevel._flat import FlatProblem
from bilevel._tree import ravel
from bilevel.algorithms import ValueFunction
from bilevel.algorithms.engine.danskin import danskin
from bilevel.algorithms.engine.descent_left import descent_left
from bilevel.algorithms.engine.global_inner import by_linear_program, by_multistart
from bilevel.algorithms.engine.optimistic import Optimistic
from bilevel.algorithms.oracle import Oracle
from bilevel.algorithms.value_function import ValueFunctionState
from bilevel.outer.batches import sources
from bilevel.solvers._scipy import as_numpy

pytest.importorskip("scipy")
F64 = torch.float64


def at(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def box(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([-1 - y, y - 1])


def program(problem: BilevelProblem, x: Tensor, y: Tensor) -> Optimistic:
    return Optimistic(FlatProblem(problem, ravel(x)[1], ravel(y)[1]), None, None)


def test_of_several_minimizers_the_best_for_f_is_taken() -> None:
    # y = -sign(x), and anything in [-1, 1] at 0: f = x^2 + (y - 0.3)^2 is least at (0, 0.3), which no slope of y* shows
    problem = BilevelProblem(
        lambda x, y: (x.square() + (y - 0.3).square()).sum(), lambda x, y: (x * y).sum(), inequalities=box
    )
    found = minimize(problem, at(0.7), at(0.0), algorithm=ValueFunction(), constraint=Box(-1.0, 1.0))
    assert found.converged and abs(found.value) < 1e-8 and abs(float(found.x)) < 1e-5


def test_a_linear_bilevel_program_is_solved_from_anywhere() -> None:
    # Clark and Westerberg (1988): (19, 14), f = -37; a polytope with inequalities in x
    rows = torch.tensor([[1.0], [5.0], [-3.0]], dtype=F64)
    problem = BilevelProblem(
        lambda x, y: (x - 4 * y).sum(),
        lambda x, y: y.sum(),
        constraints=lambda x: Polytope(G=rows, h=torch.cat([2 * x, 108 - 2 * x, -4 - 2 * x])),
    )
    for start in (-30.0, 1.0, 50.0):
        found = minimize(problem, at(start), at(0.0), algorithm=ValueFunction())
        assert found.converged and found.value == pytest.approx(-37, abs=1e-7)
        assert float(found.x) == pytest.approx(19, abs=1e-6)


def test_a_stationary_point_that_is_no_global_minimizer_is_cut_off() -> None:
    # g = x y^2 / 2 + y^4 / 4 has its minimizers at y^2 = -x, and a maximum at 0 (Mitsos and Barton, example 3.17)
    problem = BilevelProblem(
        lambda x, y: ((x + 0.5).square() + y.square() / 2).sum(),
        lambda x, y: (x * y.square() / 2 + y.pow(4) / 4).sum(),
        inequalities=box,
    )
    method = ValueFunction(samples=60, searches=2, radius=2.0)
    found = minimize(problem, at(-0.6), at(0.0), algorithm=method, constraint=Box(-1.0, 1.0), max_steps=12)
    assert found.converged and found.value == pytest.approx(0.1875, abs=2e-5)
    assert float(found.x) == pytest.approx(-0.25, abs=1e-3)


@pytest.mark.parametrize("beside", [-1e-5, -1e-6, 1e-6, 1e-5])
def test_a_cut_beside_y_does_not_hold_the_point_where_it_is(beside: float) -> None:
    """Its gradient there is as good as nothing, and the sign of that is chance."""
    problem = BilevelProblem(
        lambda x, y: ((x + 0.5).square() + y.square() / 2).sum(),
        lambda x, y: (x * y.square() / 2 + y.pow(4) / 4).sum(),
        inequalities=box,
    )
    x, y = at(-0.125), at(-(0.125**0.5))
    flat = FlatProblem(problem, ravel(x)[1], ravel(y)[1])
    method = ValueFunction()
    oracle = Oracle(flat, sources(None), method.draws, Box(-1.0, 1.0))
    cuts = torch.stack([y + beside, -y + beside])
    found = method._candidates(oracle, method._problem(oracle), x, y, cuts, regular=True)
    assert min(value for _, value, left in found if left <= 1e-6) == pytest.approx(0.1875, abs=2e-5)


def test_outer_constraints_may_couple_x_and_y() -> None:
    problem = BilevelProblem(lambda x, y: (x + y).sum(), lambda x, y: -y.sum(), inequalities=lambda x, y: y - x - 1)
    found = minimize(
        problem,
        at(3.0),
        at(0.0),
        algorithm=ValueFunction(),
        outer_inequalities=lambda x, y: 2 - y,
        outer_equalities=lambda x, y: 0 * x,
    )
    assert found.value == pytest.approx(3, abs=1e-7)  # y = x + 1 >= 2


def test_steps_that_end_before_the_gap_is_closed_are_no_success() -> None:
    problem = BilevelProblem(lambda x, y: (x + y).sum(), lambda x, y: (y.pow(3) / 3 - x * y).sum(), inequalities=box)
    short: dict[str, Any] = {"algorithm": ValueFunction(samples=20, searches=1, radius=2.0), "max_steps": 0}
    found = minimize(problem, at(0.5), at(0.9), throw=False, tol=1e-6, **short)
    assert not found.converged and found.status is Status.max_steps


def test_constraints_that_cannot_hold_are_no_success() -> None:
    problem = BilevelProblem(lambda x, y: (x + y).sum(), lambda x, y: y.sum(), inequalities=lambda x, y: 1 - y)
    found = minimize(
        problem,
        at(0.5),
        at(0.9),
        algorithm=ValueFunction(samples=20, searches=1),
        outer_inequalities=lambda x, y: y,
        max_steps=1,
        tol=1e-6,
        throw=False,
    )
    assert not found.converged and found.status is Status.max_steps


@pytest.mark.parametrize("x", [-0.7, 0.4])
def test_the_slope_of_the_value_function_is_that_of_the_lagrangian(x: float) -> None:
    # V(x) = min {x y : y >= x - 2, y <= 1 + x^2}: the constraints move with x
    problem = BilevelProblem(
        lambda x, y: y.sum(),
        lambda x, y: (x * y).sum(),
        inequalities=lambda x, y: torch.cat([x - 2 - y, y - 1 - x.square()]),
    )
    inner, here = program(problem, at(x), at(0.0)), at(x)
    least = by_linear_program(inner, here, at(0.0))
    expected = 1 + 3 * x * x if x < 0 else 2 * x - 2
    assert least.exact and float(danskin(inner, here, least.y)) == pytest.approx(expected, abs=1e-6)


def test_the_global_solve_finds_the_lower_of_two_valleys() -> None:
    problem = BilevelProblem(
        lambda x, y: y.sum(), lambda x, y: ((y.square() - 1).square() + 0.1 * y).sum(), inequalities=box
    )
    inner = program(problem, at(0.0), at(0.0))
    found = by_multistart(inner, at(0.0), at(0.95).unsqueeze(0), samples=100, searches=4, radius=2.0, seed=0)
    assert float(found.y) == pytest.approx(-1, abs=0.02) and not found.exact


def test_the_global_solve_prefers_points_that_are_feasible_to_low_values_outside() -> None:
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y.square() / 2 - y.pow(4) / 4).sum(), inequalities=box)
    inner = program(problem, at(0.0), at(0.0))
    found = by_multistart(inner, at(0.0), at(-1.0).unsqueeze(0), samples=200, searches=3, radius=10.0, seed=0)
    assert abs(found.value) < 1e-9


def test_a_resumed_run_is_the_whole_one(tmp_path: Any) -> None:
    problem = BilevelProblem(
        lambda x, y: ((x - 0.25).square() + y.square()).sum(),
        lambda x, y: (y.pow(3) / 3 - x * y).sum(),
        inequalities=box,
    )
    kept: dict[str, Any] = {
        "algorithm": ValueFunction(samples=40, searches=2, radius=2.0),
        "constraint": Box(-1.0, 1.0),
        "tol": 1e-6,
    }
    whole = minimize(problem, at(0.8), at(0.5), max_steps=8, **kept)
    path = tmp_path / "checkpoint.pt"
    minimize(problem, at(0.8), at(0.5), max_steps=1, checkpoint=path, throw=False, **kept)
    resumed = minimize(problem, at(0.8), at(0.5), max_steps=8, checkpoint=path, resume=True, **kept)
    assert torch.equal(whole.x, resumed.x) and torch.equal(whole.y, resumed.y) and whole.converged
    assert whole.value == pytest.approx(0.25, abs=1e-5)


def test_what_it_does_not_take_is_refused_by_name() -> None:
    from bilevel import Simplex

    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: y.square().sum())
    with pytest.raises(ValueError, match="a `constraint=` that is a `Box`"):
        minimize(problem, at(0.5, 0.5), at(0.0), algorithm=ValueFunction(), constraint=Simplex())
    tasks = BilevelProblem(lambda x, y, t: y.sum(), lambda x, y, t: (y - t).square().sum(), tasks=True)
    with pytest.raises(ValueError, match="takes no tasks"):
        minimize(tasks, at(0.5), at(0.0), data=at(1.0, 2.0).unsqueeze(1), algorithm=ValueFunction())
    steps = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y - x).square().sum(), iterative=True)
    with pytest.raises(ValueError, match="needs an inner problem that is g"):
        minimize(steps, at(0.5), at(0.0), algorithm=ValueFunction())


@pytest.mark.parametrize("inner", ["lp", "multistart"])
def test_the_inner_gap_is_measured_wherever_the_point_comes_from(inner: Any) -> None:
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (x * y).sum(), inequalities=box)
    x, y = at(0.5), at(0.2)
    oracle = Oracle(FlatProblem(problem, ravel(x)[1], ravel(y)[1]), sources(None))
    state = ValueFunctionState(x, y, y.new_zeros(0, 1), solved=True, round=1, final=True)
    method = ValueFunction(inner=inner, samples=20, searches=2)
    measure = method.stationarity(oracle, state, method.evaluate(oracle, state))
    assert float(measure) == pytest.approx(0.5 * 0.2 + 0.5, abs=1e-8)


def left_at(problem: BilevelProblem, x: Tensor, y: Tensor, *others: Tensor) -> float:
    rows = torch.stack(others) if others else x.new_zeros(0, len(x) + len(y))
    wide = as_numpy(torch.full_like(x, 4.0))
    return descent_left(program(problem, x, y), x, y, (-wide, wide), rows)


def test_what_f_may_still_fall_by_is_zero_at_local_minima_and_only_there() -> None:
    """y = max(x, 0) under f = (x - a)^2 + (y - b)^2: on either piece, at the kink, and beside each of them."""

    def bent(a: float, b: float) -> BilevelProblem:
        return BilevelProblem(
            lambda x, y: ((x - a).square() + (y - b).square()).sum(),
            lambda x, y: (y - x).square().sum() / 2,
            constraints=lambda x: Polytope(lower=0.0),
        )

    for a, b, at_x in ((1.0, 3.0, 2.0), (-1.0, 0.0, -1.0), (1.0, -1.0, 0.0)):
        x = at(at_x)
        assert left_at(bent(a, b), x, x.clamp_min(0)) < 1e-12
        for beside in (-0.3, 0.3):
            near = at(at_x + beside)
            assert left_at(bent(a, b), near, near.clamp_min(0)) > 0.05
    assert left_at(bent(1.0, 1.0), at(0.0), at(0.0)) > 0.5  # a kink that is no minimum: up the piece y = x
    assert left_at(bent(-1.0, 0.0), at(0.0), at(0.0)) > 0.5  # and down the other one


def test_a_degenerate_vertex_is_a_minimum_if_f_rises_on_all_pieces() -> None:
    """y = min(x, 2 - x) maximizes y under three constraints at x = 1, the third between the others."""
    for slope, least in ((-1.0, True), (1.0, False)):
        problem = BilevelProblem(
            lambda x, y, slope=slope: (slope * y).sum(),
            lambda x, y: -y.sum(),
            inequalities=lambda x, y: torch.cat([y - x, y - 2 + x, y - 1]),
        )
        assert (left_at(problem, at(1.0), at(1.0)) < 1e-12) is least


def test_ways_that_leave_the_feasible_set_or_that_no_multipliers_go_with_are_not_open() -> None:
    """f = 3 y - x at the kink of max(x, 0), and f = y - x / 2 at the end of max {y : x <= y <= 1}, where x <= 1."""
    bent = BilevelProblem(
        lambda x, y: (3 * y - x).sum(), lambda x, y: (y - x).square().sum(), inequalities=lambda x, y: -y
    )
    assert left_at(bent, at(0.0), at(0.0)) < 1e-12  # y = x < 0 would lower it
    end = BilevelProblem(
        lambda x, y: (y - x / 2).sum(), lambda x, y: -y.sum(), inequalities=lambda x, y: torch.cat([y - 1, x - y])
    )
    assert left_at(end, at(1.0), at(1.0)) < 1e-12  # y = x < 1 would lower it, and g pushes away from it


def test_another_minimizer_of_g_holds_f_where_y_would_jump() -> None:
    """g = (y^2 - 1)^2 + x y: y is near 1 for x < 0, near -1 for x > 0, and f = (x - 1)^2 + (y - 1)^2 is held at 0."""
    problem = BilevelProblem(
        lambda x, y: ((x - 1).square() + (y - 1).square()).sum(),
        lambda x, y: ((y.square() - 1).square() + x * y).sum(),
    )
    assert left_at(problem, at(0.0), at(1.0)) > 0.5
    assert left_at(problem, at(0.0), at(1.0), at(-1.0, -1.0)) < 1e-12  # y = -1, dV/dx = -1


def test_without_multipliers_it_is_unknown_and_no_success() -> None:
    """y^2 <= 0 has no Slater point: y = 0 minimizes g = y without multipliers."""
    problem = BilevelProblem(
        lambda x, y: x.square().sum() + y.sum(), lambda x, y: y.sum(), inequalities=lambda x, y: y.square()
    )
    assert left_at(problem, at(0.0), at(0.0)) == math.inf
    method = ValueFunction(samples=20, searches=1)
    found = minimize(problem, at(0.5), at(0.0), algorithm=method, constraint=Box(-1.0, 1.0), max_steps=6, throw=False)
    assert found.status is Status.descent_left and "no multipliers" in found.status.value
