"""Paths and criteria of sparse models: elastic net, group lasso, sparse logistic regression, support vector machine.

`python docs/examples/criteria_figure.py` writes docs/images/criteria.png.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel import Instance, minimize, solution_path
from bilevel.problems import elastic_net, group_lasso, sparse_logistic, svm
from bilevel.solvers import FISTA

COLORS = {"held-out": "#0072b2", "cross-validation": "#009e73", "sure": "#cc79a7"}
MODELS: dict[str, tuple[Callable[..., Instance], tuple[str, ...], dict[str, Any]]] = {
    "elastic net, both penalties along a line": (elastic_net, ("held-out", "cross-validation", "sure"), {"d": 60}),
    "group lasso": (group_lasso, ("held-out", "cross-validation", "sure"), {}),
    "sparse logistic regression": (sparse_logistic, ("held-out", "cross-validation"), {}),
    "support vector machine": (svm, ("held-out", "cross-validation"), {}),
}
POINTS, BELOW, ABOVE = 16, 4.5, 2.0  # of the grid, and how far it goes from the start of log x, down and up


def path(instance: Instance, grid: list[Tensor]) -> Any:
    """Solutions and criteria along the grid."""
    inner = {"inner": FISTA(tol=1e-6, max_steps=20_000)} if "group" in instance.description else {}
    samples = instance.settings.get("data")
    return solution_path(instance.problem, grid, instance.y0, data=samples, throw=False, **inner)


def main(target: Path) -> None:
    """Draw it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: `pip install 'bilevel[plot]'`") from error
    figure = Figure(figsize=(13, 5.4))
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(MODELS))
    for column, (title, (build, criteria, arguments)) in enumerate(MODELS.items()):
        top, bottom = axes[0][column], axes[1][column]
        for criterion in criteria:
            instance = build(criterion=criterion, **arguments)
            ends = (-BELOW, ABOVE) if instance.x0.dim() else (-BELOW, BELOW)
            shifts = torch.linspace(ends[1], ends[0], POINTS, dtype=torch.float64)
            found = path(instance, [instance.x0 + shift for shift in shifts])
            over = [float((instance.x0 + shift).reshape(-1)[0]) for shift in shifts]
            bottom.plot(over, found.values, color=COLORS[criterion], label=criterion)
            ended = minimize(instance.problem, instance.x0, instance.y0, throw=False, **instance.settings)
            best = float(ended.best.x.reshape(-1)[0])
            bottom.plot([best], [ended.best.value], "o", color=COLORS[criterion], markersize=5)
            if criterion == "held-out":
                entries = torch.stack(list(found.y))
                for j in entries.abs().amax(0).topk(min(20, entries.shape[1])).indices.tolist():
                    top.plot(over, entries[:, j].tolist(), linewidth=1)
        top.set_title(title, fontsize=10)
        bottom.set_xlabel("log x" if title == "support vector machine" else "log penalty")
        bottom.set_yscale("log")
        bottom.legend(fontsize=8)
    axes[0][0].set_ylabel("y, the 20 largest entries")
    axes[1][0].set_ylabel("criterion (dots: where a search ends)")
    figure.tight_layout()
    figure.savefig(target, dpi=90)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images/criteria.png"))
