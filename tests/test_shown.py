"""What people look at: tables in notebooks, data frames, progress, trackers, and `bilevel info`."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from bilevel import Check, Comparison, Row, Solution, Stats, Verdict, certify, compare, hypergradient, minimize
from bilevel.cli import main
from bilevel.diagnostics.verdict import Outcome
from bilevel.outer.solution import Record
from bilevel.problems import quadratic
from bilevel.tracking import AbstractTracker, MLflow, Several, TensorBoard, WandB

INSTANCE = quadratic()
POINT = INSTANCE.problem, INSTANCE.x0, INSTANCE.y0


def solved(**settings: Any) -> Solution:
    return minimize(*POINT, max_steps=3, **settings)


# Notebooks


def test_results_are_tables_in_notebooks_and_all_text_is_escaped() -> None:
    assert INSTANCE.constants is not None
    estimate = hypergradient(*POINT)
    certificate = certify(INSTANCE.problem, INSTANCE.x0, estimate, constants=INSTANCE.constants(INSTANCE.x0))
    comparison = Comparison((Row("aid-cg", None, 1e-9, 1e-9, 1.0, stats=Stats(hvps=3)),) * 2, 1.0, "aid-dense")
    checked = Check((Verdict("gradients", Outcome.passed, "right"),) * 2, "none", {"aid-cg": ""})
    for result in (estimate, solved(), checked, comparison, certificate):
        page = result._repr_html_()
        assert type(result).__name__ in page or "|h| =" in page
        assert page.count("<table") == page.count("</table>") == 1 and page.count("<tr>") == page.count("</tr>") > 2
    hostile = Check((Verdict("<script>", Outcome.failed, "a & b", "<b>"),), "none", {})
    assert "<script>" not in hostile._repr_html_() and "&lt;script&gt;" in hostile._repr_html_()


def test_numbers_in_notebooks_are_those_of_the_result() -> None:
    solution = solved()
    assert f"{solution.value:.6g}" in solution._repr_html_() and "stats" not in solution._repr_html_()
    estimate = hypergradient(*POINT)
    assert f"{float(estimate.grad.norm()):.6g}" in estimate._repr_html_()


def test_the_table_of_a_comparison_has_no_empty_column() -> None:
    rows = tuple(Row(name, None, 1e-9, 1e-9, 1.0, stats=Stats(hvps=3), seconds=1e-3, memory=10) for name in "ab")
    text = str(Comparison(rows, 1.0, "aid-dense"))
    assert "certified" not in text and "budget" not in text and "calls" in text
    assert all(len(line) <= 80 for line in text.splitlines())


# Data frames


def test_histories_and_comparisons_become_data_frames() -> None:
    pytest.importorskip("pandas")
    solution, comparison = solved(), compare(*POINT, estimators=("aid-cg",), budgets=(10, 20))
    history, rows = solution.to_pandas(), comparison.to_pandas()
    assert history["value"].tolist() == [record.value for record in solution.history]
    assert history["stats.hvps"].sum() == solution.stats.hvps
    assert rows["budget"].tolist() == [10, 20] and rows["name"].tolist() == ["aid-cg", "aid-cg"]


def test_without_pandas_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r'Solution.to_pandas.*pip install "bilevel\[pandas\]"'):
        solved().to_pandas()


# Progress


def test_progress_changes_nothing_and_says_the_name_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[int] = []
    solution = solved(progress="my run", callback=lambda record, _: told.append(record.step))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"my run: step {k}/3" for k in range(4)]
    assert told == [0, 1, 2, 3] and f"Phi {solution.value:.6g}" in lines[-1]
    quiet = solved()
    assert quiet.value == solution.value and (quiet.x == solution.x).all()
    assert capsys.readouterr().err == ""


def test_a_callback_beside_progress_still_ends_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(solved(progress=True, callback=lambda record, _: record.step == 1).history) == 2
    assert "step 0/3" in capsys.readouterr().err


def test_in_a_terminal_progress_is_a_bar_with_the_name_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    solved(progress="my run")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "my run" in text and "3/3" in text and "left" in text and "|h|" in text


# Trackers


class Told(AbstractTracker):
    """Keeps what it is handed."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, float]] = {}
        self.flushed = self.closed = 0

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.steps[step] = numbers

    def settings(self, settings: dict[str, str | int | float | bool]) -> None:
        raise AssertionError

    def flush(self) -> None:
        self.flushed += 1

    def close(self) -> None:
        self.closed += 1


def test_a_tracker_is_handed_the_numbers_of_each_step_before_a_checkpoint_counts_it(tmp_path: Path) -> None:
    with Told() as told:
        solution = solved(callback=told, checkpoint=tmp_path / "run.pt", checkpoint_every=1)
    assert [told.steps[k]["value"] for k in range(4)] == [record.value for record in solution.history]
    assert sum(told.steps[k].get("calls/hvps", 0) for k in range(4)) == solution.stats.hvps
    assert told.flushed >= 3 and told.closed == 1


def test_a_trial_point_that_was_rejected_is_not_told() -> None:
    told = Told()
    record = solved().history[1]
    told(Record(**{**vars(record), "rejected": True}), solved().estimate)
    assert not told.steps


def test_several_callbacks_are_all_told_and_each_may_end_the_run(tmp_path: Path) -> None:
    told = Told()
    several = Several(lambda record, _: record.step == 1, told)
    solution = solved(callback=several, checkpoint=tmp_path / "run.pt")
    assert len(solution.history) == 2 and sorted(told.steps) == [0, 1] and told.flushed


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # pyright: ignore[reportMissingImports]

    with TensorBoard(tmp_path, settings={"lr": 0.1}) as board:
        solution = solved(callback=board)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    values = [each.value for each in events.Scalars("value")]
    assert values == pytest.approx([record.value for record in solution.history], rel=1e-6)  # float32


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    with MLflow("name", run="first", uri=f"sqlite:///{tmp_path}/runs.db", settings={"lr": 0.1}) as tracker:
        solution = solved(callback=tracker)
    kept = tracker._client.get_metric_history(tracker.run_id, "value")
    assert [each.value for each in kept] == [record.value for record in solution.history]
    run = tracker._client.get_run(tracker.run_id)
    assert run.data.params == {"lr": "0.1"} and run.info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_writes_a_run_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    with WandB("name", mode="offline") as tracker:
        solved(callback=tracker)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


class _Recorded:
    """In the place of a package: every call, with its arguments."""

    def __init__(self, calls: list[Any], name: str = "") -> None:
        self.calls, self.name = calls, name

    def __getattr__(self, name: str) -> Any:
        return _Recorded(self.calls, name)

    def __call__(self, *args: Any, **named: Any) -> Any:
        self.calls.append((self.name, args, named))
        return _Recorded(self.calls)


def test_mlflow_and_wandb_are_told_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    for name in ("mlflow", "mlflow.entities", "mlflow.tracking", "wandb"):
        module: Any = types.ModuleType(name)
        module.__getattr__ = _Recorded(calls).__getattr__
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["mlflow"].entities = sys.modules["mlflow.entities"]  # type: ignore[attr-defined]
    with MLflow(uri="x") as one, WandB(mode="offline") as other:
        solution = solved(callback=Several(one, other))
    metrics = [args for name, args, _ in calls if name == "Metric" and args[0] == "value"]
    assert [(args[1], args[3]) for args in metrics] == [(record.value, record.step) for record in solution.history]
    logs = [(args[0]["value"], named["step"]) for name, args, named in calls if name == "log"]
    assert logs == [(record.value, record.step) for record in solution.history]
    assert [name for name, _, _ in calls][-2:] == ["finish", "set_terminated"]


@pytest.mark.parametrize(("kind", "module"), [(MLflow, "mlflow"), (WandB, "wandb")])
def test_without_its_package_a_tracker_names_it(kind: Any, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="pip install"):
        kind()


# The command


def test_info_says_versions_threads_blas_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    import bilevel

    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["bilevel"] == bilevel.__version__
    assert found["threads"]["of torch"] == torch.get_num_threads() and "cpu" in found["devices"] and found["BLAS"]
    assert main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out
