"""Runs: what they are told by, random numbers across a resumption, appended records, full disks, partial results."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bilevel import AID, ITD, BilevelError, BilevelProblem, Estimate, Status, functional, minimize
from bilevel._files import write_atomically
from bilevel._optimizer import AbstractOuterDriver
from bilevel.algorithms import SOBA
from bilevel.commands.loading import load
from bilevel.commands.result import plain
from bilevel.outer.checkpoint import read_checkpoint
from bilevel.outer.fingerprint import Fingerprint, differences
from bilevel.outer.journal import Journal, journal_of
from bilevel.outer.randomness import drawn_so_far, go_on_from
from bilevel.outer.records import Run
from bilevel.outer.saves import Saves
from bilevel.outer.solution import Record, Solution
from bilevel.solvers import CG, Adam, ClosedForm, GradientDescent, Iterate, ScipyMinimize

ZERO = torch.zeros(2)
EXACT = AID(ClosedForm(lambda x, *data: x), CG())
OPTIONS: dict[str, Any] = {"estimator": EXACT, "outer": Adam(0.1)}


def target_problem(target: Tensor) -> BilevelProblem:
    return BilevelProblem(lambda x, y: (y - target).square().sum() / 2, lambda x, y: (y - x).square().sum() / 2)


SQUARE = target_problem(torch.full((2,), 3.0))


def records(solution: Solution) -> list[tuple[int, float, float]]:
    return [(record.step, record.value, record.grad_norm) for record in solution.history]


def same(first: Solution, second: Solution) -> bool:
    return torch.equal(first.x, second.x) and torch.equal(first.y, second.y) and records(first) == records(second)


def stop_at(step: int, error: BaseException) -> Callable[[Record, Estimate], None]:
    def callback(record: Record, _: Estimate) -> None:
        if record.step == step:
            raise error

    return callback


# What a run is told by

SOURCE = """
import torch
from pathlib import Path
from bilevel import BilevelProblem

SCALE, WEIGHTS, KINDS = {scale}, torch.tensor({weights}), {{"a", "b", 3}}
HERE = str(Path(__file__).resolve().parent)

class Loss:
    def __init__(self, power): self.power = power
    def __call__(self, r): return (r.abs() ** self.power).sum() {more}

def residual(y):  # {comment}
    return SCALE * (y - WEIGHTS) if "a" in {{"a", "c", 5}} else y

loss, calls = Loss({power}), []

def problem():
    def f(x, y):
        calls.append(1)
        return loss(residual(y)) + 0 * len(HERE) + 0 * len(KINDS)
    return BilevelProblem(f, lambda x, y: (y - x).square().sum() / 2), torch.zeros(2), torch.zeros(2)
"""
AS_IT_IS: dict[str, Any] = {"scale": 2.0, "weights": [1.0, 2.0], "power": 2, "more": "", "comment": ""}


def written(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    path = folder / "mine.py"
    path.write_text(SOURCE.format(**{**AS_IT_IS, **changes}))
    return path


def parts_of(path: Path) -> dict[str, str]:
    return Fingerprint({}, {"problem": load(f"{path}:problem", {}, None)[0].problem}).parts


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"scale": 3.0}, "SCALE was 2.0 and is 3.0"),
        ({"weights": [1.0, 2.5]}, "WEIGHTS (tensor (2,) float64) has other values"),
        ({"weights": [1.0, 2.0, 3.0]}, "WEIGHTS was tensor (2,)"),
        ({"power": 4}, "loss.power was 2 and is 4"),
        ({"more": "+ 1"}, "loss.class.__call__ has other code"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_file_that_differs_in_what_f_uses_is_told_by_name(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    first, second = written(tmp_path / "a"), written(tmp_path / "b", **change)
    found = differences(parts_of(first), parts_of(second))
    assert len(found) == 1
    assert named in found[0]


def test_the_same_file_elsewhere_in_another_process_is_the_same(tmp_path: Path) -> None:
    """Another folder, another working directory, another seed of hashes, other addresses, another comment."""
    here, there = parts_of(written(tmp_path / "a")), written(tmp_path / "b", comment="a comment")
    program = (
        "import json, torch; torch.set_default_dtype(torch.float64)\n"
        "from bilevel.commands.loading import load\n"
        "from bilevel.outer.fingerprint import Fingerprint\n"
        "print(json.dumps(Fingerprint({}, {'problem': load('b/mine.py:problem', {}, None)[0].problem}).parts))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout) == here
    assert len(here) > 8
    assert there.exists()


def test_the_checkpoint_of_another_run_is_refused_by_what_is_otherwise_and_taken_by_force(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    data = [torch.tensor([float(k), 1.0]) for k in range(4)]
    problem = BilevelProblem(lambda x, y, b: (y - b).square().sum(), lambda x, y, b: (y - x).square().sum())
    arguments: dict[str, Any] = {**OPTIONS, "checkpoint": file}
    minimize(problem, ZERO, ZERO, **arguments, data=data, max_steps=3)
    goes_on = partial(minimize, problem, ZERO, ZERO, **arguments, max_steps=5)
    for other, named in (
        ([*data[:3], torch.ones(2)], r"data\[3\] \(tensor \(2,\) float64\) has other values"),
        (data[:3], "data was list of 4 and is list of 3"),
        (lambda step: data[step % 4], None),
    ):
        if named is not None:
            with pytest.raises(ValueError, match=named):
                goes_on(data=other, resume=True)
    with pytest.raises(ValueError, match=r"problem\.f has other code"):
        minimize(
            BilevelProblem(lambda x, y, b: (y + b).square().sum(), lambda x, y, b: (y - x).square().sum()),
            ZERO, ZERO, **arguments, data=data, resume=True,
        )  # fmt: skip
    forced = goes_on(data=data[:3], resume="force")
    assert len(forced.history) == 6
    assert len(goes_on(data=data[:3], resume=True).history) == 6  # its file is of the new run
    with pytest.raises(ValueError, match="constraint was None"):
        goes_on(data=data[:3], resume=True, constraint={})


def test_the_closure_of_another_value_is_another_run_and_one_of_the_same_value_is_not(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    run: Any = partial(minimize, x0=ZERO, y0=ZERO, **OPTIONS, checkpoint=file)
    run(target_problem(torch.ones(2)), max_steps=3)
    with pytest.raises(ValueError, match=r"problem.f.target \(tensor \(2,\) float64\) has other values"):
        run(target_problem(torch.full((2,), 2.0)), resume=True)
    with pytest.raises(ValueError, match=r"problem.f.target was tensor \(2,\) float64 #\w+ and is tensor \(1,\)"):
        run(target_problem(torch.ones(1)), resume=True)
    assert len(run(target_problem(torch.ones(4)[::2]), resume=True, max_steps=4).history) == 5


def test_what_counts_or_is_written_to_on_the_way_is_nothing_to_be_told_by(tmp_path: Path) -> None:
    calls, seen, count = [0], list[Tensor](), 0

    def f(x: Tensor, y: Tensor) -> Tensor:
        nonlocal count
        calls[0] += 1
        count += 1
        seen.append(y.detach())
        return (y - 3).square().sum()

    problem = BilevelProblem(f, SQUARE.g)
    minimize(problem, ZERO, ZERO, **OPTIONS, max_steps=3, checkpoint=tmp_path / "a.pt")
    assert count > 0 and seen
    for _ in range(2):
        minimize(problem, ZERO, ZERO, **OPTIONS, max_steps=5, checkpoint=tmp_path / "a.pt", resume=True)


def test_a_module_is_told_by_its_parameters_unless_a_run_begins_with_them() -> None:
    def made(seed: int, start: bool) -> dict[str, str]:
        torch.manual_seed(seed)
        net = nn.Linear(2, 1)
        problem = BilevelProblem(lambda x, y: net(y).sum(), lambda x, y: (y - x).square().sum())
        return Fingerprint({}, {"problem": problem}, net.parameters() if start else ()).parts

    assert not differences(made(0, False), made(0, False))
    assert len(differences(made(0, False), made(1, False))) == 2
    assert not differences(made(0, True), made(1, True))


def test_a_module_that_has_been_called_is_the_one_that_has_not() -> None:
    def made(calls: int) -> dict[str, str]:
        torch.manual_seed(0)
        net = functional(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)).eval())
        for _ in range(calls):
            net(net.params, torch.ones(3, 2))
        problem = BilevelProblem(lambda x, y: net(y, torch.ones(3, 2)).sum(), lambda x, y: (y - x).square().sum())
        return Fingerprint({}, {"problem": problem}).parts

    assert made(0) == made(2)
    assert sum("#" in text for text in made(0).values()) > 6


def test_large_tensors_are_told_by_a_part_of_their_entries_and_beyond_the_bound_by_their_size() -> None:
    large = torch.zeros(2**22)  # 32 MiB: every second entry
    parts = Fingerprint({}, {"data": large}).parts
    large[2] = 1.0
    assert differences(parts, Fingerprint({}, {"data": large}).parts)
    expanded = [torch.zeros(1).expand(2**21 + k) for k in range(6)]  # 16 MiB each, as they are counted
    parts = Fingerprint({}, {"data": expanded}).parts
    assert ["#" in parts[f"data[{k}]"] for k in range(6)] == [True] * 4 + [False] * 2


# Random numbers


def noisy() -> BilevelProblem:
    def f(x: Tensor, y: Tensor) -> Tensor:
        noise = torch.randn(2) + random.random() + float(np.random.rand())
        return (y - 3 + 0.1 * noise).square().sum() / 2

    return BilevelProblem(f, SQUARE.g)


def seeded() -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)


@pytest.mark.parametrize("stopped", [0, 1, 4])
@pytest.mark.parametrize("outer", [Adam(0.1), ScipyMinimize(options={"maxls": 3})], ids=["adam", "scipy"])
def test_a_random_f_goes_on_bit_for_bit(outer: Any, stopped: int, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"estimator": EXACT, "outer": outer, "throw": False, "max_steps": 7}
    seeded()
    whole = minimize(noisy(), ZERO, ZERO, **arguments)
    left = torch.rand(2)
    seeded()
    file = tmp_path / "state.pt"
    stop = stop_at(min(stopped, len(whole.history) - 2), KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        minimize(noisy(), ZERO, ZERO, **arguments, checkpoint=file, callback=stop)
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    again = minimize(noisy(), ZERO, ZERO, **arguments, checkpoint=file, resume=True)
    assert same(again, whole)
    assert torch.equal(torch.rand(2), left)


def test_random_numbers_are_not_touched_without_resume(tmp_path: Path) -> None:
    seeded()
    before = drawn_so_far()
    minimize(SQUARE, ZERO, ZERO, **OPTIONS, max_steps=4, checkpoint=tmp_path / "state.pt")
    after = drawn_so_far()
    assert torch.equal(before["torch"], after["torch"])
    assert before["python"] == after["python"]
    minimize(SQUARE, ZERO, ZERO, **OPTIONS, max_steps=4, checkpoint=tmp_path / "state.pt")
    assert torch.equal(drawn_so_far()["torch"], before["torch"])
    go_on_from({})  # of a file of earlier versions
    assert torch.equal(drawn_so_far()["torch"], before["torch"])


@pytest.mark.parametrize("own", [False, True], ids=["global", "generator"])
@pytest.mark.parametrize("stopped", [0, 2, 3, 7, 8])  # in the first, at the end of it, and in later iterations
def test_a_loader_that_shuffles_goes_on_in_its_order(own: bool, stopped: int, tmp_path: Path) -> None:
    problem = BilevelProblem(lambda x, y, b: (y - b[0].sum()).square().sum(), lambda x, y, b: (y - x).square().sum())

    def loader() -> DataLoader[Any]:
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(1) if own else None
        samples = TensorDataset(torch.arange(8.0))
        return DataLoader(samples, batch_size=2, shuffle=True, generator=generator)

    whole = minimize(problem, ZERO, ZERO, **OPTIONS, data=loader(), max_steps=11)
    file = tmp_path / "state.pt"
    minimize(problem, ZERO, ZERO, **OPTIONS, data=loader(), max_steps=stopped, checkpoint=file)
    again, _ = loader(), torch.manual_seed(77)
    assert same(minimize(problem, ZERO, ZERO, **OPTIONS, data=again, max_steps=11, checkpoint=file, resume=True), whole)


# Records are appended


def test_a_save_writes_the_state_and_the_new_records_however_many_there_were(tmp_path: Path) -> None:
    file, sizes = tmp_path / "state.pt", list[tuple[int, int]]()

    def look(record: Record, _: Estimate) -> None:
        if record.step % 50 == 0 and record.step > 150:
            sizes.append((file.stat().st_size, journal_of(file).stat().st_size))

    minimize(SQUARE, ZERO, ZERO, **OPTIONS, max_steps=700, checkpoint=file, checkpoint_every=50, callback=look)
    states, lines = zip(*sizes, strict=True)
    assert max(states) - min(states) < 200  # a digit more here and there
    steps = [after - before for before, after in itertools.pairwise(lines)]
    assert max(steps) < 1.2 * min(steps)
    content = torch.load(file, weights_only=True)
    assert "history" not in content and content["journal"]["entries"] == 700
    assert [record["step"] for record in read_checkpoint(file)["history"]] == list(range(700))


@pytest.mark.parametrize(("outer", "size"), [(Adam(0.01), 2), (ScipyMinimize("CG"), 60)], ids=["adam", "scipy"])
def test_half_a_line_and_records_after_the_checkpoint_are_dropped_on_resuming(
    outer: Any, size: int, tmp_path: Path
) -> None:
    """The evaluations of a driver are appended as soon as they are large."""
    problem = BilevelProblem(
        lambda x, y: ((y - 1).pow(4) * torch.arange(1.0, size + 1)).sum(), lambda x, y: (y - x).square().sum() / 2
    )
    arguments: dict[str, Any] = {"estimator": EXACT, "outer": outer, "max_steps": 140, "throw": False}
    start, file = torch.linspace(-1, 1, size), tmp_path / "state.pt"
    whole = minimize(problem, start, start, **arguments)
    n = len(whole.history)
    with pytest.raises(KeyboardInterrupt):
        minimize(
            problem, start, start, **arguments, checkpoint=file, checkpoint_every=4,
            callback=stop_at(n - 10, KeyboardInterrupt()),
        )  # fmt: skip
    journal, state = journal_of(file), file.read_bytes()
    kept = journal.read_text().splitlines()
    assert n > 20 and len(kept) - 1 == n - 10
    for rest in (kept[-1][:20], f"{kept[-1]}\n{kept[-1]}\n{kept[-1][:-3]}", f"{kept[-1]}\n" * 40):
        journal.write_text("\n".join([*kept, rest]))
        file.write_bytes(state)
        again = minimize(problem, start, start, **arguments, checkpoint=file, resume=True)
        assert same(again, whole)
        assert journal.read_text().endswith("}\n")
        steps = [json.loads(line)["record"]["step"] for line in journal.read_text().splitlines()[1:]]
        assert steps == list(range(n if size == 60 else n - 1))


def test_a_checkpoint_without_its_records_says_so(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    minimize(SQUARE, ZERO, ZERO, **OPTIONS, max_steps=300, checkpoint=file)
    journal, again = journal_of(file), partial(minimize, SQUARE, ZERO, ZERO, **OPTIONS, checkpoint=file, resume=True)
    whole = journal.read_text()
    for damaged in (whole[: len(whole) // 2], whole.replace('{"record"', "{record", 1), whole[10:], "", "[" * 10**5):
        journal.write_text(damaged)
        with pytest.raises(ValueError, match="which holds the records of the checkpoint beside it, cannot be read"):
            again()
    journal.unlink()
    with pytest.raises(ValueError, match=r"No such file.*Put it back"):
        again()
    minimize(SQUARE, ZERO, ZERO, **OPTIONS, max_steps=2, checkpoint=file)  # a new run needs nothing of it
    assert os.listdir(tmp_path) == ["state.pt"]


def test_a_new_run_that_is_killed_at_any_write_leaves_a_whole_checkpoint_of_the_old_one_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, original, left = tmp_path / "state.pt", os.replace, [0]

    def crash(source: Any, target: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        original(source, target)

    again = partial(minimize, SQUARE, ZERO, ZERO, **OPTIONS, checkpoint=file, checkpoint_every=105)
    for writes, most in ((0, 110), (1, 105), (2, 105), (3, 210)):
        left[0] = 99
        monkeypatch.setattr(os, "replace", crash)
        again(max_steps=110)
        left[0] = writes
        with pytest.raises(KeyboardInterrupt):
            again(max_steps=250)
        monkeypatch.setattr(os, "replace", original)
        assert len(read_checkpoint(file)["history"]) == read_checkpoint(file)["step"] == most


def test_a_tensor_in_a_line_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.history")
    entry = {
        "a": torch.tensor([math.nan, -0.0, 1e-310]),
        "b": torch.ones(2, 3, dtype=torch.float32).T,
        "c": torch.tensor(True),
        "d": torch.zeros(0, 2),
        "e": [1.5, None, -math.inf, "x"],
    }
    journal.begin([entry])
    found = Journal(journal.path, journal.run).read(1)[0]
    assert repr(found) == repr(entry)
    assert str(found["a"][1]) == "tensor(-0.)"
    journal.path.write_text(journal.path.read_text().replace("float32", "__class__"))
    with pytest.raises(ValueError, match="no dtype"):
        Journal(journal.path, journal.run).read(1)
    with pytest.raises(TypeError, match="cannot hold a object"):
        journal.add([{"a": object()}])


# By time


def test_a_checkpoint_is_written_when_its_time_has_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, now, seen = tmp_path / "state.pt", [0.0], list[int]()

    def look(record: Record, _: Estimate) -> None:
        now[0] += 12.0
        seen.append(torch.load(file, weights_only=True)["step"] if file.exists() else -1)

    module = sys.modules["bilevel.outer.minimize"]
    monkeypatch.setattr(module, "Saves", partial(Saves, clock=lambda: now[0]))
    run: Any = partial(minimize, SQUARE, ZERO, ZERO, **OPTIONS, max_steps=8, checkpoint=file, callback=look)
    run(checkpoint_every=1000)
    assert seen == [-1, -1, -1, 3, 3, 3, 6, 6, 6]
    file.unlink()
    seen.clear()
    run(checkpoint_every=5, checkpoint_seconds=None)
    assert seen == [-1] * 5 + [5] * 4
    with pytest.raises(ValueError, match="must be positive, or None"):
        run(checkpoint_seconds=0.0)


# The disk is full


@contextmanager
def little_room() -> Iterator[Callable[[int], None]]:
    """A function that limits files to so many bytes; taken back before pytest writes a report to one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("outer", [Adam(0.01), ScipyMinimize("CG", options={"gtol": 1e-12})], ids=["adam", "scipy"])
def test_a_full_disk_leaves_the_solution_so_far_and_the_checkpoint_before(outer: Any, tmp_path: Path) -> None:
    problem = BilevelProblem(lambda x, y: (y - 3).pow(4).sum() / 4, SQUARE.g)
    file = tmp_path / "state.pt"
    arguments: dict[str, Any] = {"estimator": EXACT, "outer": outer, "max_steps": 400, "throw": False}
    arguments |= {"checkpoint": file, "checkpoint_every": 5}
    wanted = r"stopped after step \d+: .*could not be written: .*File too large"
    with little_room() as limit, pytest.raises(BilevelError, match=wanted) as raised:
        minimize(
            problem, ZERO, ZERO, **arguments,
            callback=lambda record, _: limit(1000) if record.step == 17 else None,
        )  # fmt: skip
    found = raised.value.partial
    assert isinstance(found, Solution) and found.status is Status.interrupted and found.failed
    assert found.history[-1].step == 19
    assert isinstance(raised.value.__cause__, OSError)
    assert len(read_checkpoint(file)["history"]) == 15
    assert os.listdir(tmp_path) == ["state.pt"]


def test_a_disk_that_fills_while_records_are_appended_leaves_those_before(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    arguments: dict[str, Any] = {**OPTIONS, "max_steps": 230, "checkpoint": file, "checkpoint_every": 10}
    whole = minimize(SQUARE, ZERO, ZERO, **OPTIONS, max_steps=230)
    with little_room() as limit, pytest.raises(BilevelError, match="could not be written"):
        minimize(
            SQUARE, ZERO, ZERO, **arguments,
            callback=lambda record, _: limit(journal_of(file).stat().st_size + 100) if record.step == 199 else None,
        )  # fmt: skip
    assert len(read_checkpoint(file)["history"]) == 190
    assert journal_of(file).read_text().endswith("}\n")
    assert same(minimize(SQUARE, ZERO, ZERO, **arguments, resume=True), whole)


# What an exception leaves


class StubbornError(Exception):
    """Takes no attributes."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("__"):
            raise AttributeError(name)
        super().__setattr__(name, value)


def raising(where: str, after: int, error: BaseException) -> dict[str, Any]:
    """The arguments of a run in which `where` raises at its call number `after`."""
    calls = [0]

    def count(value: Any) -> Any:
        calls[0] += 1
        if calls[0] == after:
            raise error
        return value

    problem = BilevelProblem(
        (lambda x, y: count(QUARTIC.f(x, y))) if where == "f" else QUARTIC.f,
        (lambda x, y: count(QUARTIC.g(x, y))) if where == "g" else QUARTIC.g,
    )
    return {"problem": problem, "callback": (lambda *_: count(None)) if where == "callback" else None}


QUARTIC = BilevelProblem(lambda x, y: (y - 3).pow(4).sum() / 4, SQUARE.g)
WAYS: dict[str, dict[str, Any]] = {
    "adam": OPTIONS,
    "quasi-newton": {"estimator": EXACT},
    "soba": {"algorithm": SOBA(0.1, 0.1)},
    "scipy": {"estimator": EXACT, "outer": ScipyMinimize("CG")},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["f", "g", "callback"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_leaves_as_it_is_with_the_solution_so_far(
    error: type[BaseException], where: str, way: str, tmp_path: Path
) -> None:
    thrown = error("mine")
    after = {"f": 6, "g": 15 if way != "soba" else 9, "callback": 2}[where]
    ways: list[dict[str, Any]] = [{}, {"checkpoint": tmp_path / "state.pt"}]
    for options in ways:
        with pytest.raises(error) as raised:
            minimize(x0=ZERO, y0=ZERO, **WAYS[way], **raising(where, after, thrown), **options)
        assert raised.value is thrown
        found = raised.value.partial  # type: ignore[attr-defined]
        assert isinstance(found, Solution)
        assert found.status is Status.interrupted and found.failed and not found.converged
        assert "mine" in found.message and error.__name__ in found.message
        assert [record.step for record in found.history] == list(range(len(found.history)))
        assert found.value == found.history[-1].value == float(QUARTIC.f(found.x, found.y))
        assert found.best.step <= found.history[-1].step
        thrown = error("mine")


def test_what_an_exception_leaves_is_what_fewer_steps_give() -> None:
    with pytest.raises(KeyboardInterrupt) as raised:
        minimize(SQUARE, ZERO, ZERO, **OPTIONS, callback=stop_at(5, KeyboardInterrupt()))
    found = raised.value.partial  # type: ignore[attr-defined]
    shorter = minimize(SQUARE, ZERO, ZERO, **OPTIONS, max_steps=5)
    assert same(found, shorter)
    assert torch.equal(found.estimate.grad, shorter.estimate.grad)
    assert found.stats == shorter.stats and found.best.value == shorter.best.value


@pytest.mark.parametrize("way", WAYS)
def test_what_a_callback_raises_at_leaves_its_own_record_and_is_told_again_on_resuming(
    way: str, tmp_path: Path
) -> None:
    run: Any = partial(minimize, QUARTIC, ZERO, ZERO, **WAYS[way], checkpoint=tmp_path / "a.pt", max_steps=12)
    with pytest.raises(ValueError, match="mine") as raised:
        run(callback=stop_at(2, ValueError("mine")))
    found, told = raised.value.partial, list[int]()  # type: ignore[attr-defined]
    assert [record.step for record in found.history] == [0, 1, 2]
    run(resume=True, callback=lambda record, _: told.append(record.step))
    assert told[0] == 2


def test_an_f_that_changes_the_current_directory_moves_no_file_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def f(x: Tensor, y: Tensor) -> Tensor:
        os.chdir(tmp_path / "there")
        return SQUARE.f(x, y)

    problem = BilevelProblem(f, SQUARE.g)
    minimize(problem, ZERO, ZERO, **OPTIONS, max_steps=300, checkpoint="a.pt", checkpoint_every=40)
    assert os.listdir(tmp_path / "there") == []
    assert sorted(os.listdir(tmp_path / "here")) == ["a.pt", "a.pt.history"]
    os.chdir(tmp_path / "here")
    solution = minimize(problem, ZERO, ZERO, **OPTIONS, max_steps=400, checkpoint="a.pt", resume=True)
    assert len(solution.history) == 401 and os.listdir(tmp_path / "there") == []


def test_an_exception_before_the_first_estimate_leaves_none() -> None:
    for arguments, error in (
        ({"max_steps": -1}, ValueError),
        ({"callback": 3}, TypeError),
        ({"estimator": "aid-gc"}, ValueError),
        (raising("f", 1, KeyboardInterrupt()), KeyboardInterrupt),
    ):
        with pytest.raises(error) as raised:
            minimize(**{"problem": SQUARE, "x0": ZERO, "y0": ZERO, **arguments})
        assert raised.value.partial is None  # type: ignore[attr-defined]
    with pytest.raises(StubbornError):
        minimize(SQUARE, ZERO, ZERO, **OPTIONS, callback=stop_at(2, StubbornError()))


def test_a_second_interrupt_while_the_first_is_kept_leaves_the_solution_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "state.pt"

    def again(content: Any, handle: Any) -> None:
        handle.write(b"half")
        raise KeyboardInterrupt("second")

    def stop(record: Record, _: Estimate) -> None:
        if record.step == 6:
            monkeypatch.setattr(torch, "save", again)
            raise KeyboardInterrupt("first")

    with pytest.raises(KeyboardInterrupt, match="second") as raised:
        minimize(SQUARE, ZERO, ZERO, **OPTIONS, checkpoint=file, checkpoint_every=5, callback=stop)
    assert raised.value.partial.history[-1].step == 6  # type: ignore[attr-defined]
    assert read_checkpoint(file)["step"] == 5
    assert os.listdir(tmp_path) == ["state.pt"]


def test_an_interrupt_while_evaluations_are_replayed_keeps_those_of_the_file(tmp_path: Path) -> None:
    class Breaks(AbstractOuterDriver):
        def __init__(self, at: int) -> None:
            self.at = at

        def __repr__(self) -> str:
            return "Breaks()"

        def drive(self, evaluate: Any, x0: Tensor, *, bounds: Any, max_steps: int, tol: Any) -> tuple[Tensor, Status]:
            x = x0
            for step in range(max_steps):
                if step == self.at:
                    raise KeyboardInterrupt
                x = x - 0.1 * evaluate(x)[1]
            return x, Status.successful

    file = tmp_path / "state.pt"
    for at in (8, 3):
        with pytest.raises(KeyboardInterrupt) as raised:
            minimize(SQUARE, ZERO, ZERO, estimator=EXACT, outer=Breaks(at), checkpoint=file, resume=at == 3 and "force")
        assert len(read_checkpoint(file)["history"]) == 8
        assert len(raised.value.partial.history) == at  # type: ignore[attr-defined]


# Files


def test_the_name_of_a_file_is_on_the_disk_when_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, fsync, replace = list[str](), os.fsync, os.replace

    def synced(handle: int) -> None:
        log.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    def replaced(source: Any, target: Any) -> None:
        log.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_atomically(tmp_path / "a", lambda file: file.write(b"whole"))
    assert log == ["file", "rename", "folder"]


def test_temporary_files_are_of_one_call_and_those_of_dead_processes_are_removed(tmp_path: Path) -> None:
    target = tmp_path / "a.pt"
    dead = subprocess.Popen(["true"])
    dead.wait()
    stale = [tmp_path / f".a.pt.{dead.pid}-0a1b2c3d.part", tmp_path / f".a.pt.{dead.pid}.part"]
    others = [tmp_path / f".a.pt.{os.getpid()}-0a.part", tmp_path / f".b.pt.{dead.pid}-0a.part", tmp_path / "a.part"]
    for path in (*stale, *others):
        path.touch()

    def nested(file: Any) -> None:
        file.write(b"outer")
        write_atomically(target, lambda inner: inner.write(b"inner"))
        assert target.read_bytes() == b"inner"

    write_atomically(target, nested)
    assert target.read_bytes() == b"outer"
    assert {path.name for path in tmp_path.iterdir()} == {"a.pt", *(path.name for path in others)}


def test_a_full_disk_under_torch_save_is_an_os_error(tmp_path: Path) -> None:
    def fails(file: Any) -> None:
        raise RuntimeError("mine")

    def full(file: Any) -> None:
        class Full:
            def write(self, content: bytes) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

            def flush(self) -> None: ...

        torch.save({"a": torch.zeros(1000)}, cast(Any, Full()))

    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "a", full)
    with pytest.raises(RuntimeError, match="mine"):
        write_atomically(tmp_path / "a", fails)
    assert os.listdir(tmp_path) == []


def test_results_hold_no_addresses() -> None:
    found = plain({"a": [repr(lambda: 0), object(), f"{SQUARE.f}"], "b": GradientDescent(0.1)})
    assert " at 0x" not in json.dumps(found)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_file_never_takes_the_place_of_a_pipe_or_a_folder(tmp_path: Path) -> None:
    pipe, target = tmp_path / "pipe", torch.ones(2)
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(OSError, match="is no file"):
            write_atomically(path, lambda file: file.write(b"anything"))
        with pytest.raises(ValueError, match=r"`minimize\(checkpoint=...\)` must be the path of a file"):
            minimize(target_problem(target), target, target, max_steps=1, checkpoint=path)
    assert pipe.is_fifo()
    link, own = tmp_path / "link", tmp_path / "own"
    own.write_bytes(b"own")
    link.symlink_to(own)
    write_atomically(link, lambda file: file.write(b"new"))
    assert own.read_bytes() == b"own" and link.read_bytes() == b"new" and not link.is_symlink()


@pytest.mark.parametrize("outer", [Adam(0.1), ScipyMinimize()], ids=["adam", "scipy"])
@pytest.mark.parametrize("name", ["solution", "finish"])
def test_an_interrupt_after_the_last_step_loses_nothing(
    name: str, outer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    target = torch.ones(2)
    monkeypatch.setattr(Run, name, interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        minimize(target_problem(target), 0 * target, target, outer=outer, max_steps=3, checkpoint=tmp_path / "c")
    partial: Any = caught.value.partial  # type: ignore[attr-defined]
    assert len(partial.history) == 4 if isinstance(outer, Adam) else partial.history
    monkeypatch.undo()
    minimize(
        target_problem(target), 0 * target, target, outer=outer, max_steps=3, checkpoint=tmp_path / "c", resume=True
    )


def test_a_run_that_starts_its_steps_elsewhere_is_another_run(tmp_path: Path) -> None:
    """Fixed steps: where they start is a part of the answer."""
    target, itd = torch.ones(2), ITD(Iterate(GradientDescent(0.1), max_steps=5))
    given: dict[str, Any] = {"estimator": itd, "outer": Adam(0.1), "checkpoint": tmp_path / "c"}
    minimize(target_problem(target), 0 * target, target, max_steps=2, **given)
    with pytest.raises(ValueError, match="warm_start"):
        minimize(target_problem(target), 0 * target, target, max_steps=4, resume=True, warm_start=True, **given)
    minimize(target_problem(target), 0 * target, target, max_steps=4, resume=True, warm_start=False, **given)


HUGE, NONE = 10**400, torch.tensor(math.nan)
DAMAGED: dict[str, list[Any]] = {
    "x": [None, torch.zeros(2, dtype=torch.float32), torch.zeros(3)],
    "settings": [[1], {"a": 1}],
    "changing": ["x", [1], 3],
    "step": ["3", -1, HUGE, True, 5],
    "calls": ["x", {"hvps": -1}],
    "loaders": ["x", [3]],
    "format": [torch.zeros(3)],
    "history": [[], 3, [3] * 3],
    "history.0": [None, {}],
    "history.0.step": [2, -1],
    "history.0.status": ["xx", 3],
    "history.0.seconds": [-1, HUGE, math.nan],
    "history.0.stats.hvps": [-1, HUGE],
    "random": [3, "xx", {}, [1]],
    "random.torch": [None, torch.zeros(3)],
    "random.python": [None, (3, (1, 2), None)],
    "random.python.2": [3, "x"],
}
OF_A_STATE: dict[str, list[Any]] = {
    "best": [4, {}],
    "best.x": [None, torch.zeros(3), torch.zeros(2, dtype=torch.float32)],
    "best.y": [3],
    "best.counts": [None, 1, NONE],
    "best.record": [3, {}],
    "best.record.step": [7, None],
    "best.record.status": ["xx"],
    "state": [3, None, {}],
    "state.x": [None, torch.zeros(3), torch.zeros(2, dtype=torch.float32), torch.zeros(2)],
    "state.y": [torch.zeros(2, 3), torch.zeros(2)],
    "state.v": [3, "x"],
    "state.memory.m": [None, torch.zeros(3), 3.0],
    "state.memory.count": [torch.zeros(3), "x"],
}
OF_A_DRIVER: dict[str, list[Any]] = {
    "begun": [3, {}],
    "evaluations": [[], 3],
    "evaluations.0": [3, {}],
    "evaluations.0.at": [None, torch.zeros(3)],
    "evaluations.0.grad": [torch.zeros(2, dtype=torch.float32)],
    "evaluations.0.v": [torch.zeros(3)],
    "evaluations.0.value": [torch.tensor(7.0), "x"],
    "evaluations.0.reports": [3, [3]],
    "history.0.value": [7.0],
}


def put(content: Any, place: list[str], value: Any) -> Any:
    """A copy with another value at a place."""
    if not place:
        return value
    if isinstance(content, dict):
        return {**content, place[0]: put(content[place[0]], place[1:], value)}
    k = int(place[0])
    return type(content)([*content[:k], put(content[k], place[1:], value), *content[k + 1 :]])


@pytest.mark.parametrize(
    ("outer", "place"),
    [
        (outer, place)
        for outer, own in (("adam", OF_A_STATE), ("scipy", OF_A_DRIVER))
        for place in {**DAMAGED, **own}
        if not (outer == "scipy" and place in ("calls", "loaders"))
    ],
)
def test_a_checkpoint_with_an_entry_of_another_kind_is_one_clear_error(outer: str, place: str, tmp_path: Path) -> None:
    file, method = tmp_path / "c", Adam(0.1) if outer == "adam" else ScipyMinimize("CG")
    target = torch.tensor([1.0, -2.0])
    quartic = BilevelProblem(lambda x, y: (y - target).pow(4).sum(), lambda x, y: (y - x).square().sum() / 2)
    options: dict[str, Any] = {"estimator": EXACT, "outer": method, "checkpoint": file, "throw": False}
    minimize(quartic, ZERO, ZERO, **options, max_steps=3)
    content = torch.load(file, weights_only=True)
    for value in {**DAMAGED, **OF_A_STATE, **OF_A_DRIVER}[place]:
        torch.save(put(content, place.split("."), value), file)
        with pytest.raises(ValueError, match="checkpoint") as caught:
            minimize(quartic, ZERO, ZERO, **options, max_steps=5, resume=True)
        assert str(file) in str(caught.value) and len(str(caught.value).splitlines()) == 1, value
        assert "{" not in str(caught.value) and len(str(caught.value)) < 500, value
    torch.save(content, file)
    minimize(quartic, ZERO, ZERO, **options, max_steps=5, resume=True)


def test_a_state_that_only_its_first_step_finds_damaged_is_suspected_and_an_f_that_raises_is_not(
    tmp_path: Path,
) -> None:
    file, wrong = tmp_path / "c", False

    def f(x: Tensor, y: Tensor) -> Tensor:
        if wrong:
            raise TypeError("of f")
        return (y - 3).square().sum()

    run: Any = partial(minimize, BilevelProblem(f, SQUARE.g), ZERO, ZERO, outer=Adam(0.1), checkpoint=file)
    run(max_steps=3)
    content = file.read_bytes()
    torch.save(put(torch.load(file, weights_only=True), ["state", "v"], torch.zeros(3)), file)
    with pytest.raises(RuntimeError) as caught:
        run(max_steps=5, resume=True)
    assert f"of the first step from {str(file)!r}, whose state may be damaged" in caught.value.__notes__[0]
    file.write_bytes(content)
    wrong = True
    with pytest.raises(TypeError, match="of f") as raised:
        run(max_steps=5, resume="force")
    assert not any("may be damaged" in note for note in getattr(raised.value, "__notes__", ()))


@pytest.mark.parametrize("line", [2, 12])
def test_a_damaged_line_of_a_driver_s_records_is_named(line: int, tmp_path: Path) -> None:
    file, size = tmp_path / "c", 60
    problem = BilevelProblem(
        lambda x, y: ((y - 1).pow(4) * torch.arange(1.0, size + 1)).sum(), lambda x, y: (y - x).square().sum() / 2
    )
    start = torch.linspace(-1, 1, size)
    options: dict[str, Any] = {"estimator": EXACT, "outer": ScipyMinimize("CG"), "throw": False, "max_steps": 60}
    whole = minimize(problem, start, start, **options, checkpoint=file, checkpoint_every=5)
    journal, state = journal_of(file), file.read_bytes()
    lines = journal.read_text().splitlines()
    entry = json.loads(lines[line - 1])
    assert entry["record"]["step"] == line - 2
    for damaged in (
        lines[line - 1][:-5],
        "3",
        json.dumps({**entry, "record": 3}),
        json.dumps({**entry, "record": {**entry["record"], "step": 1000}}),
        json.dumps({**entry, "record": {**entry["record"], "seconds": -1}}),
        json.dumps({**entry, "evaluation": 3}),
        json.dumps({"record": entry["record"]}) if line > 2 else "[]",
        json.dumps({**entry, "evaluation": {**entry["evaluation"], "at": {**entry["evaluation"]["at"], "shape": [7]}}}),
        json.dumps({**entry, "evaluation": {**entry["evaluation"], "value": 3.0}}),
    ):
        journal.write_text("\n".join([*lines[: line - 1], damaged, *lines[line:], ""]))
        with pytest.raises(ValueError, match=r"\.history', which holds the records.* Put it back") as caught:
            minimize(problem, start, start, **options, checkpoint=file, resume=True)
        text = str(caught.value)
        assert f"line {line}:" in text or f"of step {line - 2}" in text, text
        assert file.read_bytes() == state
    journal.write_text("\n".join([*lines, ""]))
    assert same(minimize(problem, start, start, **options, checkpoint=file, resume=True), whole)


def test_a_callback_that_is_to_be_awaited_is_refused() -> None:
    async def later(record: Record, estimate: Estimate) -> None:
        raise AssertionError

    target = torch.ones(2)
    with pytest.raises(TypeError, match="not awaited"):
        minimize(target_problem(target), target, target, max_steps=1, callback=cast(Any, later))
