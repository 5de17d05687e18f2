"""The path of a lasso, its criteria, and where a search along hypergradients goes.

`python docs/examples/lasso_figure.py` writes docs/images/lasso.png.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

from bilevel import minimize, solution_path
from bilevel.problems import highest_penalty, lasso
from bilevel.problems._sparse import generated

CRITERIA = {"held-out": "#0072b2", "cross-validation": "#009e73", "sure": "#cc79a7"}


def main(path: Path) -> None:
    """Draw it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: `pip install 'bilevel[plot]'`") from error
    data = generated(150, 100, 10, 0.5, 5.0, 0)
    top = float(highest_penalty(data.train).log())
    grid = [torch.tensor(top - math.log(1e3) * k / 29, dtype=torch.float64) for k in range(30)]
    figure = Figure(figsize=(10, 3.6))
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    over = [float(x) for x in grid]
    for name, color in CRITERIA.items():
        instance = lasso(criterion=name)
        samples = instance.settings.get("data")
        values = solution_path(instance.problem, grid, instance.y0, data=samples)
        right.plot(over, values.values, color=color, label=name)
        settings = {**instance.settings, "max_steps": 8}
        seen: list[tuple[float, float]] = []

        def callback(_: object, estimate: object, seen: list[tuple[float, float]] = seen) -> None:
            seen.append((float(estimate.x), estimate.value))  # type: ignore[attr-defined]

        minimize(instance.problem, instance.x0, instance.y0, throw=False, callback=callback, **settings)
        right.plot(*zip(*seen, strict=True), "o", color=color, markersize=4)
        if name == "held-out":
            entries = torch.stack(list(values.y))
            for j in entries.abs().amax(0).topk(20).indices.tolist():
                left.plot(over, entries[:, j].tolist(), linewidth=1)
    left.set_xlabel("log penalty")
    left.set_ylabel("coefficients")
    right.set_yscale("log")
    right.set_xlabel("log penalty")
    right.set_ylabel("criterion (dots: the first 9 estimates)")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images/lasso.png"))
