"""Where g or Phi has a kink no derivative is called successful, and where it has none nothing is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from bilevel import (
    AID,
    ESJ,
    ITD,
    BilevelError,
    BilevelProblem,
    FiniteDifference,
    Penalty,
    Start,
    Status,
    check,
    compare,
    estimators,
    functional,
    hypergradient,
)
from bilevel._calculus import FiniteDifferences
from bilevel._flat import FlatProblem
from bilevel._inner import Objective as InnerObjective
from bilevel._result import Solved
from bilevel._tree import ravel
from bilevel.hypergrad.held import held
from bilevel.prox import L1
from bilevel.requirements.kinks import kinked
from bilevel.solvers import CG, LBFGS, ClosedForm, Dense, GradientDescent, Iterate

Objective: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def f(x: Tensor, y: Tensor) -> Tensor:
    return (y - 3).square().sum() / 2


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def at_kink(g: Objective, x: Tensor, y: Tensor) -> bool:
    problem = BilevelProblem(f, g)
    return bool(kinked(FlatProblem(problem, ravel(x, "x")[1], ravel(y, "y")[1]), x.reshape(-1), y.reshape(-1)).any())


# y* of each is on a kink for all x nearby: g, x, y*, dy*/dx.
PINNED: dict[str, tuple[Objective, float, float, float]] = {
    "abs, met by its convention": (lambda x, y: (y - x).abs().sum() + (y - x / 3).square().sum() / 2, 0.0, 0.0, 1.0),
    "abs": (lambda x, y: (y - x).abs().sum() + (y - 3 * x).square().sum() / 2, 0.4, 0.4, 1.0),
    "abs of abs": (lambda x, y: ((y - x).abs() - 1).abs().sum() + (y + 1).square().sum() / 2, 0.5, -0.5, 1.0),
    "maximum": (lambda x, y: torch.maximum((y - 1).square(), (y + x).square()).sum(), 0.3, 0.35, -0.5),
    "relu": (lambda x, y: 2 * (y - x).relu().sum() + (y - 2 * x - 0.5).square().sum() / 2, 0.3, 0.3, 1.0),
    "minimum": (lambda x, y: (y - x / 2).square().sum() / 2 - 2 * torch.minimum(y, x).sum(), 0.3, 0.3, 1.0),
    "clamp": (lambda x, y: 2 * y.clamp(min=x[0]).sum() + (y - 2 * x - 0.7).square().sum() / 2, 0.3, 0.3, 1.0),
    "norm": (lambda x, y: (y - x).norm() + (y - 3 * x).square().sum() / 8, 0.4, 0.4, 1.0),
    "leaky": (
        lambda x, y: 3 * torch.nn.functional.leaky_relu(y - x, 0.1).sum() + (y - 2 * x - 0.7).square().sum() / 2,
        0.3,
        0.3,
        1.0,
    ),
}


@pytest.mark.parametrize("name", PINNED)
def test_a_kink_at_the_inner_solution_fails_whoever_differentiates_g(name: str) -> None:
    g, x, y, slope = PINNED[name]
    problem, x_, y_ = BilevelProblem(f, g), vector(x), vector(y)
    assert at_kink(g, x_, y_)
    exact = ClosedForm(lambda x: y + slope * (x - x_))
    for estimator in (AID(exact, CG()), AID(exact, Dense())):
        found = hypergradient(problem, x_, y_, estimator=estimator, throw=False)
        statuses = [report.status for report in found.reports]
        assert Status.kink in statuses or Status.nonfinite in statuses  # as the derivatives of a norm at zero are
    for inner in (exact, LBFGS(1e-9)):  # what sees Phi by values is right
        found = hypergradient(problem, x_, y_, estimator=FiniteDifference(inner, step=1e-4), throw=False)
        assert float(found.grad) == pytest.approx(slope * (y - 3), rel=1e-6)
    found = hypergradient(problem, x_, y_, estimator=ESJ(exact, directions=1), throw=False)
    assert float(found.grad) == pytest.approx(slope * (y - 3), rel=1e-6)
    assert Status.one_sided not in [report.status for report in found.reports]


@pytest.mark.parametrize("name", [name for name in estimators() if name != "first-order"])
def test_no_name_is_successful_and_wrong_where_y_is_held_by_a_kink(name: str) -> None:
    for case in ("abs, met by its convention", "maximum"):
        if case == "maximum" and name.startswith(("itd", "one-step")):
            continue  # they take all their steps to say that they do not arrive
        g, x, y, slope = PINNED[case]
        found = hypergradient(BilevelProblem(f, g), vector(x), vector(y), estimator=name, throw=False)
        if found.status.ok:
            assert name in ("esj", "finite-difference")
            assert float(found.grad) == pytest.approx(slope * (y - 3), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", PINNED)
def test_what_differentiates_nothing_answers_where_kinks_hold_y(name: str, dtype: torch.dtype) -> None:
    g, x, y, slope = PINNED[name]
    for estimator in ("finite-difference", "esj", "auto")[: 3 if dtype == torch.float64 else 2]:
        start = vector(y + 0.1).to(dtype)
        found = hypergradient(BilevelProblem(f, g), vector(x).to(dtype), start, estimator=estimator)
        assert float(found.grad) == pytest.approx(slope * (y - 3), rel=1e-6 if dtype == torch.float64 else 1e-4)


@given(st.integers(0, 10**6), st.integers(2, 4))
@settings(max_examples=15, deadline=None)
def test_y_is_held_where_zero_is_in_the_hull_of_gradients_around_it_and_nowhere_else(seed: int, q: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, c = torch.randn(2, q, q, generator=generator, dtype=torch.float64)
    objective = InnerObjective(lambda y: (a @ y).abs().sum() + c[0] @ y)
    y, weights = torch.zeros(q, dtype=torch.float64), torch.linalg.solve(a.T, -c[0])  # 0 in A'[-1, 1]^q + c
    stuck = Solved(y, (Status.line_search_failed,), torch.ones(()), 3)
    inside = float(weights.abs().max()) <= 1
    assert (held(objective, stuck, 1e-8).status is Status.successful) is inside
    assert held(objective, stuck, None).status is Status.line_search_failed
    beside = Solved(y + 1e-3, (Status.line_search_failed,), torch.ones(()), 3)
    assert held(objective, beside, 1e-8).status is Status.line_search_failed


def test_the_refusal_names_the_cause_and_what_to_do() -> None:
    g, x, _, _ = PINNED["abs"]
    with pytest.raises(BilevelError, match=r"kink at the inner solution.*prox="):
        hypergradient(BilevelProblem(f, g), vector(x), vector(0.0))


def test_a_kink_is_looked_for_in_the_first_estimate_of_a_run_only() -> None:
    g, x, y, _ = PINNED["abs, met by its convention"]
    problem, exact = BilevelProblem(f, g), AID(ClosedForm(lambda x: x), CG())
    calls = []

    def counted(x: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        return g(x, y)

    assert hypergradient(problem, vector(x), vector(y), estimator=exact, throw=False).status is Status.kink
    late = Start(vector(y), count=1)
    assert hypergradient(problem, vector(x), vector(y), estimator=exact, start=late).status.ok
    found = hypergradient(BilevelProblem(f, counted), vector(x), vector(y), estimator=exact, start=late)
    assert len(calls) == found.stats.gradients


# Nothing is wrong with these: g, x, y*.
def huber(width: float) -> Objective:
    def g(x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.huber_loss(y, x / 2, reduction="sum", delta=width) + (y - x).square().sum() / 20

    return g


SCALES = vector(1.0, 1e8)
HARMLESS: dict[str, tuple[Objective, Tensor]] = {
    "steep Huber": (huber(1e-3), vector(1.0)),
    "steep softplus": (
        lambda x, y: torch.nn.functional.softplus(y - x, beta=50).sum() + (y - 0.9 * x).square().sum() / 2,
        vector(1.0),
    ),
    "ill-conditioned": (lambda x, y: (SCALES * (y - x).square()).sum() / 2, vector(0.3, 0.7)),
    "tiny curvature": (lambda x, y: 1e-12 * (y - x).square().sum(), vector(0.3, 0.7)),
    "large constants": (lambda x, y: (y - x - 1e6).square().sum() + 1e6, vector(0.3, 0.7)),
    "kink nearby": (lambda x, y: (y - x).abs().sum() + (y - x - 1 - 1e-5).square().sum() / 2, vector(0.3)),
    "kink along which y* moves": (lambda x, y: (y - x).abs().sum() + (y - x).square().sum(), vector(0.4)),
    "bend along which y* moves": (lambda x, y: (y - x).relu().square().sum() + (y - x).square().sum(), vector(1.0)),
    "derivative that is zero": (lambda x, y: (y - x.square()).square().sum(), vector(0.0)),
    "quartic": (lambda x, y: (y - x).pow(4).sum() + (y - 2 * x).square().sum(), vector(0.5)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", HARMLESS)
def test_a_smooth_g_and_a_harmless_kink_are_not_refused(name: str, dtype: torch.dtype) -> None:
    g, x = HARMLESS[name]
    double = hypergradient(BilevelProblem(f, g), x, x.clone(), estimator=AID(LBFGS(1e-12), Dense()), throw=False)
    assert Status.kink not in [report.status for report in double.reports]
    rounded = double.y.to(dtype)
    if not (name == "kink nearby" and dtype == torch.float32):  # nearer than its steps are long
        assert not at_kink(lambda x, y: g(x, y).to(dtype), x.to(dtype), rounded)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_relu_network_off_its_kinks_is_not_refused(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 30), torch.nn.ReLU(), torch.nn.Linear(30, 30), torch.nn.ReLU())
    module = functional(torch.nn.Sequential(net, torch.nn.Linear(30, 1)).to(dtype))
    inputs = torch.randn(200, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)

    def g(x: Tensor, y: Any) -> Tensor:
        decay = sum(leaf.square().sum() for leaf in y.values())
        loss: Tensor = (module(y, inputs) - inputs[:, :1].sin()).square().mean() + x.exp() * decay
        return loss

    problem = BilevelProblem(lambda x, y: module(y, inputs).square().mean(), g)
    x, start = torch.tensor(-1.0, dtype=dtype), dict(module.params)
    for steps in (0, 30):
        aid = AID(Iterate(GradientDescent(0.05), max_steps=steps), CG(max_steps=3, rtol=0.0))
        found = hypergradient(problem, x, start, estimator=aid, throw=False)
        assert Status.kink not in [report.status for report in found.reports]


def test_a_kink_of_the_hessian_on_which_y_lies_is_found_only_where_it_matters() -> None:
    def hinge(x: Tensor, y: Tensor) -> Tensor:
        return (y - 1).relu().square().sum() + (y - x).square().sum()

    assert at_kink(hinge, vector(1.0), vector(1.0))  # y* = x below 1, and (1 + x) / 2 above
    assert not at_kink(hinge, vector(1.0001), vector(1.00005))
    assert not at_kink(hinge, vector(0.9999), vector(0.9999))
    for estimator in (FiniteDifference(LBFGS(1e-10), step=1e-4), ESJ(LBFGS(1e-10), directions=1)):
        found = hypergradient(BilevelProblem(f, hinge), vector(1.0), vector(0.0), estimator=estimator, throw=False)
        assert Status.one_sided in {report.status for report in found.reports}
        near = hypergradient(BilevelProblem(f, hinge), vector(1.01), vector(0.0), estimator=estimator)
        assert float(near.grad) == pytest.approx((1.005 - 3) / 2, rel=1e-3)


def test_slopes_that_vanish_at_a_minimum_are_not_a_kink() -> None:
    problem = BilevelProblem(f, lambda x, y: (y - x).square().sum() / 2)
    for estimator in (FiniteDifference(LBFGS(1e-10)), ESJ(LBFGS(1e-10), directions=1)):
        for x in (3.0, 3.0 + 1e-7):
            assert hypergradient(problem, vector(x), vector(0.0), estimator=estimator).status.ok


def test_tasks_are_judged_one_by_one() -> None:
    def g(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return t * (y - x).abs().sum() + (y - x / 3 - (1 - t)).square().sum() / 2

    problem = BilevelProblem(lambda x, y, t: f(x, y), g, tasks=True)
    tasks, exact = vector(1.0, 0.0, 1.0), ClosedForm(lambda x, t: torch.where(t > 0, x, x / 3 + 1))
    for size in (None, 2):
        found = hypergradient(
            problem, vector(0.0), vector(0.0), estimator=AID(exact, CG()), data=tasks, chunk_size=size, throw=False
        )
        assert found.status is Status.kink
        assert [status.ok for status in found.reports[-1].statuses] == [False, True, False]


def test_differences_of_gradients_across_a_kink_are_what_holds_y() -> None:
    g, x, y, slope = PINNED["abs, met by its convention"]
    aid = AID(ClosedForm(lambda x: x), Dense(), products=FiniteDifferences())
    found = hypergradient(BilevelProblem(f, g), vector(x), vector(y), estimator=aid)
    assert float(found.grad) == pytest.approx(slope * (y - 3), rel=1e-4)


def test_a_penalty_at_a_kink_is_refused_though_it_takes_no_second_derivative() -> None:
    g, x, y, _ = PINNED["abs, met by its convention"]
    found = hypergradient(
        BilevelProblem(f, g), vector(x), vector(y), estimator=Penalty(LBFGS(1e-10), weight=1e3), throw=False
    )
    assert found.status is Status.kink


def test_unrolled_steps_that_stay_at_a_kink_are_refused() -> None:
    g, x, y, _ = PINNED["abs, met by its convention"]
    itd = ITD(Iterate(GradientDescent(0.5), max_steps=50))
    assert hypergradient(BilevelProblem(f, g), vector(x), vector(y), estimator=itd, throw=False).status is Status.kink
    steps = BilevelProblem(f, g, iterative=True)  # whose y is what the steps make of it
    assert hypergradient(steps, vector(x), vector(y), estimator=itd).status.ok


@pytest.mark.parametrize("name", ["abs, met by its convention", "abs", "maximum", "minimum"])
def test_auto_is_not_taken_in_by_estimators_that_agree(name: str) -> None:
    g, x, y, slope = PINNED[name]
    found = hypergradient(BilevelProblem(f, g), vector(x), vector(0.0), estimator="auto", throw=False)
    assert "g has a kink at y*" in found.note
    assert float(found.grad) == pytest.approx(slope * (y - 3), rel=1e-6)


def test_compare_measures_against_differences_where_g_has_a_kink() -> None:
    g, x, y, _ = PINNED["abs, met by its convention"]
    found = compare(BilevelProblem(f, g), vector(x), vector(y), memory=False)
    assert found.reference == "central differences of Phi, as g has a kink at y*"
    assert found.norm == pytest.approx(3.0, rel=1e-9)
    assert found.reference_error < 1e-6
    assert {row.name for row in found.rows if row.applies} == {"esj", "finite-difference"}
    assert all((row.relative or 0.0) < 1e-6 for row in found.rows if row.applies)


KINKS_OF_PHI: dict[str, tuple[Objective, Objective, Tensor]] = {
    "of f": (lambda x, y: (y - 1).abs().sum(), lambda x, y: (y - x).square().sum() / 2, vector(1.0)),
    "of y* in x": (f, lambda x, y: (y - x.abs()).square().sum() / 2, vector(0.0)),
    "of the Hessian": (f, lambda x, y: (y - 1).relu().square().sum() + (y - x).square().sum(), vector(1.0)),
}


@pytest.mark.parametrize("name", KINKS_OF_PHI)
def test_where_phi_has_a_kink_nothing_is_measured_and_the_cause_is_said(name: str) -> None:
    outer, g, x = KINKS_OF_PHI[name]
    problem = BilevelProblem(outer, g)
    with pytest.raises(ValueError, match=r"`Auto` does not apply.*Phi has a kink at x"):
        hypergradient(problem, x, vector(0.5), estimator="auto")
    with pytest.raises(BilevelError, match="Phi has a kink at x"):
        compare(problem, x, vector(0.5), memory=False)
    assert not hypergradient(problem, x, vector(0.5), estimator="finite-difference", throw=False).status.ok


@given(st.integers(0, 10_000), st.floats(0.05, 0.9), st.sampled_from([1, 3]))
@settings(max_examples=6, deadline=None)
def test_a_random_point_held_by_an_absolute_value_is_a_kink_and_one_beside_it_is_not(
    seed: int, fraction: float, q: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randn(q, generator=generator, dtype=torch.float64)

    def g(x: Tensor, y: Tensor) -> Tensor:  # the slope of the rest at y = x is beyond that of |y - x|, or not
        return (y - x).abs().sum() + (y - 2 * x + shift).square().sum() / 2

    held = shift + (1 - 2 * fraction) * torch.ones(q)  # x - shift is inside of [-1, 1]
    assert at_kink(g, held, held)
    free = shift + 1 + fraction
    y = 2 * free - shift - 1
    assert not at_kink(g, free, y)


A = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGET = A @ vector(3.0, -2.0, 0.01)


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    return (A @ y - TARGET).square().sum() / 2


def test_a_lasso_with_its_term_in_prox_is_sound_and_with_an_absolute_value_in_g_it_is_not() -> None:
    x, y0 = torch.tensor(0.1, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    sound = check(BilevelProblem(f, least_squares, prox=lambda x: L1(x.exp())), x, y0)
    assert sound.ok, str(sound)
    assert [name for name, why in sound.estimators.items() if why] == ["first-order"]
    inside = check(BilevelProblem(f, lambda x, y: least_squares(x, y) + x.exp() * y.abs().sum()), x, y0)
    assert "smooth at y*" in [v.name for v in inside.verdicts if v.outcome.name == "failed"]
    assert all(inside.estimators.values())  # none: differences have no y* either
    assert "prox=" in inside.estimators["aid-cg"] and "prox=" in inside.estimators["finite-difference"]
    light = torch.tensor(-9.0, dtype=torch.float64)  # all entries of y* are off zero
    assert check(BilevelProblem(f, lambda x, y: least_squares(x, y) + x.exp() * y.abs().sum()), light, y0).ok


@pytest.mark.parametrize("name", ["itd"])
def test_a_start_on_the_kink_is_no_tolerance(name: str) -> None:
    """The gradient jumps as x moves off y0 = x: that is not how large it is."""

    def g(x: Tensor, y: Tensor) -> Tensor:
        return ((y - x).relu() + (x - y).relu() + (y - 3 * x).square() / 2).sum()

    x = vector(-0.219)
    assert not hypergradient(BilevelProblem(f, g), x, x, estimator=name, throw=False).status.ok
