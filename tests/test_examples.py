"""The examples of the documentation, at reduced size."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "certificate_figure.py"

pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="an installed package comes without its documentation")


def test_the_certificate_figure_shows_bounds_that_hold_and_fall(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("certificate_figure", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    drawn = example.draw(tmp_path / "images" / "certificate.png", [8, 16])
    assert (tmp_path / "images" / "certificate.png").read_bytes().startswith(b"\x89PNG")
    assert len(drawn) == 2
    curves: Any = {}
    for curves in drawn.values():
        (_, error), (_, plain), (_, refined) = (curves[name] for name in example.NAMES)
        assert all(e <= r <= p for e, r, p in zip(error, refined, plain, strict=True))
        for falling in (error, plain, refined):
            assert falling[1] < 0.1 * falling[0]
    costs = [curves[name][0][-1] for name in example.NAMES]
    assert costs[0] < costs[1] < costs[2]


def test_the_certificate_figure_is_small() -> None:
    assert (ROOT / "docs" / "images" / "certificate.png").stat().st_size < 150_000
