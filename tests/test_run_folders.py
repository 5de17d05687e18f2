"""The folder of a run: one process at a time, resumed from whatever is left of it, finished by its last step."""

from __future__ import annotations

import json
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import bits
from forks import ended, forked, wait_for

from bilevel._files import write_atomically
from bilevel.cli import main
from bilevel.commands import contents as contents_module, few_shot as few_shot_module, outcome as outcome_module
from bilevel.commands.contents import write_result
from bilevel.commands.folder import Folder
from bilevel.commands.replaced import bring_back, forget, set_aside
from bilevel.commands.signals import received
from bilevel.outer import lock as lock_module
from bilevel.outer.lock import locked

MINE = """
import os, signal, sys, time
import torch
from pathlib import Path
from bilevel import BilevelProblem, Instance

target = torch.tensor([1.0, -2.0], dtype=torch.float64)
def loss(x, y): return (y - target).square().sum()
problem = BilevelProblem(loss, lambda x, y: (y - x).square().sum() / 2)
x0, y0 = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
adam = dict(outer="adam", outer_step=0.1)
"""
EXPERIMENT = """
from torch.nn.functional import mse_loss
from bilevel.few_shot import Evaluating, Experiment, Training, Validating, mlp
from bilevel.problems import maml
from bilevel.tasks import Sinusoid

def tuned() -> Experiment:
    tasks = Sinusoid(shots=3)
    validation, settings = Validating(tasks, episodes=2), Training(max_steps=4, batch=2, checkpoint_every=100)
    learner = maml(mlp((1, 4, 1)), mse_loss)
    return Experiment(learner, tasks, validation, tasks, settings=settings, evaluation=Evaluating(episodes=2))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory; pictures that take no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(outcome_module, "draw", lambda file, *_: file.write(b"a picture"))
    monkeypatch.setattr(few_shot_module, "draw_training", lambda file, *_: file.write(b"a picture"))
    yield tmp_path
    sys.modules.pop("mine", None)


def mine(text: str = "", name: str = "mine.py") -> str:
    Path(name).write_text(MINE + textwrap.dedent(text))
    return name


def result(folder: str = "out") -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(folder, "result.json").read_text())
    return content


def history(folder: str = "out") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in Path(folder, "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def run(*words: str, out: str = "out") -> int:
    return main(["run", *words, "--out", out, "--quiet"])


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert text.startswith("bilevel: error: ")
    assert text.count("\n") == 1, text
    return text


class Killed(BaseException):
    """In the place of a signal that nothing survives: nothing that handles exceptions may come after it."""


def killed_in(module: Any, name: str, run: Callable[[], int]) -> None:
    """Run a command line in a fork that dies when it calls module.name."""

    def dying() -> int:
        setattr(module, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        return run()

    assert ended(forked(dying)) == -signal.SIGKILL


# Killed before the first checkpoint


@pytest.mark.usefixtures("here")
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again_as_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("quadratic", "--estimator", "itd", "--outer", "adam", "--step", "0.07", "--steps", "6", "--set", "p=3")
    from bilevel.outer import saves

    killed_in(saves, "write_atomically", lambda: run(*words))
    assert result()["status"] == "running"
    assert run("quadratic", "--resume") == 0
    assert "was ended before its first checkpoint: it begins again from step 0" in capsys.readouterr().err
    assert run(*words, out="whole") == 0
    assert history() == history("whole")
    assert bits(torch.load("out/solution.pt")["x"]) == bits(torch.load("whole/solution.pt")["x"])
    assert result()["settings"] == result("whole")["settings"]


@pytest.mark.usefixtures("here")
def test_what_a_run_left_that_was_killed_before_its_first_checkpoint_is_not_in_the_way_of_another(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bilevel.outer import saves

    killed_in(saves, "write_atomically", lambda: run("quadratic", "--steps", "6"))
    assert run("nested", "--steps", "2") == 0
    assert "another one takes its place" in capsys.readouterr().err
    assert len(history()) == 3


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("write", range(2))  # what was asked for, and that it has begun
def test_a_run_that_was_killed_at_one_of_its_first_two_files_is_none(write: int, capsys: Any) -> None:
    contents: Any = contents_module

    def dying() -> int:
        real, count = contents.write_atomically, iter(range(10))

        def dies(path: Path, fill: Any) -> None:
            if next(count) == write:
                os.kill(os.getpid(), signal.SIGKILL)
            real(path, fill)

        contents.write_atomically = dies
        return run("quadratic", "--steps", "6")

    assert ended(forked(dying)) == -signal.SIGKILL
    assert sorted(path.name for path in Path("out").glob("[!.]*")) == ["config.toml"] * write
    assert run("quadratic", "--resume") == 2 and "no run to resume" in capsys.readouterr().err
    assert run("quadratic", "--steps", "6") == 0 and len(history()) == 7


@pytest.mark.usefixtures("here")
def test_training_that_was_killed_before_its_first_checkpoint_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.py").write_text(EXPERIMENT)
    from bilevel.outer import saves

    killed_in(saves, "write_atomically", lambda: run("mine.py:tuned", "--steps", "3", "--seed", "2"))
    assert run("mine.py:tuned", "--resume") == 0
    assert run("mine.py:tuned", "--steps", "3", "--seed", "2", out="whole") == 0
    assert [line["value"] for line in history()] == [line["value"] for line in history("whole")]
    assert result()["test"]["score"] == result("whole")["test"]["score"]


@pytest.mark.usefixtures("here")
def test_a_run_that_begins_again_and_is_killed_while_it_clears_its_folder_can_still_begin_again() -> None:
    from bilevel.outer import saves

    killed_in(saves, "write_atomically", lambda: run("quadratic", "--steps", "6"))
    assert len(history()) > 0
    for file in reversed(Folder(Path("out")).files):
        original = Path.unlink

        def dying(path: Path, missing_ok: bool = False, at: Path = file) -> None:
            if path == at:
                os.kill(os.getpid(), signal.SIGKILL)
            original(path, missing_ok)  # noqa: B023

        def resumed(unlink: Any = dying) -> int:
            setattr(Path, "unlink", unlink)  # noqa: B010
            setattr(saves, "write_atomically", lambda *_: os.kill(os.getpid(), signal.SIGKILL))  # noqa: B010
            return run("quadratic", "--resume")

        assert ended(forked(resumed)) == -signal.SIGKILL
        assert result()["settings"]["steps"] == 6
    Path("out/.result.json.1-ab.part").touch()
    assert run("quadratic", "--resume") == 0
    assert not [path for path in Path("out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("empty", ["result.json", "history.jsonl", "checkpoint.pt", ".lock", None])
@pytest.mark.usefixtures("here")
def test_an_empty_folder_holds_no_run(empty: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    if empty is not None:
        Path("out", empty).touch()
    assert run("quadratic", "--resume") == 2
    error_line(capsys)
    assert run("quadratic", "--steps", "1") == 0


@pytest.mark.usefixtures("here")
def test_a_result_without_its_checkpoint_is_neither_lost_nor_begun_again_unasked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("quadratic", "--steps", "1") == 0
    Path("out/checkpoint.pt").unlink()
    before = Path("out/result.json").read_bytes()
    for words in (["--steps", "2"], ["--resume", "--steps", "2"]):
        assert run("quadratic", *words) == 2
        assert "`--overwrite`" in error_line(capsys)
    assert Path("out/result.json").read_bytes() == before
    assert run("quadratic", "--steps", "2", "--overwrite") == 0


@pytest.mark.usefixtures("here")
def test_a_folder_that_was_made_for_a_run_that_is_refused_is_removed() -> None:
    assert run("quadratic", "--set", "kappa=0", out="a/b") == 2
    assert not Path("a").exists()
    Path("a").mkdir()
    assert run("quadratic", "--set", "kappa=0", out="a/b") == 2
    assert list(Path("a").iterdir()) == []


# Signals


@pytest.fixture
def heard() -> Iterator[None]:
    """Signals as they are where nobody has said `nohup`, or has begun the tests in the background: a run heeds that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in zip((signal.SIGHUP, signal.SIGINT), before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.usefixtures("here", "heard")
def test_a_signal_ends_a_run_after_its_checkpoint(number: int, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    file = mine(f"""
        calls = []
        def f(x, y):
            calls.append(1)
            if len(calls) == 30 and not Path("mended").exists():
                os.kill(os.getpid(), {int(number)})
            return loss(x, y)
        made = Instance(BilevelProblem(f, problem.g), x0, y0, settings=adam)
    """)
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert run(f"{file}:made", "--steps", "40") == code
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    line = capsys.readouterr().err
    assert line.startswith("bilevel: interrupted after step ")
    assert line.count("\n") == 1
    assert result()["status"] == "interrupted"
    Path("mended").touch()
    assert run(f"{file}:made", "--resume") == 0
    assert run(f"{file}:made", "--steps", "40", out="whole") == 0
    assert history() == history("whole")
    assert [record["step"] for record in history()] == list(range(41))


@pytest.mark.usefixtures("here")
def test_a_signal_ends_training_after_its_checkpoint() -> None:
    Path("mine.py").write_text(
        EXPERIMENT
        + textwrap.dedent("""
        import dataclasses, os, signal
        from pathlib import Path
        from dataclasses import dataclass
        from bilevel.tasks import AbstractTasks
        @dataclass(frozen=True)
        class Signalling(AbstractTasks):
            inner: Sinusoid = Sinusoid(shots=3)
            def sample(self, batch, seed):
                calls.append(1)
                if len(calls) == 3 and not Path("mended").exists():
                    os.kill(os.getpid(), signal.SIGTERM)
                return self.inner.sample(batch, seed)
        calls = []
        def signalled() -> Experiment:
            return dataclasses.replace(tuned(), tasks=Signalling())
    """)
    )
    assert run("mine.py:signalled", "--steps", "5") == 143
    assert result()["status"] == "interrupted"
    Path("mended").touch()
    assert run("mine.py:signalled", "--resume") == 0
    assert run("mine.py:signalled", "--steps", "5", out="whole") == 0
    assert [line["value"] for line in history()] == [line["value"] for line in history("whole")]


@pytest.mark.usefixtures("here")
def test_a_signal_during_the_first_evaluation_leaves_a_run_that_can_be_continued(
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = mine("""
        def f(x, y):
            if not Path("mended").exists():
                os.kill(os.getpid(), signal.SIGTERM)
            return loss(x, y)
        made = Instance(BilevelProblem(f, problem.g), x0, y0, settings=adam)
    """)
    assert run(f"{file}:made", "--steps", "3") == 143
    assert "Continue with: bilevel run mine.py:made --out out --resume" in capsys.readouterr().err
    assert result()["status"] == "interrupted"
    Path("mended").touch()
    assert run(f"{file}:made", "--resume") == 0
    assert len(history()) == 4


@pytest.mark.usefixtures("here")
def test_a_second_signal_ends_a_run_at_once_and_leaves_no_half_file() -> None:
    file = mine("""
        def metrics(x, y):
            Path("ready").touch()
            while True:
                try:
                    time.sleep(60)
                except BaseException:
                    Path("out/.plot.png.1.part").touch()
        made = Instance(problem, x0, y0, settings=adam, metrics=metrics)
    """)
    number = forked(lambda: run(f"{file}:made", "--steps", "2"))
    wait_for(Path("ready"))
    os.kill(number, signal.SIGTERM)
    wait_for(Path("out/.plot.png.1.part"))
    os.kill(number, signal.SIGTERM)
    assert ended(number) == 143
    names = sorted(path.name for path in Path("out").iterdir())
    assert names == ["checkpoint.pt", "config.toml", "history.jsonl", "result.json", "solution.pt"]


def test_a_signal_that_is_ignored_stays_ignored_and_other_threads_set_none() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with received():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    found: list[Any] = []

    def elsewhere() -> None:
        with received():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


def test_minimize_sets_no_handlers() -> None:
    from bilevel import minimize
    from bilevel.problems import quadratic

    before, seen = signal.getsignal(signal.SIGTERM), []
    made = quadratic()
    minimize(
        made.problem, made.x0, made.y0, max_steps=1, callback=lambda *_: seen.append(signal.getsignal(signal.SIGTERM))
    )
    assert set(seen) == {before}


# The lock


@pytest.mark.usefixtures("here")
def test_two_runs_in_one_folder_are_refused_by_name_of_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    file = mine("""
        def metrics(x, y):
            Path("ready").touch()
            time.sleep(60)
        made = Instance(problem, x0, y0, settings=adam, metrics=metrics)
    """)
    number = forked(lambda: run(f"{file}:made", "--steps", "2"))
    try:
        wait_for(Path("ready"))  # the lock is held to the end of the last step
        for words in (["--resume"], [], ["--overwrite"]):
            assert run("quadratic", *words) == 2
            line = error_line(capsys)
            assert f"'out' is in use by process {number} on {os.uname().nodename} since 20" in line
    finally:
        os.kill(number, signal.SIGKILL)
        ended(number)
    assert Path("out/.lock").exists()  # and means nothing, as its process is dead
    assert run(f"{mine('made = Instance(problem, x0, y0, settings=adam)')}:made", "--resume", "--force") == 0
    assert not Path("out/.lock").exists()


def test_a_lock_is_released_and_its_file_removed(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
            with pytest.raises(ValueError, match="is in use by process"), locked(tmp_path):
                pass
            assert (tmp_path / ".lock").exists()
        assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_was_removed_and_made_by_another_is_left_to_that_one(tmp_path: Path) -> None:
    with locked(tmp_path):
        (tmp_path / ".lock").unlink()
        (tmp_path / ".lock").write_text("another's")
    assert (tmp_path / ".lock").read_text() == "another's"


def test_a_forked_worker_does_not_keep_the_lock(tmp_path: Path) -> None:
    ends, released = os.pipe(), os.pipe()

    def waits() -> int:
        os.close(released[1])
        return len(os.read(released[0], 1))

    def holds() -> int:
        with locked(tmp_path):
            forked(waits)  # outlives the process that holds the lock
            os.write(ends[1], b"x")
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    number = forked(holds)
    os.read(ends[0], 1)
    ended(number)
    with locked(tmp_path):
        pass
    for end in (*ends, *released):
        os.close(end)


def test_where_there_are_no_locks_the_file_itself_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "_locks", None)
    with locked(tmp_path):
        with pytest.raises(ValueError, match=r"is in use by process .* If it is gone, remove"), locked(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".lock").write_text('{"pid": 1, "host": "a", "since": "b"}')
    with pytest.raises(ValueError, match="in use by process 1 on a since b"), locked(tmp_path):
        pass


# The last step


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.usefixtures("here")
def test_what_was_killed_at_its_metrics_is_finished_on_resuming_and_nothing_is_computed_again(
    failing: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = mine("""
        calls = []
        def f(x, y):
            calls.append(1)
            return loss(x, y)
        def metrics(x, y):
            return {"computed": len(calls), "first": x[0]}
        made = Instance(BilevelProblem(f, problem.g), x0, y0, settings=adam, metrics=metrics)
    """)
    words = [f"{file}:made", "--steps", "5", *(["--tol", "1e-9"] if failing else [])]
    killed_in(outcome_module, "draw", lambda: run(*words))
    assert result()["status"] == "finishing"
    assert not Path("out/plot.png").exists()
    kept = {name: Path("out", name).read_bytes() for name in ("history.jsonl", "checkpoint.pt", "solution.pt")}
    assert run(f"{file}:made", "--resume") == int(failing)
    assert Path("out/plot.png").exists()
    assert {name: Path("out", name).read_bytes() for name in kept} == kept
    assert run(*words, out="whole") == int(failing)
    assert capsys.readouterr().err.count("did not succeed") == 2 * failing
    parts, whole = result(), result("whole")
    assert parts["metrics"].pop("computed") == 0 < whole["metrics"].pop("computed")
    for content in (parts, whole):
        del content["seconds"]
    assert parts == whole
    assert "computed" not in parts


@pytest.mark.usefixtures("here")
def test_training_that_was_killed_at_its_plot_is_finished_on_resuming(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.py").write_text(EXPERIMENT)
    killed_in(few_shot_module, "draw_training", lambda: run("mine.py:tuned"))
    before = result()
    assert before["status"] == "finishing"
    kept = {path.name: path.read_bytes() for path in Path("out").iterdir() if path.suffix in (".pt", ".jsonl")}
    assert run("mine.py:tuned", "--resume") == 0
    assert Path("out/plot.png").exists()
    assert {name: Path("out", name).read_bytes() for name in kept} == kept
    assert result() == {key: value for key, value in before.items() if key != "computed"} | {"status": "successful"}
    assert main(["run", "mine.py:tuned", "--resume", "--out", "out"]) == 0
    assert "nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["solution.pt", "history.jsonl"])
@pytest.mark.usefixtures("here")
def test_an_unfinished_run_whose_files_are_damaged_is_continued_from_its_checkpoint(
    damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_in(outcome_module, "draw", lambda: run("quadratic", "--steps", "3"))
    Path("out", damage).write_bytes(b"{")
    assert run("quadratic", "--resume") == 0
    assert run("quadratic", "--steps", "3", out="whole") == 0
    assert history() == history("whole")
    assert result()["status"] == "steps_used_up"


@pytest.mark.usefixtures("here")
def test_more_steps_than_an_unfinished_run_has_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    killed_in(outcome_module, "draw", lambda: run("quadratic", "--steps", "3"))
    assert run("quadratic", "--resume", "--steps", "5") == 0
    assert len(history()) == 6


# Replacing


def test_no_file_of_a_replaced_run_is_lost_wherever_that_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_after(count: int) -> None:
        calls = iter(range(count))

        def counted(original: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*arguments: Any, **keywords: Any) -> Any:
                if next(calls, None) is None:
                    raise Killed
                return original(*arguments, **keywords)

            return wrapped

        for name in ("mkdir", "replace", "rename", "rmdir", "unlink"):
            context.setattr(Path, name, counted(getattr(Path, name)))

    new = False
    for count in range(60):
        folder = Folder(tmp_path / str(count))
        folder.path.mkdir()
        for file in folder.files[:4]:
            file.write_text(f"old {file.name}")
        new = False
        try:
            with monkeypatch.context() as context:
                stop_after(count)
                set_aside(folder)
                folder.result.write_text("new")
                bring_back(folder)
                set_aside(folder)
                folder.result.write_text("new")
                new = True
                forget(folder)
        except Killed:
            pass
        bring_back(folder)
        kept = {file.name: file.read_text() for file in folder.files if file.exists()}
        old = {file.name: f"old {file.name}" for file in folder.files[:4]}
        assert kept == old or (new and kept == {"result.json": "new"}), count
        assert not [path for path in folder.path.iterdir() if path.name.startswith(".")]
    assert new


# Damage


def in_its_place(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def replaced(path: Path) -> None:
        path.unlink()
        make(path)

    return replaced


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 7),
    "null": lambda path: path.write_text("null"),
    "list": lambda path: path.write_text("[1, 2]\n"),
    "deep": lambda path: path.write_bytes(b"[" * 100_000),
    "numbers": lambda path: path.write_text('{"settings": 3, "status": 4, "step": "a"}\n'),
    "missing": Path.unlink,
    "folder": in_its_place(Path.mkdir),
    "loop": in_its_place(lambda path: path.symlink_to(path)),
    "dangling": in_its_place(lambda path: path.symlink_to("nowhere")),
    "fifo": in_its_place(os.mkfifo),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["result.json", "history.jsonl", "checkpoint.pt", "solution.pt"])
@pytest.mark.usefixtures("here")
def test_a_damaged_folder_is_told_in_one_line_and_another_one_works(
    name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("quadratic", "--steps", "1") == 0
    DAMAGES[damage](Path("out", name))
    for words in (["--resume"], ["--resume", "--steps", "2"], ["--steps", "1"], ["--overwrite", "--steps", "1"]):
        code = run("quadratic", *words)
        text = capsys.readouterr().err
        assert code in (0, 2), text
        assert text.count("bilevel: error: ") == (code == 2)
        assert len(text.splitlines()) <= 1, text
        assert "Traceback" not in text
        assert "--debug" not in text  # which is for errors that say too little
    assert code == (2 if damage in ("folder", "loop", "dangling", "fifo") else 0), text


@pytest.mark.parametrize(
    "change",
    [
        {"x": 3},
        {"x": torch.zeros(7)},
        {"step": "two"},
        {"step": True},
        {"history": 3},
        {"history": [3]},
        {"history": [{"step": 0}]},
        {"state": None},
        {"state": [1, 2]},
        {"format": 99},
        {"settings": 3},
        {"calls": 3},
        {"best": 3},
    ],
    ids=str,
)
@pytest.mark.usefixtures("here")
def test_a_checkpoint_of_the_wrong_types_is_told_in_one_line(
    change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("quadratic", "--steps", "2") == 0
    content = torch.load("out/checkpoint.pt", weights_only=True)
    torch.save(content | change, "out/checkpoint.pt")
    assert run("quadratic", "--resume", "--steps", "4") in (0, 2)
    text = capsys.readouterr().err
    assert len(text.splitlines()) <= 1, text
    assert "--debug" not in text, text


@pytest.mark.parametrize(
    "change",
    [
        {"status": 3},
        {"settings": None},
        {"settings": {}},
        {"settings": {"problem": "quadratic", "set": 3}},
        {"settings": {"problem": "quadratic", "set": {"p": 3}}},
        {"settings": {"problem": 3, "set": {}}},
        {"settings": {"problem": "quadratic", "set": {}, "steps": "many"}},
        {"settings": {"problem": "quadratic", "set": {}, "estimator": ["itd"]}},
        {"seconds": "long"},
        {"status": "finishing", "computed": 3},
        {"status": "finishing", "steps": "a"},
        {"status": "unknown"},
        {"status": "xx"},
        {"seconds": -1},
        {"seconds": 10**400},
        {"settings": {"problem": "quadratic", "set": {}, "step": 10**400}},
        {"settings": {"problem": "quadratic", "set": {}, "tol": -(10**400)}},
    ],
    ids=str,
)
@pytest.mark.usefixtures("here")
def test_a_result_of_the_wrong_types_is_told_in_one_line(
    change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("quadratic", "--steps", "2") == 0
    write_result(Folder(Path("out")), result() | change)
    assert run("quadratic", "--resume", "--steps", "4") in (0, 2)
    text = capsys.readouterr().err
    assert len(text.splitlines()) <= 1, text
    assert "--debug" not in text, text


@pytest.mark.skipif(os.getuid() == 0, reason="nothing is forbidden to root")
@pytest.mark.parametrize("name", ["result.json", "checkpoint.pt", "history.jsonl", "."])
@pytest.mark.usefixtures("here")
def test_files_that_may_not_be_read_are_told_in_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quadratic", "--steps", "1") == 0
    mode = Path("out", name).stat().st_mode
    Path("out", name).chmod(0)
    try:
        assert run("quadratic", "--resume", "--steps", "2") == 2
        error_line(capsys)
    finally:
        Path("out", name).chmod(mode)


@pytest.mark.usefixtures("here")
def test_another_problem_under_the_same_name_is_resumed_by_force_only(capsys: pytest.CaptureFixture[str]) -> None:
    file = mine("made = Instance(problem, x0, y0, settings=adam)")
    assert run(f"{file}:made", "--steps", "3") == 0
    mine("made = Instance(BilevelProblem(lambda x, y: loss(x, y) / 3, problem.g), x0, y0, settings=adam)")
    sys.modules.pop("mine")
    assert run(f"{file}:made", "--resume", "--steps", "5") == 2
    assert "`--force`" in error_line(capsys)
    assert len(history()) == 4
    assert run(f"{file}:made", "--resume", "--steps", "5", "--force") == 0
    assert len(history()) == 6
    assert run(f"{file}:made", "--force", out="other") == 2
    assert "goes with `--resume`" in error_line(capsys)


@pytest.mark.usefixtures("here")
def test_checkpoints_are_written_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    file = mine("""
        def f(x, y):
            time.sleep(0.004)
            return loss(x, y)
        made = Instance(BilevelProblem(f, problem.g), x0, y0, settings=adam)
    """)
    from bilevel.outer import saves

    written: list[Any] = []

    def write(path: Any, action: Any) -> None:
        written.append(path)
        write_atomically(path, action)

    monkeypatch.setattr(saves, "write_atomically", write)
    assert run(f"{file}:made", "--steps", "8", "--checkpoint-seconds", "0.001") == 0
    assert len(written) >= 8
    written.clear()
    assert run(f"{file}:made", "--steps", "8", out="rarely") == 0
    assert len(written) <= 2


# What a file of the user's may do


@pytest.mark.parametrize("command", [["run", "--out", "out", "--quiet"], ["check"], ["compare"]])
@pytest.mark.parametrize(
    ("text", "code", "complaint"),
    [
        ("sys.exit(0)", 2, "mine.py:12: SystemExit: 0"),
        ("sys.exit('bye')", 2, "mine.py:12: SystemExit: bye"),
        ("raise SystemExit", 2, "mine.py:12: SystemExit"),
        ("raise KeyboardInterrupt", 130, "bilevel: interrupted"),
        ("raise GeneratorExit", 2, "mine.py:12: GeneratorExit"),
        ("raise RecursionError('deep')", 2, "mine.py:12: RecursionError: deep"),
        ("def made(): sys.exit(3)", 2, "building mine.py:made failed: SystemExit: 3 (mine.py:12)"),
        ("def made(): raise KeyboardInterrupt", 130, "bilevel: interrupted"),
        ("made = BilevelProblem(lambda x, y: sys.exit(3), problem.g)", 1, "f of mine.py:made raised SystemExit: 3"),
        ("made = BilevelProblem(problem.f, lambda x, y: sys.exit(3))", 1, "g of mine.py:made raised SystemExit: 3"),
    ],
)
@pytest.mark.usefixtures("here")
def test_a_file_that_wants_to_exit_is_told_in_one_line(
    text: str, code: int, complaint: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command[0], f"{mine(text)}:made", *command[1:]]) == code
    line = capsys.readouterr().err
    assert complaint in line
    assert line.count("\n") == 1, line
    assert not Path("out").exists()


@pytest.mark.usefixtures("here")
def test_an_exit_on_the_way_is_a_failure_that_keeps_what_was_computed(capsys: pytest.CaptureFixture[str]) -> None:
    file = mine("""
        calls = []
        def f(x, y):
            calls.append(1)
            if len(calls) > 20:
                sys.exit(0)
            return loss(x, y)
        made = Instance(BilevelProblem(f, problem.g), x0, y0, settings=adam)
        def leaves(*given): sys.exit(0)
        ends = Instance(problem, x0, y0, settings=adam, metrics=leaves, plot=leaves)
    """)
    assert run(f"{file}:made", "--steps", "50") == 1
    assert "f of mine.py:made raised SystemExit: 0" in error_line(capsys)
    assert result()["status"] == "failed"
    assert len(history()) > 2
    assert run(f"{file}:ends", "--steps", "2", out="other") == 0
    assert "left out its metrics: SystemExit: 0" in result("other")["notes"]


@pytest.mark.parametrize("where", ["the file", "building", "f", "metrics"])
@pytest.mark.usefixtures("here")
def test_code_that_changes_the_current_directory_moves_no_file(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("away").mkdir()
    file = mine(f"""
        def leave(name):
            if name == {where!r}: os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), "away"))
        leave("the file")
        def f(x, y):
            leave("f")
            return loss(x, y)
        def metrics(x, y):
            leave("metrics")
            return {{}}
        def made():
            leave("building")
            return Instance(BilevelProblem(f, problem.g), x0, y0, settings=adam, metrics=metrics)
    """)
    home = os.getcwd()
    for more in (["--steps", "3"], ["--resume", "--steps", "5"]):
        assert run(f"{file}:made", *more) == 0
        said = capsys.readouterr().err
        told = said.count(f"changes the current directory, to {home}/away: the command goes on in {home}.")
        assert told == (where != "the file" or "--resume" not in more), said  # a file is executed once
        assert os.getcwd() == home and os.listdir("away") == []
    assert len(history()) == 6 and not Path("out/.lock").exists()
    assert main(["compare", f"{file}:made", "--estimator", "aid-cg", "--out", "other"]) == 0
    assert Path("other/compare.json").exists() and os.listdir("away") == []


@pytest.mark.usefixtures("here")
def test_a_folder_or_a_link_of_the_name_of_a_python_file_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.py").mkdir()
    Path("z.py").symlink_to("nowhere")
    for problem, why in (
        ("x.py:problem", "'x.py' is a folder: name a Python file"),
        ("x.py", "'x.py' is a folder: name a Python file"),
        ("z.py:problem", "'z.py' is a link that leads to no file"),
        ("xx.py:problem", "there is no file 'xx.py'."),
    ):
        assert run(problem) == 2
        line = error_line(capsys)
        assert why in line and "Did you mean" not in line


def test_the_lines_of_a_history_are_on_the_disk_before_the_checkpoint_that_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    synced, sync = list[tuple[int, int]](), os.fsync

    def look(handle: int) -> None:
        lines = Path("out/history.jsonl")
        if lines.exists() and os.path.samestat(os.fstat(handle), lines.stat()):
            checkpoint = Path("out/checkpoint.pt")
            steps = torch.load(checkpoint, weights_only=True)["step"] if checkpoint.exists() else 0
            synced.append((len(lines.read_text().splitlines()), steps))
        sync(handle)

    monkeypatch.setattr(os, "fsync", look)
    assert run("quadratic", "--outer", "adam", "--step", "0.1", "--steps", "35") == 0
    assert [lines for lines, _ in synced] == [10, 20, 30, 36]
    assert [steps for _, steps in synced[:3]] == [0, 10, 20]


def test_a_link_of_the_name_of_the_lock_is_refused_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("own")
    for target in (own, tmp_path / "nothing"):
        folder = tmp_path / f"run-{target.name}"
        folder.mkdir()
        (folder / ".lock").symlink_to(target)
        with pytest.raises(ValueError, match=r"\.lock' is a link"), locked(folder):
            pass
    assert own.read_text() == "own" and not (tmp_path / "nothing").exists()
