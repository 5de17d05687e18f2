"""How a run ended: converged, out of steps, stuck, stopped, failed; and the best iterate that it saw."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import bits, distance
from torch import Tensor

from bilevel import AID, BilevelError, BilevelProblem, Box, Estimate, Record, Simplex, Solution, Split, Status, minimize
from bilevel.algorithms import SOBA, Descent
from bilevel.outer.checkpoint import begun_with
from bilevel.outer.words import in_words
from bilevel.solvers import CG, LBFGS, Adam, GradientDescent, Iterate, QuasiNewton, ScipyMinimize

AID_CG = AID(LBFGS(1e-10), CG(1e-10))
CURVATURES = torch.tensor([1.0, 4.0, 9.0])
PROBLEM = BilevelProblem(
    lambda x, y: (CURVATURES * (y - 1).square()).sum() / 2, lambda x, y: (y - x).square().sum() / 2
)  # x* = 1
ZERO = torch.zeros(3)
OUTERS: dict[str, dict[str, Any]] = {
    "quasi-newton": {"outer": QuasiNewton(), "estimator": AID_CG},
    "default": {},
    "adam": {"outer": Adam(0.05), "estimator": AID_CG},
    "gradient descent": {"outer": GradientDescent(0.2), "estimator": AID_CG},
    "scipy": {"outer": ScipyMinimize(), "estimator": AID_CG},
    "soba": {"algorithm": SOBA(inner_step=0.5, outer_step=0.03)},
}
OWN = ("quasi-newton", "default", "scipy")  # have a tolerance of their own


def ended(outer: str, **options: Any) -> Solution:
    """The solution, returned or raised: both are the same."""
    arguments = {**OUTERS[outer], **options}
    quiet = minimize(PROBLEM, ZERO, ZERO, **arguments, throw=False)
    if not quiet.failed:
        loud = minimize(PROBLEM, ZERO, ZERO, **arguments)
    else:
        with pytest.raises(BilevelError) as caught:
            minimize(PROBLEM, ZERO, ZERO, **arguments)
        loud = caught.value.partial
        assert caught.value.status is quiet.status
    assert (loud.status, loud.converged, loud.failed) == (quiet.status, quiet.converged, quiet.failed)
    assert bits((loud.x, loud.best.x)) == bits((quiet.x, quiet.best.x))
    assert quiet.failed == (not quiet.converged and "tol" in options)
    return quiet


@pytest.mark.parametrize("outer", OUTERS)
def test_a_tolerance_that_is_met_is_convergence(outer: str) -> None:
    pytest.importorskip("scipy")
    found = ended(outer, tol=1e-2, max_steps=600)
    assert (found.status, found.converged) == (Status.successful, True)
    assert found.history[-1].grad_norm <= 1e-2
    assert found.message == ""


@pytest.mark.parametrize("outer", OUTERS)
def test_a_tolerance_that_is_missed_is_a_failure_and_the_steps_were_too_few(outer: str) -> None:
    pytest.importorskip("scipy")
    found = ended(outer, tol=1e-9, max_steps=2)
    assert (found.status, found.converged) == (Status.max_steps, False)
    assert "Raise `max_steps`" in found.message


@pytest.mark.parametrize("outer", OUTERS)
def test_steps_that_are_used_up_without_a_tolerance_are_neither_success_nor_failure(outer: str) -> None:
    pytest.importorskip("scipy")
    found = ended(outer, max_steps=2)
    assert (found.status, found.converged, found.failed) == (Status.steps_used_up, False, False)
    assert found.status.ok


@pytest.mark.parametrize("outer", OUTERS)
def test_without_a_tolerance_only_methods_that_have_their_own_converge(outer: str) -> None:
    pytest.importorskip("scipy")
    found = ended(outer, max_steps=100)
    assert found.converged == (outer in OWN)
    assert found.status is (Status.successful if outer in OWN else Status.steps_used_up)
    if outer in OWN:
        assert distance(found.x, torch.ones(3)) <= 1e-4
        assert len(found.history) < 30


def test_the_default_is_the_quasi_newton_method_only_for_one_function_that_is_known_accurately() -> None:
    for estimator in ("implicit", "aid-cg", "aid-dense", "itd", "kkt", "auto"):
        assert minimize(PROBLEM, ZERO, ZERO, estimator=estimator, max_steps=60).converged or estimator == "auto"
    for estimator in ("one-step", "itd-truncated", "esj", "penalty", "aid-nystrom"):
        found = minimize(PROBLEM, ZERO, ZERO, estimator=estimator, max_steps=2)
        assert found.status is Status.steps_used_up
        assert found.x.abs().max() <= 0.11  # two steps of Adam
    streamed = BilevelProblem(lambda x, y, d: PROBLEM.f(x, y) + 0 * d.sum(), lambda x, y, d: PROBLEM.g(x, y))
    batch = torch.ones(1)
    assert minimize(streamed, ZERO, ZERO, data=batch).converged
    assert minimize(streamed, ZERO, ZERO, data=Split(batch, (batch,)[0])).converged
    for data in ([batch], lambda step: batch, Split([batch], batch)):
        assert minimize(streamed, ZERO, ZERO, data=data, max_steps=60).status is Status.steps_used_up


def test_a_method_that_can_go_no_further_says_so_and_raises_only_where_a_tolerance_was_given() -> None:
    kink = BilevelProblem(lambda x, y: 1 + y.abs().sum(), PROBLEM.g)
    found = minimize(kink, ZERO + torch.tensor([0.7, -0.3, 0.2]), ZERO, estimator=AID_CG)
    assert not found.converged and not found.failed
    assert found.status in (Status.line_search_failed, Status.stagnated, Status.steps_used_up)
    assert found.value < 1.1
    assert found.best.value <= found.value
    with pytest.raises(BilevelError):
        minimize(kink, ZERO + torch.tensor([0.7, -0.3, 0.2]), ZERO, estimator=AID_CG, tol=1e-6)


def test_a_failed_estimate_is_a_failure_whatever_the_tolerance() -> None:
    hasty = AID(Iterate(GradientDescent(0.1), max_steps=3, tol=1e-9), CG())
    for outer in (None, Adam(0.05), QuasiNewton(), GradientDescent(0.1)):
        with pytest.raises(BilevelError) as caught:
            minimize(PROBLEM, ZERO + 2, ZERO, estimator=hasty, outer=outer, max_steps=5)
        partial = caught.value.partial
        assert (partial.status, partial.converged, partial.failed) == (Status.max_steps, False, True)
        assert torch.equal(partial.best.x, ZERO + 2)
        found = minimize(PROBLEM, ZERO + 2, ZERO, estimator=hasty, outer=outer, max_steps=5, throw=False)
        assert found.failed and not found.converged


def test_a_callback_that_ends_the_run_is_told_from_convergence() -> None:
    pytest.importorskip("scipy")
    for outer in OUTERS.values():
        found = minimize(PROBLEM, ZERO, ZERO, **outer, callback=lambda record, _: record.step == 1)
        assert (found.status, found.converged, found.failed) == (Status.stopped, False, False)


def test_adaptive_accuracy_converges_where_it_is_certified() -> None:
    found = minimize(PROBLEM, ZERO, ZERO, accuracy="adaptive", outer=GradientDescent(0.2), tol=1e-2)
    assert found.converged
    assert found.estimate.bound is not None
    assert float(found.estimate.grad.norm()) + found.estimate.bound <= 1e-2


# The best iterate


def test_the_best_iterate_has_the_lowest_value_of_all() -> None:
    pytest.importorskip("scipy")
    for outer in (Adam(0.05), GradientDescent(0.22), QuasiNewton(), ScipyMinimize()):
        xs: list[Tensor] = []

        def keep(record: Record, estimate: Estimate, into: list[Tensor] = xs) -> None:
            into.append(estimate.x)

        found = minimize(PROBLEM, ZERO, ZERO, estimator=AID_CG, outer=outer, max_steps=15, callback=keep)
        values = [record.value for record in found.history]
        assert found.best.value == min(values)
        assert torch.equal(found.best.x, xs[found.best.step])
        assert found.best.grad_norm == found.history[found.best.step].grad_norm
        assert distance(found.best.y, found.best.x) <= 1e-6
        assert found.best.compared
    diverging = minimize(PROBLEM, ZERO, ZERO, estimator=AID_CG, outer=GradientDescent(0.3), max_steps=6)
    assert diverging.best.step == 0  # the value grows from there on
    assert torch.equal(diverging.best.x, ZERO)


def test_values_that_are_not_of_one_function_are_not_compared() -> None:
    streamed = BilevelProblem(lambda x, y, d: PROBLEM.f(x, y) + d.sum(), lambda x, y, d: PROBLEM.g(x, y))
    batches = [torch.tensor([5.0]), torch.tensor([-5.0]), torch.tensor([0.0])]  # the second looks best
    found = minimize(streamed, ZERO, ZERO, estimator=AID_CG, data=batches, max_steps=5)
    assert (found.best.step, found.best.compared) == (5, False)
    assert torch.equal(found.best.x, found.x)
    single = minimize(PROBLEM, ZERO, ZERO + 1, algorithm=SOBA(0.5, 0.05), max_steps=20)
    assert single.history[0].value == 0  # f at y0, which is not y*(x0)
    assert (single.best.step, single.best.compared) == (20, False)


def test_iterates_whose_estimate_failed_or_that_are_outside_do_not_count() -> None:
    """x = 0, 1, 2, 3, ...: f falls all the way, and is NaN beyond 2.5."""
    problem = BilevelProblem(lambda x, y: -y.sum() + 0 * (2.5 - x).sqrt().sum(), PROBLEM.g)
    with pytest.raises(BilevelError) as caught:
        minimize(problem, ZERO, ZERO, estimator=AID_CG, outer=GradientDescent(1.0))
    partial = caught.value.partial
    assert math.isnan(partial.value)
    assert partial.best.x.tolist() == [2.0, 2.0, 2.0]
    pytest.importorskip("scipy")
    boxed = minimize(PROBLEM, ZERO, ZERO, estimator=AID_CG, outer=ScipyMinimize(), constraint=Box(-1.0, 0.5))
    assert boxed.best.x.tolist() == [0.5, 0.5, 0.5]
    assert boxed.history[-1].grad_norm <= 1e-6  # that of the projected gradient


# Tolerances of scipy


@pytest.mark.parametrize("size", [1, 400])
def test_scipy_meets_a_tolerance_on_the_norm_of_many_entries(size: int) -> None:
    """A tolerance on the largest entry would end with a norm of up to twenty times as much."""
    pytest.importorskip("scipy")
    weights = torch.linspace(1.0, 30.0, size)
    problem = BilevelProblem(lambda x, y: (weights * (y - 1).square()).sum() / 2, PROBLEM.g)
    for tol in (1e-2, 1e-5):
        found = minimize(
            problem, torch.zeros(size), torch.zeros(size), estimator=AID_CG, outer=ScipyMinimize(), tol=tol
        )
        assert found.converged
        assert found.history[-1].grad_norm <= tol


# Records and earlier files


def test_the_status_of_a_record_is_a_status_and_plain_data_its_name() -> None:
    record = minimize(PROBLEM, ZERO, ZERO, max_steps=1).history[0]
    assert record.status is Status.successful
    assert record.as_dict()["status"] == "successful"
    assert Record.from_dict(record.as_dict()) == record
    old = {key: value for key, value in record.as_dict().items() if key != "rejected"}
    assert Record.from_dict(old) == record


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_runs_by_the_default_of_earlier_versions_are_resumed(version: int, tmp_path: Path) -> None:
    """Which was Adam; format 1 had no state by name, format 2 no best iterate."""
    file = tmp_path / "state.pt"
    whole = minimize(PROBLEM, ZERO, ZERO, outer=Adam(0.05), max_steps=9)
    minimize(PROBLEM, ZERO, ZERO, outer=Adam(0.05), max_steps=4, checkpoint=file)
    content = torch.load(file, weights_only=True)
    del content["best"]
    for record in content["history"]:
        del record["rejected"]
    if version == 1:
        content = {**content, **content.pop("state"), "format": 1}
        del content["calls"]
        content["settings"] = {**content["settings"], "outer": "Adam(step=0.05, beta1=0.9)"}
    torch.save(content, file)
    again = minimize(PROBLEM, ZERO, ZERO, max_steps=9, checkpoint=file, resume=True)
    assert bits(again.x) == bits(whole.x)
    assert again.status is Status.steps_used_up
    assert again.best.value == again.value
    assert begun_with(file, "outer", in_words({"outer": Adam(0.05)})["outer"])
    with pytest.raises(FileNotFoundError):
        minimize(PROBLEM, ZERO, ZERO, checkpoint=tmp_path / "none.pt", resume=True)


def test_a_run_by_the_default_is_resumed_by_it(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    whole = minimize(PROBLEM, ZERO, ZERO)
    minimize(PROBLEM, ZERO, ZERO, max_steps=3, checkpoint=file)
    again = minimize(PROBLEM, ZERO, ZERO, checkpoint=file, resume=True)
    assert again.converged
    assert bits((again.x, again.best.x)) == bits((whole.x, whole.best.x))
    assert [record.value for record in again.history] == [record.value for record in whole.history]


def test_a_minimizer_is_taken_by_descent_and_refused_nowhere_a_step_is_missing() -> None:
    found = minimize(PROBLEM, ZERO, ZERO, algorithm=Descent(AID_CG, QuasiNewton()), constraint=Simplex())
    assert found.converged
    assert float(found.x.sum()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="needs a step size"):
        Descent(AID_CG, GradientDescent())
