"""Constraints on x and y*(x): the augmented Lagrangian of `minimize`."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from bilevel import AID, BilevelError, BilevelProblem, Box, FiniteSum, Simplex, Solution, Status, minimize
from bilevel.algorithms import AugmentedLagrangian, Descent, OuterConstraints
from bilevel.solvers import CG, LBFGS, GradientDescent, QuasiNewton, ScipyMinimize

F64 = torch.float64
# y* = x, Phi = |x - 3|^2 / 2
SHIFT = BilevelProblem(lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (y - x).square().sum() / 2)


def zero(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=F64)


def told(solution: Solution) -> OuterConstraints:
    assert solution.outer_constraints is not None
    return solution.outer_constraints


def test_the_multiplier_of_a_coupling_constraint_is_that_of_the_closed_form() -> None:
    found = minimize(SHIFT, zero(), zero(), outer_inequalities=lambda x, y: y - 1, tol=1e-8, max_steps=200)
    assert found.converged and abs(float(found.x) - 1) < 1e-7
    assert abs(told(found).inequalities[0] - 2) < 1e-7  # -Phi'(1)
    assert abs(found.value - 2) < 1e-7  # f, and not the augmented Lagrangian


def test_an_equality_may_be_of_both_signs() -> None:
    found = minimize(SHIFT, zero(), zero(), outer_equalities=lambda x, y: x + y - 10, tol=1e-8, max_steps=200)
    assert abs(float(found.x) - 5) < 1e-7 and abs(told(found).equalities[0] + 1) < 1e-7  # x - 3 + 2 nu = 0


def test_a_constraint_that_is_not_active_changes_nothing() -> None:
    found = minimize(SHIFT, zero(), zero(), outer_inequalities=lambda x, y: y - 10, tol=1e-8)
    assert abs(float(found.x) - 3) < 1e-7 and told(found).inequalities == (0.0,)


def test_ridge_with_a_budget_on_its_penalties_is_the_projection_of_the_closed_form() -> None:
    # y = b / (1 + x), f = |y - t|^2 / 2 : the budget sum(x) <= s is active, and the multiplier is common to all entries
    b, t = torch.tensor([2.0, 3.0, 4.0], dtype=F64), torch.tensor([1.0, 1.0, 1.0], dtype=F64)
    ridge = BilevelProblem(
        lambda x, y: (y - t).square().sum() / 2, lambda x, y: ((y - b).square() + x * y.square()).sum() / 2
    )
    found = minimize(
        ridge,
        zero(3) + 0.1,
        zero(3),
        outer_inequalities=lambda x, y: x.sum() - 2,
        constraint=Box(0.0),
        tol=1e-7,
        max_steps=300,
    )
    slope = (b / (1 + found.x) - t) * b / (1 + found.x) ** 2  # -dPhi / dx
    assert abs(float(found.x.sum()) - 2) < 1e-6
    assert bool(((slope - told(found).inequalities[0]).abs() < 1e-6).all()) and bool((found.x > 0).all())


@pytest.mark.parametrize("outer", ["quasi-newton", "gradient descent", "scipy"])
def test_constraints_that_contradict_each_other_end_at_the_least_violation(outer: str) -> None:
    if outer == "scipy":
        pytest.importorskip("scipy")
    method: Any = {
        "quasi-newton": QuasiNewton(),
        "gradient descent": GradientDescent(0.002),
        "scipy": ScipyMinimize(),
    }[outer]
    found = minimize(
        SHIFT,
        zero(),
        zero(),
        outer=method,
        outer_inequalities=lambda x, y: torch.stack([y - 1, 2 - x]),
        tol=1e-8,
        throw=False,
        max_steps=2000,
    )
    assert found.status is Status.infeasible_stationary and found.failed and not found.converged
    assert abs(float(found.x) - 1.5) < 1e-2 and abs(told(found).violation - 0.5) < 1e-2


def test_an_infeasible_problem_raises_with_its_status_and_what_was_found() -> None:
    with pytest.raises(BilevelError, match="no small change of x lowers the violation") as raised:
        minimize(SHIFT, zero(), zero(), outer_equalities=lambda x, y: 1 + y.square(), tol=1e-8, max_steps=300)
    assert raised.value.status is Status.infeasible_stationary
    assert told(raised.value.partial).violation == pytest.approx(1, abs=1e-3)


def test_a_weight_that_may_not_grow_ends_as_such() -> None:
    flat = AugmentedLagrangian(_descent(), equalities=lambda x, y: 1e-3 * (x - 5).pow(3), weight=1.0, most=50.0)
    found = minimize(SHIFT, zero(), zero(), algorithm=flat, tol=1e-12, throw=False, max_steps=500)
    assert found.status is Status.weight_limit and found.failed


def test_steps_that_end_first_are_said_to_have_ended() -> None:
    kept: dict[str, Any] = {"outer_inequalities": lambda x, y: y - 1, "throw": False}
    assert minimize(SHIFT, zero(), zero(), max_steps=3, tol=1e-8, **kept).status is Status.max_steps
    assert minimize(SHIFT, zero(), zero(), max_steps=3, **kept).status is Status.steps_used_up


@pytest.mark.parametrize("outer", ["optimizer", "minimizer", "scipy"])
def test_every_outer_method_arrives(outer: str) -> None:
    if outer == "scipy":
        pytest.importorskip("scipy")
    method: Any = {"optimizer": GradientDescent(0.05), "minimizer": None, "scipy": ScipyMinimize()}[outer]
    found = minimize(
        SHIFT,
        zero(2),
        zero(2),
        outer=method,
        outer_inequalities=lambda x, y: y.sum() - 1,
        constraint=Box(None, 0.25),
        tol=1e-6,
        max_steps=1000,
    )
    assert found.converged and bool(((found.x - 0.25).abs() < 1e-5).all())


def test_a_simplex_may_stand_beside_a_constraint() -> None:
    found = minimize(
        BilevelProblem(lambda x, y: (y - torch.arange(3.0)).square().sum(), lambda x, y: (y - x).square().sum()),
        zero(3) + 1 / 3,
        zero(3),
        constraint=Simplex(),
        outer_inequalities=lambda x, y: y[2] - 0.5,
        tol=1e-7,
        max_steps=300,
    )
    assert bool(((found.x - torch.tensor([0.0, 0.5, 0.5])).abs() < 1e-6).all())


def test_with_tasks_a_constraint_holds_in_each_of_them() -> None:
    shifts = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.5]], dtype=F64)
    for how in (True, "loop"):
        problem = BilevelProblem(
            lambda x, y, t: (y - 3).square().sum() / 2,
            lambda x, y, t: (y - x - t).square().sum() / 2,
            tasks=how,
        )
        found = minimize(
            problem, zero(2), zero(2), data=shifts, outer_inequalities=lambda x, y, t: y - 2, tol=1e-7, max_steps=300
        )
        assert bool(((found.x - 1).abs() < 1e-6).all())
        # the mean of f has the slopes 1 + 1/3 - 3 and 1 + 1/2 - 3: the multipliers of the tasks that are active / 3
        expected = (0.0, 4.5, 5.0, 0.0, 0.0, 0.0)
        assert told(found).inequalities == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("outer", ["quasi-newton", "scipy"])
def test_a_resumed_run_is_the_whole_one_bit_for_bit(outer: str, tmp_path: Any) -> None:
    if outer == "scipy":
        pytest.importorskip("scipy")
    method: Any = None if outer == "quasi-newton" else ScipyMinimize()
    kept: dict[str, Any] = {
        "outer_inequalities": lambda x, y: y.sum() - 1,
        "outer_equalities": lambda x, y: y[0] - 2 * x[1],
        "constraint": Box(0.0, 1.0),
        "tol": 1e-6,
        "outer": method,
    }
    whole = minimize(SHIFT, zero(3), zero(3), max_steps=200, **kept)
    path = tmp_path / "checkpoint.pt"
    for stop in (1, 4, 9, 14):
        minimize(SHIFT, zero(3), zero(3), max_steps=stop, checkpoint=path, resume=path.exists(), throw=False, **kept)
    resumed = minimize(SHIFT, zero(3), zero(3), max_steps=200, checkpoint=path, resume=True, **kept)
    if outer == "quasi-newton":  # a driver that is told of other limits goes other ways
        assert [_timeless(record) for record in whole.history] == [_timeless(record) for record in resumed.history]
        assert torch.equal(whole.x, resumed.x)
    assert resumed.converged and told(resumed).violation <= 1e-6
    other: dict[str, Any] = {**kept, "outer_inequalities": lambda x, y: y.sum() - 2}
    with pytest.raises(ValueError, match="outer_inequalities has other code"):
        minimize(SHIFT, zero(3), zero(3), max_steps=200, checkpoint=path, resume=True, **other)


def test_what_is_known_of_constraints_is_saved_and_read_back(tmp_path: Any) -> None:
    pytest.importorskip("safetensors")
    found = minimize(SHIFT, zero(2), zero(2), outer_inequalities=lambda x, y: y - 1, tol=1e-6)
    found.save(tmp_path / "solution.safetensors")
    read = Solution.load(tmp_path / "solution.safetensors")
    assert [record.outer for record in read.history] == [record.outer for record in found.history]
    assert Solution.from_dict(found.to_dict()).outer_constraints == found.outer_constraints
    assert len(told(read).inequalities) == 2


def test_an_exception_brings_the_multipliers_so_far() -> None:
    def stop(record: Any, _: Any) -> None:
        if record.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        minimize(SHIFT, zero(), zero(), outer_inequalities=lambda x, y: y - 1, callback=stop)
    partial: Any = raised.value.partial  # type: ignore[attr-defined]
    assert told(partial).weight > 0 and len(partial.history) == 6


def test_the_best_iterate_is_that_of_the_least_measure_and_not_of_a_low_value_outside() -> None:
    found = minimize(
        SHIFT, zero() + 3, zero(), outer_inequalities=lambda x, y: y - 1, tol=1e-6, max_steps=200, throw=False
    )
    assert found.history[0].value == pytest.approx(0) and abs(float(found.best.x) - 1) < 1e-5


def test_batches_adaptive_accuracy_and_other_algorithms_are_refused() -> None:
    given: dict[str, Any] = {"outer_inequalities": lambda x, y, *data: y - 1}
    noisy = BilevelProblem(lambda x, y, b: (y - b.mean()).square(), lambda x, y, b: (y - x).square())
    with pytest.raises(ValueError, match="needs the same data at every step"):
        minimize(noisy, zero(), zero(), data=FiniteSum(torch.ones(8, dtype=F64), batch_size=2), **given)
    with pytest.raises(ValueError, match="it is an augmented Lagrangian that is minimized"):
        minimize(SHIFT, zero(), zero(), accuracy="adaptive", **given)
    with pytest.raises(ValueError, match="`outer_inequalities=` belongs to `Descent`"):
        minimize(SHIFT, zero(), zero(), algorithm="soba", **given)
    with pytest.raises(ValueError, match="needs one of them"):
        AugmentedLagrangian(_descent())
    whole = minimize(noisy, zero(), zero(), data=torch.ones(8, dtype=F64), outer_inequalities=lambda x, y, b: y - 0.5)
    assert abs(float(whole.x) - 0.5) < 1e-4  # the neighbor: all samples as one batch


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10**6))
def test_quadratic_programs_over_x_are_solved_as_by_enumeration(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(3, 3, generator=generator, dtype=F64) + 2 * torch.eye(3, dtype=F64)
    t, G = (torch.randn(*shape, generator=generator, dtype=F64) for shape in ((3,), (2, 3)))
    h = torch.rand(2, generator=generator, dtype=F64)
    problem = BilevelProblem(  # y* = B x
        lambda x, y: (y - 3 * t).square().sum() / 2 + 0.05 * x.square().sum(),
        lambda x, y: (y - B @ x).square().sum() / 2,
    )
    found = minimize(
        problem, zero(3), zero(3), outer_inequalities=lambda x, y: G @ y - h, tol=1e-6, max_steps=600, throw=False
    )
    P, r = B.T @ B + 0.1 * torch.eye(3, dtype=F64), B.T @ (3 * t)
    expected = min(_by_enumeration(P, r, G @ B, h), key=lambda pair: pair[0])[1]
    assert found.converged and bool(((found.x - expected).abs() < 1e-4).all())


def _by_enumeration(P: Tensor, r: Tensor, G: Tensor, h: Tensor) -> list[tuple[float, Tensor]]:
    """The points that satisfy the equalities of a set of active rows, where they are feasible: value and x."""
    found = []
    for size in range(len(h) + 1):
        for active in map(list, itertools.combinations(range(len(h)), size)):
            K = torch.zeros(3 + size, 3 + size, dtype=F64)
            K[:3, :3], K[:3, 3:], K[3:, :3] = P, G[active].T, G[active]
            x = torch.linalg.solve(K, torch.cat([r, h[active]]))[:3]
            if bool((G @ x <= h + 1e-9).all()):
                found.append((float(x @ P @ x / 2 - r @ x), x))
    return found


def _descent() -> Descent:
    return Descent(AID(LBFGS(tol=1e-10), CG(rtol=1e-10)), QuasiNewton())


def _timeless(record: Any) -> dict[str, Any]:
    return {**record.as_dict(), "seconds": 0.0}
