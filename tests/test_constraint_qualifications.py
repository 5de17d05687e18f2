"""When the derivative of a constrained minimizer is not valid, by name; neighbours where it is; multipliers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from bilevel import AID, KKT, BilevelProblem, Estimate, FullKKT, Multipliers, Polytope, Status, hypergradient, minimize
from bilevel._linear import AbstractLinearSolver
from bilevel.solvers import GMRES, MINRES, Dense, InteriorPoint, SaddleCholesky

ZERO = torch.zeros(2)


def statuses(found: Estimate) -> dict[str, Status]:
    return {report.part: report.status for report in found.reports}


def at(problem: BilevelProblem, *x: float, y0: Tensor = ZERO, **keywords: Any) -> Estimate:
    return hypergradient(problem, torch.tensor(x), y0, throw=False, **keywords)


# Independence


def meeting(lines: Callable[..., Any], as_polytope: bool) -> BilevelProblem:
    """max y_1 + y_2 under lines G y <= h(x)."""
    G = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    kind: dict[str, Any] = (
        {"constraints": lambda x: Polytope(G=G, h=lines(x))}
        if as_polytope
        else {"inequalities": lambda x, y: G @ y - lines(x)}
    )
    return BilevelProblem(lambda x, y: y[0] * 2 + y[1] * x[1], lambda x, y: -3 * y.sum() + y[0] * x[1] / 5, **kind)


@pytest.mark.parametrize("as_polytope", [True, False])
def test_constraints_that_meet_at_this_x_only_are_named(as_polytope: bool) -> None:
    """y_1 <= x_1, y_2 <= 1 and y_1 + y_2 <= 2: at x_1 = 1 the third takes over from the first."""
    posed = meeting(lambda x: torch.stack([x[0], 0 * x[0] + 1, 0 * x[0] + 2]), as_polytope)
    kink = at(posed, 1.0, 0.5)
    assert kink.status is Status.dependent_constraints
    assert statuses(kink)["independence of active constraints"] is Status.dependent_constraints
    assert "linearly dependent" in kink.message
    below, above = at(posed, 0.99, 0.5), at(posed, 1.01, 0.5)
    assert below.status.ok and above.status.ok
    torch.testing.assert_close(below.grad[0], torch.tensor(2.0))
    torch.testing.assert_close(above.grad[0], torch.tensor(0.0))


@pytest.mark.parametrize("inside", [False, True], ids=["y", "task"])
def test_bounds_that_meet_at_this_x_only_are_named_and_bounds_that_stay_together_are_not(inside: bool) -> None:
    """y in [x, 2 - x] is a point at x = 1, and nothing beyond; y in [x^2, x^2] is y = x^2."""

    def bounded(lower: Callable[[Tensor], Tensor], upper: Callable[[Tensor], Tensor]) -> BilevelProblem:
        def constraints(x: Tensor, *_: Any) -> Polytope:
            free = torch.tensor([torch.inf])
            return Polytope(lower=torch.cat([lower(x), -free]), upper=torch.cat([upper(x), free]))

        def g(x: Tensor, y: Tensor, *_: Any) -> Tensor:
            return (y - 3 * x).square().sum() / 2

        return BilevelProblem(lambda x, y, *_: y.sum(), g, constraints=constraints, tasks=inside)

    given: dict[str, Any] = {"data": torch.zeros(2)} if inside else {}
    meet = at(bounded(lambda x: x, lambda x: 2 - x), 1.0, **given)
    assert meet.status is Status.dependent_constraints
    assert statuses(meet)["bounds that meet"] is Status.dependent_constraints
    together = at(bounded(lambda x: x.square(), lambda x: x.square() + 0 * x), 1.0, **given)
    assert together.status.ok
    torch.testing.assert_close(together.grad, torch.tensor([2.0 + 3.0]))
    apart = at(bounded(lambda x: x, lambda x: 2 - x), 0.9, **given)
    assert apart.status.ok and "bounds that meet" not in statuses(apart)
    torch.testing.assert_close(apart.grad, torch.tensor([-1.0 + 3.0]))


@pytest.mark.parametrize("as_polytope", [True, False])
def test_constraints_that_stay_together_are_differentiated_though_dependent(as_polytope: bool) -> None:
    """The third goes through the corner of the other two at every x: the corner moves smoothly."""
    posed = meeting(lambda x: torch.stack([x[0], 0 * x[0] + 1, x[0] + 1]), as_polytope)
    found = at(posed, 1.0, 0.5)
    assert found.status.ok
    torch.testing.assert_close(found.grad, torch.tensor([2.0, 1.0]))


# Strict complementarity


def test_a_constraint_that_holds_without_force_is_named() -> None:
    """y* = x lies on |y| = 1 by itself; a little inside, and outside, all is well."""
    posed = BilevelProblem(
        lambda x, y: y.sum(), lambda x, y: (y - x).square().sum(), inequalities=lambda x, y: y.square().sum() - 1
    )
    on = at(posed, 0.6, 0.8)
    assert on.status is Status.weakly_active or not on.reports[0].status.ok
    assert not on.status.ok
    for factor, length in ((0.999, None), (1.001, 1.0)):
        found = at(posed, 0.6 * factor, 0.8 * factor)
        assert found.status.ok
        if length:
            assert abs(float(found.y.norm()) - length) < 1e-12
        else:
            torch.testing.assert_close(found.grad, torch.ones(2))


# Curvature


@pytest.mark.parametrize("linear", [SaddleCholesky(), MINRES(rtol=1e-10), GMRES(rtol=1e-10), Dense()])
def test_a_direction_that_nothing_curves_is_named_whatever_solves_the_system(linear: AbstractLinearSolver) -> None:
    """g = x y_1 on |y_1| <= 1: y_2 may be anything. With y_2^2 in a constraint that holds it may not."""
    flat = BilevelProblem(
        lambda x, y: y[0] * x[0], lambda x, y: x[0] * y[0], inequalities=lambda x, y: [y[0] - 1, -y[0] - 1]
    )
    found = at(flat, 1.0, estimator=AID(InteriorPoint(), linear))
    assert not found.status.ok
    assert Status.not_positive_definite in statuses(found).values()
    curved = BilevelProblem(flat.f, flat.g, inequalities=lambda x, y: (1 + x[0].square()) * y[1].square() - 1 - y[0])
    found = at(curved, 1.0, estimator=AID(InteriorPoint(), linear))
    assert found.status.ok
    torch.testing.assert_close(found.grad, torch.tensor([-1.0]))


def test_a_saddle_of_the_lagrangian_is_named_though_every_system_has_a_solution() -> None:
    """g = y_1 x - y_2^2 on y_1 >= 0, from its stationary point; with + y_2^2 it is the minimum."""
    for sign, good in ((-1.0, False), (1.0, True)):
        saddle = BilevelProblem(
            lambda x, y: y.sum(),
            lambda x, y, sign=sign: x[0] * y[0] + sign * (y[1] - x[0]).square(),
            inequalities=lambda x, y: -y[0],
        )
        for linear in (Dense(),):
            found = at(saddle, 1.0, y0=torch.tensor([0.0, 1.0]), estimator=AID(InteriorPoint(), linear))
            assert found.status.ok is good
            if not good and found.reports[0].status.ok:
                assert statuses(found)["second-order sufficiency"] is Status.not_positive_definite


# The solver


@pytest.mark.parametrize("together", [True, False])
def test_what_has_no_solution_is_named_and_others_of_the_batch_do_not_mind(together: bool) -> None:
    """|y|^2 <= 1 and y_1 + y_2 >= d: a point for d = 1, none for d = 2."""
    posed = BilevelProblem(
        lambda x, y, d: y.sum() * x[0],
        lambda x, y, d: (y - x).square().sum(),
        inequalities=lambda x, y, d: [y.square().sum() - 1, d - y.sum()],
        tasks=together,
    )
    if together:
        found = at(posed, 0.1, 0.2, data=torch.tensor([1.0, 2.0, 1.2]))
        assert [s.name for s in found.reports[0].statuses] == ["successful", "infeasible", "successful"]
        assert bool(found.y.isfinite().all())
    else:
        assert at(posed, 0.1, 0.2, data=torch.tensor(2.0**0.5 - 1e-3)).status.ok
        assert at(posed, 0.1, 0.2, data=torch.tensor(2.0**0.5 + 1e-3)).reports[0].status is Status.infeasible


def test_what_falls_without_end_is_named_and_a_bound_far_away_ends_it() -> None:
    def falling(**limits: Any) -> BilevelProblem:
        return BilevelProblem(
            lambda x, y: y.sum(),
            lambda x, y: -x[0] * y.sum() + (y[0] - y[1]).square(),
            inequalities=lambda x, y: (y[0] - y[1]).square() - 1,
            **limits,
        )

    assert at(falling(), 1.0).reports[0].status is Status.unbounded
    ended = at(falling(constraints=lambda x: Polytope(upper=100 * x.expand(2))), 1.0)
    assert ended.status.ok
    torch.testing.assert_close(ended.grad, torch.tensor([200.0]))


def test_what_is_not_finite_at_the_start_is_named_and_on_the_way_is_avoided() -> None:
    posed = BilevelProblem(
        lambda x, y: y.sum(),
        lambda x, y: x[0] * y.sum() - y.log().sum(),
        inequalities=lambda x, y: y.sum() - 1,
    )
    found = at(posed, 0.5, y0=torch.tensor([0.1, 0.1]))
    assert found.status.ok
    torch.testing.assert_close(found.y, torch.full((2,), 0.5))
    assert at(posed, 0.5, y0=torch.tensor([-1.0, 0.1])).status.ok  # the model of one entry leads back
    lost = BilevelProblem(posed.f, lambda x, y: posed.g(x, y) / 0.0, inequalities=posed.inequalities)
    assert at(lost, 0.5, y0=torch.tensor([0.1, 0.1])).reports[0].status is Status.nonfinite


def test_too_few_steps_are_named() -> None:
    posed = BilevelProblem(
        lambda x, y: y.sum(), lambda x, y: (y - x).exp().sum() - y.sum(), inequalities=lambda x, y: y.exp().sum() - 1
    )
    far = torch.full((2,), 10.0)
    found = at(posed, 3.0, 4.0, y0=far, estimator=KKT(InteriorPoint(max_steps=1)))
    assert found.reports[0].status is Status.max_steps
    assert at(posed, 3.0, 4.0, y0=far).status.ok


# Multipliers


def everything() -> BilevelProblem:
    return BilevelProblem(
        lambda x, y: (y - 1).square().sum(),
        lambda x, y: (y - 3 * x).square().sum() / 2,
        inequalities=lambda x, y: {"ball": y.square().sum() - 4, "far": [y[0] - 100]},
        equalities=lambda x, y: (y[2] + y[3] - x[0],),
        constraints=lambda x: Polytope(
            G=torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0]]),
            h=torch.tensor([1.0, 100.0]),
            A=torch.tensor([[0.0, 1.0, 1.0, 0.0]]),
            b=1.5,
            lower=torch.tensor([-9.0, -9.0, -9.0, 0.2]),
        ),
    )


X, Y0 = torch.tensor([0.5, 0.6, 0.2, -0.3]), torch.zeros(4)


def test_multipliers_balance_the_gradient_in_the_units_of_the_constraints_as_written() -> None:
    found = hypergradient(everything(), X, Y0)
    assert isinstance(found.multipliers, Multipliers)
    m, y = cast(Any, found.multipliers), found.y
    assert m.upper is None and m.lower is not None
    ball, far, nu = m.inequalities["ball"], m.inequalities["far"][0], m.equalities[0]
    total = (y - 3 * X) + ball * 2 * y + nu * torch.tensor([0.0, 0.0, 1.0, 1.0])
    total = total + m.linear_inequalities[0] * torch.tensor([2.0, 0.0, 0.0, 0.0])
    total = total + m.linear_equalities[0] * torch.tensor([0.0, 1.0, 1.0, 0.0]) - m.lower
    assert torch.allclose(total, torch.zeros(4), atol=1e-12)
    assert float(far) == 0 and float(m.linear_inequalities[1]) == 0
    assert float(m.linear_inequalities[0]) > 0 and float(m.lower[3]) > 0
    again = hypergradient(everything(), X, Y0, estimator=FullKKT(InteriorPoint()))
    torch.testing.assert_close(again.grad, found.grad, rtol=1e-8, atol=1e-9)


def test_a_multiplier_is_what_the_least_value_falls_by() -> None:
    """Of a Polytope: d g*/d h = -gamma, d g*/d b = -alpha, d g*/d lower = lambda, d g*/d upper = -mu."""
    c = torch.tensor([2.0, -1.0, 0.3])

    def g(x: dict[str, Tensor], y: Tensor) -> Tensor:
        return (y - c).square().sum() / 2

    posed = BilevelProblem(
        g,
        g,
        constraints=lambda x: Polytope(
            G=torch.tensor([[3.0, 1.0, 0.0]]),
            h=x["h"],
            A=torch.ones(1, 3),
            b=x["b"],
            lower=x["lower"],
            upper=x["upper"],
        ),
    )
    x = {
        "h": torch.tensor([1.5]),
        "b": torch.tensor([0.4]),
        "lower": torch.tensor([-5.0, -0.3, -5.0]),
        "upper": torch.tensor([5.0, 5.0, 0.35]),
    }
    found = hypergradient(posed, x, torch.zeros(3))
    m: Any = found.multipliers
    torch.testing.assert_close(found.grad["h"], -m.linear_inequalities)
    torch.testing.assert_close(found.grad["b"], -m.linear_equalities)
    torch.testing.assert_close(found.grad["lower"], m.lower)
    torch.testing.assert_close(found.grad["upper"], -m.upper)
    assert float(m.lower.max() + m.upper.max()) > 0


def test_multipliers_travel_with_the_estimate_and_the_solution(tmp_path: Path) -> None:
    found = hypergradient(everything(), X, Y0)

    def same(a: Any, b: Any) -> bool:
        return str(a) == str(b) and bool(torch.equal(a.lower, b.lower))

    assert same(pickle.loads(pickle.dumps(found.multipliers)), found.multipliers)
    assert same(copy.deepcopy(found).multipliers, found.multipliers)
    assert same(Estimate.from_dict(found.to_dict()).multipliers, found.multipliers)
    pytest.importorskip("safetensors")
    found.save(tmp_path / "estimate.safetensors")
    assert same(Estimate.load(tmp_path / "estimate.safetensors").multipliers, found.multipliers)
    run = minimize(everything(), X, Y0, max_steps=1)
    assert run.multipliers is not None and run.multipliers is run.estimate.multipliers
    plain = hypergradient(BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y - x).square().sum()), X, Y0)
    assert plain.multipliers is None and plain.to_dict()["multipliers"] is None
