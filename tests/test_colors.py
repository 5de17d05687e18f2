"""Pictures that people see: colors that are told apart, captions that are whole."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bilevel import Comparison, Row, Stats
from bilevel.portable.colors import COLORS, MARKERS, style


def _linear(color: str) -> list[float]:
    shares = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]


def _without_green(color: str) -> list[float]:
    """What is left of linear light for those without green receptors (Viénot, Brettel, Mollon 1999)."""
    r, g, b = _linear(color)
    mixed = 0.29275 * r + 0.70725 * g
    return [mixed, mixed, -0.02234 * r + 0.02234 * g + b]


def test_colors_differ_for_those_who_do_not_see_green() -> None:
    seen = [_without_green(color) for color in COLORS]
    for i, first in enumerate(seen):
        for second in seen[:i]:
            assert math.dist(first, second) > 0.05
    red, green = _without_green("#c44e52"), _without_green("#55a868")  # the pair that is avoided
    assert math.dist(_without_green(COLORS[1]), _without_green(COLORS[2])) > 0.5 * math.dist(red, green)


def test_no_two_lines_of_a_comparison_look_alike() -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    names = [f"e{k}" for k in range(len(COLORS) * len(MARKERS))]
    assert len({style(k) for k in range(len(names))}) == len(names)
    rows = tuple(Row(name, None, 1e-3, 1e-3, 1.0, stats=Stats(hvps=3)) for name in names[:20])
    figure = figure_module.Figure()
    Comparison(rows, 1.0, "aid-dense").plot(figure)
    lines = figure.axes[0].get_lines()
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines) == 20


def test_the_caption_of_hyper_cleaning_is_inside_of_its_picture() -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from bilevel.problems._plots import draw_cleaning

    figure = figure_module.Figure(figsize=(9.0, 4.6), dpi=110)
    wrong, labels = torch.arange(20) < 5, torch.arange(20) % 10
    metrics = {f"test_accuracy_{name}": 0.9 for name in ("everything", "learned", "oracle")}
    metrics |= {"auc": 1.0, "precision_at_true_count": 1.0}
    draw_cleaning(figure, torch.linspace(0, 1, 20), wrong, metrics, torch.rand(20, 64), labels, labels)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    caption, page = figure._supxlabel.get_window_extent(), figure.bbox
    assert page.y0 <= caption.y0 and caption.y1 <= min(axes.get_window_extent().y0 for axes in figure.axes)
