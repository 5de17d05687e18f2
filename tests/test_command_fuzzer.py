"""The command line under arguments that nobody meant: a documented exit code, one line, no traceback, nothing opaque.

Commands and options are read off the parser, so that new ones are tried too. `COMMAND_CASES` says how many cases;
`COMMAND_SEED` with which to begin.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bilevel import cli
from bilevel.commands import (
    compare as compare_module,
    few_shot as few_shot_module,
    outcome as outcome_module,
    run as run_module,
)
from bilevel.diagnostics.compare import compare
from bilevel.few_shot import Experiment
from bilevel.outer.minimize import minimize

CASES, SEED = int(os.environ.get("COMMAND_CASES", "200")), int(os.environ.get("COMMAND_SEED", "0"))
CODES = {cli.SUCCESS, cli.FAILED, cli.USAGE, cli.MISSING}
STEPS = 3  # of a run, whatever number was asked for

OWN = """
import sys
from typing import Literal
import torch
from torch.nn.functional import mse_loss
from bilevel import BilevelProblem, Instance
from bilevel.few_shot import Evaluating, Experiment, Training, Validating, mlp
from bilevel.problems import maml
from bilevel.tasks import Sinusoid

def f(x, y): return (y - 1).square().sum()
def g(x, y): return (y - x).square().sum() / 2
def leaves(*_): sys.exit(0)
def stops(*_): raise SystemExit("bye")
def nothing(*_): return None
x0 = y0 = torch.zeros(2).double()
problem, exits, says, none = (BilevelProblem(each, g) for each in (f, leaves, stops, nothing))
nan = BilevelProblem(lambda x, y: f(x, y) * float("nan"), g)
ready = Instance(problem, x0, y0, metrics=leaves, plot=stops, settings={"max_steps": 2})
odd = Instance(problem, x0, y0, metrics=lambda x, y: {"a": "b", 3: x, "deep": [[[x]]], "none": None})
unknown = Instance(problem, x0, y0, settings={"steps": 3})
text, number = "text", 3

def typed(n: int, rate: float = 0.5, mode: Literal["a", "b"] = "a", flag: bool = False, sizes: tuple[int, ...] = (1, 2),
          maybe: int | None = None, anything=None, seed: int = 0):
    return problem, x0 + n + rate, y0

def raises(error="ValueError"): raise getattr(__builtins__, error, KeyError)("no")
def leaving(): sys.exit(0)
def tensors(x: torch.Tensor): return problem, x, x
def free(**keywords): return problem, x0, y0
def positional(a, /, b=1): return problem, x0, y0
def broken(n: "Nowhere" = 3): return problem, x0, y0
def wrong() -> "Experiment": return 3

def tuned(shots: int = 3, width: int = 4, seed: int = 0) -> Experiment:
    tasks = Sinusoid(shots=shots)
    learner = maml(mlp((1, width, 1), seed=seed), mse_loss)
    return Experiment(learner, tasks, Validating(tasks, episodes=2), tasks, settings=Training(max_steps=2, batch=2),
                      evaluation=Evaluating(episodes=2))
"""
MEMBERS = [
    *re.findall(r"^(?:def )?(\w+)(?: =|\()", OWN, re.MULTILINE),
    "x0",
    "exits",
    "says",
    "none",
    "sys",
    "__name__",
]

TEXTS = (
    "", " ", "0", "1", "2", "-1", "-0.5", "0.5", "3.0", "1e-3", "nan", "NaN", "inf", "-inf", "1e400", "1e-400",
    "1_0", "0x1f", str(2**31), str(2**63), str(-(2**63) - 1), str(2**64), "9" * 30, "9" * 5000, "٣", "½",
    "none", "None", "true", "yes", "()", "[1,2]", "1,2", ",", "=", "a=b", "a=", "=b", "--", "-", "---", "--out",
    "quadratic", "own.py", "own.py:", ":", ":problem", "own.py:problem", "a folder", "a folder/own.py:problem",
    "folder.py:problem", "bytes.py:problem", "deep.py:problem", "exit.py:problem", "interrupt.py:problem",
    "null.py:problem", "missing.py:problem", "/", ".", "..", "/dev/null", "/dev/full", "/proc/self/mem",
    "x" * 300, "a" * 5000, "ünï/¢ödé", "😀", "\udcff", "a\nb", "a\tb", "\x1b[31m", "%s", "%(prog)s", "{0}",
    "$HOME", "'", '"', "; ls", "../../../../etc/passwd", "run", "damaged", "empty", "garbage", "a file", "loop",
    "dangling", "\0",
)  # fmt: skip
PROBLEMS = (
    *("quadratic",) * 14, *("own.py:tuned", "own.py:problem", "own.py:typed", "own.py:ready") * 4, "nested",
    "rank-deficient", *(f"own.py:{name}" for name in MEMBERS),
)  # fmt: skip
FOLDERS = (
    *("new",) * 7, *("run",) * 6, *("damaged",) * 5, *("trained",) * 3, "empty", "garbage", "a file", "loop",
    "dangling", "new/er", "a file/x", "forbidden",
)  # fmt: skip
SETS = (
    "p=2", "q=3", "kappa=0", "kappa=5", "kappa=nan", "seed=1", "seed=-1", "p=0", "p=-1", f"p={'9' * 30}",
    "double=maybe", "n=1", "n=x", "n=1.5", "rate=nan", "rate=inf", "mode=c", "flag=2", "sizes=1,2", "sizes=",
    "maybe=none", "anything={", "anything=[1", f"anything={'[' * 3000}", "error=KeyError", "error=OSError",
    "x=1", "shots=0", "shots=2", "shots=-1", "width=0", "batch=0", "=", "n", "n=", " n = 1 ", "1n=2", "ü=1",
    "a=1", "b=2", "data=own.npz",
)  # fmt: skip
EITHER: dict[str, tuple[str, ...]] = {
    "--out": FOLDERS,
    "--set": SETS,
    "--estimator": ("aid-cg", "itd", "esj", "auto", "aid", "implicit", "finite-difference"),
    "--algorithm": ("soba", "descent", "sobba"),
    "--outer": ("adam", "gd", "scipy-minimize", "quasi-newton", "sgd", "lbfgs"),
    "--budgets": ("1,2", "3", "0", "1,,2", "1.5"),
    "--from": ("empty", "garbage", "a file", "missing", "archives"),
    "PROBLEM": PROBLEMS,
    "NAME": ("omniglot",),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a case finds in its current directory."""
    base = tmp_path_factory.mktemp("base")
    (base / "own.py").write_text(OWN)
    (base / "a folder").mkdir()
    (base / "a folder" / "own.py").write_text(OWN)
    (base / "folder.py").mkdir()
    (base / "bytes.py").write_bytes(bytes(range(256)))
    (base / "null.py").write_bytes(b"\0\0")
    (base / "deep.py").write_text("x = " + "(" * 5000)
    (base / "exit.py").write_text("import sys; sys.exit(0)")
    (base / "interrupt.py").write_text("raise SystemExit('stop')")
    (base / "own.npz").write_bytes(b"PK not a zip")
    (base / "a file").write_text("text")
    (base / "empty").mkdir()
    (base / "garbage").mkdir()
    (base / "archives").mkdir()
    for name in ("result.json", "checkpoint.pt", "history.jsonl", "solution.pt", "images_background.zip"):
        (base / "garbage" / name).write_bytes(b"\x80\x02garbage")
    for name in ("images_background.zip", "images_evaluation.zip"):
        (base / "archives" / name).write_bytes(b"PK\x05\x06" + bytes(18))
    (base / "forbidden").mkdir()
    (base / "forbidden" / "result.json").mkdir()
    (base / "loop").symlink_to("loop")
    (base / "dangling").symlink_to("nowhere")
    with contextlib.chdir(base), contextlib.redirect_stderr(io.StringIO()):
        assert cli.main(["run", "quadratic", "--steps", "1", "--out", "run", "--quiet"]) == 0
        assert cli.main(["run", "own.py:tuned", "--out", "trained", "--quiet"]) == 0
    shutil.copytree(base / "run", base / "damaged")
    return base


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few steps, no pictures, no network."""
    train = Experiment.train

    def few(*arguments: Any, max_steps: int, **keywords: Any) -> Any:
        return minimize(*arguments, max_steps=min(max_steps, STEPS), **keywords)

    def short(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if self.settings.max_steps > STEPS or self.settings.batch > STEPS:
            raise ValueError("it would take too long")
        return train(self, *arguments, **keywords)

    def two(*arguments: Any, estimators: Any, **keywords: Any) -> Any:
        return compare(*arguments, estimators=estimators or ("aid-cg", "itd"), **keywords)

    def unreachable(*_: Any, **__: Any) -> Any:
        raise urllib.error.URLError("there is no network")

    monkeypatch.setattr(run_module, "minimize", few)
    monkeypatch.setattr(Experiment, "train", short)
    monkeypatch.setattr(outcome_module, "draw", lambda file, *_: file.write(b"a picture"))
    monkeypatch.setattr(few_shot_module, "draw_training", lambda file, *_: file.write(b"a picture"))
    monkeypatch.setattr(compare_module, "_draw", lambda file, *_: file.write(b"a picture"))
    monkeypatch.setattr(compare_module, "compare_estimators", two)
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names, default = set(sys.modules), torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() is default
    for name in set(sys.modules) - names:
        if name in ("own", "bytes", "null", "deep", "exit", "interrupt", "folder"):
            del sys.modules[name]


def subparsers() -> dict[str, argparse.ArgumentParser]:
    (found,) = (action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


COMMANDS = subparsers()


def sound(action: argparse.Action, text: str) -> bool:
    """Whether the parser takes it."""
    try:
        if callable(action.type):
            action.type(text)
    except (argparse.ArgumentTypeError, ValueError):
        return False
    return action.choices is None or text in action.choices


def value(draw: random.Random, action: argparse.Action) -> str:
    """Mostly one of those that mean something for this option, else anything: most mistakes are met after parsing."""
    name = action.option_strings[-1] if action.option_strings else str(action.metavar)
    if draw.random() < 0.9 and name in EITHER:
        return draw.choice(EITHER[name])
    likely = [text for text in TEXTS if sound(action, text)]
    return draw.choice(likely if likely and draw.random() < 0.8 else TEXTS)


def words(draw: random.Random) -> list[str]:
    """A command line."""
    if draw.random() < 0.03:
        return [draw.choice(TEXTS) for _ in range(draw.randrange(3))]
    name = draw.choices(list(COMMANDS), [{"run": 14, "check": 1, "compare": 0.4}.get(name, 0.7) for name in COMMANDS])[
        0
    ]
    found = []
    for action in COMMANDS[name]._actions:
        if isinstance(action, argparse._HelpAction):
            if draw.random() < 0.01:
                found.append([draw.choice(action.option_strings)])
        elif not action.option_strings:
            found += [[value(draw, action)]] * (draw.random() < 0.98)
        else:
            likely = {
                "--out": 0.9,
                "--resume": 0.3,
                "--overwrite": 0.12,
                "--seconds": 0.04,
                "--force": 0.04,
                "--debug": 0.02,
            }
            for _ in range(draw.choice((1, 1, 1, 2))):
                if draw.random() < likely.get(action.option_strings[-1], 0.12):
                    option = draw.choice(action.option_strings)
                    plain, joined = [option, value(draw, action)], [f"{option}={value(draw, action)}"]
                    found.append([option] if action.nargs == 0 else draw.choice((plain, joined)))
    if draw.random() < 0.03:
        found.append([draw.choice(TEXTS)])
    if draw.random() < 0.5:
        draw.shuffle(found)
    return [name, *(word for each in found for word in each)]


def complaint(case: list[str], code: object, out: str, error: str) -> str | None:
    """What is wrong with how a command line was answered, or None."""
    if code not in CODES:
        return f"exit code {code!r} is not documented"
    shown = re.compile(r"bilevel: note: |step |[^\n]*: step +\d+/\d+  ")  # progress has the name of the run in front
    lines = [line for line in error.split("\n")[:-1] if not shown.match(line)]
    if "--debug" in case:
        return None if not lines or lines[-1].startswith("bilevel: error: ") else "the last line is no error"
    if len(lines) != (0 if code == cli.SUCCESS else 1):
        return f"{len(lines)} lines"
    if lines and not (lines[0].startswith("bilevel: error: ") and len(lines[0]) < 2500):
        return "no line of an error"
    if "Traceback" in error + out:
        return "a traceback"
    whose = re.search(r"\b[fg] of \S* ?\S* ?raised |own.py:raises", error)
    if "`--debug` shows the traceback" in error and not whose:
        return "it is opaque"
    return None


def answered(case: list[str]) -> tuple[object, str, str]:
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of f: torch says what it thinks of NaN
        try:
            code: object = cli.main(case)
        except BaseException as escaped:
            code = escaped
    return code, out.getvalue(), error.getvalue()


@pytest.mark.usefixtures("quick")
def test_every_command_line_is_answered_by_a_documented_code_and_one_line(folders: Path, tmp_path: Path) -> None:
    wrong = []
    here = tmp_path / "here"
    for seed in range(SEED, SEED + CASES):
        draw = random.Random(seed)
        case = words(draw)
        if seed == SEED or case[:1] not in (["list"], ["check"], []):
            shutil.rmtree(here, ignore_errors=True)
            shutil.copytree(folders, here, symlinks=True)
            damaged = draw.choice(sorted((here / "damaged").iterdir()))
            content = damaged.read_bytes()
            damaged.write_bytes(content[: draw.randrange(len(content))] + draw.randbytes(draw.randrange(20)))
        with contextlib.chdir(here):
            code, out, error = answered(case)
        found = complaint(case, code, out, error)
        if found is not None:
            wrong.append(f"{seed}: {found}: {json.dumps(case)[:600]}\n    {code}: {error[-600:]}")
    assert not wrong, f"{len(wrong)} of {CASES}\n" + "\n".join(wrong[:40])


def test_the_fuzzer_sees_each_kind_of_mistake() -> None:
    for case, code, error in (
        ([], 5, ""),
        ([], 1, ""),
        ([], 0, "bilevel: error: a\n"),
        ([], 2, "bilevel: error: a\nb\n"),
        ([], 2, "Traceback\n"),
        ([], 2, "bilevel: error: KeyError: 3. `--debug` shows the traceback.\n"),
        ([], SystemExit(2), "bilevel: error: a\n"),
    ):
        assert complaint(case, code, "", error) is not None, (code, error)
    assert complaint([], 2, "", "bilevel: note: a\nbilevel: error: b\n") is None
    assert complaint([], 0, "all", "") is None
