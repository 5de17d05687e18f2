"""Projections against their characterization: the nearest point, by optimality conditions and by brute force."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from bilevel import Box, Simplex, ravel
from bilevel._sets import AbstractSet, bounds, region

numbers = st.floats(-100, 100, allow_subnormal=False)
vectors = st.lists(numbers, min_size=1, max_size=8).map(lambda entries: torch.tensor(entries))


@given(vectors, st.sampled_from([0.1, 1.0, 30.0]))
def test_simplex_meets_the_optimality_conditions(x: Tensor, total: float) -> None:
    """z = P(x) iff z >= 0, sum z = total, and x_i - z_i is one number t where z_i > 0, at most t elsewhere."""
    z = Simplex(total).project(x)
    rounding = 1e-13 * (float(x.abs().max()) + total)
    assert float(z.min()) >= 0
    assert float(z.sum()) == pytest.approx(total, abs=10 * rounding)
    gap = x - z
    t = float(gap[z > 0].max())
    assert float(gap[z > 0].min()) >= t - 10 * rounding
    assert float(gap.max()) <= t + 10 * rounding


@given(vectors, st.integers(0, 100))
def test_simplex_is_nearer_than_any_other_point(x: Tensor, seed: int) -> None:
    z = Simplex().project(x)
    others = torch.rand(200, x.numel(), generator=torch.Generator().manual_seed(seed)).log().neg()
    others = others / others.sum(1, keepdim=True)
    assert float((others - x).norm(dim=1).min()) >= float((z - x).norm()) - 1e-9


def test_simplex_on_a_grid() -> None:
    x = torch.tensor([0.9, 0.4, -0.3])
    a, b = torch.meshgrid(torch.linspace(0, 1, 401), torch.linspace(0, 1, 401), indexing="ij")
    grid = torch.stack([a, b, 1 - a - b], -1).reshape(-1, 3)
    grid = grid[grid[:, 2] >= 0]
    nearest = grid[(grid - x).norm(dim=1).argmin()]
    assert float((Simplex().project(x) - nearest).abs().max()) <= 1 / 400


@given(vectors)
def test_projections_are_idempotent_and_keep_their_arguments(x: Tensor) -> None:
    for part in (Simplex(2.0), Box(-1.0, 3.0)):
        before = x.clone()
        z = part.project(x)
        assert torch.equal(x, before)
        assert float((part.project(z) - z).abs().max()) <= 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_simplex_of_large_entries(dtype: torch.dtype) -> None:
    """The total is far below the rounding of the entries: the projection goes by their differences."""
    x = torch.tensor([1e12, 1e12, -1e12], dtype=dtype)
    assert Simplex().project(x).tolist() == [0.5, 0.5, 0.0]
    assert Simplex().project(torch.tensor([1e20, 0.0], dtype=dtype)).tolist() == [1.0, 0.0]


def test_simplex_of_nan_is_nan() -> None:
    assert bool(Simplex().project(torch.tensor([math.nan, 1.0])).isnan().any())


@given(vectors, numbers, st.floats(0, 10))
def test_box_clips(x: Tensor, lower: float, width: float) -> None:
    z = Box(lower, lower + width).project(x)
    assert z.tolist() == [min(max(entry, lower), lower + width) for entry in x.tolist()]


def test_box_bounds_entry_by_entry_and_one_sided() -> None:
    x = torch.tensor([-5.0, 0.0, 5.0], dtype=torch.float32)
    assert Box(lower=torch.tensor([[-1.0], [1.0], [-torch.inf]])).project(x).tolist() == [-1.0, 1.0, 5.0]
    assert Box(upper=0.0).project(x).tolist() == [-5.0, 0.0, 0.0]
    assert Box().project(x).tolist() == x.tolist()
    assert Box(lower=torch.tensor([0.0] * 3)).project(x).dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Box(1.0, 0.0), "lower <= upper"),
        (lambda: Box(torch.tensor([0.0, 2.0]), 1.0), "lower <= upper"),
        (lambda: Box(math.nan, 0.0), "lower <= upper"),
        (lambda: Simplex(0.0), r"Simplex\(total=\.\.\.\)` must be positive"),
        (lambda: Simplex(math.nan), r"Simplex\(total=\.\.\.\)` must be positive"),
        (lambda: Box(torch.zeros(2)).project(torch.zeros(3)), "must be a number or hold 3 entries"),
    ],
)
def test_arguments_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


TREE: dict[str, Any] = {
    "w": torch.tensor([[0.2, 3.0], [-1.0, 0.1]]),
    "free": torch.tensor(-7.0),
    "v": [torch.tensor([5.0, -5.0])],
}


def test_sets_for_entries_of_a_dict_leave_the_others() -> None:
    vector, structure = ravel(TREE)
    product = region({"w": Simplex(), "v": Box(-1.0, 1.0)}, structure)
    assert product is not None
    before = vector.clone()
    found = structure.unravel(product.project(vector))
    assert torch.equal(vector, before)
    assert found["free"] == TREE["free"]
    assert found["v"][0].tolist() == [1.0, -1.0]
    assert torch.equal(found["w"], Simplex().project(TREE["w"].reshape(-1)).reshape(2, 2))


def test_bounds_of_boxes_for_entries() -> None:
    vector, structure = ravel(TREE)
    found = bounds({"w": Box(lower=0.0), "v": Box(upper=torch.tensor([1.0, 2.0]))}, structure, vector)
    assert found is not None
    inf = torch.inf
    lower, upper = (structure.unravel(bound) for bound in found)
    assert lower["w"].tolist() == [[0, 0], [0, 0]]
    assert upper["w"].tolist() == [[inf, inf], [inf, inf]]
    assert (float(lower["free"]), float(upper["free"])) == (-inf, inf)
    assert lower["v"][0].tolist() == [-inf, -inf]
    assert upper["v"][0].tolist() == [1, 2]
    assert bounds(None, structure, vector) is None
    whole = bounds(Box(0.0, 1.0), structure, vector)
    assert whole is not None
    assert bool((whole[1] - whole[0] == 1).all())


def test_constraints_that_do_not_fit_are_refused() -> None:
    vector, structure = ravel(TREE)
    with pytest.raises(ValueError, match="names 'u', which x does not have"):
        region({"u": Box()}, structure)
    with pytest.raises(ValueError, match=r"handles bounds only\. Got Simplex"):
        bounds({"w": Simplex()}, structure, vector)
    with pytest.raises(TypeError, match=r"must be a set such as `Box\(0, 1\)`"):
        region([Box()], structure)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a set"):
        region({"w": 3.0}, structure)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="which x does not have"):
        region({"w": Box()}, ravel(torch.zeros(3))[1])


@pytest.mark.parametrize(
    ("which", "at"),
    [
        (Box(-1.0, torch.tensor([0.5, 2.0, 1.0, 3.0])), [0.7, 0.2, -3.0, 1.0]),
        (Simplex(2.0), [1.5, 0.9, -0.4, 0.3]),
    ],
)
def test_a_face_is_the_derivative_of_the_projection(which: Box | Simplex, at: list[float]) -> None:
    toward = torch.tensor(at)
    along = which.face(toward)
    for d in torch.eye(4):
        difference = (which.project(toward + 1e-6 * d) - which.project(toward - 1e-6 * d)) / 2e-6
        torch.testing.assert_close(along(d), difference, rtol=0, atol=1e-9)
    assert torch.equal(along(torch.eye(4)), torch.stack([along(d) for d in torch.eye(4)]))


def test_a_product_has_the_faces_of_its_sets_and_none_where_one_has_none() -> None:
    class Ball(AbstractSet):
        def project(self, x: Tensor) -> Tensor:
            return x / max(1.0, float(x.norm()))

    vector, structure = ravel(TREE)
    product = region({"w": Simplex(), "v": Box(-1.0, 1.0)}, structure)
    assert product is not None
    along = product.face(vector)
    assert along is not None
    found = structure.unravel(along(torch.ones_like(vector)))
    assert (float(found["free"]), found["v"][0].tolist(), found["w"].tolist()) == (1.0, [0, 0], [[0, 0], [0, 0]])
    half = region({"w": Ball(), "v": Box(-1.0, 1.0)}, structure)
    assert half is not None and half.face(vector) is None
