"""Settings in a file, several runs, reports, completion, devices, `auto`: the command line."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from bilevel.cli import main
from bilevel.commands.config import read, written
from bilevel.commands.many import half_width, seeds_of, shown

RUN = ("run", "ridge", "--set", "n=6", "--set", "q=2", "--steps", "1", "--quiet")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def result(folder: str) -> Any:
    return json.loads(Path(folder, "result.json").read_text())


# Settings in a file


def test_a_run_can_be_asked_for_again_by_the_file_that_it_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--step", "0.2", "--outer", "adam", "--seed", "3", "--out", "a"]) == 0
    assert main(["run", "--config", "a/config.toml", "--quiet", "--out", "b"]) == 0
    a, b = result("a"), result("b")
    assert a["settings"] == b["settings"] and a["final"]["value"] == b["final"]["value"]
    assert Path("a/config.toml").read_text() == Path("b/config.toml").read_text()
    assert tomllib.loads(Path("a/config.toml").read_text())["set"] == {"n": "6", "q": "2"}


def test_the_command_line_wins_over_the_file() -> None:
    Path("c.toml").write_text(
        'problem = "quadratic"\nsteps = 3\nstep = 0.1\n[set]\nn = 7\nq = 3\nper_feature = false\n'
    )
    assert main(["run", "ridge", "--config", "c.toml", "--steps", "1", "--set", "n=5", "--quiet", "--out", "a"]) == 0
    found = result("a")["settings"]
    assert (found["problem"], found["steps"], found["step"]) == ("ridge", 1, 0.1)
    assert found["set"] == {"n": "5", "q": "3", "per_feature": "false"}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("stepz = 3", "Did you mean 'step"),
        ("steps = true", "'steps' must be a number"),
        ("problem = 3", "'problem' must be a text"),
        ("set = 3", "[set]"),
        ("= 3", "cannot be read"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(text: str, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.toml").write_text(text)
    assert main(["run", "ridge", "--config", "c.toml"]) == 2
    assert what in capsys.readouterr().err and not Path("runs").exists()


def test_a_problem_is_needed_from_somewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run"]) == 2 and "needs a PROBLEM" in capsys.readouterr().err


NAMES = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=10)


@settings(max_examples=30, deadline=None)
@given(
    TEXTS.filter(bool),
    st.none() | st.integers(0, 10**6),
    st.none() | st.floats(1e-9, 1e9),
    st.dictionaries(NAMES, TEXTS),
)
def test_what_is_written_is_read_as_it_was(problem: str, steps: Any, step: Any, arguments: dict[str, str]) -> None:
    text = written({"problem": problem, "steps": steps, "step": step, "set": arguments})
    Path("c.toml").write_text(text, encoding="utf-8")
    found = read("c.toml")
    assert found["problem"] == problem and found.get("steps") == (None if steps is None else str(steps))
    assert (float(found["step"]) if step is not None else None) == step  # type: ignore[arg-type]
    assert found.get("set", []) == [f"{key}={value}" for key, value in arguments.items()]


# Several runs


def test_there_is_a_run_for_each_seed_and_combination_and_a_row_of_means(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "ridge", "--set", "n=6", "--steps", "1", "--seeds", "0-2", "--out", "m"]
    assert main([*words, "--sweep", "q=2,3", "--sweep", "step=0.1"]) == 0
    text = capsys.readouterr().out
    folders = sorted(path.parent.name for path in Path("m").glob("*/result.json"))
    assert folders == [f"q={q}_step=0.1_seed={seed}" for q in (2, 3) for seed in (0, 1, 2)]
    alone = result("m/q=2_step=0.1_seed=1")["settings"]
    assert (alone["set"], alone["step"], alone["seed"]) == ({"n": "6", "q": "2"}, 0.1, 1)
    rows = json.loads(Path("m/runs.json").read_text())["rows"]
    values = [result(f"m/q=3_step=0.1_seed={seed}")["final"]["value"] for seed in range(3)]
    assert rows[1]["value"]["mean"] == pytest.approx(statistics.fmean(values))
    assert rows[1]["value"]["half_width"] == pytest.approx(4.303 * statistics.stdev(values) / 3**0.5)
    assert len(text.splitlines()[0].split()) == 6 and "3 " in text.splitlines()[1]
    assert all(len(line) <= 80 for line in text.splitlines()[:-1])


def test_a_run_that_fails_is_counted_and_the_others_are_made(capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.py").write_text(
        "import torch\nfrom bilevel import BilevelProblem\n"
        "def problem(a: float = 1.0):\n"
        "    zero = torch.tensor(0.0).double()\n"
        "    f = lambda x, y: (y - a) ** 2 / 2 if a < 2 else y * float('nan')\n"
        "    return BilevelProblem(f, lambda x, y: (y - x) ** 2 / 2), zero, zero\n"
    )
    assert main(["run", "p.py:problem", "--sweep", "a=3,1", "--steps", "1", "--quiet", "--out", "m"]) == 1
    assert "1 of 2 runs did not succeed. a=3" in capsys.readouterr().err
    assert result("m/a=1")["status"] == "successful" or result("m/a=1")["final"]["value"] < 1e-6


def test_a_mean_is_over_the_runs_that_succeeded_and_says_of_how_many(capsys: pytest.CaptureFixture[str]) -> None:
    """A value that is not a number was left out in silence."""
    Path("p.py").write_text(
        "import torch\nfrom bilevel import BilevelProblem\n"
        "def problem(seed: int = 0):\n"
        "    zero = torch.tensor(0.0).double()\n"
        "    f = lambda x, y: (y - seed) ** 2 / 2 + 3 if seed != 1 else y * float('nan')\n"
        "    return BilevelProblem(f, lambda x, y: (y - x) ** 2 / 2), zero, zero\n"
    )
    assert main(["run", "p.py:problem", "--seeds", "0-2", "--steps", "0", "--out", "m"]) == 1
    (row,) = json.loads(Path("m/runs.json").read_text())["rows"]
    assert (row["runs"], row["succeeded"]) == (3, 2)
    assert row["value"]["mean"] == pytest.approx((3 + 5) / 2)
    assert "2 of 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--seeds", "5-1"], "such as 0-9"),
        (["--seeds", "0-1", "--seed", "3"], "given twice"),
        (["--sweep", "q"], "key=a,b,c"),
        (["--sweep", "q=1,,2"], "key=a,b,c"),
        (["--sweep", "step=a"], "must be numbers"),
        (["--sweep", "q=2", "--sweep", "q=3"], "given twice"),
        (["--sweep", "nosuch=2"], "no argument 'nosuch'"),
        (["--device", "nowhere"], "--device nowhere"),
    ],
)
def test_words_that_make_no_sense_are_refused(words: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, *words, "--out", "m"]) == 2
    assert what in capsys.readouterr().err


def test_seeds_are_numbers_and_ranges() -> None:
    assert seeds_of("3, 0-1,1") == (3, 0, 1)
    for text in ("", "a", "1-", "-1", "0-99999"):
        with pytest.raises(ValueError, match="such as"):
            seeds_of(text)


def test_an_interval_is_students() -> None:
    assert half_width([1.0]) is None
    assert half_width([0.0, 2.0]) == pytest.approx(12.706)  # s / sqrt(n) = 1
    assert half_width([float(i) for i in range(40)]) == pytest.approx(2.0227 * 11.69 / 40**0.5, rel=1e-2)


def test_a_table_that_is_too_wide_goes_on_below() -> None:
    row: dict[str, Any] = {"combination": {"key": "value"}, "runs": 1, "succeeded": 1}
    names = [f"metric_number_{i}" for i in range(9)]
    row |= {name: {"mean": 1 / 3, "half_width": 0.1} for name in names}
    text = shown(names, [row])
    assert all(len(line) <= 80 for line in text.splitlines()) and all(name in text for name in names)


# Reports


class Page(HTMLParser):
    """Which tags are open at the end, and what is loaded from elsewhere."""

    def __init__(self) -> None:
        HTMLParser.__init__(self)
        self.open: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "line"):
            self.open.append(tag)
        self.outside += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith("data:")]
        assert tag != "script"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_report_is_one_page_that_needs_nothing_else_with_runs_side_by_side(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for step, name in (("0.1", "a"), ("0.2", "<b>")):
        assert main([*RUN[:-1], "--steps", "3", "--step", step, "--out", name, "--quiet"]) == 0
    assert main(["report", "a", "<b>", "--out", "r.html"]) == 0
    assert capsys.readouterr().out == "r.html\n"
    text, page = Path("r.html").read_text(), Page()
    page.feed(text)
    assert not page.open and not page.outside
    assert "&lt;b&gt;" in text and "<b>" not in text
    assert text.count("<polyline") == 4 and f"{result('a')['final']['value']:.6g}" in text
    assert result("a")["versions"]["torch"] in text and ("data:image/png" in text) == Path("a/plot.png").exists()


def test_a_folder_without_a_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert main(["report", "empty"]) == 2 and "holds no run" in capsys.readouterr().err


# Completion


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_names_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    Path("c.sh").write_text(capsys.readouterr().out)

    def completed(*words: str) -> list[str]:
        line = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}"
        program = f'source c.sh; {line}; _bilevel; echo "${{COMPREPLY[@]}}"'
        return subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout.split()

    assert completed("bilevel", "rep") == ["report"]
    assert completed("bilevel", "run", "ridge-dia") == ["ridge-diabetes"]
    assert completed("bilevel", "run", "x", "--estimator", "aut") == ["auto"]
    assert "--seeds" in completed("bilevel", "run", "--se")
    assert not completed("bilevel", "report", "ridge-d")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_script_too(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert "quadratic" in text and "seeds" in text and re.search(r"compdef|bashcompinit|complete -c", text)


# Estimators and devices


def test_auto_is_an_estimator_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--estimator", "auto", "--out", "a"]) == 0
    assert result("a")["settings"]["estimator"] == "auto"
    assert main(["list", "--json"]) == 0
    assert "auto" in json.loads(capsys.readouterr().out)["estimators"]


def test_a_device_is_where_tensors_are_made_and_what_a_function_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.py").write_text(
        "import torch\nfrom bilevel import BilevelProblem\n"
        "def problem(device: str = 'meta'):\n"
        "    zero = torch.zeros((), device=device).double()\n"
        "    return BilevelProblem(lambda x, y: (y - 1) ** 2 / 2, lambda x, y: (y - x) ** 2 / 2), zero, zero\n"
        "def elsewhere():\n    return problem('cpu')\n"
    )
    assert main(["run", "p.py:problem", "--device", "cpu", "--steps", "1", "--quiet", "--out", "a"]) == 0
    assert result("a")["settings"]["device"] == "cpu"
    assert main(["run", "p.py:elsewhere", "--device", "meta", "--out", "b"]) == 2
    assert "its x0 is on cpu" in capsys.readouterr().err


def test_what_a_run_prints_fits_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*RUN[:-1], "--out", "a"]) == 0
    assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines())
