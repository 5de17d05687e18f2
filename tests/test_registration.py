"""A registered name stands for its estimator wherever a name may be given; a name has one meaning."""

from __future__ import annotations

import inspect
import json
import multiprocessing
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from bilevel import (
    AID,
    AbstractEstimator,
    BilevelProblem,
    Polytope,
    check,
    compare,
    estimators,
    hypergradient,
    hyperobjective,
    minimize,
    register_estimator,
)
from bilevel.cli import main
from bilevel.extending import Setting
from bilevel.named import registry
from bilevel.problems.quadratic import quadratic
from bilevel.solvers.cg import CG
from bilevel.solvers.closed_form import ClosedForm
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.minres import MINRES

INSTANCE = quadratic(p=3, q=5, cross=0.5, seed=2)
FIXED = AID(Iterate(GradientDescent(0.05), max_steps=4), CG(rtol=0.0, max_steps=2))  # as nothing else estimates it
CONSTRAINED = BilevelProblem(
    lambda x, y: (y - 2).square().sum(),
    lambda x, y: (y - x).square().sum(),
    constraints=lambda x: Polytope(lower=torch.zeros_like(x)),
)
MODULE = """
import torch
from bilevel import AID, BilevelProblem, hypergradient, register_estimator
from bilevel.solvers import CG, GradientDescent, Iterate

problem = BilevelProblem(lambda x, y: y.square().sum(), lambda x, y: (y - x).square().sum())
x0, y0 = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
register_estimator("mine", lambda s: AID(s.inner(per_step=2), s.linear()), "one of my own")

def work(name):
    return hypergradient(problem, x0, y0, estimator=name).grad.tolist()
"""


@pytest.fixture(autouse=True)
def _names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", {})


def fixed(setting: Setting) -> AbstractEstimator:
    return FIXED


def by_minres(setting: Setting) -> AbstractEstimator:
    return AID(setting.inner(per_step=2), MINRES(rtol=setting.accuracy(1e-9, 1e-4), max_steps=setting.steps(2)))


def arguments() -> tuple[Any, Any, Any]:
    return INSTANCE.problem, INSTANCE.x0, INSTANCE.y0


def test_a_registered_name_is_its_estimator_at_every_entry_point() -> None:
    register_estimator("mine", fixed, "one of my own")
    named, itself = (hypergradient(*arguments(), estimator=e).grad for e in ("mine", FIXED))
    assert torch.equal(named, itself)
    named, itself = (minimize(*arguments(), estimator=e, max_steps=3).x for e in ("mine", FIXED))
    assert torch.equal(named, itself)
    for e in ("mine", FIXED):
        x = INSTANCE.x0.clone().requires_grad_()
        hyperobjective(INSTANCE.problem, INSTANCE.y0, estimator=e)(x).backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        assert torch.equal(x.grad, hypergradient(*arguments(), estimator=FIXED).grad)


def test_registered_names_are_listed_compared_and_checked(capsys: pytest.CaptureFixture[str]) -> None:
    register_estimator("mine", by_minres, "one of my own")
    assert list(estimators())[-1] == "mine"
    assert [row.name for row in compare(*arguments(), memory=False).rows if row.applies][-1] == "mine"
    assert check(*arguments()).estimators["mine"] == ""
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["estimators"]["mine"] == "one of my own"


def test_a_budget_is_spent_by_the_builder_that_asks_for_it() -> None:
    register_estimator("mine", by_minres, "half inner, half linear steps")
    rows = compare(*arguments(), estimators=["mine", "aid-minres"], budgets=[1, 6, 8], memory=False).rows
    assert rows[0].reason == "a budget of 1 oracle calls is too small for 'mine'."
    for mine, builtin in zip(rows[1:3], rows[4:], strict=True):
        assert mine.error == builtin.error
        assert mine.stats is not None
        assert mine.stats.inner_steps == mine.stats.linear_steps == (mine.budget or 0) // 2


def test_a_builder_that_asks_for_nothing_has_no_budget() -> None:
    register_estimator("mine", fixed, "one of my own")
    (row,) = compare(*arguments(), estimators=["mine"], budgets=[100], memory=False).rows
    assert row.reason == "it is not known what 'mine' spends. Pass an estimator instead of a budget."
    (row,) = compare(*arguments(), estimators=["mine"], memory=False).rows
    assert row.applies


def test_auto_tries_registered_names() -> None:
    solution = INSTANCE.solution
    assert solution is not None

    def known(setting: Setting) -> AbstractEstimator:
        return AID(ClosedForm(solution), CG(rtol=1e-9, max_steps=setting.steps(per_step=1)))

    register_estimator("known", known, "y* in closed form")
    assert hypergradient(*arguments(), estimator="auto").note.startswith("chosen: known")


@pytest.mark.parametrize("name", ["mine", "aid-cg", "implicit", "auto"])
def test_a_name_twice_is_refused(name: str) -> None:
    register_estimator("mine", fixed, "one of my own")
    with pytest.raises(ValueError, match=f"`register_estimator` has no name twice: '{name}' is "):
        register_estimator(name, by_minres, "another")
    assert estimators()["mine"] == "one of my own"


@pytest.mark.parametrize(
    ("wrong", "error", "complaint"),
    [
        ({"name": 3}, TypeError, r"`register_estimator\(name=...\)` must be a string. Got 3"),
        ({"build": FIXED}, TypeError, r"`register_estimator\(build=...\)` must be a function of a setting"),
        ({"build": AID}, TypeError, "must be a function of a setting. Got the class AID itself. Write `lambda setting"),
        ({"build": lambda: FIXED}, TypeError, r"must be a function of a setting. Got a function of the arguments \(\)"),
        ({"build": lambda a, b: FIXED}, TypeError, r"Got a function of the arguments \(a, b\)"),
        ({"build": lambda *, s: FIXED}, TypeError, r"Got a function of the arguments \(\*, s\)"),
        ({"description": None}, TypeError, r"`register_estimator\(description=...\)` must be a string"),
        ({"name": "my own"}, ValueError, "must be one word.*Got 'my own'"),
        ({"name": ""}, ValueError, "must be one word"),
        ({"description": "two\nlines"}, ValueError, "must be one line"),
        ({"description": " "}, ValueError, "must be one line"),
    ],
)
def test_what_is_no_registration_is_refused(wrong: dict[str, Any], error: type[Exception], complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        register_estimator(**{"name": "mine", "build": fixed, "description": "one of my own", **wrong})
    assert "mine" not in estimators()


def test_a_builder_that_builds_no_estimator_is_named() -> None:
    register_estimator("mine", lambda setting: CG(), "one of my own")  # type: ignore[arg-type,return-value]
    with pytest.raises(
        ValueError, match="'mine' could not be built: the `build` that it was registered with must return"
    ):
        hypergradient(*arguments(), estimator="mine")


def _raises(setting: Any) -> Any:
    raise TypeError("a mistake in it")


def _three(setting: Any) -> Any:
    return 3


def _misspelt(setting: Any) -> Any:
    return AID(setting.iner(), CG())


@pytest.mark.parametrize(
    ("build", "reason"),
    [(_raises, "raised TypeError: a mistake in it"), (_three, "Got 3"), (_misspelt, "raised AttributeError")],
)
def test_a_builder_that_does_not_work_costs_its_own_row_and_no_other(build: Any, reason: str) -> None:
    register_estimator("mine", build, "one of my own")
    *others, mine = compare(*arguments(), memory=False).rows
    assert mine.name == "mine"
    assert mine.reason.startswith("'mine' could not be built: ")
    assert reason in mine.reason
    assert any(row.applies for row in others)
    found = check(*arguments()).estimators
    assert found["mine"] == mine.reason
    assert found["aid-cg"] == ""
    with pytest.raises(ValueError, match="'mine' could not be built"):
        hypergradient(*arguments(), estimator="mine")
    assert hypergradient(*arguments(), estimator="auto").status.ok


def test_a_misspelt_registered_name_is_suggested() -> None:
    register_estimator("minimal-residual", by_minres, "one of my own")
    for wrong in ("minimal_residual", "minimal"):
        with pytest.raises(ValueError, match="Did you mean 'minimal-residual'"):
            compare(*arguments(), estimators=[wrong])


def test_a_worker_process_has_the_names_of_the_modules_that_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "names_of_mine.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    import names_of_mine  # type: ignore[import-not-found]  # pyright: ignore[reportMissingImports]

    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert pool.apply(names_of_mine.work, ("mine",)) == pytest.approx([2.0, 2.0])
    finally:
        del sys.modules["names_of_mine"]


def test_the_file_of_a_problem_may_register_what_its_command_line_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("mine.py").write_text(textwrap.dedent(MODULE))
    words = ["mine.py:problem", "--estimator", "mine"]
    try:
        assert main(["compare", *words, "--budgets", "4", "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["rows"]
        assert (row["name"], row["budget"], row["status"]) == ("mine", 4, "successful")
        assert main(["run", *words, "--steps", "1", "--quiet", "--out", "out"]) == 0
        assert json.loads(Path("out/result.json").read_text())["settings"]["estimator"] == "mine"
    finally:
        sys.modules.pop("mine", None)


# "implicit"


def test_implicit_is_aid_cg_where_g_is_smooth_and_kkt_where_y_is_constrained() -> None:
    implicit, smooth = (hypergradient(*arguments(), estimator=name) for name in ("implicit", "aid-cg"))
    assert torch.equal(implicit.grad, smooth.grad)
    assert implicit.stats == smooth.stats
    x, y0 = torch.tensor([1.0, -1.0]), torch.zeros(2)  # y = max(x, 0)
    implicit, by_kkt = (hypergradient(CONSTRAINED, x, y0, estimator=name) for name in ("implicit", "kkt"))
    assert torch.equal(implicit.grad, by_kkt.grad)
    assert implicit.grad.tolist() == pytest.approx([-2.0, 0.0], abs=1e-9)


def test_implicit_is_the_default() -> None:
    for function in (hypergradient, hyperobjective):
        assert inspect.signature(function).parameters["estimator"].default == "implicit"
    x, y0 = torch.tensor([1.0, -1.0]), torch.zeros(2)
    assert hypergradient(CONSTRAINED, x, y0).grad.tolist() == pytest.approx([-2.0, 0.0], abs=1e-9)
    assert minimize(CONSTRAINED, x, y0, max_steps=2).status.ok
    assert float(hyperobjective(CONSTRAINED, y0)(x)) == pytest.approx(5.0)


def test_implicit_spends_a_budget_and_is_checked_as_what_it_stands_for() -> None:
    named, other = compare(*arguments(), estimators=["implicit", "aid-cg"], budgets=[8], memory=False).rows
    assert named.error == other.error
    found = check(CONSTRAINED, torch.tensor([1.0, -1.0]), torch.zeros(2)).estimators
    assert found["implicit"] == found["kkt"] == ""
    assert found["aid-cg"] != ""
    saddle = BilevelProblem(lambda x, y: y.sum(), lambda x, y: y[0] ** 2 - y[1] ** 2 + x @ y)
    found = check(saddle, torch.zeros(2), torch.zeros(2)).estimators
    assert found["implicit"] == found["aid-cg"]
    assert "the inner Hessian is not positive definite at the solution" in found["aid-cg"]
    assert found["aid-minres"] == ""
