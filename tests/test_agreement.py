"""check and compare say the same of every estimator, on every kind of inner problem."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import PROBLEMS, point
from test_check import ITERATIONS, lasso
from test_inner_problems import FixedPoint
from torch import Tensor

from bilevel import BilevelProblem, Check, Outcome, Polytope, check, compare, estimators, hypergradient
from bilevel.inner_problems import Iteration

X, Y0 = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.2, 0.1]).double()
ROTATION = torch.tensor([[0.0, 0.5], [-0.4, 0.1]]).double()


def f(x: Tensor, y: Tensor) -> Tensor:
    return (y - 1).square().sum()


def near(x: Tensor, y: Tensor) -> Tensor:
    return (y - x).square().sum()


PARTLY = BilevelProblem(f, lambda x, y: near(x, y) + near(x.detach(), y))
STEPS_PARTLY = BilevelProblem(f, inner=Iteration(lambda x, y, k: y / 2 + x.detach() + x / 10, steps=3))
KINDS: dict[str, tuple[BilevelProblem, Any, Any]] = {
    "fixed point": (BilevelProblem(f, inner=FixedPoint(lambda x, y: ROTATION @ y + x.sin())), X, Y0),
    "composite": (lasso(0.0), torch.tensor(0.1, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)),
    "constrained": (BilevelProblem(f, near, constraints=lambda x: Polytope(lower=0.0)), X + 0.25, Y0),
    **{name: (problem, X, Y0) for name, problem in ITERATIONS.items()},
    "start": (BilevelProblem(f, lambda x, y: (y - 1).square().sum(), init=lambda x: x), X, Y0),
    "start and g": (BilevelProblem(f, near, init=lambda x: x), X, None),
    "no x": (BilevelProblem(f, lambda x, y: (y - 1).square().sum() + x.sum()), X, Y0),
    "x detached": (BilevelProblem(f, lambda x, y: near(x.detach(), y)), X, Y0),
    "x detached in part": (PARTLY, X, Y0),
    "x detached in a step": (STEPS_PARTLY, X, Y0),
    "f detached": (BilevelProblem(lambda x, y: f(x, y).detach(), near), X, Y0),
    "no second derivative": (
        BilevelProblem(f, lambda x, y: torch.cdist(y[None], x[None]).square().sum() + y.square().sum()),
        X,
        Y0,
    ),
    "kink": (BilevelProblem(f, lambda x, y: (y - x).abs().sum() + near(x / 3, y)), 0 * X[:1], 0 * Y0[:1]),
}
CASES = ("asinh", "ridge")


@pytest.mark.parametrize("name", [*KINDS, *CASES])
def test_what_check_lists_is_what_compare_runs_and_the_reasons_are_the_same(name: str) -> None:
    if name in KINDS:
        problem, x, y0 = KINDS[name]
    else:
        instance = PROBLEMS[name]()
        problem, x, y0 = instance.problem, point(instance), instance.y0
    said = check(problem, x, y0).estimators
    rows = compare(problem, x, y0, budgets=[60], memory=False).rows
    assert [row.name for row in rows] == [name for name in estimators() if name != "implicit"]
    assert {row.name: "" if row.applies else row.reason for row in rows} == {row.name: said[row.name] for row in rows}


def verdict(found: Check, name: str) -> Outcome:
    return next(v.outcome for v in found.verdicts if v.name == name)


@pytest.mark.parametrize("problem", [PARTLY, STEPS_PARTLY])
def test_where_x_is_detached_in_part_only_differences_apply(problem: BilevelProblem) -> None:
    found = check(problem, X, Y0)
    assert verdict(found, "hypergradient") is Outcome.failed
    assert [name for name, why in found.estimators.items() if not why] == ["esj", "finite-difference"]
    assert "detached" in found.estimators["itd"]


def test_a_kind_without_a_symmetric_operator_is_not_for_kkt() -> None:
    problem, x, y0 = KINDS["fixed point"]
    why = check(problem, x, y0).estimators["kkt"]
    assert why == "`KKT` does not apply: y is a fixed point, not a minimizer. Use `AID` with `GMRES`."
    with pytest.raises(ValueError, match="`KKT` does not apply: y is a fixed point"):
        hypergradient(problem, x, y0, estimator="kkt")


@pytest.mark.parametrize("name", ["composite", "constrained", "fixed point", "kink"])
def test_the_reference_of_every_kind_is_known_to_within_something(name: str) -> None:
    problem, x, y0 = KINDS[name]
    found = compare(problem, x, y0, estimators=["finite-difference"], memory=False)
    assert found.reference_error <= 1e-3 * found.norm
    assert "known to within" in str(found)


def test_a_derivative_in_x_that_happens_to_be_zero_is_no_missing_one() -> None:
    found = check(BilevelProblem(f, lambda x, y: near(x.square(), y)), 0 * X, Y0)
    assert found.ok, str(found)
    assert found.dependence == "inner objective"


def test_y0_may_be_left_out_where_init_gives_it() -> None:
    problem = BilevelProblem(lambda x, y: f(x, y["w"]), lambda x, y: near(x, y["w"]), init=lambda x: {"w": 0 * x})
    assert check(problem, X).as_dict() == check(problem, X, {"w": 0 * X}).as_dict()
    (row,) = compare(problem, X, estimators=["aid-cg"], memory=False).rows
    assert (row.relative or 0.0) < 1e-8
    tasks = BilevelProblem(
        lambda x, y, t: f(x, y - t), lambda x, y, t: near(x + t, y), init=lambda x, t: x * t, tasks=True
    )
    assert check(tasks, X, data=torch.ones(3, 2).double()).ok


@pytest.mark.parametrize("call", [check, compare])
def test_without_init_y0_is_asked_for(call: Any) -> None:
    with pytest.raises(ValueError, match=rf"`{call.__name__}\(y0=\.\.\.\)` may be left out only where"):
        call(BilevelProblem(f, near), X)
