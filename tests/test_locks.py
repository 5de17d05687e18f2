"""Two runs never have one file: the second is refused, whoever they are, and nothing of the first hinders the next."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import ended, forked, wait_for
from torch import Tensor

from bilevel import AID, ITD, BilevelProblem, Solution, minimize
from bilevel.cli import main
from bilevel.few_shot import Learner, train
from bilevel.outer.lock import held, locked
from bilevel.solvers import CG, Adam, ClosedForm, GradientDescent, Iterate, ScipyMinimize
from bilevel.tasks import Sinusoid

ZERO = torch.zeros(2, dtype=torch.float64)
PROBLEM = BilevelProblem(lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (y - x).square().sum() / 2)
OUTER: dict[str, Callable[[], Any]] = {
    "adam": lambda: Adam(0.1),
    "quasi-newton": lambda: None,
    "scipy": ScipyMinimize,
}


def run(path: Path, callback: Any = None, outer: str = "adam", **options: Any) -> Solution:
    return minimize(
        *(PROBLEM, ZERO, ZERO),
        estimator=AID(ClosedForm(lambda x: x), CG()),
        outer=OUTER[outer](),
        max_steps=3,
        checkpoint=path,
        callback=callback,
        **options,
    )


def mean() -> Learner:
    def f(x: Tensor, y: Tensor, task: Any) -> Any:
        return (y - task["query_y"]).square().mean()

    def g(x: Tensor, y: Tensor, task: Any) -> Any:
        return (y - task["support_y"]).square().mean() / 2

    problem = BilevelProblem(f, g, init=lambda x, task: x, tasks=True)
    inner, x0 = Iterate(GradientDescent(0.1), max_steps=1), torch.tensor(3.0)
    predict = lambda x, y, task: y.expand(task["query_y"].shape)  # noqa: E731
    return Learner("mean", problem, x0, x0, ITD(inner), inner, predict, lambda x: torch.nn.Identity())


@pytest.mark.parametrize("outer", OUTER)
def test_a_second_run_on_a_checkpoint_is_refused_and_changes_nothing(outer: str, tmp_path: Path) -> None:
    if outer == "scipy":
        pytest.importorskip("scipy.optimize")
    path, alone, refused = tmp_path / "a.pt", run(tmp_path / "alone.pt", outer=outer), []

    def callback(*_: Any) -> None:
        for resume in (False, True):
            with pytest.raises(ValueError, match=r"`minimize\(checkpoint=...\)`: .*a.pt' is in use by process \d+"):
                run(path, outer=outer, resume=resume)
        refused.append(run(tmp_path / "b.pt", outer=outer))  # the folder is everybody's

    solution = run(path, callback, outer)
    assert refused and torch.equal(solution.x, alone.x)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.pt", "alone.pt", "b.pt"]
    assert torch.equal(run(path, outer=outer, resume=True).x, alone.x)


def test_the_refusal_names_the_other_process_and_a_killed_one_hinders_nobody(tmp_path: Path) -> None:
    path, ready = tmp_path / "new" / "a.pt", tmp_path / "ready"

    def callback(record: Any, _: Any) -> None:
        if record.step == 2:
            ready.touch()
            threading.Event().wait(60)

    number = forked(lambda: run(path, callback, checkpoint_every=1).failed)
    try:
        wait_for(ready)
        with pytest.raises(ValueError, match=rf"process {number} on {os.uname().nodename} since 20.*another file"):
            run(path, resume=True)
    finally:
        os.kill(number, signal.SIGKILL)
        ended(number)
    assert (path.parent / ".a.pt.lock").exists()  # and means nothing
    assert torch.equal(run(path, resume=True).x, run(tmp_path / "b.pt").x)
    assert [each.name for each in path.parent.iterdir()] == ["a.pt"]


def test_of_two_threads_on_a_checkpoint_one_runs(tmp_path: Path) -> None:
    both, told = threading.Barrier(2), []

    def work() -> None:
        def callback(record: Any, _: Any) -> None:
            if record.step == 0:
                both.wait(30)

        try:
            run(tmp_path / "a.pt", callback)
        except ValueError as error:
            told.append(str(error))
            both.wait(30)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 1 and f"process {os.getpid()} on" in told[0] and "(this very one)" in told[0]


def test_a_lock_is_let_go_by_whatever_ends_the_run(tmp_path: Path) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a.pt", stop)
    with pytest.raises(FileNotFoundError):
        run(tmp_path / "not" / "there.pt", resume=True)
    with pytest.raises(ValueError, match="dtype"):
        minimize(PROBLEM, ZERO, ZERO.float(), checkpoint=tmp_path / "not" / "made.pt")
    run(tmp_path / "a.pt")
    assert [each.name for each in tmp_path.iterdir()] == ["a.pt"]  # and no folder for what did not begin


def test_a_link_of_the_name_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("own")
    (tmp_path / ".a.pt.lock").symlink_to(tmp_path / "own")
    with pytest.raises(ValueError, match=r"\.a\.pt\.lock' is a link"):
        run(tmp_path / "a.pt")
    assert (tmp_path / "own").read_text() == "own"


def test_a_place_where_no_file_can_be_is_told_before_anything_is_computed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"`minimize\(checkpoint=...\)`: .* cannot be written: .*file"):
        run(tmp_path / "file" / "a.pt", lambda *_: pytest.fail("computed"))


def test_two_trainings_in_a_folder_are_refused_and_the_first_keeps_its_files(tmp_path: Path) -> None:
    refused = []

    def callback(*_: Any) -> None:
        if (tmp_path / "best.pt").exists():
            with pytest.raises(ValueError, match=r"`train\(out=...\)`: .*best.pt' is in use .* name another folder"):
                train(mean(), Sinusoid(), max_steps=2, out=tmp_path)
            refused.append((tmp_path / "best.pt").exists())

    train(mean(), Sinusoid(), max_steps=2, batch=2, validation=Sinusoid(), out=tmp_path, callback=callback)
    assert refused and all(refused)
    assert not [each.name for each in tmp_path.iterdir() if each.name.startswith(".")]
    train(mean(), Sinusoid(), max_steps=2, batch=2, out=tmp_path)


@pytest.mark.parametrize("name", ["checkpoint.pt", "best.pt"])
def test_the_command_line_leaves_a_folder_to_the_run_in_python_that_has_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "quadratic", "--steps", "1", "--quiet", "--out", str(tmp_path)]
    assert main(words) == 0
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    with held(tmp_path / name):
        for more in (["--overwrite"], ["--resume", "--steps", "2"]):
            assert main([*words, *more]) == 2
            assert f"{name}' is in use by process {os.getpid()}" in capsys.readouterr().err
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before
    assert main([*words, "--overwrite"]) == 0


def test_a_comparison_has_its_folder_to_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a" / "b"
    words = ["compare", "quadratic", "--estimator", "aid-cg", "--budgets", "2", "--out", str(folder)]
    assert main(words) == 0 and "compare.json" in os.listdir(folder)
    before = json.loads((folder / "compare.json").read_text())
    with locked(folder):
        assert main([*words[:-4], "--budgets", "3", "--out", str(folder)]) == 2
        assert "is in use by process" in capsys.readouterr().err
    assert json.loads((folder / "compare.json").read_text()) == before
    assert ".lock" not in os.listdir(folder)
    assert main(["compare", "nothing", "--out", str(tmp_path / "c")]) == 2
    assert not (tmp_path / "c").exists()
