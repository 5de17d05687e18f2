"""Whether predicted probabilities are the frequencies with which predictions are right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import SIZE
from bilevel.arguments.shapes import Shape
from bilevel.few_shot.evaluate import Evaluation


@final
@dataclass(frozen=True, eq=False)
class Calibration:
    """How predictions of classes compare with what was true.

    With confidence c = max_k p_k, bins of equal width over [0, 1], and in bin b the number of predictions n_b, their
    accuracy acc_b and mean confidence conf_b,

        ECE = sum_b (n_b / n) |acc_b - conf_b|,    MCE = max over bins that are not empty of |acc_b - conf_b|.

    Both are biased upwards by chance: |acc_b - conf_b| is about sqrt(c (1 - c) / n_b) where predictions are perfectly
    calibrated, so that few predictions or many bins look bad, MCE most.

    Attributes:
        nll: the mean of -log p of the true class.
        accuracy: how often the likeliest class is the true one.
        ece: the expected calibration error.
        mce: the largest calibration error of a bin.
        edges: of the bins `(bins + 1,)`; a bin holds its upper end and not its lower one.
        counts: predictions in each bin `(bins,)`.
        accuracies: of each bin; NaN where it is empty.
        confidences: the mean in each bin; NaN where it is empty.
    """

    nll: float
    accuracy: float
    ece: float
    mce: float
    edges: Tensor
    counts: Tensor
    accuracies: Tensor
    confidences: Tensor

    def __post_init__(self) -> None:
        demand_types(self)

    def __str__(self) -> str:
        return f"NLL {self.nll:.4g}, accuracy {self.accuracy:.4g}, ECE {self.ece:.3g}, MCE {self.mce:.3g}"

    def plot(self, axes: Any) -> None:
        """Draw the reliability diagram on matplotlib axes: accuracy against confidence, and how many there are.

        Bars below the diagonal are of predictions more confident than right. A bin's share of the predictions is its
        bar's darkness.

        Args:
            axes: of a figure of matplotlib, `pip install "bilevel[plots]"`.
        """
        if not callable(getattr(axes, "bar", None)):
            raise TypeError(f"`Calibration.plot(axes=...)` must be axes of matplotlib. Got {type(axes).__name__}.")
        width = float(self.edges[1] - self.edges[0])
        most = int(self.counts.max())
        for left, count, accuracy, confidence in zip(
            self.edges[:-1].tolist(),
            self.counts.tolist(),
            self.accuracies.tolist(),
            self.confidences.tolist(),
            strict=True,
        ):
            if count:
                shade = 0.15 + 0.75 * count / most
                axes.bar(left, accuracy, width, align="edge", color="C0", alpha=shade, edgecolor="C0")
                axes.plot([confidence, confidence], [accuracy, confidence], color="C3", lw=1.5)
        axes.plot([0, 1], [0, 1], color="0.4", lw=1, ls="--")
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
        axes.text(0.03, 0.97, f"ECE {self.ece:.3f}\nMCE {self.mce:.3f}", va="top", transform=axes.transAxes)


@checked(log_probabilities=Shape("n classes", finite=False), targets=Shape("n", "integer"), bins=SIZE)
def calibration(log_probabilities: Tensor, targets: Tensor, *, bins: int = 15) -> Calibration:
    """The calibration of predictions; all queries of all test tasks belong into one call.

    Cost: one pass over the predictions.

    Source: Guo, Pleiss, Sun, Weinberger, "On calibration of modern neural networks", ICML 2017.

    Args:
        log_probabilities: `(n, classes)`, such as `Evaluation.log_probabilities`.
        targets: the true classes `(n,)`.
        bins: of equal width over [0, 1].

    Raises:
        ValueError: if there are no bins or no predictions, shapes do not match, or rows are no log-probabilities.

    Example:
        >>> found = calibration(torch.tensor([[0.9, 0.1], [0.9, 0.1]]).log(), torch.tensor([0, 1]))
        >>> round(found.ece, 3), found.accuracy
        (0.4, 0.5)
    """
    if not bool(((targets >= 0) & (targets < log_probabilities.shape[1])).all()):
        raise ValueError(
            f"`calibration(targets=...)` must be numbers of classes, from 0 to {log_probabilities.shape[1] - 1}."
            f" Got {int(targets.min())} to {int(targets.max())}."
        )
    logs = log_probabilities.detach().double()
    total = logs.exp().sum(-1)
    if not bool((total - 1).abs().max() <= 1e-3):
        raise ValueError(
            f"`calibration(log_probabilities=...)` must be logarithms: each row's exponentials sum to 1. Got sums from"
            f" {float(total.min()):.4g} to {float(total.max()):.4g}. Apply `log_softmax(logits, dim=-1)` first."
        )
    best, predicted = logs.max(-1)
    confidence, right = best.exp().clamp(max=1.0), (predicted == targets).double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    counts = torch.bincount(index, minlength=bins)
    accuracies, confidences = (torch.bincount(index, part, minlength=bins) / counts for part in (right, confidence))
    gaps = (accuracies - confidences).abs()[counts > 0]
    return Calibration(
        nll=float(-logs.gather(-1, targets.unsqueeze(-1)).mean()),
        accuracy=float(right.mean()),
        ece=float((gaps * counts[counts > 0]).sum() / len(targets)),
        mce=float(gaps.max()),
        edges=torch.linspace(0, 1, bins + 1, dtype=torch.float64, device="cpu"),
        counts=counts,
        accuracies=accuracies,
        confidences=confidences,
    )


@checked(bins=SIZE)
def calibration_of(evaluation: Evaluation, *, bins: int = 15) -> Calibration:
    """The calibration of what `evaluate` predicted, all its episodes together.

    Raises:
        ValueError: if it was a regression.
    """
    if evaluation.log_probabilities is None or evaluation.targets is None:
        raise ValueError("`calibration_of` needs an evaluation of classes. Got one of a regression.")
    return calibration(evaluation.log_probabilities, evaluation.targets, bins=bins)


@checked()
def draw_reliability(found: Mapping[str, Calibration], path: str | Path) -> None:
    """Write reliability diagrams of several methods, side by side by name, as a picture.

    Raises:
        ImportError: without matplotlib, `pip install "bilevel[plots]"`.
        ValueError: if there is none.
    """
    if not found:
        raise ValueError("`draw_reliability(found=...)` must hold at least one calibration. Got none.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'drawing {path} needs matplotlib: `pip install "bilevel[plots]"`.') from error
    figure = Figure(figsize=(3.2 * len(found), 3.2), dpi=100, layout="constrained")
    row = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (name, each) in zip(row, found.items(), strict=True):
        each.plot(axes)
        axes.set_title(name)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
