"""`bilevel check` and `bilevel compare`: what they print is what `check` and `compare` find."""

import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bilevel
from bilevel.cli import main
from bilevel.problems import catalogue

USER_FILE = """
import torch
from bilevel import BilevelProblem, Constants, Instance

target = torch.tensor([1.0, -2.0], dtype=torch.float64)
problem = BilevelProblem(lambda x, y: (y - target).square().sum(), lambda x, y: (y - x).square().sum() / 2)
unbounded = BilevelProblem(problem.f, lambda x, y: -(y - x - 1).square().sum())
flat = BilevelProblem(problem.f, lambda x, y: (y[0] - x[0]).square() / 2)
x0, y0 = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)

def scaled(scale: float = 1.0, seed: int = 0):
    return BilevelProblem(problem.f, lambda x, y: (y - scale * x).square().sum() / 2), x0, y0

def known():
    constants = Constants(mu=1.0, L=1.0, L_fyy=2.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0, C_G=1.0)
    return Instance(problem, x0, y0, constants=lambda x: constants)

def batches():
    f = lambda x, y, batch: (y - batch).square().sum()
    g = lambda x, y, batch: (y - x).square().sum() / 2
    return Instance(BilevelProblem(f, g), x0, y0, settings={"data": [target, target + 2]})

def quartic():  # y = 1 where x = 2, with curvature 4
    return BilevelProblem(problem.f, lambda x, y: (y.square() / 2 + y.pow(4) / 4 - x * y).sum()), x0 + 2, y0

def raises():
    def f(x, y):
        raise RuntimeError("no memory")
    return BilevelProblem(f, problem.g), x0, y0
"""


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The user's file, alone in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("mine.py").write_text(textwrap.dedent(USER_FILE))
    yield
    sys.modules.pop("mine", None)


def as_json(text: str) -> Any:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    return json.loads(text, parse_constant=refuse)


def one_error(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("bilevel: error: ")]
    assert len(lines) == 1
    assert "Traceback" not in text
    return lines[0]


# Check


def test_check_prints_the_verdicts_of_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "quadratic", "--set", "p=2", "--set", "kappa=5"]) == 0
    made = catalogue()["quadratic"].build(p=2, kappa=5.0)
    expected = bilevel.check(made.problem, made.x0, made.y0)
    captured = capsys.readouterr()
    assert captured.out == f"{expected}\n"
    assert captured.err == ""
    assert "condition number 5" in captured.out


def test_check_as_json_is_the_data_of_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "mine.py:scaled", "--set", "scale=0", "--json"]) == 1
    found = as_json(capsys.readouterr().out)
    assert found["dependence"] == "none"
    assert {verdict["name"]: verdict["outcome"] for verdict in found["verdicts"]}["y depends on x"] == "FAIL"
    assert set(found["estimators"]) == set(bilevel.estimators())


def test_a_failed_test_is_exit_code_1_and_everything_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "mine.py:flat"]) == 1
    captured = capsys.readouterr()
    assert "FAIL  curvature" in captured.out
    assert "add a regularizer" in captured.out
    assert one_error(captured.err) == "bilevel: error: mine.py:flat did not pass: curvature."


def test_what_f_raises_is_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "mine.py:raises"]) == 1
    captured = capsys.readouterr()
    assert "RuntimeError: no memory" in captured.out
    assert "did not pass: values" in one_error(captured.err)


def test_check_takes_the_first_batch_of_the_problems_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "mine.py:batches"]) == 0
    assert "f = 5, g = 0 at (x, y0)" in capsys.readouterr().out


# Compare


def test_compare_shows_what_compare_finds(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["mine.py:known", "--estimator", "aid-cg", "--estimator", "one-step", "--budgets", "4,20", "--json"]
    assert main(["compare", *words]) == 0
    found = as_json(capsys.readouterr().out)
    assert [(row["name"], row["budget"]) for row in found["rows"]] == [
        ("aid-cg", 4),
        ("aid-cg", 20),
        ("one-step", 4),
        ("one-step", 20),
    ]
    assert found["norm"] == pytest.approx(2 * 5**0.5, rel=1e-12)  # grad Phi = 2 (x - target)
    assert found["constants"]["source"] == "given"
    for row in found["rows"]:
        assert row["error"] <= row["certificate"] + found["reference_error"]
    assert found["rows"][1]["relative"] < 1e-12


def test_the_table_says_what_the_certificates_are_worth(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--estimator", "aid-cg"]
    assert main(["compare", "mine.py:known", *words]) == 0
    assert "certificates are proven: constants are given" in capsys.readouterr().out
    assert main(["compare", "mine.py:problem", *words]) == 0
    assert "no certificates" in capsys.readouterr().out
    assert main(["compare", "mine.py:problem", "--estimate-constants", *words]) == 0
    assert "certificates are heuristic: L_fxy, L_fyy, M_xy, M_yy" in capsys.readouterr().out
    assert main(["compare", "mine.py:known", "--estimate-constants", *words]) == 0
    captured = capsys.readouterr()
    assert "certificates are proven" in captured.out
    assert "--estimate-constants has no effect" in captured.err


def test_estimated_constants_are_those_at_the_inner_solution(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["mine.py:quartic", "--estimator", "aid-cg", "--estimate-constants", "--json"]
    assert main(["compare", *words]) == 0
    found = as_json(capsys.readouterr().out)["constants"]
    assert found["mu"] == pytest.approx(4.0, rel=1e-6)
    assert found["C_G"] == pytest.approx(1.0, rel=0.2)
    assert found["L_fyy"] == pytest.approx(2.0, rel=0.2)
    assert found["heuristic"] == ["L_fxy", "L_fyy", "M_xy", "M_yy"]


def test_out_leaves_the_data_and_the_picture_whole(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    words = ["compare", "mine.py:known", "--estimator", "aid-cg", "--budgets", "4,20", "--out", "a/b"]
    assert main(words) == 0
    assert "aid-cg" in capsys.readouterr().out
    assert sorted(path.name for path in Path("a/b").iterdir()) == ["compare.json", "compare.png"]
    assert Path("a/b/compare.png").read_bytes().startswith(b"\x89PNG")
    found = as_json(Path("a/b/compare.json").read_text())
    assert found["problem"] == "mine.py:known"
    assert found["versions"]["torch"] == torch.__version__
    assert len(found["rows"]) == 2
    assert main([*words[:4], "--out", "a/b"]) == 0
    assert len(as_json(Path("a/b/compare.json").read_text())["rows"]) == 1


def test_without_matplotlib_a_note_takes_the_place_of_the_picture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["compare", "mine.py:known", "--estimator", "aid-cg", "--out", "out"]) == 0
    assert 'pip install "bilevel[plots]"' in capsys.readouterr().err
    assert [path.name for path in Path("out").iterdir()] == ["compare.json"]


def test_estimators_that_do_not_apply_are_listed_and_none_at_all_is_exit_code_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["compare", "mine.py:known", "--budgets", "1", "--out", "out"]
    assert main([*words, "--estimator", "itd", "--estimator", "one-step"]) == 0
    assert "not itd: a budget of 1 oracle calls is too small" in capsys.readouterr().out
    assert main([*words, "--estimator", "itd"]) == 1
    captured = capsys.readouterr()
    assert "not itd: " in captured.out
    assert one_error(captured.err) == "bilevel: error: no estimator applies to mine.py:known."
    assert Path("out/compare.json").exists()


def test_a_seed_without_effect_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "mine.py:problem", "--seed", "1", "--estimator", "aid-cg"]) == 0
    assert "--seed has no effect" in capsys.readouterr().err
    assert main(["compare", "mine.py:scaled", "--seed", "1", "--estimator", "aid-cg"]) == 0
    assert "--seed" not in capsys.readouterr().err


def test_without_a_reference_there_is_no_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--estimator", "one-step", "--budgets", "4"]
    assert main(["compare", "mine.py:unbounded", *words]) == 1
    assert "there is no reference to measure" in one_error(capsys.readouterr().err)
    assert main(["compare", "mine.py:problem", *words]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (["check"], 2, "the following arguments are required: PROBLEM"),
        (["check", "quadratc"], 2, "Did you mean 'quadratic'?"),
        (["check", "mine.py:nothing"], 2, "mine.py has no 'nothing'. It has: "),
        (["check", "mine.py:problem", "--set", "a=1"], 2, "is not a function: it takes no `--set`"),
        (["check", "mine.py:problem", "--seed", "x"], 2, "argument --seed: must be an integer. Got 'x'"),
        (
            ["compare", "mine.py:known", "--estimator", "aid"],
            2,
            "there is no estimator 'aid'. Did you mean 'aid-cg'? Names: ",
        ),
        (
            ["compare", "mine.py:known", "--budgets", "10,x"],
            2,
            "must be positive integers of at most 8 digits",
        ),
        (
            ["compare", "mine.py:known", "--budgets", "0"],
            2,
            "must be positive integers of at most 8 digits",
        ),
        (["compare", "mine.py:known", "--out", "mine.py"], 2, "is a file: name a folder"),
        (["compare", "mine.py:raises", "--estimator", "itd"], 1, "f of mine.py:raises raised RuntimeError: no memory"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    words: list[str], code: int, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == code
    assert complaint in one_error(capsys.readouterr().err)
    assert {path.name for path in Path().iterdir()} <= {"mine.py", "__pycache__"}


@pytest.mark.parametrize("command", ["check", "compare"])
def test_debug_shows_the_traceback(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "quadratic", "--set", "kappa=0", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("list", "run", "check", "compare"):
        assert re.search(rf"^ +{command} +\w", text, re.MULTILINE), command


@pytest.mark.parametrize("words", [["check"], ["compare"], ["compare", "--budgets", "10,100"]])
def test_tables_and_reasons_fit_80_columns(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([words[0], "quadratic", *words[1:]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 10 and max(map(len, lines)) <= 80
    assert len([line for line in lines if line.startswith("aid-cg ")]) == (words[0] == "compare") * max(
        1, len(words) - 1
    )
