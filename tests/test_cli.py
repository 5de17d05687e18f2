"""The command line: what it computes is what `minimize` computes, and what it leaves is all of it."""

import contextlib
import dataclasses
import json
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from cases import bits

import bilevel
from bilevel._files import write_atomically
from bilevel.cli import main
from bilevel.commands import outcome as outcome_module, progress as progress_module
from bilevel.commands.arguments import bind, convert, takes
from bilevel.outer import progress as shown_module
from bilevel.problems import catalogue, quadratic
from bilevel.solvers import Adam

FILES = ["checkpoint.pt", "config.toml", "history.jsonl", "plot.png", "result.json", "solution.pt"]
USER_PROBLEM = """
import torch
from bilevel import BilevelProblem, Instance

target = torch.tensor([1.0, -2.0], dtype=torch.float64)
problem = BilevelProblem(lambda x, y: (y - target).square().sum(), lambda x, y: (y - x).square().sum() / 2)
x0, y0 = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory, and nothing left behind of the modules that are loaded from it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("mine", "neighbour_of_mine"):
        sys.modules.pop(name, None)


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, without the time that drawing takes: for tests that do not look at the picture."""
    monkeypatch.setattr(outcome_module, "draw", lambda file, *_: file.write(b"a picture"))
    return folder


def user_file(text: str, name: str = "mine.py") -> str:
    Path(name).write_text(USER_PROBLEM + textwrap.dedent(text))
    return name


def result(folder: str = "out") -> dict[str, Any]:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    content: dict[str, Any] = json.loads(Path(folder, "result.json").read_text(), parse_constant=refuse)
    return content


def history(folder: str = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "history.jsonl").read_text().splitlines()]


def without_seconds(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def solution(folder: str = "out") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(Path(folder, "solution.pt"), weights_only=True)
    return content


def run(*words: str, out: str = "out") -> int:
    return main(["run", *words, "--out", out, "--quiet"])


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    text = capsys.readouterr().err
    assert text.startswith("bilevel: error: ")
    assert text.count("\n") == 1, text
    assert "Traceback" not in text
    return text


# List


def test_list_names_everything_once_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    words = [line.split()[0] for line in lines if re.match("  [^ ]", line)]  # others go on with a description
    for name in [*catalogue(), *bilevel.estimators(), "CG", "LBFGS", "Iterate", "adam", "gradient-descent", "descent"]:
        assert words.count(name) == 1, name
    assert all(len(line.split()) > 1 for line in lines if re.match("  [^ ]", line))


@pytest.mark.parametrize("words", [["list"], ["list", "--literature"], ["--help"], ["run", "--help"]])
def test_what_there_is_fits_80_columns(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with contextlib.suppress(SystemExit):
        main(words)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 10 and max(map(len, lines)) <= 80


def test_list_as_json_holds_the_descriptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: text for name, text in found["estimators"].items() if name != "auto"} == bilevel.estimators()
    assert found["problems"] == {name: entry.description for name, entry in catalogue().items()}
    assert found["linear solvers"]["CG"].startswith("Conjugate gradients")
    assert {"linear solvers", "inner solvers", "optimizers", "outer methods", "algorithms"} <= found.keys()


# Run: what it computes and what it leaves


@pytest.mark.usefixtures("here")
def test_a_run_is_minimize_with_the_settings_of_the_problem() -> None:
    assert run("quadratic", "--steps", "7") == 0
    instance = quadratic()
    direct = bilevel.minimize(
        instance.problem, instance.x0, instance.y0, estimator="aid-cg", outer=Adam(0.1), max_steps=7
    )
    assert torch.equal(solution()["x"], direct.x)
    assert torch.equal(solution()["y"], direct.y)
    assert without_seconds(history()) == without_seconds([record.as_dict() for record in direct.history])
    found = result()
    assert (found["status"], found["converged"]) == ("steps_used_up", False)
    assert found["best"]["value"] == direct.best.value
    assert found["final"] == {"step": 7, "value": direct.value, "grad_norm": direct.history[-1].grad_norm}
    assert found["initial"]["value"] == direct.history[0].value
    assert found["stats"] == direct.stats.as_dict()
    assert found["x"]["values"] == direct.x.tolist()
    assert found["seconds"] > 0
    assert found["versions"]["torch"] == torch.__version__
    assert {"python", "bilevel"} <= found["versions"].keys()


@pytest.mark.usefixtures("folder")
def test_a_run_leaves_its_files_and_no_others() -> None:
    assert run("quadratic", "--steps", "2") == 0
    assert sorted(path.name for path in Path("out").iterdir()) == FILES
    assert Path("out/plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("here")
def test_flags_override_the_settings_of_the_problem() -> None:
    words = ("--estimator", "itd", "--outer", "gd", "--step", "0.02", "--steps", "3")
    assert run("quadratic", *words) == 0
    instance = quadratic()
    from bilevel.solvers import GradientDescent

    direct = bilevel.minimize(
        instance.problem, instance.x0, instance.y0, estimator="itd", outer=GradientDescent(0.02), max_steps=3
    )
    assert torch.equal(solution()["x"], direct.x)
    settings = result()["settings"]
    assert (settings["estimator"], settings["outer"], settings["step"], settings["steps"]) == ("itd", "gd", 0.02, 3)


@pytest.mark.usefixtures("here")
def test_a_tolerance_ends_the_run_where_it_is_met() -> None:
    assert run("quadratic", "--steps", "500", "--tol", "0.01") == 0
    norms = [record["grad_norm"] for record in history()]
    assert norms[-1] <= 0.01 < min(norms[:-1])
    assert result()["steps"] == len(norms) - 1 < 500


@pytest.mark.usefixtures("here")
def test_large_x_is_described_and_not_written_out() -> None:
    assert run("quadratic", "--set", "p=300", "--set", "q=2", "--steps", "0") == 0
    found = result()["x"]
    assert "values" not in found
    assert found["leaves"][0]["shape"] == [300]
    assert solution()["x"].shape == (300,)


@pytest.mark.usefixtures("here")
def test_nested_structures_are_kept() -> None:
    assert run("nested", "--steps", "1") == 0
    instance = catalogue()["nested"].build()
    direct = bilevel.minimize(instance.problem, instance.x0, instance.y0, outer=Adam(0.1), max_steps=1)
    assert bilevel.ravel(solution()["x"])[1] == bilevel.ravel(direct.x)[1]
    assert torch.equal(bilevel.ravel(solution()["y"])[0], bilevel.ravel(direct.y)[0])


@pytest.mark.usefixtures("here")
def test_without_out_each_run_gets_a_folder_of_its_own() -> None:
    for _ in range(2):
        assert main(["run", "quadratic", "--steps", "1", "--quiet"]) == 0
    folders = list(Path("runs").iterdir())
    assert len(folders) == 2
    assert all(folder.name.startswith("quadratic-") and (folder / "result.json").exists() for folder in folders)


@pytest.mark.usefixtures("here")
def test_a_driver_runs_its_own_loop_and_goes_on_as_if_it_had_not_stopped() -> None:
    pytest.importorskip("scipy")
    assert run("quadratic", "--outer", "scipy-minimize", "--tol", "1e-6") == 0
    assert result()["final"]["grad_norm"] <= 1e-6
    minimizer = quadratic().minimizer
    assert minimizer is not None
    assert torch.allclose(solution()["x"], minimizer, atol=1e-5)
    assert run("nested", "--outer", "scipy-minimize", "--steps", "3", out="parts") == 0
    assert run("nested", "--resume", "--steps", "12", out="parts") == 0
    assert run("nested", "--outer", "scipy-minimize", "--steps", "12", out="whole") == 0
    assert without_seconds(history("parts")) == without_seconds(history("whole"))
    for name in ("x", "y"):
        assert bits(solution("parts")[name]) == bits(solution("whole")[name])
    assert run("nested", "--resume", out="parts") == 0
    assert without_seconds(history("parts")) == without_seconds(history("whole"))


@pytest.mark.usefixtures("here")
def test_an_algorithm_is_run_by_name_recorded_and_kept_on_resuming(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quadratic", "--algorithm", "soba", "--steps", "6", "--out", "parts"]) == 0
    assert "quadratic: soba" in capsys.readouterr().out
    assert result("parts")["settings"]["algorithm"] == result("parts")["settings"]["chosen"]["algorithm"] == "soba"
    assert run("quadratic", "--resume", "--steps", "9", out="parts") == 0
    assert run("quadratic", "--algorithm", "soba", "--steps", "9", out="whole") == 0
    assert torch.equal(solution("parts")["x"], solution("whole")["x"])
    assert without_seconds(history("parts")) == without_seconds(history("whole"))
    instance = quadratic()
    direct = bilevel.minimize(instance.problem, instance.x0, instance.y0, algorithm="soba", max_steps=9)
    assert torch.equal(solution("whole")["x"], direct.x)
    assert result("whole")["stats"]["hvps"] == 10
    assert run("quadratic", "--resume", "--algorithm", "descent", out="parts") == 2
    assert "algorithm descent (it was soba)" in error_line(capsys)
    assert run("quadratic", "--algorithm", "descent", "--estimator", "itd", "--steps", "1", out="descent") == 0
    assert result("descent")["settings"]["algorithm"] == "descent"


@pytest.mark.usefixtures("here")
def test_a_problem_may_come_with_its_algorithm(capsys: pytest.CaptureFixture[str]) -> None:
    file = user_file("""
        from bilevel.algorithms import SOBA
        single = Instance(problem, x0, y0, settings={"algorithm": SOBA(0.5, 0.1), "max_steps": 5, "warm_start": False})
    """)
    assert run(f"{file}:single") == 0
    assert result()["settings"]["chosen"]["algorithm"].startswith("SOBA(inner_step=0.5")
    assert run(f"{file}:single", "--resume", "--steps", "7") == 0
    assert len(history()) == 8
    assert run(f"{file}:single", "--estimator", "itd", out="other") == 0
    assert result("other")["settings"]["chosen"]["estimator"] == "itd"
    assert run(f"{file}:single", "--seed", "1", out="seeded") == 0
    assert "--seed has no effect" in capsys.readouterr().err


# Resuming


@pytest.mark.parametrize("estimator", ["aid-cg", "esj"])
@pytest.mark.usefixtures("here")
def test_resuming_continues_bit_for_bit(estimator: str) -> None:
    words = ("quadratic", "--estimator", estimator, "--seed", "3", "--set", "p=5", "--outer", "adam", "--step", "0.07")
    assert run(*words, "--steps", "20", out="whole") == 0
    assert run(*words, "--steps", "10", out="parts") == 0
    before, seconds = history("parts"), result("parts")["seconds"]
    assert len(before) == 11
    assert run("quadratic", "--resume", "--steps", "20", out="parts") == 0  # the rest is as it was recorded
    assert history("parts")[:10] == before[:10]  # with their seconds: they were not taken again
    assert result("parts")["seconds"] > seconds
    for name in ("x", "y"):
        assert torch.equal(solution("whole")[name], solution("parts")[name])
    assert without_seconds(history("whole")) == without_seconds(history("parts"))
    assert [record["step"] for record in history("parts")] == list(range(21))
    for key in ("final", "initial", "stats", "x", "steps", "settings"):
        assert result("whole")[key] == result("parts")[key], key


@pytest.mark.usefixtures("here")
def test_steps_after_the_last_checkpoint_of_a_killed_run_are_taken_again() -> None:
    assert run("quadratic", "--steps", "10") == 0
    with Path("out/history.jsonl").open("a") as file:
        file.write(json.dumps(history()[-1] | {"step": 11}) + '\n{"step": 12, "val')  # the last line was cut
    assert run("quadratic", "--steps", "12", "--resume") == 0
    assert run("quadratic", "--steps", "12", out="whole") == 0
    assert without_seconds(history()) == without_seconds(history("whole"))


@pytest.mark.usefixtures("here")
def test_resuming_a_finished_run_changes_nothing() -> None:
    assert run("quadratic", "--steps", "5") == 0
    before, records = solution(), history()
    assert run("quadratic", "--resume") == 0
    assert torch.equal(before["x"], solution()["x"])
    assert without_seconds(records) == without_seconds(history())


@pytest.mark.parametrize("steps", [[], ["--steps", "5"], ["--steps", "3"]])
@pytest.mark.usefixtures("here")
def test_resuming_where_all_steps_were_taken_says_that_there_is_nothing_to_do(
    steps: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("quadratic", "--steps", "5") == 0
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert main(["run", "quadratic", "--resume", "--out", "out", *steps]) == 0
    text = capsys.readouterr()
    assert text.err.startswith("bilevel: note: nothing to do: the run in 'out' has taken its steps.")
    assert "`--steps`" in text.err
    assert text.err.count("\n") == 1
    assert not text.out
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before
    assert run("quadratic", "--resume", "--steps", "6") == 0
    assert len(history()) == 7


@pytest.mark.usefixtures("here")
def test_resuming_a_run_that_missed_its_tolerance_does_not_call_it_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quadratic", "--steps", "5", "--tol", "1e-9") == 1
    assert run("quadratic", "--resume") == 1
    assert "Raise `max_steps`" in capsys.readouterr().err
    assert run("quadratic", "--steps", "5", out="loose") == 0
    assert run("quadratic", "--resume", "--tol", "1e-9", out="loose") == 1


@pytest.mark.usefixtures("here")
def test_a_damaged_checkpoint_is_told_in_a_few_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quadratic", "--steps", "2") == 0
    Path("out/checkpoint.pt").write_bytes(b"PK not a zip file at all")
    assert run("quadratic", "--resume", "--steps", "4") == 2
    line = error_line(capsys)
    assert "'out/checkpoint.pt' is not a readable checkpoint: it is damaged, or is none." in line
    assert len(line) < 200
    assert "weights_only" not in line


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--estimator", "itd"], "estimator itd (it was aid-cg)"),
        (["--step", "0.2"], "step 0.2 (it was 0.1)"),
        (["--seed", "4"], "seed 4 (it was 0)"),
        (["--set", "p=3"], "p=3 (it was 2)"),
        (["--set", "q=3"], "q=3 (it was not given)"),
    ],
)
@pytest.mark.usefixtures("here")
def test_resuming_refuses_to_become_another_run(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("quadratic", "--steps", "1", "--seed", "0", "--set", "p=2") == 0
    before = Path("out/result.json").read_bytes()
    assert run("quadratic", "--resume", *words) == 2
    assert complaint in error_line(capsys)
    assert Path("out/result.json").read_bytes() == before


@pytest.mark.usefixtures("here")
def test_resuming_another_problem_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quadratic", "--steps", "1") == 0
    assert run("nested", "--resume") == 2
    assert "problem nested (it was quadratic)" in error_line(capsys)


@pytest.mark.usefixtures("here")
def test_there_must_be_something_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quadratic", "--resume") == 2
    assert "no run to resume in 'out'" in error_line(capsys)
    assert main(["run", "quadratic", "--resume"]) == 2
    assert "--out DIR" in error_line(capsys)
    assert run("quadratic", "--resume", "--overwrite") == 2
    assert "choose one" in error_line(capsys)


# The folder


@pytest.mark.usefixtures("here")
def test_a_run_is_not_overwritten_unless_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quadratic", "--steps", "2") == 0
    before = Path("out/result.json").read_bytes()
    assert run("quadratic", "--steps", "3") == 2
    assert "'out' holds a run" in error_line(capsys)
    assert Path("out/result.json").read_bytes() == before
    Path("out/my_notes.txt").write_text("mine")
    assert run("quadratic", "--steps", "3", "--overwrite") == 0
    assert len(history()) == 4
    assert Path("out/my_notes.txt").read_text() == "mine"


@pytest.mark.usefixtures("folder")
def test_overwriting_leaves_nothing_of_the_run_before(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("quadratic", "--steps", "2") == 0
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("quadratic", "--steps", "2", "--overwrite") == 0
    assert not Path("out/plot.png").exists()


FIRST = """
def first(error):
    def f(x, y):
        raise error
    return BilevelProblem(f, problem.g)

raises, stopped = first(RuntimeError("no data")), first(KeyboardInterrupt())
fails = BilevelProblem(lambda x, y: (y - 2).log().sum(), problem.g)
scalar = BilevelProblem(lambda x, y: y, problem.g)
"""


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize(("name", "code"), [("raises", 1), ("fails", 1), ("scalar", 2), ("stopped", 130)])
@pytest.mark.usefixtures("here")
def test_overwriting_by_a_run_that_fails_at_once_destroys_nothing(
    name: str, code: int, earlier: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if earlier:
        assert run("quadratic", "--steps", "2") == 0
    before = {path.name: path.read_bytes() for path in Path().glob("out/*")}
    assert run(f"{user_file(FIRST)}:{name}", "--overwrite") == code
    text = capsys.readouterr().err
    assert ("The earlier run in 'out' is kept." in text) == earlier
    if earlier:
        assert "--resume" not in text
        assert {path.name: path.read_bytes() for path in Path().glob("out/*")} == before
        assert not Path("out/.replaced").exists()
        assert run("quadratic", "--steps", "4", "--resume") == 0
        assert len(history()) == 5


@pytest.mark.usefixtures("here")
def test_what_a_failed_replacement_wrote_is_not_mixed_with_the_run_that_is_kept() -> None:
    assert run("quadratic", "--steps", "2") == 0
    Path("out/checkpoint.pt").unlink()
    assert run(f"{user_file(FIRST)}:fails", "--overwrite") == 1
    assert "checkpoint.pt" not in {path.name for path in Path("out").iterdir()}


@pytest.mark.usefixtures("here")
def test_overwriting_by_a_run_that_is_killed_at_once_destroys_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quadratic", "--steps", "2") == 0
    before = Path("out/result.json").read_bytes()
    file = user_file("""
        import os
        killed = BilevelProblem(lambda x, y: os._exit(9), problem.g)
    """)
    words = [sys.executable, "-m", "bilevel", "run", f"{file}:killed", "--overwrite", "--out", "out"]
    assert subprocess.run(words, check=False).returncode == 9
    assert result()["problem"] == "mine.py:killed"
    assert run("quadratic", "--steps", "1") == 2
    assert "'out' holds a run" in error_line(capsys)
    assert Path("out/result.json").read_bytes() == before
    assert run("quadratic", "--steps", "4", "--resume") == 0


@pytest.mark.usefixtures("here")
def test_overwriting_clears_the_folder_once_the_first_evaluation_has_succeeded() -> None:
    assert run("quadratic", "--steps", "2") == 0
    file = user_file("""
        from pathlib import Path
        def f(x, y):
            if Path("out/history.jsonl").exists():
                raise RuntimeError
            return (y - target).square().sum()
        later = BilevelProblem(f, problem.g)
    """)
    assert run(f"{file}:later", "--overwrite") == 1
    assert result()["problem"] == "mine.py:later"
    assert len(history()) == 1
    assert sorted(path.name for path in Path("out").iterdir()) == FILES


@pytest.mark.usefixtures("here")
def test_a_file_is_replaced_whole_or_not_at_all() -> None:
    target = Path("folder/file")
    write_atomically(target, lambda file: file.write(b"first"))

    def fail(file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, fail)
    assert target.read_bytes() == b"first"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


@pytest.mark.usefixtures("here")
def test_the_files_on_disk_are_complete_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(record: Any) -> str:
        found = result()
        seen.append((found["status"], [record["step"] for record in history()]))
        return original(record)

    original = shown_module.in_short  # called with each line of progress, after the step was written
    monkeypatch.setattr(shown_module, "in_short", look)
    assert main(["run", "quadratic", "--steps", "3", "--out", "out"]) == 0
    assert seen[:4] == [("running", list(range(k + 1))) for k in range(4)]


# Problems of one's own


@pytest.mark.usefixtures("here")
def test_a_problem_with_its_start_next_to_it_runs() -> None:
    assert run(f"{user_file('')}:problem", "--steps", "400", "--step", "0.05") == 0
    assert torch.allclose(solution()["x"], torch.tensor([1.0, -2.0]), atol=1e-3)


@pytest.mark.usefixtures("here")
def test_a_function_is_called_with_the_settings() -> None:
    file = user_file("""
        def make(scale: float, seed=0, shift=1, both: bool = False):
            assert both is True
            return problem, x0 + scale + shift + seed, y0

        def instance(start: int = 1):
            return Instance(problem, x0 + start, y0, settings={"max_steps": 2, "estimator": "aid-dense"})

        ready = instance(5)
    """)
    assert run(f"{file}:make", "--set", "scale=0.5", "--set", "both=yes", "--seed", "4", "--steps", "0") == 0
    assert solution()["x"].tolist() == [5.5, 5.5]
    assert run(f"{file}:instance", "--set", "start=3", "--overwrite") == 0
    assert result()["settings"]["chosen"]["estimator"] == "aid-dense"
    assert result()["steps"] == 2
    assert run(f"{file}:ready", "--steps", "0", "--overwrite") == 0
    assert solution()["x"].tolist() == [5.0, 5.0]


@pytest.mark.parametrize(
    ("name", "words", "complaint"),
    [
        ("lonely", [], "define x0 and y0 next to it"),
        ("absent", [], "mine.py has no 'absent'. It has: problem, make, wrong, failing"),
        ("wrong", [], "Got int."),
        ("target", [], "Got Tensor."),
        ("failing", [], "ZeroDivisionError"),
        ("problem", ["--set", "a=1"], "it takes no `--set`"),
        ("make", ["--set", "n=2", "--set", "b=1"], "no argument 'b'. Its arguments: n, mode, flag"),
        ("make", [], "needs `--set n=...`"),
        ("make", ["--set", "n=x"], "`--set n=...` of mine.py:make must be an integer. Got 'x'."),
        ("make", ["--set", "n=1", "--set", "mode=c"], "must be one of a, b. Got 'c'."),
        ("make", ["--set", "n=1", "--set", "flag=maybe"], "must be true or false. Got 'maybe'."),
        ("make", ["--set", "n"], "needs key=value. Got 'n'."),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_cannot_be_run_is_refused_in_one_line(
    name: str, words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = user_file("""
        from typing import Literal

        def make(n: int, mode: Literal["a", "b"] = "a", flag=False): return problem, x0, y0
        def wrong(): return 3
        def failing(): return 1 / 0
    """)
    if name == "lonely":
        Path("mine.py").write_text(Path("mine.py").read_text().replace("x0, y0 = ", "x1, y1 = "))
    assert run(f"{file}:{'problem' if name == 'lonely' else name}", *words) == 2
    assert complaint in error_line(capsys)
    assert not Path("out/result.json").exists()


@pytest.mark.parametrize(
    ("text", "code", "complaint"),
    [
        ("1 / 0", 2, "mine.py:8: ZeroDivisionError: division by zero"),
        ("def broken(:", 2, "SyntaxError"),
        ("import no_such_module", 3, "mine.py:8: No module named 'no_such_module'"),
    ],
)
@pytest.mark.usefixtures("here")
def test_an_error_in_a_file_is_told_with_its_line(
    text: str, code: int, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"{user_file(text)}:problem") == code
    assert complaint in error_line(capsys)


@pytest.mark.parametrize(
    ("problem", "complaint"),
    [
        ("quadratc", "Did you mean 'quadratic'?"),
        ("absent.py:problem", "there is no file 'absent.py'"),
        ("absent.py", "say which problem in it, as absent.py:NAME"),
    ],
)
@pytest.mark.usefixtures("here")
def test_a_problem_that_does_not_exist_is_refused(
    problem: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(problem) == 2
    assert complaint in error_line(capsys)


@pytest.mark.usefixtures("here")
def test_a_file_may_import_its_neighbours() -> None:
    Path("neighbour_of_mine.py").write_text("value = 3.0\n")
    assert (
        run(f"{user_file('import neighbour_of_mine; x0 = x0 + neighbour_of_mine.value')}:problem", "--steps", "0") == 0
    )
    assert solution()["x"].tolist() == [3.0, 3.0]


# Settings


@dataclasses.dataclass(frozen=True)
class Shared:
    """What several problems have in common."""

    size: int = 3
    rate: float = 0.1
    seed: int = 0


def grouped(kappa: float, shared: Shared = Shared(size=5), name: str = "a") -> None:
    """A problem with settings that it shares with others."""


def twice(seed: int = 0, shared: Shared = Shared()) -> None:
    """It has two seeds."""


def optional(shared: Shared | None = None) -> None:
    """It may do without."""


def test_fields_of_a_dataclass_are_arguments_of_their_own() -> None:
    assert takes(grouped, "rate")
    assert takes(grouped, "kappa")
    assert not takes(grouped, "shared.rate")
    bound = bind("grouped", grouped, {"kappa": "2", "rate": "0.5"}, {"seed": 7})
    assert bound == {"kappa": 2.0, "shared": Shared(size=5, rate=0.5, seed=7)}
    assert bind("grouped", grouped, {"kappa": "2"}, {}) == {"kappa": 2.0}  # the function's own default
    with pytest.raises(ValueError, match=r"has no argument 'shared'\. Its arguments: kappa, size, rate, seed, name\."):
        bind("grouped", grouped, {"shared": "1"}, {})
    with pytest.raises(ValueError, match=r"`--set size=\.\.\.` of grouped must be an integer\. Got 'big'"):
        bind("grouped", grouped, {"size": "big"}, {})
    with pytest.raises(ValueError, match=r"twice takes 'seed' twice, by 'shared' too\. Rename one"):
        bind("twice", twice, {}, {"seed": 3})
    assert bind("open", optional, {"shared": "none"}, {}) == {"shared": None}  # no group: there is nothing to change
    with pytest.raises(ValueError, match=r"grouped needs `--set kappa=\.\.\.`\."):
        bind("grouped", grouped, {"size": "4"}, {})


@pytest.mark.parametrize(
    ("text", "wanted", "value"),
    [
        ("3", int, 3),
        ("1e-3", float, 1e-3),
        ("No", bool, False),
        ("3", str, "3"),
        ("a.npz", Path, Path("a.npz")),
        ("none", int | None, None),
        ("3", int | float, 3),
        ("3", str | int, 3),
        ("b", Literal["a", "b"], "b"),
        ("1,2", tuple[int, float], (1, 2.0)),
        ("(1, 2, 3)", tuple[int, ...], (1, 2, 3)),
        ("[0.5]", list[float], [0.5]),
        ("[1, 2]", Any, [1, 2]),
        ("plain text", Any, "plain text"),
    ],
)
def test_a_text_becomes_what_the_signature_says(text: str, wanted: Any, value: object) -> None:
    found = convert(text, wanted)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "wanted", "words"),
    [
        ("1.5", int, "an integer"),
        ("x", float, "a number"),
        ("2", bool, "true or false"),
        ("c", Literal["a", "b"], "one of a, b"),
        ("1", tuple[int, int], "2 values separated by commas"),
        ("x", int | None, "an integer or none"),
        ("x", torch.Tensor, "something that a command line can give, not Tensor"),
    ],
)
def test_a_text_of_another_type_is_refused(text: str, wanted: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}$"):
        convert(text, wanted)


@pytest.mark.usefixtures("here")
def test_the_settings_reach_a_problem_of_the_catalogue() -> None:
    assert run("quadratic", "--set", "p=2", "--set", "kappa=50", "--set", "double=false", "--steps", "1") == 0
    found = result()
    assert found["description"] == quadratic(p=2, kappa=50.0, double=False).description
    assert solution()["x"].dtype == torch.float32


@pytest.mark.usefixtures("here")
def test_the_seed_reaches_the_problem_and_the_estimator() -> None:
    def value(seed: int, *words: str) -> tuple[float, list[float]]:
        assert run("quadratic", "--set", "p=30", "--estimator", "esj", "--seed", str(seed), *words, "--overwrite") == 0
        return result()["initial"]["value"], solution()["x"].tolist()

    assert value(1, "--steps", "1") == value(1, "--steps", "1")
    assert value(1, "--steps", "0")[0] != value(2, "--steps", "0")[0]
    file = user_file("x0, y0 = (torch.linspace(0, 1, 40, dtype=torch.float64) for _ in range(2))\ntarget = y0 - 1")
    found = []
    for seed in ("1", "1", "2"):
        words = (f"{file}:problem", "--estimator", "esj", "--seed", seed, "--steps", "2")
        assert run(*words, "--outer", "gd", "--step", "0.1", "--overwrite") == 0
        found.append(solution()["x"].tolist())
    assert found[0] == found[1] != found[2]


@pytest.mark.usefixtures("here")
def test_a_seed_without_effect_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{user_file('')}:problem", "--seed", "1", "--steps", "0") == 0
    assert "--seed has no effect" in capsys.readouterr().err
    assert run("quadratic", "--seed", "1", "--set", "seed=2", "--overwrite") == 2
    assert "given twice" in error_line(capsys)


# Exit codes and messages


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["run", "quadratic", "--estimator", "aid"], "there is no estimator 'aid'"),
        (
            ["run", "quadratic", "--algorithm", "sobba"],
            "there is no algorithm 'sobba'. Did you mean 'soba'? Names: descent, soba",
        ),
        (["run", "quadratic", "--algorithm", "soba", "--step", "1"], "leave out --step, which belongs to"),
        (["run", "maml-sinusoid", "--algorithm", "soba"], "does not apply to few-shot experiments"),
        (["run", "quadratic", "--outer", "sgd"], "there is no outer method 'sgd'. Did you mean 'gd'? Names: adam, "),
        (["run", "quadratic", "--outer", "gd"], "`--outer gd` needs a step length"),
        (["run", "quadratic", "--outer", "scipy-minimize", "--step", "1"], "leave out `--step`"),
        (["run", "quadratic", "--step", "-1"], "argument --step: must be a positive number. Got '-1'"),
        (["run", "quadratic", "--tol", "nan"], "argument --tol: must be a number >= 0. Got 'nan'"),
        (["run", "quadratic", "--steps", "1.5"], "argument --steps: must be an integer >= 0. Got '1.5'"),
        (["run"], "needs a PROBLEM"),
        (["walk"], "invalid choice: 'walk'"),
        ([], "a command is needed"),
        (["run", "quadratic", "--set", "kappa=0"], "`quadratic(kappa=...)` must be at least 1"),
        (["run", "quadratic", "--out", "a_file"], "is a file: name a folder"),
    ],
)
@pytest.mark.usefixtures("here")
def test_wrong_usage_is_one_line_and_exit_code_2(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a_file").touch()
    assert main(words) == 2
    assert complaint in error_line(capsys)
    assert [path.name for path in Path().iterdir()] == ["a_file"]


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["chek", "quadratic"], "check"),
        (["--verison"], "--version"),
        (["list", "--jsn"], "--json"),
        (["run", "quadratic", "--estimater", "itd"], "--estimator"),
        (["compare", "quadratic", "--buget=3"], "--budgets"),
        (["check", "quadratic", "--sed", "3"], "--seed"),
        (["data", "omniglott"], "omniglot"),
        (["run", "quadratik"], "quadratic"),
        (["check", "rige"], "ridge"),
        (["run", "maml-sinusoids"], "maml-sinusoid"),
        (["run", "quadratic", "--estimator", "aid-gc"], "aid-cg"),
        (["compare", "quadratic", "--estimator", "itdd"], "itd"),
        (["run", "quadratic", "--algorithm", "sobo"], "soba"),
        (["run", "quadratic", "--outer", "adan"], "adam"),
        (["run", "maml-sinusoid", "--outer", "adamm"], "adam"),
        (["run", "maml-sinusoid", "--estimator", "aid-gc"], "aid-cg"),
        (["run", "quadratic", "--set", "kapa=3"], "kappa"),
        (["check", "quadratic", "--set", "sede=3"], "seed"),
        (["run", "maml-sinusoid", "--set", "sots=3"], "shots"),
        (["run", "own.py:made", "--set", "kind=smoth"], "smooth"),
        (["run", "own.py:maed"], "made"),
        (["run", "onw.py:made"], "own.py"),
        (["run", "hyper-cleaning", "--set", "data=onw.npz"], "own.npz"),
    ],
)
@pytest.mark.usefixtures("here")
def test_a_mistaken_name_is_told_the_nearest_one(
    words: list[str], near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own.py").write_text(
        'from typing import Literal\n\ndef made(kind: Literal["smooth", "rough"]):\n    """A problem."""\n'
    )
    Path("own.npz").touch()
    assert main(words) == 2
    assert f"Did you mean {near!r}?" in error_line(capsys)


def test_a_name_that_is_near_to_nothing_is_told_none(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["run", "?"], ["run", "quadratic", "--set", "zzz=1"], ["walk"], ["list", "--zzz"]):
        assert main(words) == 2
        assert "Did you mean" not in error_line(capsys)


@pytest.mark.usefixtures("here")
def test_a_misfit_in_f_or_g_is_an_error_of_the_computation(capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        "import torch\nfrom bilevel import BilevelProblem\n\n"
        "problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y - torch.ones(3)).square().sum())\n"
        "x0, y0 = torch.ones(2), torch.ones(2)\n"
    )
    Path("own.py").write_text(text)
    assert run("own.py:problem") == 1
    line = error_line(capsys)
    assert "g of own.py:problem raised RuntimeError: `problem.g(x, y)` met shapes that do not fit" in line
    assert "y: float" in line
    assert "(at own.py:4)" in line


@pytest.mark.usefixtures("here")
def test_a_missed_tolerance_is_exit_code_1_and_everything_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quadratic", "--steps", "3", "--tol", "1e-9") == 1
    assert "Raise `max_steps`" in error_line(capsys)
    assert result()["status"] == "max_steps"
    assert result()["message"]
    assert len(history()) == 4
    assert sorted(path.name for path in Path("out").iterdir()) == FILES


@pytest.mark.usefixtures("here")
def test_a_failed_estimate_ends_the_run_unless_it_is_to_keep_going(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("rank-deficient", "--steps", "3", out="stops") == 1
    assert "did not succeed" in error_line(capsys)
    assert len(history("stops")) == 1
    assert run("rank-deficient", "--steps", "3", "--keep-going", out="goes") == 1
    assert "did not succeed" in error_line(capsys)
    assert len(history("goes")) == 4
    assert result("stops")["status"] == result("goes")["status"] == history("goes")[0]["status"] != "successful"


@pytest.mark.usefixtures("here")
def test_nan_is_reported_in_files_that_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    file = user_file("problem = BilevelProblem(lambda x, y: (y - 2 + x).log().sum(), problem.g)\nx0 = x0 + 1.5")
    assert run(f"{file}:problem", "--steps", "30", "--outer", "gd", "--step", "1") == 1
    assert "NaN" in error_line(capsys)
    assert result()["status"] == "nonfinite"
    assert result()["final"]["value"] == "NaN"
    assert history()[-1]["status"] == "nonfinite"


@pytest.mark.usefixtures("here")
def test_an_exception_on_the_way_is_exit_code_1_and_the_run_can_be_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    file = user_file("""
        from pathlib import Path
        calls = []
        def f(x, y):
            calls.append(1)
            if len(calls) == 8 and not Path("mended").exists():
                raise RuntimeError("no\\nmemory")
            return (y - target).square().sum()
        breaks = BilevelProblem(f, problem.g)
    """)
    assert run(f"{file}:breaks", "--outer", "adam", "--steps", "12") == 1
    line = error_line(capsys)
    step = int(re.findall(r"stopped after step (\d+): f of mine.py:breaks raised RuntimeError: no memory", line)[0])
    assert 0 < step < 12
    assert result()["status"] == "failed"
    assert [record["step"] for record in history()] == list(range(step + 1))
    assert result()["steps"] == step + 1
    Path("mended").touch()
    assert run(f"{file}:breaks", "--outer", "adam", "--steps", str(step + 1), out="so_far") == 0
    assert torch.equal(solution()["x"], solution("so_far")["x"])
    assert run(f"{file}:breaks", "--resume") == 0
    assert run(f"{file}:breaks", "--outer", "adam", "--steps", "12", out="whole") == 0
    assert torch.equal(solution()["x"], solution("whole")["x"])


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("level", ["f", "g"])
def test_an_exception_at_the_start_names_its_function_and_leaves_nothing(
    level: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = user_file("""
        def bad(x, y):
            return y @ torch.zeros(3, dtype=y.dtype)
        f, g = BilevelProblem(bad, problem.g), BilevelProblem(problem.f, bad)
        class Mine(BilevelProblem):
            def f(self, x, y): return bad(x, y) if which == "f" else problem.f(x, y)
            def g(self, x, y): return bad(x, y) if which == "g" else problem.g(x, y)
        def mine(level: str):
            global which
            which = level
            return Mine(), x0, y0
    """)
    for words in ([f"{file}:{level}"], [f"{file}:mine", "--set", f"level={level}"]):
        assert run(*words) == 1
        line = error_line(capsys)
        assert f"{level} of {words[0]} raised RuntimeError: " in line
        assert "(at mine.py:10)" in line
        assert not Path("out").exists()
        assert main(["compare", *words]) == 1
        assert f"{level} of {words[0]} raised RuntimeError: " in error_line(capsys)


@pytest.mark.usefixtures("here")
def test_a_value_that_is_no_scalar_is_wrong_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{user_file('bad = BilevelProblem(lambda x, y: y, problem.g)')}:bad") == 2
    assert "must return a scalar tensor" in error_line(capsys)


@pytest.mark.usefixtures("here")
def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quadratic", "--set", "kappa=0", "--debug") == 2
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert "`quadratic(kappa=...)` must be at least 1" in text
    assert text.splitlines()[-1].startswith("bilevel: error: `quadratic(kappa=...")


@pytest.mark.usefixtures("here")
def test_a_missing_extra_is_exit_code_3_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert run("ridge-diabetes") == 3
    assert 'pip install "bilevel[sklearn]"' in error_line(capsys)


@pytest.mark.usefixtures("folder")
def test_without_matplotlib_a_note_takes_the_place_of_the_plot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("quadratic", "--steps", "1") == 0
    text = capsys.readouterr().err
    assert text.startswith("bilevel: note: ")
    assert 'pip install "bilevel[plots]"' in text
    assert not Path("out/plot.png").exists()
    assert 'pip install "bilevel[plots]"' in result()["notes"][0]


def test_help_says_what_the_exit_codes_mean(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for code, meaning in (
        ("0", "success"),
        ("1", "succeed"),
        ("2", "wrong usage"),
        ("3", "missing"),
        ("130", "Ctrl-C"),
    ):
        assert re.search(rf"^ +{code} +.*{meaning}", text, re.MULTILINE), code
    assert main(["run", "--help"]) == 0
    assert "exit codes" in capsys.readouterr().out


# What is shown


@pytest.mark.usefixtures("folder")
def test_metrics_are_shown_and_recorded_and_the_problem_draws_its_plot(capsys: pytest.CaptureFixture[str]) -> None:
    file = user_file("""
        drawn = []
        made = Instance(
            problem, x0, y0, metrics=lambda x, y: {"first_entry": float(x[0]) + 40, "gap": float((x - y).abs().max())},
            plot=lambda figure, x, y: (figure.subplots().plot(x), figure.tight_layout(), open("drawn", "w").close()),
        )
    """)
    assert main(["run", f"{file}:made", "--steps", "3", "--out", "out"]) == 0
    found = result()["metrics"]
    assert found["first_entry"] == 40 + float(solution()["x"][0])
    shown = capsys.readouterr().out
    assert re.search(rf"first entry +{found['first_entry']:.6g}\n", shown)
    assert re.search(r"Phi +\S+ -> \S+", shown)
    assert re.search(r"oracle calls +\d+ gradients", shown)
    assert Path("drawn").exists()


@pytest.mark.usefixtures("folder")
def test_a_plot_or_metrics_that_fail_do_not_take_the_run_with_them(capsys: pytest.CaptureFixture[str]) -> None:
    file = user_file(
        "made = Instance(problem, x0, y0, metrics=lambda x, y: 1 / 0, plot=lambda figure, x, y: x.nothing)"
    )
    assert run(f"{file}:made", "--steps", "1") == 0
    notes = capsys.readouterr().err
    assert "ZeroDivisionError" in notes
    assert "AttributeError" in notes
    assert len(result()["notes"]) == 2


@pytest.mark.usefixtures("here")
def test_progress_where_there_is_no_terminal_is_a_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quadratic", "--steps", "55", "--out", "out"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert 10 <= len(lines) <= 13
    assert lines[0].startswith("quadratic: step  0/55  Phi ")
    assert lines[-1].startswith("quadratic: step 55/55  Phi ")


@pytest.mark.usefixtures("here")
def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quadratic", "--steps", "2") == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.usefixtures("here")
def test_in_a_terminal_the_same_is_drawn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    for module in (progress_module, shown_module):
        monkeypatch.setattr(module, "is_fancy", lambda _: True)
    assert main(["run", "quadratic", "--steps", "2", "--out", "out"]) == 0
    captured = capsys.readouterr()
    assert "2/2" in captured.err
    assert "steps_used_up" in captured.out
    assert f"{result()['final']['value']:.6g}" in captured.out


# As a process


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "bilevel", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"bilevel {bilevel.__version__}\n"


def test_help_loads_neither_problems_nor_solvers_nor_an_extra() -> None:
    program = "import sys; from bilevel.cli import main; main(['run', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1].split()
    assert "bilevel.cli" in loaded
    assert not {"bilevel.problems", "bilevel.commands.run", "rich", "matplotlib", "sklearn"} & set(loaded)


SLOW = """
import time

def f(x, y):
    time.sleep(0.01)
    return (y - target).square().sum()

slow = BilevelProblem(f, problem.g)
"""


@pytest.mark.usefixtures("here")
def test_interrupting_leaves_everything_to_continue_bit_for_bit() -> None:
    words = ["run", f"{user_file(SLOW)}:slow", "--outer", "adam", "--steps", "100000", "--out", "out"]
    program = (  # a job in the background may have been started with interrupts ignored
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        " import torch; torch.set_default_dtype(torch.float64); torch.set_num_threads(1);"
        f" from bilevel.cli import main; sys.exit(main({words!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not Path("out/history.jsonl").exists() or len(history_lines()) < 13:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130
    last = text.splitlines()[-1]
    assert "Traceback" not in text
    assert "--out out --resume" in last
    found = result()
    assert found["status"] == "interrupted"
    steps = found["steps"]
    assert steps >= 12
    assert len(history()) in (steps, steps + 1)
    assert torch.load("out/checkpoint.pt", weights_only=True)["step"] == steps
    total = str(steps + 3)
    assert run("mine.py:slow", "--steps", total, "--resume") == 0
    assert result()["status"] == "steps_used_up"
    assert run("mine.py:slow", "--outer", "adam", "--steps", total, out="whole") == 0
    assert torch.equal(solution()["x"], solution("whole")["x"])
    assert without_seconds(history()) == without_seconds(history("whole"))


def history_lines() -> list[str]:
    return Path("out/history.jsonl").read_text().splitlines()


FAILS = """
        import builtins, os, signal, resource
        calls = []
        def f(x, y):
            calls.append(1)
            if len(calls) == {at}:
                {what}
            return (y - target).square().sum()
        breaks = BilevelProblem(f, problem.g)
"""


@pytest.mark.usefixtures("here")
def test_a_full_disk_is_exit_code_1_and_says_what_was_kept(capsys: pytest.CaptureFixture[str]) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = "(os.path.getsize('out/history.jsonl') + 500, -1)"
    file = user_file(FAILS.format(at=30, what=f"resource.setrlimit(resource.RLIMIT_FSIZE, {limit})"))
    try:
        assert run(f"{file}:breaks", "--outer", "adam", "--steps", "60") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    line = error_line(capsys)
    kept = int(re.findall(r"Kept: the checkpoint of step (\d+) in 'out', from which `--resume` continues", line)[0])
    assert "File too large" in line
    assert 10 <= kept <= 40
    assert all(line.endswith("}") for line in history_lines())
    assert run(f"{file}:breaks", "--resume") == 0
    assert run(f"{file}:breaks", "--outer", "adam", "--steps", "60", out="whole") == 0
    assert torch.equal(solution()["x"], solution("whole")["x"])
    assert without_seconds(history()) == without_seconds(history("whole"))


@pytest.mark.usefixtures("here")
def test_after_a_second_interrupt_the_steps_of_the_result_are_those_of_the_history(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from bilevel.outer import saves

    original, file = write_atomically, user_file(FAILS.format(at=40, what="raise KeyboardInterrupt"))
    saved: list[int] = []

    def write(path: Any, action: Any) -> None:
        saved.append(len(history_lines()))
        if len(saved) > 3:
            raise KeyboardInterrupt
        original(path, action)

    monkeypatch.setattr(saves, "write_atomically", write)
    assert run(f"{file}:breaks", "--outer", "adam", "--steps", "60") == 130
    monkeypatch.setattr(saves, "write_atomically", original)
    found, records = result(), history()
    assert found["steps"] == records[-1]["step"] == found["final"]["step"] == len(records) - 1 > 30
    assert torch.load("out/checkpoint.pt", weights_only=True)["step"] == 30
    assert run(f"{file}:breaks", "--outer", "adam", "--steps", str(found["steps"]), out="shorter") == 0
    assert torch.equal(solution()["x"], solution("shorter")["x"])
    assert run(f"{file}:breaks", "--resume") == 0
    assert [record["step"] for record in history()] == list(range(61))


@pytest.mark.usefixtures("here")
def test_another_problem_of_the_same_name_is_refused_also_where_nothing_is_left_to_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = Path(user_file("other = BilevelProblem(lambda x, y: (y - 7).square().sum(), problem.g)"))
    assert run(f"{file}:other", "--steps", "3", "--outer", "adam") == 0
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    Path("b").mkdir()
    Path("b/mine.py").write_text(file.read_text().replace("(y - 7)", "(y - 8)"))
    for steps in ("3", "9"):
        assert run("b/mine.py:other", "--resume", "--steps", steps) == 2
        assert "problem.f has other code" in error_line(capsys)
        assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before
    Path("b/mine.py").write_text(f"# moved\n{file.read_text()}")
    assert run("b/mine.py:other", "--resume", "--steps", "4") == 0


@pytest.mark.usefixtures("here")
def test_result_json_holds_no_memory_address() -> None:
    file = user_file("""
        from bilevel import AID, Instance
        from bilevel.solvers import CG, ClosedForm
        aid = AID(ClosedForm(lambda x: x), CG())
        same = BilevelProblem(problem.f, lambda x, y: (y - x).square().sum())
        mine = Instance(same, x0, x0, settings={"estimator": aid})
    """)
    assert run(f"{file}:mine", "--steps", "2") == 0
    text = Path("out/result.json").read_text()
    assert "<function <lambda>>" in text and "0x" not in text


@pytest.mark.usefixtures("here")
def test_an_interrupted_driver_can_be_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scipy")
    file = user_file("""
        calls = []
        def f(x, y):
            calls.append(1)
            if len(calls) == 7:  # three of them to look at f at first
                raise KeyboardInterrupt
            return (y - target).square().sum() + (x - target).pow(4).sum()
        stops = BilevelProblem(f, problem.g)
    """)
    assert run(f"{file}:stops", "--outer", "scipy-minimize") == 130
    assert "Continue with: bilevel run mine.py:stops --out out --resume" in capsys.readouterr().err
    assert result()["status"] == "interrupted"
    assert len(history()) == result()["steps"] == 3
    assert run(f"{file}:stops", "--resume") == 0
    assert run(f"{file}:stops", "--outer", "scipy-minimize", out="whole") == 0
    assert torch.equal(solution()["x"], solution("whole")["x"])
    assert without_seconds(history()) == without_seconds(history("whole"))
