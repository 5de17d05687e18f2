"""The picture of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

_SMOOTH = 50  # the running mean of the loss is over a share of the steps


def draw_training(
    file: BinaryIO,
    lines: Sequence[Mapping[str, Any]],
    test: Mapping[str, Any] | None,
    paths: Mapping[str, Any] | None = None,
) -> None:
    """The outer loss and the validation score against seconds, and paths where there are any.

    Args:
        file: where to.
        lines: those of history.jsonl.
        test: the final evaluation, as in result.json.
        paths: as there.

    Raises:
        ImportError: if matplotlib is missing, naming the extra to install.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing plot.png needs matplotlib: `pip install "bilevel[plots]"`.') from error
    figure = Figure(figsize=(9.0 if paths is None else 13.0, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    seconds = [line["elapsed"] for line in lines]
    losses = [float(line["value"]) for line in lines]  # "NaN" where there was none
    left, right, *more = figure.subplots(1, 2 if paths is None else 3)
    left.plot(seconds, losses, color="#0072b2", alpha=0.3 if len(losses) > _SMOOTH else 1.0, linewidth=0.8)
    if len(losses) > _SMOOTH:
        left.plot(seconds, _running_mean(losses, max(len(losses) // _SMOOTH, 5)), color="#0072b2")
    left.set_title("outer loss on training tasks", loc="left")
    validations = [line["validation"] for line in lines if line.get("validation")]
    metric = validations[0]["metric"] if validations else "score"
    if validations:
        at = [validation["seconds"] for validation in validations]
        scores = [float(validation["score"]) for validation in validations]
        errors = [float(validation["interval"]) for validation in validations]
        right.errorbar(at, scores, errors, color="#d55e00", marker=".", linewidth=1, label="validation")
        if metric == "return":
            before = [float(validation["before"]) for validation in validations]
            right.plot(at, before, color="#cc79a7", marker=".", linewidth=1, linestyle="--", label="before adaptation")
    if test is not None:
        mean, interval = float(test["score"]["mean"]), float(test["score"]["interval"])
        right.axhline(mean, color="#009e73", linewidth=1, label=f"test {mean:.4g} +- {interval:.2g}")
        right.axhspan(mean - interval, mean + interval, color="#009e73", alpha=0.2, linewidth=0)
    if validations or test is not None:
        right.legend(frameon=False)
    right.set_title(f"{metric} on new tasks after adaptation", loc="left")
    for axes in (left, right):
        axes.set_xlabel("seconds")
        axes.grid(alpha=0.3)
    if paths is not None:
        _draw_paths(more[0], paths)
    figure.savefig(file, format="png")


def _draw_paths(axes: Any, paths: Mapping[str, Any]) -> None:
    """A path before and one after adaptation in each task, and its goal."""
    colors = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7")
    for k, (goal, before, after) in enumerate(zip(paths["goals"], paths["before"], paths["after"], strict=True)):
        color = colors[k % len(colors)]
        axes.plot(*zip(*before, strict=True), color="#999999", linewidth=0.8, label=None if k else "before adaptation")
        axes.plot(*zip(*after, strict=True), color=color, linewidth=1.4, label=None if k else "after")
        axes.plot(*goal, color=color, marker="*", markersize=11, linestyle="none", label=None if k else "goal")
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_title("paths in test tasks", loc="left")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of the last `width` values at each."""
    return [sum(values[max(0, k + 1 - width) : k + 1]) / min(k + 1, width) for k in range(len(values))]
