"""`bilevel run` of few-shot experiments: files, resuming, limits, errors."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bilevel import AID, cli
from bilevel._tree import tree_leaves
from bilevel.experiments.catalogue import experiments
from bilevel.experiments.image_setup import ImageSetting
from bilevel.few_shot import Experiment, mlp, train
from bilevel.problems.meta_learning.kl_products import KLProducts

RUN = ["run", "maml-sinusoid", "--set", "batch=3", "--quiet"]
KEYS = ("step", "value", "grad_norm", "status", "stats")  # of a line of history.jsonl that do not depend on time


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def result(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return content


def small(monkeypatch: pytest.MonkeyPatch, validate_every: int = 3) -> None:
    """Short validations and evaluations in the place of those of the experiments."""
    from bilevel.experiments import on_sinusoids

    original = on_sinusoids._experiment

    def shrunk(*arguments: Any, **keywords: Any) -> Experiment:
        made = original(*arguments, **keywords)
        return dataclasses.replace(
            made,
            validation=dataclasses.replace(made.validating, every=validate_every, episodes=4),
            settings=dataclasses.replace(made.settings, checkpoint_every=4),
            evaluation=dataclasses.replace(made.evaluation, episodes=6),
        )

    monkeypatch.setattr(on_sinusoids, "_experiment", shrunk)


def test_a_run_leaves_its_result_history_model_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    out = tmp_path / "run"
    assert cli.main([*RUN, "--steps", "7", "--seed", "2", "--out", str(out)]) == 0
    names = {file.name for file in out.iterdir()}
    assert names == {"result.json", "config.toml", "history.jsonl", "checkpoint.pt", "best.pt", "model.pt", "plot.png"}
    found = result(out)
    assert found["status"] == "successful"
    assert found["ended"] == "max_steps"
    assert found["steps"] == 7
    assert found["settings"]["set"] == {"batch": "3"}
    assert found["settings"]["seed"] == 2
    assert found["versions"]["torch"] == torch.__version__
    assert found["test"]["metric"] == "mse"
    assert found["test"]["episodes"] == 6
    assert math.isfinite(found["test"]["score"]["interval"])
    assert sorted(map(int, found["test"]["curve"])) == [0, 1, 5, 10]
    assert found["stats"]["gradients"] > 0
    assert found["seconds"] > found["training_seconds"] > 0
    assert [line["step"] for line in lines(out)] == list(range(8))
    assert [line["step"] for line in lines(out) if line["validation"]] == [0, 3, 6, 7]
    scores = {line["step"]: line["validation"]["score"] for line in lines(out) if line["validation"]}
    assert found["step"] == min(scores, key=lambda step: scores[step])
    assert found["validation"]["score"] == min(scores.values())
    mlp().load_state_dict(torch.load(out / "model.pt", weights_only=True))


def test_the_command_line_is_the_same_run_as_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    assert cli.main([*RUN, "--steps", "5", "--seed", "1", "--step", "0.01", "--out", str(tmp_path / "run")]) == 0
    from bilevel.solvers import Adam

    experiment = experiments()["maml-sinusoid"].build(batch=3, seed=1)
    settings = dataclasses.replace(experiment.settings, max_steps=5, outer=Adam(0.01))
    trained = dataclasses.replace(experiment, settings=settings).train(1)
    assert [line["value"] for line in lines(tmp_path / "run")] == [record.value for record in trained.history]
    found = experiment.evaluate(trained.x, 1)
    assert result(tmp_path / "run")["test"]["score"]["mean"] == found.score.mean


def test_an_interrupted_run_resumes_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small(monkeypatch)
    assert cli.main([*RUN, "--steps", "9", "--out", str(tmp_path / "whole")]) == 0
    from bilevel.commands import few_shot

    original = few_shot._line

    def interrupted(progress: Any) -> Any:
        if progress.record.step == 5:
            raise KeyboardInterrupt
        return original(progress)

    with monkeypatch.context() as context:
        context.setattr(few_shot, "_line", interrupted)
        assert cli.main([*RUN, "--steps", "9", "--out", str(tmp_path / "parts")]) == 130
    assert "--resume" in capsys.readouterr().err
    halfway = result(tmp_path / "parts")
    assert halfway["status"] == "interrupted"
    assert halfway["test"] is None
    again = ["run", "maml-sinusoid", "--quiet", "--out", str(tmp_path / "parts"), "--resume"]
    assert cli.main(again) == 0
    whole, parts = result(tmp_path / "whole"), result(tmp_path / "parts")
    for key in ("test", "validation"):
        for content in (whole, parts):
            content[key] = {name: value for name, value in content[key].items() if "seconds" not in name}
        assert parts[key] == whole[key]
    assert parts["stats"] == whole["stats"]
    assert [[line[key] for key in KEYS] for line in lines(tmp_path / "parts")] == [
        [line[key] for key in KEYS] for line in lines(tmp_path / "whole")
    ]
    models = [torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("whole", "parts")]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


def test_a_resumed_run_may_take_more_steps_but_is_otherwise_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small(monkeypatch)
    out = str(tmp_path / "run")
    assert cli.main([*RUN, "--steps", "2", "--out", out]) == 0
    resume = ["run", "maml-sinusoid", "--quiet", "--out", out, "--resume"]
    assert cli.main([*resume, "--set", "batch=4"]) == 2
    assert "batch=4 (it was 3)" in capsys.readouterr().err
    assert cli.main([*resume, "--steps", "5"]) == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(6))
    assert result(tmp_path / "run")["settings"]["steps"] == 5


def test_a_time_limit_leaves_time_for_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, validate_every=10**6)
    out = tmp_path / "run"
    assert cli.main([*RUN, "--steps", "1000000", "--seconds", "2.5", "--out", str(out)]) == 0
    found = result(out)
    assert found["ended"] == "seconds"
    assert 0 < found["training_seconds"] < 2.5 or found["steps"] == 0
    assert found["test"]["episodes"] == 6


def test_digits_need_no_file_and_report_accuracy_and_calibration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    out = tmp_path / "run"
    settings = ["--set", "filters=2", "--set", "batch=1", "--set", "test_queries=2", "--steps", "1"]
    assert cli.main(["run", "protonet-digits", *settings, "--out", str(out)]) == 0
    found = result(out)
    assert found["test"]["metric"] == "accuracy"
    assert 0 <= found["test"]["score"]["mean"] <= 1
    assert 0 <= found["calibration"]["ECE"] <= found["calibration"]["MCE"] <= 1
    printed = capsys.readouterr()
    assert "test accuracy" in printed.out
    assert "validation accuracy" in printed.err
    assert "s/step" in printed.err


def test_omniglot_without_its_file_says_how_to_get_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "maml-omniglot", "--out", str(tmp_path / "run")]) == 2
    complaint = capsys.readouterr().err
    assert "bilevel data omniglot" in complaint
    assert "--set data=" in complaint
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--tol", "1e-3"], "does not apply"),
        (["--set", "shot=3"], "has no argument 'shot'"),
        (["--set", "shots=many"], "must be an integer"),
        (["--estimator", "aid"], "no estimator 'aid'"),
        (["--estimator", "aid-cg"], "ITD"),
        (["--outer", "scipy-minimize", "--step", "1"], "runs its own loop"),
        (["--outer", "gradient-descent"], "needs a step length"),
        (["--seconds", "-1"], "positive"),
    ],
)
def test_senseless_wishes_are_refused_before_anything_is_written(
    arguments: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main([*RUN, "--steps", "1", *arguments, "--out", str(tmp_path / "run")])
    assert code == 2
    assert re.search(text, capsys.readouterr().err)
    assert not list(tmp_path.glob("run/*"))


def test_other_problems_take_no_time_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "quadratic", "--seconds", "3", "--out", str(tmp_path / "run")]) == 2
    assert "few-shot experiments" in capsys.readouterr().err


def test_an_occupied_folder_is_kept_unless_it_is_to_be_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small(monkeypatch)
    out = str(tmp_path / "run")
    assert cli.main([*RUN, "--steps", "1", "--out", out]) == 0
    assert cli.main([*RUN, "--steps", "2", "--out", out]) == 2
    assert "holds a run" in capsys.readouterr().err
    assert cli.main([*RUN, "--steps", "2", "--out", out, "--overwrite"]) == 0
    assert result(tmp_path / "run")["steps"] == 2
    assert not (tmp_path / "run" / ".replaced").exists()


def test_training_that_meets_nan_fails_and_evaluates_the_best_x(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small(monkeypatch, validate_every=1)
    out = tmp_path / "run"
    wish = ["--outer", "gradient-descent", "--step", "1e200", "--steps", "9"]
    assert cli.main([*RUN, *wish, "--out", str(out)]) == 1
    assert "NaN" in capsys.readouterr().err
    found = result(out)
    assert found["status"] == "nonfinite"
    assert found["ended"] == "failed"
    assert math.isfinite(found["test"]["score"]["mean"])
    assert sum(found["failed"].values()) >= 1


def test_every_experiment_is_listed_and_the_sinusoids_and_digits_can_be_built(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["few-shot experiments"]
    assert listed.keys() == experiments().keys()
    for method in ("protonet", "maml", "anil", "imaml", "ibaml", "ridge", "svm"):
        assert f"{method}-omniglot" in listed
        made = experiments()[f"{method}-digits"].build(ImageSetting(filters=2))
        assert made.learner.problem.tasks
    for name in ("maml", "fomaml", "anil", "imaml", "ibaml"):
        made = experiments()[f"{name}-sinusoid"].build(shots=3)
        assert made.tasks.sample(2, 0)["support_x"].shape == (2, 3, 1)


@pytest.mark.parametrize("name", ["anil-sinusoid", "imaml-sinusoid", "ibaml-sinusoid", "anil-digits", "ridge-digits"])
def test_an_experiment_learns_something(name: str) -> None:
    made = experiments()[name].build()
    trained = train(made.learner, made.tasks, max_steps=8, batch=4, outer=made.settings.outer, seed=1)
    values = [record.value for record in trained.history]
    assert all(math.isfinite(value) for value in values)
    assert not torch.equal(*(tree_leaves(x)[0] for x in (trained.x, made.learner.x0)))


def test_an_experiment_can_be_checked_and_compared(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["check", "maml-sinusoid", "--set", "batch=2", "--json"])
    verdicts = json.loads(capsys.readouterr().out)
    assert verdicts


OWN = """
from torch.nn.functional import mse_loss
from bilevel.few_shot import Evaluating, Experiment, Training, Validating, mlp
from bilevel.problems import maml
from bilevel.tasks import Sinusoid

def tuned(shots: int = 5, seed: int = 0) -> Experiment:
    tasks = Sinusoid(shots=shots)
    validation, settings = Validating(tasks, episodes=4), Training(max_steps=2, batch=3)
    learner = maml(mlp((1, 8, 1), seed=seed), mse_loss)
    return Experiment(learner, tasks, validation, tasks, settings=settings, evaluation=Evaluating(episodes=4))

fixed = tuned()

def silent():
    return fixed

def wrong() -> "Experiment":
    return 3
"""


def test_an_experiment_in_a_file_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(OWN)
    words = ["run", "mine.py:tuned", "--set", "shots=4", "--seed", "3", "--quiet", "--out", "a"]
    assert cli.main(words) == 0
    recorded = json.loads((tmp_path / "a/result.json").read_text())
    assert recorded["steps"] == 2
    assert "Sinusoid(shots=4" in recorded["settings"]["chosen"]["tasks"]
    assert recorded["test"]["episodes"] == 4
    assert cli.main([*words, "--steps", "3", "--resume"]) == 0
    assert json.loads((tmp_path / "a/result.json").read_text())["steps"] == 3
    assert cli.main(["run", "mine.py:fixed", "--quiet", "--out", "b"]) == 0
    capsys.readouterr()
    cli.main(["check", "mine.py:tuned", "--json"])  # of the bilevel problem of one batch
    assert json.loads(capsys.readouterr().out)
    for word, message in (
        ("fixed --set shots=4", "is not a function: it takes no `--set`"),
        ("silent", "or is annotated to return an Experiment. Got Experiment."),
        ("wrong", "must return an Experiment, as it says. Got int."),
    ):
        assert cli.main(["run", *f"mine.py:{word}".split(), "--quiet", "--out", "c"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("full", [False, True])
def test_the_weight_of_the_divergence_may_be_another_at_test_time(full: bool) -> None:
    build = experiments()["ibaml-digits"].build
    made = build(ImageSetting(filters=2), full=full, kl_weight=0.1, test_kl_weight=0.2)
    for learner, weight in ((made.learner, 0.1), (made.tester, 0.2)):
        assert learner is not None
        assert isinstance(learner.estimator, AID)
        assert isinstance(learner.estimator.products, KLProducts)
        assert learner.estimator.products.weight == weight
    assert build(ImageSetting(filters=2), full=full).tester is None
