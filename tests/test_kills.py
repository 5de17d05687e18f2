"""Runs that are killed at random moments, and resumed, end where the run that was left alone ends, bit for bit.

`KILLS=1000 pytest -m slow tests/test_kills.py` takes that many; `KILLS_SEED` begins elsewhere.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from cases import bits
from forks import ended, forked, killed_after

from bilevel._tree import tree_leaves
from bilevel.cli import main
from bilevel.commands import few_shot as few_shot_module, outcome as outcome_module

MINE = """
import random, time
import torch
from torch.nn.functional import mse_loss
from bilevel import BilevelProblem, Instance
from bilevel.few_shot import Evaluating, Experiment, Training, Validating, mlp
from bilevel.problems import maml
from bilevel.tasks import Sinusoid

scales = torch.linspace(1, 4, 5, dtype=torch.float64)
def rosenbrock(x, y): return ((1 - y[:-1]) ** 2 + 5 * (y[1:] - y[:-1] ** 2) ** 2).sum()
def g(x, y): return (scales * (y - x) ** 2).sum() / 2 + 0.01 * (y ** 4).sum()
x0 = y0 = torch.full((5,), -0.5, dtype=torch.float64)
def slow(x, y):
    time.sleep(0.03)
    return {"loss": float(rosenbrock(x, y))}
problem = BilevelProblem(rosenbrock, g)
with_adam = {"outer": "adam", "outer_step": 0.05, "max_steps": 30}
adam = Instance(problem, x0, y0, metrics=slow, settings=with_adam)
newton = Instance(problem, x0, y0, metrics=slow, settings={"max_steps": 40})
driven = Instance(problem, x0, y0, metrics=slow, settings={"outer": "scipy-minimize", "max_steps": 15})

def noisy(seed: int = 0):
    torch.manual_seed(seed)
    random.seed(seed)
    def data(step):  # from the global random state: what is drawn depends on all that was drawn before
        return torch.randn(5, dtype=torch.float64) * random.random()
    def f(x, y, noise): return rosenbrock(x, y + 0.1 * noise)
    problem = BilevelProblem(f, lambda x, y, noise: g(x, y))
    settings = {**with_adam, "data": data, "estimator": "aid-cg"}
    return Instance(problem, x0, y0, metrics=lambda x, y: {"x": float(x.sum())}, settings=settings)

def tuned() -> Experiment:
    tasks = Sinusoid(shots=3)
    learner = maml(mlp((1, 8, 1)), mse_loss)
    return Experiment(learner, tasks, Validating(tasks, every=7, episodes=3), tasks,
                      settings=Training(max_steps=25, batch=3, checkpoint_every=4), evaluation=Evaluating(episodes=20))
"""
KINDS: dict[str, list[str]] = {
    "adam": ["mine.py:adam"],
    "quasi-newton": ["mine.py:newton"],
    "a random f": ["mine.py:noisy", "--seed", "3"],
    "few-shot training": ["mine.py:tuned", "--seed", "1"],
    "scipy": ["mine.py:driven"],
    "soba on a named problem": ["quadratic", "--algorithm", "soba", "--steps", "40", "--set", "p=6"],
}
TIMED = ("seconds", "elapsed", "own_seconds", "training_seconds")


def drawn(file: BinaryIO, *_: Any) -> None:
    for half in (b"one half, ", b"and the other"):
        file.write(half)
        time.sleep(0.01)


@dataclass(frozen=True)
class Left:
    """What a run leaves, without what depends on time."""

    result: Any
    history: list[Any]
    tensors: dict[str, list[bytes]]

    @staticmethod
    def at(folder: Path) -> Left:
        """What is in a folder."""
        names = sorted(path.name for path in folder.iterdir())
        assert not [name for name in names if name.startswith(".")], names
        lines = (folder / "history.jsonl").read_text().splitlines()
        kept = {
            name: torch.load(folder / name, weights_only=True) for name in names if name in ("solution.pt", "model.pt")
        }
        return Left(
            timeless(json.loads((folder / "result.json").read_text())),
            [timeless(json.loads(line)) for line in lines],
            {name: [bits(leaf) for leaf in tree_leaves(tree)] for name, tree in kept.items()},
        )


def timeless(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: timeless(value) for name, value in content.items() if name not in TIMED}
    return [timeless(each) for each in content] if isinstance(content, list) else content


def bilevel_run(words: list[str], folder: Path, *more: str) -> int:
    """The command, what it says put beside the folder."""
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(said):
        code = main(["run", *words, "--out", str(folder), "--quiet", *more])
    folder.with_suffix(".txt").write_text(said.getvalue())
    return code


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the file of the problems, and pictures that are made slowly and without work."""
    pytest.importorskip("scipy.optimize")
    if not hasattr(os, "fork"):
        pytest.skip("a fork is needed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(outcome_module, "draw", drawn)
    monkeypatch.setattr(few_shot_module, "draw_training", drawn)
    Path("mine.py").write_text(MINE)
    state = random.getstate()
    with torch.random.fork_rng():
        yield tmp_path
    random.setstate(state)
    sys.modules.pop("mine", None)


@dataclass(frozen=True)
class Whole:
    """A run that was left alone: what it left, and how long it took."""

    left: Left
    seconds: float


def whole_runs() -> dict[str, Whole]:
    """Each kind once in this process, which imports for all its forks, and once in a fork, for the time that takes."""
    found = {}
    for kind, words in KINDS.items():
        folder, timed = Path(f"whole-{kind}"), Path(f"timed-{kind}")
        assert bilevel_run(words, folder) == 0, said(folder)
        began = time.monotonic()
        assert ended(forked(lambda: bilevel_run(words, timed))) == 0, said(timed)  # noqa: B023
        found[kind] = Whole(Left.at(folder), time.monotonic() - began)
        assert Left.at(timed) == found[kind].left, kind
    return found


def said(folder: Path) -> str:
    path = folder.with_suffix(".txt")
    return path.read_text() if path.exists() else ""


def survives(kind: str, whole: Whole, draw: random.Random, name: str, budget: int) -> int:
    """Kill a run of a kind at random moments, resuming it each time, until it ends; how often it was killed."""
    words, folder, kills = KINDS[kind], Path(f"{name}-{kind}"), 0
    while True:
        # who has not yet recorded what is to be run has to be told again
        begun = (folder / "result.json").exists()
        more = [] if not begun else ["--resume"]
        seconds = draw.uniform(0, 1.05) * whole.seconds if kills < budget else 600.0
        code = killed_after(lambda: bilevel_run(words[:1] if begun else words, folder, *more), seconds)  # noqa: B023
        if code == -signal.SIGKILL:
            kills += 1
            continue
        assert code == 0, f"{kind}, after {kills} kills: exit code {code}. {said(folder)}"
        break
    left = Left.at(folder)
    assert left.history == whole.left.history, kind
    assert left.tensors == whole.left.tensors, kind
    assert left.result == whole.left.result, kind
    return kills


def kill_them(count: int, seed: int) -> dict[str, int]:
    """At least so many kills, taking turns; how many of each kind."""
    whole, draw = whole_runs(), random.Random(seed)
    kills = dict.fromkeys(KINDS, 0)
    for turn in range(10**9):
        if sum(kills.values()) >= count:
            return kills
        kind = list(KINDS)[turn % len(KINDS)]
        kills[kind] += survives(kind, whole[kind], draw, str(turn), budget=8)
        Path(os.environ.get("KILLS_REPORT", "kills.json")).write_text(json.dumps(kills))
    raise AssertionError


@pytest.mark.usefixtures("here")
def test_runs_that_are_killed_at_random_moments_end_where_they_would_have() -> None:
    kills = kill_them(12, seed=0)
    assert sum(kills.values()) >= 12


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_a_thousand_kills_change_nothing() -> None:
    count = int(os.environ.get("KILLS", "1000"))
    kills = kill_them(count, seed=int(os.environ.get("KILLS_SEED", "1")))
    assert sum(kills.values()) >= count
    assert all(kills.values())


@pytest.mark.usefixtures("here")
def test_a_run_that_replaces_another_and_is_killed_leaves_one_of_them_whole() -> None:
    words, draw = KINDS["adam"], random.Random(5)
    assert bilevel_run(words, Path("old"), "--steps", "3") == 0
    assert bilevel_run(words, Path("new")) == 0
    old, new = Left.at(Path("old")), Left.at(Path("new"))
    for turn in range(int(os.environ.get("KILLS_REPLACING", "3"))):
        folder = Path(f"replaced-{turn}")
        assert bilevel_run(words, folder, "--steps", "3") == 0
        if killed_after(lambda: bilevel_run(words, folder, "--overwrite"), draw.uniform(0, 0.1)) != 0:  # noqa: B023
            assert bilevel_run(words, folder, "--resume") == 0, said(folder)
        assert Left.at(folder) in (old, new)
