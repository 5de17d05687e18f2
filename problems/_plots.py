"""Parts of figures that problems share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bilevel._tree import Tree, tree_leaves

COLORS = ("#4c72b0", "#c44e52", "#55a868", "#8c8c8c")


def draw_bars(axes: Any, values: Mapping[str, float], label: str) -> None:
    """Horizontal bars with their values written at the end."""
    names = list(values)
    bars = axes.barh(
        range(len(names)), list(values.values()), color=[COLORS[k % len(COLORS)] for k in range(len(names))]
    )
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set_xlabel(label)


def draw_penalties(figure: Any, x: Tree, metrics: Mapping[str, float], label: str) -> None:
    """The losses in `metrics` beside the learned penalties exp(x)."""
    left, right = figure.subplots(1, 2)
    draw_bars(left, {name: value for name, value in metrics.items() if "loss" in name}, label)
    learned = torch.cat([leaf.detach().reshape(-1) for leaf in tree_leaves(x)]).exp().tolist()
    right.bar(range(len(learned)), learned, color=COLORS[0])
    right.set_yscale("log")
    right.set_xlabel("feature" if len(learned) > 1 else "")
    right.set_ylabel("learned penalty exp(x)")
    figure.tight_layout()
