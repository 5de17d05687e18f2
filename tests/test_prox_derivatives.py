"""Generalized derivatives of proximal maps: against autograd, as matrices, side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from prox_cases import CASES, Case, points
from torch import Tensor

from bilevel import ravel
from bilevel.prox import ProxDerivative

DOUBLE = torch.float64
EXACT: Any = {"rtol": 1e-9, "atol": 1e-9}
WITH = {name: case for name, case in CASES.items() if case.has_derivative}
with_derivative = pytest.mark.parametrize("case", WITH.values(), ids=WITH)


def of(case: Case, v: Any, step: Any = 0.7) -> ProxDerivative:
    found = case.term().derivative(v, step)
    assert found is not None
    return found


def matrix(apply: Any, like: Any) -> Tensor:
    """What a map of structures is, as a matrix."""
    flat, structure = ravel(like)
    columns = [ravel(apply(structure.unravel(e)))[0] for e in torch.eye(flat.numel(), dtype=flat.dtype)]
    return torch.stack(columns, dim=1)


def jacobian(case: Case, v: Any, step: float) -> Tensor:
    """Of the proximal map, by autograd."""
    flat, structure = ravel(v)

    def at(flat: Tensor) -> Tensor:
        return ravel(case.term().prox(structure.unravel(flat), step))[0]

    found: Tensor = torch.autograd.functional.jacobian(at, flat)  # type: ignore[no-untyped-call]
    return found


@with_derivative
@settings(max_examples=8)
@given(points())
def test_products_are_those_of_autograd_and_the_inverse_is_the_pseudo_inverse(case: Case, entries: Tensor) -> None:
    v = case.point(entries)
    P = of(case, v)
    dense = matrix(lambda w: P.times(P.parts, w), v)
    torch.testing.assert_close(dense, jacobian(case, v, 0.7), **EXACT)
    torch.testing.assert_close(dense, dense.T, **EXACT)
    eigenvalues = torch.linalg.eigvalsh(dense)
    assert float(eigenvalues.min()) >= -1e-10 and float(eigenvalues.max()) <= 1 + 1e-10
    inverse = matrix(lambda w: P.inverse(P.parts, w), v)
    torch.testing.assert_close(inverse, torch.linalg.pinv(dense, rtol=1e-9, hermitian=True), rtol=1e-6, atol=1e-7)
    onto = matrix(lambda w: P.onto(P.parts, w), v)
    torch.testing.assert_close(onto, dense @ inverse, rtol=1e-6, atol=1e-7)


@with_derivative
def test_parts_leave_a_vmap_and_products_are_taken_there_or_in_another(case: Case) -> None:
    rows = [case.point(torch.linspace(-2, 2, 12, dtype=DOUBLE).roll(k) * (1 + k)) for k in range(3)]
    flat = torch.stack([ravel(row)[0] for row in rows])
    structure, seen = ravel(rows[0])[1], []

    def one(flat: Tensor) -> tuple[Tensor, ...]:
        P = of(case, structure.unravel(flat))
        seen.append(P)
        return P.parts

    parts = torch.vmap(one)(flat)
    w = torch.linspace(1, 2, flat.numel(), dtype=DOUBLE).reshape(flat.shape).sin()
    for product in (seen[-1].times, seen[-1].inverse):

        def applied(parts: Any, w: Tensor, product: Any = product) -> Tensor:
            return ravel(product(parts, structure.unravel(w)))[0]

        together = torch.vmap(applied)(parts, w)
        for k, row in enumerate(rows):
            alone = of(case, row)
            expected = alone.times if product is seen[-1].times else alone.inverse
            expected_row = ravel(expected(alone.parts, structure.unravel(w[k])))[0]
            torch.testing.assert_close(together[k], expected_row, **EXACT)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_codes_of_the_manifold_are_integers_that_stay_where_nothing_changes_and_leave_a_vmap(case: Case) -> None:
    v = case.point(torch.linspace(-2, 2, 12, dtype=DOUBLE))
    flat, structure = ravel(v)
    codes = case.term().active(v, 0.7)
    assert codes.dim() == 1 and codes.dtype == torch.int64
    close = torch.stack([flat, flat + 1e-9])
    together = torch.vmap(lambda row: case.term().active(structure.unravel(row), 0.7))(close)
    assert torch.equal(together[0], codes) and torch.equal(together[1], codes)
