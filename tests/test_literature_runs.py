"""Runs on the test problems of the literature: what `solve` and the command line find, and how they say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bilevel import KKT, hypergradient, minimize
from bilevel.cli import main
from bilevel.problems import literature
from bilevel.problems.literature.cuts import Cuts
from bilevel.problems.literature.inner import Inner
from bilevel.problems.literature.programs import Model
from bilevel.solvers import InteriorPoint

pytest.importorskip("scipy")
np: Any = pytest.importorskip("numpy")

A_FEW = (
    *("HenrionSurowiec2011_c2", "GumusFloudas2001Ex4", "Bard1988Ex1", "ClarkWesterberg1990a", "AllendeStill2013"),
    *("LiuHart1994", "DempeFranke2014Ex38", "DempeDutta2012Ex24", "Bard1988Ex3"),
    *("MitsosBarton2006Ex314", "MitsosBarton2006Ex311", "Mirrlees1999", "FrankeEtal2018Ex53", "FrankeEtal2018Ex521"),
)


def judged(name: str, starts: int) -> tuple[float, float, float]:
    """The gap to the best known value, the gap of g to an independent inner solve, and the largest violation."""
    solution, instance = literature.solve(name, starts=starts), literature.load(name)
    assert instance.metrics is not None
    found = instance.metrics(solution.x, solution.y)
    x, y = (torch.as_tensor(each).numpy() for each in (solution.x, solution.y))
    lowest = Inner(Model(literature.statement(name)), 12345).lowest(x, y)
    assert lowest is not None
    violation = max(found["violation of outer constraints"], found["violation of inner constraints"])
    return found["gap to the best known"], (found["inner value"] - lowest[0]) / max(1.0, abs(lowest[0])), violation


@pytest.mark.parametrize("name", [*A_FEW, pytest.param("CalveteGale1999P1", marks=pytest.mark.slow)])
def test_some_problems_of_every_class_are_solved_from_starts_that_know_nothing(name: str) -> None:
    gap, inner_gap, violation = judged(name, starts=4 if literature.statement(name).sizes == (1, 1) else 2)
    assert abs(gap) <= 1e-4
    assert inner_gap <= 1e-6
    assert violation <= 1e-6


@pytest.mark.parametrize("beside", [-1e-5, 1e-5])
def test_a_cut_beside_y_does_not_hold_the_point_where_it_is(beside: float) -> None:
    """Its gradient there is as good as nothing, and the sign of that is chance."""
    model = Model(literature.statement("MitsosBarton2006Ex317"))
    y = -np.sqrt([0.125])  # a minimizer at x = -1/8, where f = 0.203 falls with x
    z = np.concatenate([[-0.125], y])
    found, violation = Cuts(model, Inner(model, 0))._program(z, [y + beside, -y + beside])
    assert violation <= 1e-9
    assert model.values(found).at[0] < 0.0626


def test_the_same_seed_finds_the_same_bits_and_another_one_starts_elsewhere() -> None:
    one, two, other = (literature.solve("ClarkWesterberg1990a", seed=seed, starts=3) for seed in (1, 1, 2))
    assert torch.equal(torch.as_tensor(one.x), torch.as_tensor(two.x))
    assert [record.value for record in one.history] == [record.value for record in two.history]
    assert [record.value for record in one.history] != [record.value for record in other.history]


def test_the_history_falls_and_ends_with_what_is_returned() -> None:
    solution = literature.solve("Bard1988Ex1", starts=4)
    values = [record.value for record in solution.history]
    assert values == sorted(values, reverse=True)
    assert solution.value == values[-1]
    assert not solution.failed


def test_the_gradient_of_a_record_is_the_hypergradient() -> None:
    name = "MacalHurter1997"
    instance = literature.load(name)
    known = literature.references(name)[0]
    x = torch.tensor(known.x, dtype=torch.float64)
    found = hypergradient(instance.problem, x, instance.y0, estimator=instance.settings["estimator"])
    assert torch.allclose(torch.as_tensor(found.grad), torch.tensor(known.grad, dtype=torch.float64), atol=1e-6)


def test_an_x_without_an_inner_minimizer_that_the_outer_constraints_allow_is_infeasible() -> None:
    instance = literature.load("ClarkWesterberg1990a")
    x = torch.tensor([9.0], dtype=torch.float64)  # beyond the outer bound 8
    found = hypergradient(instance.problem, x, instance.y0, estimator=instance.settings["estimator"], throw=False)
    assert found.status.name == "infeasible"


def test_the_outer_constraints_are_what_minimize_takes() -> None:
    instance = literature.load("ClarkWesterberg1990a")
    solution = minimize(
        instance.problem,
        torch.tensor([1.7], dtype=torch.float64),
        instance.y0,
        estimator=KKT(InteriorPoint()),
        outer_inequalities=instance.settings["outer_inequalities"],
        throw=False,
    )
    assert solution.value == pytest.approx(5.0)
    assert solution.outer_constraints is not None


def test_list_literature_is_a_table_of_all_problems(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--literature"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["class", "name"]
    assert [line.split()[1] for line in lines[1 : 1 + len(literature.names())]] == list(literature.names())
    assert main(["list", "--literature", "--json"]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert len(rows) == 109
    assert all(row["source"] == literature.statement(row["name"]).source for row in rows)


def test_run_leaves_the_files_of_every_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "literature:Bard1988Ex1", "--steps", "4", "--out", "out", "--quiet"]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["status"] == "successful"
    assert abs(result["metrics"]["gap to the best known"]) <= 1e-6
    assert result["final"]["value"] == pytest.approx(17.0)
    assert (tmp_path / "out" / "history.jsonl").read_text().count("\n") == result["steps"] + 1
    assert main(["run", "literature:Bard1988", "--quiet"]) == 2
    assert "Did you mean 'Bard1988Ex" in capsys.readouterr().err
    assert main(["run", "literature:Bard1988Ex1", "--set", "a=1", "--quiet"]) == 2


@pytest.mark.slow
def test_most_problems_of_every_class_are_solved() -> None:
    """The gates of the table in docs/constraints.md; `benchmarks/literature.py` prints it. An hour at most."""
    wanted = {"lp": 30, "nonconvex": 20}
    for kind in literature.KINDS:
        found = [judged(name, starts=12) for name in literature.names(kind)]
        solved = [each for each in found if each[0] <= 1e-4 and each[1] <= 1e-6 and each[2] <= 1e-6]
        assert len(solved) >= wanted.get(kind, len(found)), kind
