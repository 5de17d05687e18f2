"""Terms whose proximal map is an iteration: at its tolerance, by optimality conditions and other ways to the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prox_cases import ITERATED, Case
from torch import Tensor

from bilevel import ravel
from bilevel.prox import L1, L2, TV1D, TV2D, Box, GroupLasso, L2Ball, LInf, Nonnegative, Simplex, Sum
from bilevel.prox.closed_sums import closed_form
from bilevel.prox.grid_dual import differences, pulled_back
from bilevel.prox.splitting import Split, split_derivative, split_prox

DOUBLE = torch.float64
V = torch.tensor([2.0, -1.1, 0.45, 3.0, -0.6, 1.3, -2.2, 0.8, 0.15, -1.7, 0.35, 2.6], dtype=DOUBLE)
CHEAP = {name: case for name, case in ITERATED.items() if name != "Sum-split-sets"}
each = pytest.mark.parametrize("case", CHEAP.values(), ids=CHEAP)


def flat(tree: Any) -> Tensor:
    return ravel(tree)[0]


@each
def test_one_gradient_in_everything_is_that_of_differences(case: Case) -> None:
    start, structure = ravel(case.point(V))
    weights = torch.linspace(1, 2, len(start), dtype=DOUBLE).sin()

    def at(v: Tensor, step: Tensor, *parameters: Tensor) -> Tensor:
        return flat(case.make(*parameters).prox(structure.unravel(v), step)) @ weights

    inputs = [start, torch.tensor(0.7, dtype=DOUBLE), *case.parameters]
    leaves = [each.clone().requires_grad_() for each in inputs]
    gradients = torch.autograd.grad(at(*leaves), leaves)
    moves = [torch.linspace(-1, 1, each.numel(), dtype=DOUBLE).cos().reshape(each.shape) for each in inputs]
    for k in range(len(inputs)):
        ends = [
            at(*(a + s * 1e-5 * (j == k) * m for j, (a, m) in enumerate(zip(inputs, moves, strict=True))))
            for s in (1, -1)
        ]
        expected = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close((gradients[k] * moves[k]).sum(), expected, rtol=1e-6, atol=1e-7)


@each
def test_products_with_the_derivative_are_those_of_autograd_and_undone_by_the_inverse(case: Case) -> None:
    v = case.point(V)
    start, structure = ravel(v)
    P = case.term().derivative(v, 0.7)
    assert P is not None
    w = structure.unravel(torch.linspace(1, 3, len(start), dtype=DOUBLE).sin())
    leaf = start.clone().requires_grad_()
    (expected,) = torch.autograd.grad(flat(case.term().prox(structure.unravel(leaf), 0.7)), leaf, flat(w))
    found = P.times(P.parts, w)
    torch.testing.assert_close(flat(found), expected, rtol=1e-8, atol=1e-9)
    back = P.inverse(P.parts, found)
    torch.testing.assert_close(flat(P.times(P.parts, back)), flat(found), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(flat(P.onto(P.parts, back)), flat(back), rtol=1e-7, atol=1e-8)


@each
def test_rows_side_by_side_agree_with_single_calls_with_their_gradients_and_margins(case: Case) -> None:
    start, structure = ravel(case.point(V))
    rows = torch.stack([start, start.roll(1) * 1.3]).requires_grad_()

    def one(v: Tensor) -> tuple[Tensor, Tensor]:
        return flat(case.term().prox(structure.unravel(v), 0.7)), case.term().margin(structure.unravel(v), 0.7)

    found, margins = torch.vmap(one)(rows)
    (gradient,) = torch.autograd.grad((found * rows.detach().cos()).sum(), rows)
    for k, row in enumerate(rows):
        leaf = row.detach().requires_grad_()
        alone, margin = one(leaf)
        torch.testing.assert_close(found[k], alone, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(margins[k], margin, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(
            gradient[k], torch.autograd.grad(alone, leaf, leaf.cos().detach())[0], rtol=1e-8, atol=1e-8
        )


@pytest.mark.parametrize("isotropic", [False, True])
def test_total_variation_on_a_grid_meets_its_conditions_of_optimality(isotropic: bool) -> None:
    """y = v - D' z with |z| <= t w and <z, D y> = t w sum |D y|: the duality gap vanishes, and bounds |y - y*|."""
    v = torch.randn(7, 9, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    term = TV2D(0.6, isotropic=isotropic)
    y = term.prox(v, 0.5)
    assert float(term.error(v, 0.5)) < torch.finfo(DOUBLE).eps ** 0.5 * float(v.norm())  # to which a gap rounds
    z = term._at_rest(v, torch.tensor(0.3, dtype=DOUBLE)).z
    sizes = torch.linalg.vector_norm(z, dim=0) if isotropic else z.abs()
    assert float(sizes.max()) <= 0.3 * (1 + 1e-12)
    torch.testing.assert_close(v - pulled_back(z), y, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close((z * differences(y)).sum(), 0.5 * term.value(y), rtol=1e-8, atol=1e-8)


def test_a_grid_of_one_row_is_a_chain() -> None:
    for isotropic in (False, True):
        found = TV2D(0.7, isotropic=isotropic).prox(V[None], 1.0)
        torch.testing.assert_close(found[0], TV1D(0.7).prox(V, 1.0), rtol=1e-9, atol=1e-9)


def test_what_composes_is_what_splitting_finds() -> None:
    weight = torch.tensor([0.9, 0.1, 1.0, 0.3], dtype=DOUBLE, requires_grad=True)
    terms = (L1(weight), Box(-0.4, 1.2))
    v = V[:4].clone().requires_grad_()
    closed, w = Sum(terms), torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=DOUBLE)
    split = Split.of(terms, v.detach(), 0.7, 1e-13, 10_000)
    torch.testing.assert_close(split_prox(split, v, 0.7), closed.prox(v, 0.7), rtol=1e-9, atol=1e-9)
    gradients = [
        torch.autograd.grad(found, (v, weight), w) for found in (split_prox(split, v, 0.7), closed.prox(v, 0.7))
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    P, Q = split_derivative(split, 0.7), closed.derivative(v.detach(), 0.7)
    assert P is not None and Q is not None
    torch.testing.assert_close(P.times(P.parts, w), Q.times(Q.parts, w), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(P.inverse(P.parts, w), Q.inverse(Q.parts, w), rtol=1e-8, atol=1e-8)


HOMOGENEOUS = {
    "TV1D": (TV1D(0.4),),
    "L1": (L1(0.53), Nonnegative()),
    "groups": (L1(0.1), GroupLasso(0.3, torch.arange(12, device="cpu") // 3)),
    "LInf": (LInf(0.6),),
}


@pytest.mark.parametrize("name", HOMOGENEOUS)
@pytest.mark.parametrize("last", [L2, L2Ball])
def test_a_norm_or_a_ball_after_positively_homogeneous_terms_is_what_splitting_finds(name: str, last: Any) -> None:
    """prox_{r + h} = prox_r o prox_h for such an h (Yu 2013), and the derivatives commute."""
    radius = torch.tensor(0.9, dtype=DOUBLE, requires_grad=True)
    terms = (*HOMOGENEOUS[name], last(radius))
    v, w = V.clone().requires_grad_(), torch.linspace(-1, 2, len(V), dtype=DOUBLE)
    closed, split = Sum(terms[::-1]), Split.of(terms, V, 0.7, 1e-13, 10_000)
    assert closed_form(closed.flat()) is not None
    both = [split_prox(split, v, 0.7), closed.prox(v, 0.7)]
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-9)
    for a, b in zip(*(torch.autograd.grad(found, (v, radius), w) for found in both), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    P, Q = split_derivative(split, 0.7), closed.derivative(V, 0.7)
    assert P is not None and Q is not None
    torch.testing.assert_close(P.inverse(P.parts, w), Q.inverse(Q.parts, w), rtol=1e-7, atol=1e-7)
    assert closed_form((Box(-0.1, 0.2), last(radius))) is None  # a box is no such term


def test_sets_that_do_not_meet_have_no_margin_and_sets_that_do_have_one() -> None:
    apart = Sum((Box(0.0, 0.1), Box(0.2, 1.0)))
    assert bool(apart.margin(V[:4], 1.0).isnan())
    far = Sum((L2Ball(0.1), Simplex(1.0)), max_steps=200)
    assert bool(far.margin(V[:4], 1.0).isnan())
    meeting = Sum((L2Ball(0.9), Simplex(1.0)), tol=1e-7)
    assert float(meeting.margin(V[:4], 1.0)) > 0
    y = meeting.prox(V[:4], 1.0)
    assert abs(float(y.sum()) - 1) < 1e-5 and float(y.norm()) < 0.9 + 1e-5


def test_too_few_steps_have_no_margin() -> None:
    v = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    assert bool(TV2D(1.0, isotropic=True, max_steps=3).margin(v, 1.0).isnan())
    assert float(TV2D(1.0, isotropic=True).margin(v, 1.0)) >= 0
