"""Proximal maps: what they minimize, their equations, their derivatives in everything, side by side, and at corners."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from prox_cases import CASES, Case, points
from torch import Tensor

from bilevel import ravel

DOUBLE = torch.float64
V = torch.tensor([2.0, -1.1, 0.45, 3.0, -0.6, 1.3, -2.2, 0.8, 0.15, -1.7, 0.35, 2.6], dtype=DOUBLE)
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
VALUED = {
    name: case for name, case in CASES.items() if not name.startswith(("Sum", "AffineAny"))
}  # whose conjugates have values


def flat(tree: Any) -> Tensor:
    return ravel(tree)[0]


@every_case
@settings(max_examples=5)
@given(points(), points(), st.floats(0.1, 3))
def test_moreau_and_firm_nonexpansiveness(case: Case, a: Tensor, b: Tensor, step: float) -> None:
    """prox_{t h}(v) + t prox_{h*/t}(v / t) = v, and |p - q|^2 <= <p - q, v - w>."""
    term, v, w = case.term(), case.point(a), case.point(b)
    structure = ravel(v)[1]
    p, q = flat(term.prox(v, step)), flat(term.prox(w, step))
    dual = flat(term.conjugate().prox(structure.unravel(flat(v) / step), 1 / step))
    torch.testing.assert_close(p + step * dual, flat(v), rtol=1e-9, atol=1e-9)
    assert float((p - q) @ (p - q)) <= float((p - q) @ (flat(v) - flat(w))) + 1e-9


@every_case
@settings(max_examples=5)
@given(points(), points(), st.floats(0.1, 3), st.floats(0.01, 1))
def test_the_image_minimizes_the_term_and_the_distance(
    case: Case, a: Tensor, b: Tensor, step: float, part: float
) -> None:
    """h(p) <= h(q) + <q - p, p - v> / t for all q: p is the minimizer; here for the images q of other points."""
    term, v = case.term(), case.point(a)
    p = term.prox(v, step)
    q = term.prox(case.point(b), part)
    slope = (flat(q) - flat(p)) @ (flat(p) - flat(v)) / step
    at, other = float(term.value(p)), float(term.value(q))
    assert abs(at) < float("inf")
    assert at <= other + float(slope) + 1e-8 * (1 + abs(at))


@pytest.mark.parametrize("case", VALUED.values(), ids=VALUED)
@settings(max_examples=5)
@given(points(), st.floats(0.1, 3))
def test_young_and_fenchel_are_equal_at_an_image(case: Case, a: Tensor, step: float) -> None:
    """h(p) + h*(u) = <p, u> with u = (v - p) / t: the values of both are those of their proximal maps."""
    term, v = case.term(), case.point(a)
    p, structure = flat(term.prox(v, step)), ravel(v)[1]
    u = flat(term.conjugate().prox(structure.unravel(flat(v) / step), 1 / step))
    whole = term.value(structure.unravel(p)) + term.conjugate().value(structure.unravel(u))
    torch.testing.assert_close(whole, p @ u, rtol=1e-8, atol=1e-8)


@every_case
def test_derivatives_in_v_in_the_step_and_in_every_parameter_are_those_of_differences(case: Case) -> None:
    start, structure = flat(case.point(V)), ravel(case.point(V))[1]

    def at(v: Tensor, step: Tensor, *parameters: Tensor) -> Tensor:
        return flat(case.make(*parameters).prox(structure.unravel(v), step))

    def leaf(value: Tensor) -> Tensor:
        return value.clone().requires_grad_(value.is_floating_point())

    parameters = [leaf(torch.where(each == 0, each + 0.05, each)) for each in case.parameters]
    inputs = [leaf(start), leaf(torch.tensor(0.7, dtype=DOUBLE)), *parameters]
    assert float(case.make(*parameters).margin(structure.unravel(start), 0.7).detach()) > 1e-3
    assert torch.autograd.gradcheck(at, inputs, eps=1e-6, atol=1e-6)


@every_case
def test_rows_side_by_side_are_single_calls_and_so_are_their_gradients(case: Case) -> None:
    rows = torch.stack([flat(case.point(V.roll(k) * (1 + k / 3))) for k in range(3)]).requires_grad_()
    structure = ravel(case.point(V))[1]
    scales = torch.tensor([1.0, 0.8, 1.3], dtype=DOUBLE, requires_grad=True)

    def one(v: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        scaled = [each * scale if each.is_floating_point() else each for each in case.parameters]
        term, y = case.make(*scaled), structure.unravel(v)
        p = term.prox(y, 0.7 * scale)
        return flat(p), term.margin(y, 0.7), term.value(p), term.active(y, 0.7)

    together = torch.vmap(one)(rows, scales)
    singly = [torch.stack(each) for each in zip(*[one(v, s) for v, s in zip(rows, scales, strict=True)], strict=True)]
    for a, b in zip(together, singly, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    weights = torch.linspace(1, 2, rows.numel(), dtype=DOUBLE).reshape(rows.shape).sin()
    gradients = [
        torch.autograd.grad((found[0] * weights).sum(), (rows, scales), retain_graph=True, materialize_grads=True)
        for found in (together, singly)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@every_case
def test_numbers_of_32_bits_stay_so_and_agree_with_those_of_64(case: Case) -> None:
    v, structure = ravel(case.point(V))
    small = case.make(*[each.float() if each.is_floating_point() else each for each in case.parameters])
    narrow = ravel(structure.unravel(v.float()))[1]
    found = flat(small.prox(narrow.unravel(v.float()), 0.7))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), flat(case.term().prox(case.point(V), 0.7)), rtol=1e-5, atol=1e-5)
    assert small.margin(narrow.unravel(v.float()), 0.7).dtype == torch.float32
    assert small.value(narrow.unravel(found)).dtype == torch.float32


@every_case
def test_at_zero_everything_is_finite_and_a_nan_stays_one(case: Case) -> None:
    zero = flat(case.point(V * 0)).requires_grad_()
    structure = ravel(case.point(V))[1]
    p = flat(case.term().prox(structure.unravel(zero), 0.7))
    (gradient,) = torch.autograd.grad(p.sum(), zero)
    assert bool(p.isfinite().all()) and bool(gradient.isfinite().all())
    bad = zero.detach().clone()
    bad[0] = torch.nan
    assert bool(flat(case.term().prox(structure.unravel(bad), 0.7)).isnan().any())
