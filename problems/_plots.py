"""Parts of figures that problems share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel._tree import Tree, tree_leaves
from bilevel.portable.colors import COLORS as COLORS


def draw_bars(axes: Any, values: Mapping[str, float], label: str, colors: int = 3) -> None:
    """Horizontal bars with their values written at the end, in so many alternating colors."""
    names = list(values)
    bars = axes.barh(range(len(names)), list(values.values()), color=[COLORS[k % colors] for k in range(len(names))])
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set_xlabel(label)


def draw_penalties(figure: Any, x: Tree, metrics: Mapping[str, float], label: str) -> None:
    """The losses in `metrics` beside the learned penalties exp(x)."""
    left, right = figure.subplots(1, 2)
    draw_bars(left, {name: value for name, value in metrics.items() if "loss" in name}, label, 2)
    learned = torch.cat([leaf.detach().reshape(-1) for leaf in tree_leaves(x)]).exp().tolist()
    right.bar(range(len(learned)), learned, color=COLORS[0])
    right.set_yscale("log")
    right.set_xlabel("feature" if len(learned) > 1 else "")
    right.set_ylabel("learned penalty exp(x)")
    figure.tight_layout()


def draw_cleaning(
    figure: Any,
    weights: Tensor,
    wrong: Tensor,
    metrics: Mapping[str, float],
    inputs: Tensor,
    labels: Tensor,
    truth: Tensor,
    names: Mapping[str, str] | None = None,
) -> None:
    """The learned weights of clean and of corrupted samples, the accuracies, and the most suspicious samples.

    Args:
        figure: a matplotlib figure.
        weights: sigmoid(x): `(n,)`.
        wrong: which labels were corrupted.
        metrics: with `auc`, `precision_at_true_count` and `test_accuracy_...`.
        inputs: the samples before scaling, shown as pictures if their number of features is a square.
        labels: the labels that were trained on.
        truth: those before the corruption.
        names: which accuracies are shown, and how they are called; None: everything, learned, oracle.
    """
    figure.set_layout_engine("constrained")
    side = math.isqrt(inputs.shape[1])
    pictures = side >= 4 and side * side == inputs.shape[1]
    grid = figure.add_gridspec(2 if pictures else 1, 2, height_ratios=(3, 1) if pictures else (1,))
    left, right = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    bins = [k / 30 for k in range(31)]
    left.hist(weights[~wrong].tolist(), bins, alpha=0.75, color=COLORS[0], label=f"clean ({int((~wrong).sum())})")
    left.hist(weights[wrong].tolist(), bins, alpha=0.75, color=COLORS[1], label=f"corrupted ({int(wrong.sum())})")
    left.set_xlabel("learned weight")
    left.set_ylabel("training samples")
    left.set_title(f"AUC {metrics['auc']:.3f}, precision {metrics['precision_at_true_count']:.3f}")
    left.legend()
    if names is None:
        names = {"everything": "everything", "learned": "learned weights", "oracle": "clean only (oracle)"}
    draw_bars(right, {label: metrics[f"test_accuracy_{name}"] for name, label in names.items()}, "test accuracy")
    right.set_xlim(0, 1.15)
    if pictures:
        row = grid[1, :].subgridspec(1, 10)
        for k, index in enumerate(weights.argsort()[:10].tolist()):
            axes = figure.add_subplot(row[0, k])
            axes.imshow(inputs[index].reshape(side, side).tolist(), cmap="gray_r")
            axes.set_xticks([])
            axes.set_yticks([])
            given, true = int(labels[index]), int(truth[index])
            axes.set_title(
                f"{given} → {true}" if given != true else f"{given}", fontsize=9, color=COLORS[given != true]
            )
    if pictures:
        figure.supxlabel("The samples with the least weight (label given → true label)", fontsize=10)
