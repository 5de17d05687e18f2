"""Runs over the ranks of a process group: the trajectory of one process, counted messages, faults."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rank_processes import on_ranks
from torch import Tensor

from bilevel import (
    AID,
    ITD,
    BilevelError,
    BilevelProblem,
    CompiledProducts,
    FiniteSum,
    Split,
    Status,
    hypergradient,
    minimize,
)
from bilevel.algorithms import F2SA, SABA, SOBA, SRBA
from bilevel.outer.batches import sources
from bilevel.ranks import Ranks, Rows, Shard
from bilevel.solvers import CG, Adam, GradientDescent, Iterate

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs gloo", allow_module_level=True)

P = Q = 3
N, M, B = 11, 9, 4  # the last blocks are ragged, and a rank may have none of their samples
_gen = torch.Generator().manual_seed(0)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_gen, dtype=torch.float64)


TRAIN, VAL = (_normal(N, Q), _normal(N)), (_normal(M, Q), _normal(M))


def _misfit(y: Tensor, data: Any) -> Tensor:
    found: Tensor = (data[0] @ y - data[1]).square().mean() / 2
    return found


def f(x: Tensor, y: Tensor, data: Any) -> Tensor:
    return _misfit(y, data)


def g(x: Tensor, y: Tensor, data: Any) -> Tensor:
    return _misfit(y, data) + (x.exp() * y.square()).sum() / 2


PROBLEM = BilevelProblem(f, g)
TASKS = BilevelProblem(
    f, lambda x, y, data: _misfit(y, data) + (y - x).square().sum(), init=lambda x, data: x, tasks=True
)
PROXIMAL = BilevelProblem(f, lambda x, y, data: _misfit(y, data) + (y - x).square().sum(), tasks=True)
EPISODES = Split(f=(_normal(5, 3, Q), _normal(5, 3)), g=(_normal(5, 4, Q), _normal(5, 4)))
X0 = torch.zeros(P, dtype=torch.float64)
BATCHES = Split(f=FiniteSum(VAL, B), g=FiniteSum(TRAIN, B))
WHOLE = Split(f=FiniteSum(VAL, B, order="full"), g=FiniteSum(TRAIN, B, order="full"))
GD = GradientDescent(0.1)


def _steps(count: int) -> Iterate:
    return Iterate(GD, max_steps=count)


AID_CG = AID(_steps(5), CG(rtol=0, max_steps=3))
RUNS: dict[str, dict[str, Any]] = {
    "soba": {"algorithm": SOBA(0.1, 0.05), "data": BATCHES},
    "saba": {"algorithm": SABA(0.1, 0.05), "data": BATCHES},
    "srba": {"algorithm": SRBA(0.1, 0.05, period=4), "data": BATCHES},
    "f2sa-2": {"algorithm": F2SA(0.1, 0.05, order=2), "data": BATCHES},
    "aid-cg": {"estimator": AID_CG, "outer": GD, "data": WHOLE, "warm_start": False},
    "itd": {"estimator": ITD(_steps(4)), "outer": GD, "data": WHOLE},
    "maml": {"problem": TASKS, "estimator": ITD(_steps(2)), "outer": Adam(0.1), "data": EPISODES},
    "maml in chunks": {
        "problem": TASKS,
        "estimator": ITD(_steps(2)),
        "outer": Adam(0.1),
        "data": EPISODES,
        "chunk_size": 2,
    },
    "imaml": {"problem": PROXIMAL, "estimator": AID_CG, "outer": GD, "data": EPISODES, "warm_start": True},
}


EVEN = Split(f=FiniteSum(tuple(part[:8] for part in VAL), B), g=FiniteSum(tuple(part[:8] for part in TRAIN), B))
SWEEP = {"inner_step": [0.05, 0.1], "seed": [0, 1]}


def _run(name: str, group: Any = None, max_steps: int = 4, **more: Any) -> Any:
    of = {"problem": PROBLEM, **RUNS[name]}
    problem, data = of.pop("problem"), of["data"]
    y0 = None if problem.init is not None else X0
    every = {"evaluate_every": 100} if data is BATCHES else {}
    return minimize(problem, X0, y0, group=group, max_steps=max_steps, **{**of, **every, **more})


def _floats(name: str, size: int) -> tuple[int, int]:
    """Messages and floats of one step."""
    p, q, steps, cg = P, Q, 5, 3
    if name in ("soba", "saba", "srba"):
        return 1, 2 * q + p + 1
    if name == "f2sa-2":
        return 4, 2 * q + 2 * (p + 1)
    if name == "aid-cg":  # gradients with values; the last one; f; products; at v both
        return steps + 2 + cg + 2, steps * (q + 1) + q + (p + q + 1) + cg * q + (q + p)
    if name == "itd":
        steps = 4  # values with gradients and the residual; f and its gradient; Hessian and cross products
        return 4 * steps + 2, steps * (q + 1) + (q + 1) + (1 + q) + (steps - 1) * q + steps * p
    return 1, p + 5 + 3 * size


def _all_runs(group: Any, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in RUNS:
        counts = []
        for more in (2, 4):
            ranks = Ranks(group)
            solution = _run(name, ranks, more)
            counts.append((ranks.messages, ranks.floats))
        per_step = [(b - a) / 2 for a, b in zip(*counts, strict=True)]
        found[name] = solution.x, solution.value, [r.value for r in solution.history], per_step, solution.y
    return found


def _demand_one_trajectory(size: int) -> None:
    everyone = on_ranks(size, _all_runs)
    for found in everyone:
        if isinstance(found, Exception):
            raise found
    for name in RUNS:
        alone = _run(name)
        x, value, values, per_step, _ = everyone[0][name]
        assert float((x - alone.x).abs().max()) <= 1e-12, name
        assert values == pytest.approx([r.value for r in alone.history], abs=1e-12), name
        for other in everyone[1:]:
            assert torch.equal(other[name][0], x) and other[name][1] == value, name
        if alone.y.dim() > 1:  # each rank has its tasks
            assert torch.allclose(torch.cat([found[name][4] for found in everyone]), alone.y, rtol=0, atol=1e-12)
        assert tuple(per_step) == _floats(name, size), (name, per_step)


def test_two_ranks_take_the_steps_of_one_with_the_same_bits_on_both_and_messages_as_counted() -> None:
    _demand_one_trajectory(2)


@pytest.mark.slow
def test_four_ranks_do_so_too_where_some_have_no_sample_of_a_block() -> None:
    _demand_one_trajectory(4)


def _faults(group: Any, rank: int, folder: Path) -> dict[str, Any]:
    """What goes wrong, and what is resumed, on one rank; every rank does the same in the same order."""
    found: dict[str, Any] = {}

    def raised(call: Any) -> Any:
        try:
            return call()
        except Exception as error:
            return type(error).__name__, str(error)

    target = float(rank)
    other_code = BilevelProblem(f, lambda x, y, data: _misfit(y, data) + target * y.square().sum())
    found["code"] = raised(lambda: minimize(other_code, X0, X0, data=WHOLE, group=group))
    less = FiniteSum(tuple(part[: N - rank] for part in TRAIN), B)
    found["sizes"] = raised(lambda: minimize(PROBLEM, X0, X0, data=less, algorithm=SOBA(0.1, 0.1), group=group))
    found["settings"] = raised(lambda: _run("soba", group, algorithm=SOBA(0.1 + 0.1 * rank, 0.05)))
    found["data"] = raised(lambda: minimize(PROBLEM, X0, X0, data=TRAIN, group=group))
    found["init"] = raised(
        lambda: minimize(BilevelProblem(f, g, init=lambda x, data: x), X0, data=WHOLE, estimator=AID_CG, group=group)
    )
    compiled = AID(Iterate(GD, 3), CG(), products=CompiledProducts(backend="eager"))
    found["compiled"] = raised(
        lambda: minimize(PROBLEM, X0, X0, data=Split(f=Shard(VAL), g=Shard(TRAIN)), estimator=compiled, group=group)
    )
    soba: dict[str, Any] = {"estimator": None, "outer": None, "warm_start": None, "algorithm": "soba"}
    found["algorithm"] = raised(lambda: _run("imaml", group, **soba))
    found["few"] = raised(lambda: _few(group))

    nan = Shard(tuple(math.nan * part if rank == 1 else part for part in TRAIN))
    own = Split(f=Shard(VAL), g=nan)
    solution = minimize(PROBLEM, X0, X0, data=own, estimator=AID_CG, outer=GD, throw=False, group=group, max_steps=3)
    found["nan"] = solution.status, len(solution.history)
    bad = Split(f=EPISODES.f, g=(EPISODES.g[0].clone(), EPISODES.g[1]))
    bad.g[0][4] = math.nan  # a task of the last rank
    solution = minimize(TASKS, X0, data=bad, estimator=ITD(_steps(2)), outer=GD, throw=False, group=group, max_steps=3)
    found["nan task"] = solution.status, len(solution.history)
    short = AID(Iterate(GD, max_steps=3, tol=1e-12), CG())
    estimate = hypergradient(PROXIMAL, X0, X0, data=EPISODES, estimator=short, throw=False, group=group)
    found["estimate"] = estimate.status, estimate.grad

    size = torch.distributed.get_world_size(group)
    rows = [slice(0, 7), slice(7, N)][rank] if size == 2 else slice(0, N)  # unequal shards
    shard = Split(f=Shard(tuple(part[rank::size] for part in VAL)), g=Shard(tuple(part[rows] for part in TRAIN)))
    moved = Rows(lambda role, k: tuple(part[k % 3 :] for part in (VAL if role == "f" else TRAIN)))  # rows of two sizes
    found["rows"] = minimize(PROBLEM, X0, X0, data=moved, algorithm=SOBA(0.1, 0.05), max_steps=4, group=group).x
    found["rows alone"] = minimize(PROBLEM, X0, X0, data=moved, algorithm=SOBA(0.1, 0.05), max_steps=4).x
    found["shards"] = minimize(PROBLEM, X0, X0, data=shard, estimator=AID_CG, outer=GD, max_steps=4, group=group).x
    estimate = hypergradient(PROBLEM, X0, X0, data=shard, estimator="aid-cg", group=group)
    found["hypergradient"] = estimate.grad

    swept: dict[str, Any] = {"algorithm": SOBA(0.1, 0.05), "data": EVEN, "sweep": SWEEP, "sweep_steps": 3}
    found["swept"] = minimize(PROBLEM, X0, X0, group=group, max_steps=5, **swept).x
    found["swept alone"] = minimize(PROBLEM, X0, X0, max_steps=5, **swept).x

    told: list[int] = []

    def stop(record: Any, estimate: Any) -> bool:
        told.append(record.step)
        return bool(record.step == 2)

    stopped = _run("aid-cg", group, callback=stop)
    found["callback"] = told, stopped.status, len(stopped.history)

    def fail(record: Any, estimate: Any) -> None:
        raise KeyError("mine")

    found["failing callback"] = raised(lambda: _run("aid-cg", group, callback=fail))
    for name in ("soba", "saba", "imaml"):
        file = folder / name
        _run(name, group, 2, checkpoint=file, checkpoint_every=2)
        assert file.exists() or rank
        found[f"{name} resumed"] = _run(name, group, 4, checkpoint=file, resume=True).x
        found[f"{name} undisturbed"] = _run(name, group, 4, checkpoint=folder / "other", checkpoint_every=2).x
        (folder / "other").unlink(missing_ok=True)
    found["files"] = sorted(path.name for path in folder.iterdir())
    return found


def _few(group: Any) -> Any:
    one = Split(f=tuple(part[:1] for part in EPISODES.f), g=tuple(part[:1] for part in EPISODES.g))
    return minimize(TASKS, X0, data=one, estimator=ITD(_steps(2)), outer=GD, group=group)


def test_ranks_refuse_fail_stop_and_resume_together(tmp_path: Path) -> None:
    first, second = on_ranks(2, lambda group, rank: _faults(group, rank, tmp_path))
    for found in (first, second):
        if isinstance(found, Exception):
            raise found
    for name, text in (
        ("code", "rank 1 has not what rank 0 has: problem.g.target was 0.0 and is 1.0"),
        ("sizes", "data.tensors[0] was tensor (11, 3) float64"),
        ("settings", "inner_step=0.1"),
        ("data", "must know how the samples are shared"),
        ("init", "needs another function"),
        ("compiled", "compiles f and g of one process"),
        ("algorithm", "pass `estimator=`"),
        ("few", "at least one task for each"),
    ):
        for found in (first, second):
            assert found[name][0] == "ValueError" and text in found[name][1], (name, found[name])
    assert first["nan"] == second["nan"] == (Status.nonfinite, 1)
    assert first["nan task"] == second["nan task"] == (Status.nonfinite, 1)
    short = AID(Iterate(GD, max_steps=3, tol=1e-12), CG())
    alone = hypergradient(PROXIMAL, X0, X0, data=EPISODES, estimator=short, throw=False)
    assert first["estimate"][0] is second["estimate"][0] is alone.status is Status.max_steps
    assert torch.allclose(first["estimate"][1], alone.grad, rtol=0, atol=1e-13)
    data = Split(f=VAL, g=TRAIN)
    whole = minimize(PROBLEM, X0, X0, data=data, estimator=AID_CG, outer=GD, max_steps=4)
    h = hypergradient(PROBLEM, X0, X0, data=data, estimator="aid-cg").grad
    for found in (first, second):
        assert torch.allclose(found["swept"], found["swept alone"], rtol=0, atol=1e-12)
        assert torch.allclose(found["rows"], found["rows alone"], rtol=0, atol=1e-12)
        assert torch.allclose(found["shards"], whole.x, rtol=0, atol=1e-12)
        assert torch.allclose(found["hypergradient"], h, rtol=0, atol=1e-12)
        for name in ("soba", "saba", "imaml"):
            assert torch.allclose(found[f"{name} resumed"], _run(name).x, rtol=0, atol=1e-12), name
        for name in ("soba", "saba", "imaml"):
            assert torch.equal(found[f"{name} resumed"], found[f"{name} undisturbed"])
    assert first["callback"] == ([0, 1, 2], Status.stopped, 3) and second["callback"] == ([], Status.stopped, 3)
    assert first["failing callback"][0] == "KeyError"
    assert second["failing callback"][0] == "BilevelError" and "its callback" in second["failing callback"][1]
    assert first["files"] == ["imaml", "saba", "soba"]
    for name in ("soba", "saba", "imaml"):  # one process goes on from the file of two
        assert torch.allclose(_run(name, checkpoint=tmp_path / name, resume=True).x, _run(name).x, rtol=0, atol=1e-12)


def _stopped(group: Any, rank: int, seconds: float) -> Any:
    """A run in which rank 1 is stopped after step 1, for so long."""
    numbers = Ranks(group).gathered(os.getpid())
    timer = threading.Timer(seconds, os.kill, (numbers[1], signal.SIGCONT))

    def stop(record: Any, estimate: Any) -> None:
        if record.step == 1:
            os.kill(numbers[1], signal.SIGSTOP)
            timer.start()

    try:
        return _run("aid-cg", group, callback=stop).x
    except BilevelError as error:
        return error.status, len(error.partial.history), str(error)
    finally:
        if rank == 0:
            timer.join()


def test_a_rank_that_is_stopped_for_less_than_the_timeout_changes_nothing() -> None:
    for found in on_ranks(2, lambda group, rank: _stopped(group, rank, 0.4)):
        assert torch.allclose(found, _run("aid-cg").x, rtol=0, atol=1e-12)


def test_a_rank_that_is_stopped_for_longer_is_an_error_on_the_others_with_what_was_computed() -> None:
    first, _ = on_ranks(2, lambda group, rank: _stopped(group, rank, 2.0), seconds=0.5)
    assert first[0] is Status.interrupted and first[1] == 2 and "waited in vain" in first[2]


def _hangs(group: Any, rank: int) -> Any:
    def slow(record: Any, estimate: Any) -> None:
        if record.step == 2:
            time.sleep(3.0)

    try:
        return _run("aid-cg", group, callback=slow)
    except BilevelError as error:
        return error.status, len(error.partial.history), str(error)


def test_a_rank_that_hangs_is_an_error_after_the_timeout_with_what_was_computed() -> None:
    _, second = on_ranks(2, _hangs, seconds=0.5)
    assert second[0] is Status.interrupted and second[1] == 3 and "waited in vain" in second[2]


def test_rows_are_both_sides_and_are_drawn_once_a_step() -> None:
    drawn: list[tuple[str, int]] = []

    def batches(role: str, number: int) -> Any:
        drawn.append((role, number))
        return VAL if role == "f" else TRAIN

    data = Rows(batches)
    with pytest.raises(ValueError, match=r"pass it by itself, `data=Rows\(...\)`"):
        minimize(PROBLEM, X0, X0, data=Split(f=data, g=data), algorithm=SOBA(0.1, 0.05), max_steps=2)
    ranks: Any = SimpleNamespace(rank=1, size=2)
    part = sources(data, ranks)
    assert isinstance(part, Split)
    for number in range(3):
        n, first = len(TRAIN[0]), part.g.block(number, number)
        assert part.g.block(number, number) is first and first.share == (n - n // 2) / n
        assert torch.equal(part.g.batch(number, number)[0], TRAIN[0][len(TRAIN[0]) // 2 :])
    assert drawn == [("g", 0), ("g", 1), ("g", 2)]
