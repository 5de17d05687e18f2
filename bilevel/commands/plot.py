"""The picture of a run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, BinaryIO

from bilevel._instance import Instance
from bilevel._tree import Tree
from bilevel.outer.solution import Record

_WIDTH, _DPI = 9.0, 110


def draw(file: BinaryIO, instance: Instance, x: Tree, y: Tree, history: Sequence[Record]) -> None:
    """Phi and |h| against steps and seconds; above them the problem's own picture, if it has one.

    Each is drawn on a figure of its own, so that a problem may do with its figure what it likes.

    Raises:
        ImportError: if matplotlib is missing, naming the extra to install.
    """
    try:
        import numpy as np
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.image import imsave
    except ImportError as error:
        raise ImportError('drawing plot.png needs matplotlib: `pip install "bilevel[plots]"`.') from error
    figures = [Figure(figsize=(_WIDTH, 3.4), dpi=_DPI, layout="constrained")]
    _curves(figures[0], history)
    if instance.plot is not None:
        figures.insert(0, Figure(figsize=(_WIDTH, 4.6), dpi=_DPI))
        instance.plot(figures[0], x, y)
    pictures = []
    for figure in figures:
        canvas: Any = FigureCanvasAgg(figure)
        canvas.draw()
        pictures.append(np.asarray(canvas.buffer_rgba()))
    width = max(picture.shape[1] for picture in pictures)
    padded = [
        np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)), constant_values=255) for picture in pictures
    ]
    imsave(file, np.ascontiguousarray(np.vstack(padded)), format="png", dpi=_DPI)


def _curves(figure: Any, history: Sequence[Record]) -> None:
    steps = [record.step for record in history]
    seconds = list(itertools.accumulate(record.seconds for record in history))
    curves = {"Phi": [record.value for record in history], "|h|": [record.grad_norm for record in history]}
    for column, (name, values) in enumerate(curves.items()):
        axes = figure.add_subplot(1, 2, column + 1)
        axes.plot(steps, values, color="#0072b2", marker="." if len(steps) < 30 else "")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("outer step")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        if _spans_decades(values):
            axes.set_yscale("log")
        if len(steps) > 1 and seconds[-1] > 0:
            _seconds(axes, steps, seconds)


def _seconds(axes: Any, steps: Sequence[int], seconds: Sequence[float]) -> None:
    """Seconds along the top, at the ticks of the steps below: they do not grow evenly with the steps."""
    top = axes.secondary_xaxis("top")
    count = min(5, len(steps))
    chosen = sorted({round(k * (len(steps) - 1) / (count - 1)) for k in range(count)})
    top.set_xticks([steps[k] for k in chosen], [f"{seconds[k]:.3g} s" for k in chosen])


def _spans_decades(values: Sequence[float]) -> bool:
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > 10 * min(finite)
