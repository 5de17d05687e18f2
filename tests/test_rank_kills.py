"""Runs over ranks of which one is killed at a random moment, started again together: they end as if left alone.

`KILLS=50 pytest -m slow tests/test_rank_kills.py` takes that many, of runs of two and three processes.
"""

from __future__ import annotations

import io
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import forked
from test_kills import Left, drawn

from bilevel.cli import main
from bilevel.commands import few_shot as few_shot_module, outcome as outcome_module

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available() or not hasattr(os, "fork"):
    pytest.skip("needs gloo and forks", allow_module_level=True)

MINE = """
import os, signal, time
import torch
from torch.nn.functional import mse_loss
from bilevel import BilevelProblem, FiniteSum, Instance, Split
from bilevel.algorithms import SABA, SOBA
from bilevel.few_shot import Evaluating, Experiment, Training, Validating, mlp
from bilevel.problems import maml
from bilevel.tasks import Sinusoid

gen = torch.Generator().manual_seed(0)
train, val = [(torch.randn(n, 3, generator=gen).double(), torch.randn(n, generator=gen).double()) for n in (12, 9)]
def misfit(y, data): return (data[0] @ y - data[1]).square().mean() / 2
problem = BilevelProblem(lambda x, y, data: misfit(y, data),
                         lambda x, y, data: misfit(y, data) + (x.exp() * y.square()).sum() / 2)
zero = torch.zeros(3, dtype=torch.float64)
data = Split(f=FiniteSum(val, 4), g=FiniteSum(train, 4))
soba = Instance(problem, zero, zero, settings={"algorithm": SOBA(0.1, 0.05), "data": data, "max_steps": 150})
saba = Instance(problem, zero, zero, settings={"algorithm": SABA(0.1, 0.05), "data": data, "max_steps": 150})
alone = Instance(BilevelProblem(lambda x, y: (y - 1).square().sum(), lambda x, y: (y - x).square().sum()), zero, zero)
def tasks() -> Experiment:
    torch.manual_seed(0)
    learner = maml(mlp([1, 4, 1]), mse_loss, step=0.01)
    few = Training(max_steps=40, batch=4, checkpoint_every=5)
    validation = Validating(Sinusoid(), every=10, episodes=6)
    return Experiment(learner, Sinusoid(), validation, Sinusoid(), settings=few,
                      evaluation=Evaluating(episodes=6))
"""
KINDS = ("mine.py:soba", "mine.py:saba", "mine.py:tasks")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the file of the problems, and pictures that are made without work."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(outcome_module, "draw", drawn)
    monkeypatch.setattr(few_shot_module, "draw_training", drawn)
    Path("mine.py").write_text(MINE)
    yield tmp_path
    sys.modules.pop("mine", None)


def _one(rank: int, size: int, port: int, restarts: int, words: list[str], folder: Path) -> int:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_RESTART_COUNT": str(restarts)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    text = io.StringIO()
    with redirect_stderr(text), redirect_stdout(text):
        code = main(["run", *words, "--out", str(folder), "--quiet", "--debug"])
    folder.with_suffix(f".{rank}.txt").write_text(text.getvalue())
    return code


def _agent() -> Any:
    """What the agent of `torchrun` keeps over all its restarts: where ranks tell each other their addresses."""
    made: Any = torch.distributed
    return made.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _together(
    size: int,
    words: list[str],
    folder: Path,
    restarts: int = 0,
    kill: tuple[int, float] | None = None,
    agent: Any = None,
) -> list[int]:
    """Start as many processes; kill one of them after a time, and as `torchrun` does end the others; how they ended."""
    agent = _agent() if agent is None else agent
    port = agent.port
    numbers = [forked(partial(_one, rank, size, port, restarts, words, folder)) for rank in range(size)]
    codes: dict[int, int] = {}
    began, told = time.monotonic(), 0
    while len(codes) < size:
        for rank, number in enumerate(numbers):
            if rank in codes:
                continue
            done, status = os.waitpid(number, os.WNOHANG)
            if done:
                codes[rank] = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - began
        if kill is not None and told == 0 and seconds >= kill[1]:
            told = 1
            if kill[0] not in codes:
                os.kill(numbers[kill[0]], signal.SIGKILL)
        failed = any(code != 0 for code in codes.values())
        if failed and told < 2:
            told, began = 2, time.monotonic()
            for rank in set(range(size)) - set(codes):
                os.kill(numbers[rank], signal.SIGTERM)
        if told == 2 and time.monotonic() - began > 10:  # as it does too
            for rank in set(range(size)) - set(codes):
                os.kill(numbers[rank], signal.SIGKILL)
        assert seconds < 120
        time.sleep(0.002)
    return [codes[rank] for rank in range(size)]


def _whole(kind: str, size: int, name: str) -> tuple[Left, float]:
    began = time.monotonic()
    codes = _together(size, [kind], Path(name))
    assert codes == [0] * size, [Path(f"{name}.{rank}.txt").read_text() for rank in range(size)]
    return Left.at(Path(name)), time.monotonic() - began


def _survives(kind: str, size: int, whole: tuple[Left, float], draw: random.Random, name: str) -> int:
    """Kill a rank at random moments, and start all again, until they end; how often one was killed."""
    folder, kills, restarts, agent = Path(name), 0, 0, _agent()
    while True:
        victim = draw.randrange(size)
        kill = (victim, draw.uniform(0, 1.05) * whole[1]) if kills < 4 else None
        codes = _together(size, [kind], folder, restarts, kill, agent)
        if -signal.SIGKILL not in codes:
            said_all = [Path(f"{name}.{rank}.txt").read_text() for rank in range(size)]
            assert codes == [0] * size, (codes, said_all)
            break
        kills, restarts = kills + 1, restarts + 1
    left = Left.at(folder)
    assert left.history == whole[0].history, (kind, size, kills)
    assert left.tensors == whole[0].tensors, (kind, size, kills)
    assert left.result == whole[0].result, (kind, size, kills)
    return kills


def _kill_them(count: int, kinds: tuple[str, ...], sizes: tuple[int, ...], seed: int) -> int:
    draw, kills, runs = random.Random(seed), 0, [(kind, size) for kind in kinds for size in sizes]
    wholes: dict[tuple[str, int], tuple[Left, float]] = {}
    turn = 0
    while kills < count:
        kind, size = runs[turn % len(runs)]
        if (kind, size) not in wholes:
            wholes[kind, size] = _whole(kind, size, f"whole{turn}")
        kills += _survives(kind, size, wholes[kind, size], draw, f"run{turn}")
        turn += 1
    return kills


def test_three_kills_of_a_rank_leave_the_run_that_was_left_alone(here: Path) -> None:
    assert _kill_them(3, KINDS[:1], (2,), seed=0) >= 3


@pytest.mark.slow
def test_fifty_kills_of_a_rank_leave_the_runs_that_were_left_alone(here: Path) -> None:
    count = int(os.environ.get("KILLS", "50"))
    assert _kill_them(count, KINDS, (2, 3), seed=int(os.environ.get("KILLS_SEED", "0"))) >= count


def test_what_has_nothing_to_share_is_refused_by_name_and_the_other_ranks_leave(here: Path) -> None:
    codes = _together(2, ["mine.py:alone"], Path("out"))
    assert codes[0] == 2 and "mine.py:alone cannot be run over 2 ranks" in Path("out.0.txt").read_text()
    assert not Path("out").exists()
