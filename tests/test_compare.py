"""compare measures every estimator against a certified reference; auto picks the cheapest that is good enough."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import final

import pytest
import torch
from cases import distance, flat, point
from torch import Tensor

from bilevel import (
    AID,
    ITD,
    AbstractEstimator,
    Auto,
    BilevelError,
    BilevelProblem,
    Constants,
    check,
    compare,
    estimators,
    hypergradient,
    minimize,
)
from bilevel._estimate import FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel.diagnostics.memory import peak_memory
from bilevel.inner_problems import Iteration
from bilevel.problems.quadratic import quadratic
from bilevel.prox import L1
from bilevel.solvers.cg import CG
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.lbfgs import LBFGS
from bilevel.solvers.own_steps import OwnSteps

INSTANCE = quadratic(p=3, q=5, cross=0.5, seed=2)
X = point(INSTANCE)


def test_errors_are_those_against_the_closed_form() -> None:
    assert INSTANCE.gradient is not None
    h = INSTANCE.gradient(X)
    found = compare(INSTANCE.problem, X, INSTANCE.y0, memory=False)
    assert found.norm == pytest.approx(float(h.norm()), rel=1e-8)
    assert ["implicit", *(row.name for row in found.rows)] == list(estimators())  # which stands for another
    for row in found.rows:
        if row.name == "first-order":  # of a start that depends on x
            assert not row.applies
            continue
        truth = distance(hypergradient(INSTANCE.problem, X, INSTANCE.y0, estimator=row.name).grad, h)
        assert row.relative == pytest.approx(truth, rel=0.05, abs=1e-9)


def test_certificates_are_above_the_errors() -> None:
    assert INSTANCE.constants is not None
    found = compare(
        INSTANCE.problem, X, INSTANCE.y0, constants=INSTANCE.constants, budgets=[10, 100, 1000], memory=False
    )
    assert len(found.rows) == 3 * (len(estimators()) - 1)
    for row in found.rows:
        if row.applies:
            assert row.certificate is not None
            assert row.certificate >= (row.error or 0.0) - found.reference_error
    assert found.reference_error < 1e-8


def test_a_larger_budget_costs_more_and_errs_less() -> None:
    found = compare(
        INSTANCE.problem, X, INSTANCE.y0, estimators=["itd", "aid-neumann"], budgets=[20, 2000], memory=False
    )
    for name in ("itd", "aid-neumann"):
        small, large = (row for row in found.rows if row.name == name)
        assert (large.cost or 0) > (small.cost or 0)
        assert (large.error or 0.0) < 0.1 * (small.error or 0.0)


def test_the_reason_is_given_where_an_estimator_does_not_apply() -> None:
    problem = BilevelProblem(lambda x, y: y.square().sum(), lambda x, y: (y - 1).square().sum(), init=lambda x: 2 * x)
    found = compare(problem, torch.ones(2), torch.zeros(2), memory=False)
    reasons = {row.name: row.reason for row in found.rows if not row.applies}
    assert "init" in reasons["aid-cg"]
    assert "penalty" in reasons
    assert "itd" not in reasons
    assert found.reference == "central differences of Phi"
    assert "not aid-cg:" in str(found)


def test_operations_without_a_second_derivative_leave_first_order_estimators() -> None:
    problem = BilevelProblem(
        lambda x, y: (y - 2).square().sum(),
        lambda x, y: torch.cdist(y[None], x[None]).square().sum() + y.square().sum(),
    )
    found = compare(problem, torch.ones(2), torch.zeros(2), memory=False)
    applies = {row.name for row in found.rows if row.applies}
    assert applies == {"esj", "penalty", "finite-difference"}
    for row in found.rows:
        if row.applies:
            assert (row.relative or 0.0) < 1e-4


def test_own_estimators_keep_their_labels() -> None:
    mine = {"three steps": AID(LBFGS(1e-10), CG(rtol=0.0, max_steps=3)), "tight": AID(LBFGS(1e-10), CG(rtol=1e-12))}
    found = compare(INSTANCE.problem, X, INSTANCE.y0, estimators=mine, memory=False)
    assert [row.name for row in found.rows] == ["three steps", "tight"]
    assert (found.rows[1].relative or 0.0) < 1e-9 < (found.rows[0].relative or 0.0)


def test_a_comparison_is_plain_data_and_a_table() -> None:
    found = compare(INSTANCE.problem, X, INSTANCE.y0, estimators=["aid-cg", "esj"], memory=False)
    content = json.loads(json.dumps(found.as_dict()))
    assert content["rows"][0]["stats"]["cross_products"] == 1
    assert str(found).splitlines()[1].split()[0] == "estimator"


def test_the_plot_has_a_line_for_each_estimator() -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    figure = figure_module.Figure()
    found = compare(INSTANCE.problem, X, INSTANCE.y0, estimators=["aid-cg", "itd"], budgets=[10, 100], memory=False)
    found.plot(figure)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["aid-cg", "itd"]


def test_peak_memory_counts_what_is_held_at_once() -> None:
    kilobyte = 128  # numbers in float64

    def held_together() -> list[Tensor]:
        return [torch.zeros(kilobyte * 100) for _ in range(4)]

    def one_after_the_other() -> None:
        for _ in range(4):
            torch.zeros(kilobyte * 100)

    assert peak_memory(held_together, torch.device("cpu"))[1] == pytest.approx(4 * 100 * 1024, rel=0.1)
    assert peak_memory(one_after_the_other, torch.device("cpu"))[1] == pytest.approx(100 * 1024, rel=0.1)


def test_unrolling_holds_more_than_checkpointing() -> None:
    A = torch.randn(20, 50, generator=torch.Generator().manual_seed(0)) / 10

    def g(x: Tensor, y: Tensor) -> Tensor:
        return (A @ y).cosh().log().sum() + (y - x.sum()).square().sum()

    inner = Iterate(GradientDescent(0.1), max_steps=400)
    both = {"plain": ITD(inner), "checkpointed": ITD(inner, checkpoint=True)}
    problem = BilevelProblem(lambda x, y: y.square().sum(), g)
    plain, checkpointed = (row.memory for row in compare(problem, X, torch.zeros(50), estimators=both).rows)
    assert plain is not None
    assert checkpointed is not None
    assert plain > 10 * checkpointed


@pytest.mark.parametrize("relative", [0.3, 1e-3, 1e-6])
def test_auto_meets_its_target(relative: float) -> None:
    assert INSTANCE.gradient is not None
    found = hypergradient(INSTANCE.problem, X, INSTANCE.y0, estimator=Auto(relative))
    assert distance(found.grad, INSTANCE.gradient(X)) <= relative
    assert "measured error" in found.note


def test_auto_certifies_where_constants_are_known() -> None:
    assert INSTANCE.gradient is not None
    wish = Auto(relative_error=0.0, target_error=1e-3, constants=INSTANCE.constants)
    found = hypergradient(INSTANCE.problem, X, INSTANCE.y0, estimator=wish)
    assert float((flat(found.grad) - flat(INSTANCE.gradient(X))).norm()) <= 1e-3
    assert "certified error" in found.note


def test_auto_takes_less_for_less() -> None:
    costs = []
    for relative in (0.3, 1e-8):
        stats = hypergradient(INSTANCE.problem, X, INSTANCE.y0, estimator=Auto(relative)).stats
        costs.append(stats.gradients + stats.hvps + stats.cross_products)
    assert costs[0] < costs[1]


def test_auto_is_chosen_once_in_minimize() -> None:
    solution = minimize(
        INSTANCE.problem, INSTANCE.x0, INSTANCE.y0, estimator="auto", outer=GradientDescent(0.01), max_steps=3
    )
    assert solution.estimate.note.startswith("chosen")


def test_auto_refuses_problems_in_which_the_number_of_steps_matters() -> None:
    problem = BilevelProblem(lambda x, y: y.square().sum(), lambda x, y: (y - 1).square().sum(), init=lambda x: 2 * x)
    with pytest.raises(ValueError, match="part of the problem"):
        hypergradient(problem, torch.ones(2), torch.zeros(2), estimator="auto")


def test_a_senseless_wish_is_refused() -> None:
    with pytest.raises(ValueError, match="one of them positive"):
        Auto(relative_error=0.0)


def test_without_a_reference_there_is_no_comparison() -> None:
    unbounded = BilevelProblem(lambda x, y: y.square().sum(), lambda x, y: -(y - x).square().sum())
    with pytest.raises(BilevelError, match="reference"):
        compare(unbounded, torch.ones(2), torch.zeros(2), memory=False)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no estimator 'cg'"):
        compare(INSTANCE.problem, X, INSTANCE.y0, estimators=["cg"], memory=False)


ITERATION = BilevelProblem(
    lambda x, y: (y - 1).square().sum(), inner=Iteration(lambda x, y, k: y / 2 + x, steps=3)
)  # y_3 = y_0 / 8 + 7 x / 4
AT, FROM = torch.tensor([1.0, -2.0]).double(), torch.zeros(2).double()
OF_ITERATION = 2 * 7 / 4 * (7 / 4 * AT - 1)


def test_an_iteration_without_a_g_is_compared_with_differences() -> None:
    found = compare(ITERATION, AT, FROM, constants=Constants(mu=1.0), memory=False)
    assert found.norm == pytest.approx(float(OF_ITERATION.norm()), rel=1e-8)
    rows = {row.name: row for row in found.rows}
    assert (rows["itd"].relative or 0.0) < 1e-8
    assert rows["itd"].certificate is None  # certificates are of minimizers
    assert all(row.applies or "` does not apply: " in row.reason for row in found.rows)
    (row,) = compare(ITERATION, AT, FROM, estimators={"mine": ITD(OwnSteps())}, memory=False).rows
    assert (row.relative or 0.0) < 1e-8


def test_auto_takes_the_steps_of_an_iteration_without_a_g() -> None:
    found = hypergradient(ITERATION, AT, FROM, estimator="auto")
    assert distance(found.grad, OF_ITERATION) < 0.01
    with pytest.raises(ValueError, match="Leave the constants out"):
        hypergradient(ITERATION, AT, FROM, estimator=Auto(constants=Constants(mu=1.0)))
    unmet = hypergradient(ITERATION, AT, FROM, estimator=Auto(relative_error=1e-30))
    assert "taking itd" in unmet.note


@pytest.mark.parametrize("name", [name for name in estimators() if not name.startswith(("itd", "one", "esj", "fin"))])
def test_names_that_need_more_than_steps_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"^`\w+` does not apply: "):
        hypergradient(ITERATION, AT, FROM, estimator=name)


def test_a_non_smooth_problem_is_measured_against_its_own_implicit_gradient() -> None:
    problem = BilevelProblem(
        lambda x, y: y.square().sum() / 2, lambda x, y: (y - 3).square().sum() / 2, prox=lambda x: L1(x)
    )  # y* = 3 - x
    found = compare(problem, AT[0], FROM, estimators=["aid-cg", "itd"], memory=False)
    assert "of the inner problem" in found.reference
    assert found.norm == pytest.approx(4.0, rel=1e-8)
    assert all((row.relative or 0.0) < 1e-6 for row in found.rows if row.applies)


def f(x: Tensor, y: Tensor) -> Tensor:
    return (y - 3).square().sum() / 2


def g(x: Tensor, y: Tensor) -> Tensor:
    return (y - x).square().sum() / 2


KINDS = {
    "smooth": BilevelProblem(f, g),
    "composite": BilevelProblem(f, g, prox=lambda x: L1(0.1)),
    "steps of its own": BilevelProblem(f, inner=Iteration(lambda x, y, k: y - (y - x) / 2, steps=3)),
    "a start only": BilevelProblem(f, lambda x, y: y.square().sum() / 2, init=lambda x: x),
    "x detached": BilevelProblem(f, lambda x, y: g(x.detach(), y)),
    "y without x": BilevelProblem(lambda x, y: x.square().sum() + y.sum(), lambda x, y: (y - 1).square().sum()),
}


@pytest.mark.parametrize("problem", KINDS.values(), ids=KINDS.keys())
def test_compare_and_check_agree_on_what_applies(problem: BilevelProblem) -> None:
    x, y0 = torch.tensor([0.7, 0.4]), torch.zeros(2)
    names = ["aid-cg", "aid-minres", "kkt", "first-order", "esj", "one-step", "penalty", "implicit"]
    applies = {name for name, why in check(problem, x, y0).estimators.items() if not why}
    rows = compare(problem, x, y0, estimators=names, memory=False).rows
    assert {row.name for row in rows if row.error is not None} == applies & set(names)
    assert all(row.reason for row in rows if row.error is None)


def test_an_estimator_that_fails_costs_its_own_row_and_no_other() -> None:
    @final
    @dataclass(frozen=True)
    class Failing(AbstractEstimator):
        def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
            raise RuntimeError("of its own")

    mixed: dict[str, AbstractEstimator] = {"failing": Failing(), "aid": AID(LBFGS(1e-10), CG(1e-10))}
    failed, found = compare(BilevelProblem(f, g), torch.ones(2), torch.zeros(2), estimators=mixed, memory=False).rows
    assert "of its own" in failed.reason
    assert failed.error is None
    assert found.relative is not None and found.relative < 1e-6
