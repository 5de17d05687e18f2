"""Calibration of predicted probabilities, against predictions whose calibration is known."""

from __future__ import annotations

import builtins
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from bilevel._result import Stats
from bilevel.few_shot.calibration import Calibration, calibration, calibration_of, draw_reliability
from bilevel.few_shot.evaluate import Evaluation, Score


def drawn(n: int, classes: int = 5, seed: int = 0, sharpness: float = 2.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities, and classes drawn from them."""
    generator = torch.Generator().manual_seed(seed)
    logs = torch.log_softmax(sharpness * torch.randn(n, classes, generator=generator, dtype=torch.float64), -1)
    return logs, torch.multinomial(logs.exp(), 1, generator=generator).squeeze(-1)


@pytest.mark.parametrize("bins", [15, 20])
def test_classes_drawn_from_the_probabilities_are_calibrated(bins: int) -> None:
    logs, targets = drawn(100_000)
    found = calibration(logs, targets, bins=bins)
    assert found.ece < 0.01
    assert found.mce < 0.05
    assert int(found.counts.sum()) == 100_000
    # By chance alone, not less than this.
    assert found.ece > 1e-4


def test_overconfident_predictions_are_not_calibrated() -> None:
    logs, targets = drawn(100_000)
    found = calibration(torch.log_softmax(2 * logs, -1), targets)
    assert found.ece > 0.1
    used = found.counts > 100
    assert bool((found.confidences > found.accuracies)[used].all())


@pytest.mark.parametrize("accuracy", [0.0, 0.3, 0.8, 1.0])
def test_certain_predictions_err_by_how_often_they_are_wrong(accuracy: float) -> None:
    right = int(accuracy * 1000)
    logs = torch.full((1000, 3), -torch.inf)
    logs[:, 1] = 0.0
    targets = torch.tensor([1] * right + [2] * (1000 - right))
    found = calibration(logs, targets)
    assert found.ece == pytest.approx(1 - accuracy, abs=1e-12)
    assert found.mce == pytest.approx(1 - accuracy, abs=1e-12)
    assert found.accuracy == pytest.approx(accuracy)
    assert found.counts.tolist() == [0] * 14 + [1000]
    assert found.nll == (0 if accuracy == 1 else math.inf)


def test_errors_are_those_of_a_table_worked_out_by_hand() -> None:
    confidences = torch.tensor([0.55, 0.55, 0.65, 0.85, 0.95, 0.95])
    correct = [True, False, True, True, True, True]
    logs = torch.stack([confidences, 1 - confidences], -1).log()
    targets = torch.tensor([0 if right else 1 for right in correct])
    found = calibration(logs, targets, bins=10)
    assert found.counts.tolist() == [0, 0, 0, 0, 0, 2, 1, 0, 1, 2]
    assert found.accuracies[[5, 6, 8, 9]].tolist() == [0.5, 1, 1, 1]
    gaps = [0.05, 0.35, 0.15, 0.05]
    assert found.mce == pytest.approx(0.35)
    assert found.ece == pytest.approx(sum(n * gap for n, gap in zip([2, 1, 1, 2], gaps, strict=True)) / 6)
    assert bool(found.accuracies[:5].isnan().all() & found.confidences[:5].isnan().all())
    one = calibration(logs, targets, bins=1)
    assert one.ece == one.mce == pytest.approx(abs(5 / 6 - float(confidences.mean())))


def test_bins_hold_their_upper_ends() -> None:
    logs = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log()
    assert calibration(logs, torch.tensor([0, 0]), bins=4).counts.tolist() == [0, 1, 1, 0]


def test_the_log_loss_is_that_of_torch_and_the_accuracy_counts() -> None:
    logs, targets = drawn(500)
    found = calibration(logs, targets)
    assert found.nll == pytest.approx(float(nll_loss(logs, targets)), rel=1e-12)
    assert found.accuracy == pytest.approx(float((logs.argmax(-1) == targets).double().mean()), rel=1e-12)
    assert calibration(logs.float(), targets).ece == pytest.approx(found.ece, abs=1e-6)


def test_the_expected_error_is_at_most_the_largest() -> None:
    for seed in range(20):
        logs, targets = drawn(200, seed=seed)
        found = calibration(logs, targets.roll(1))
        assert 0 <= found.ece <= found.mce <= 1


def evaluation(logs: Tensor | None, targets: Tensor | None) -> Evaluation:
    score = Score(0.0, 0.0)
    scores = torch.zeros(1)
    return Evaluation("accuracy", 1, score, score, score, {}, {}, Stats(), 0.0, scores, logs, targets)


def test_an_evaluation_is_calibrated_over_all_its_queries() -> None:
    logs, targets = drawn(300)
    found = calibration_of(evaluation(logs, targets), bins=20)
    assert found.ece == calibration(logs, targets, bins=20).ece
    assert len(found.counts) == 20
    with pytest.raises(ValueError, match="of a regression"):
        calibration_of(evaluation(None, None))


@pytest.mark.parametrize(
    ("logs", "targets", "bins", "message"),
    [
        (torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64), 0, "bins"),
        (torch.zeros(2, 1), torch.zeros(3, dtype=torch.int64), 5, r"targets=...\)` must be of shape \(n,\) = \(2,\)"),
        (torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64), 5, r"must be of shape \(n, classes\)"),
        (torch.zeros(2, 3, 1), torch.zeros(2, dtype=torch.int64), 5, r"must be of shape \(n, classes\)"),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), 5, "log_softmax"),
        (torch.full((2, 3), torch.nan), torch.zeros(2, dtype=torch.int64), 5, "log_softmax"),
    ],
)
def test_what_is_no_prediction_is_refused(logs: Tensor, targets: Tensor, bins: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration(logs, targets, bins=bins)


def overconfident() -> Calibration:
    logs, targets = drawn(2000)
    return calibration(torch.log_softmax(2 * logs, -1), targets, bins=10)


def test_a_reliability_diagram_shows_the_accuracy_of_every_bin() -> None:
    figures = pytest.importorskip("matplotlib.figure")
    found = overconfident()
    axes = figures.Figure().subplots()
    found.plot(axes)
    used = found.counts > 0
    bars = [(bar.get_x(), bar.get_height()) for bar in axes.patches]
    assert [height for _, height in bars] == pytest.approx(found.accuracies[used].tolist())
    assert [left for left, _ in bars] == pytest.approx(found.edges[:-1][used].tolist())
    assert f"{found.ece:.3f}" in axes.texts[0].get_text()
    assert "ECE" in str(found)


def test_diagrams_of_several_methods_are_one_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "reliability.png"
    draw_reliability({"MAML": overconfident(), "iBaML": overconfident()}, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="at least one"):
        draw_reliability({}, path)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any, **keywords: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *rest, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"bilevel\[plots\]"):
        draw_reliability({"MAML": overconfident()}, tmp_path / "reliability.png")
