"""Proximal maps against cvxpy, at corners, and with arguments that are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel.prox import (
    L1,
    L2,
    TV1D,
    TV2D,
    Affine,
    Box,
    Conjugate,
    ElasticNet,
    GroupBall,
    GroupLasso,
    L1Ball,
    L2Ball,
    LInf,
    LInfBall,
    Nonnegative,
    NuclearNorm,
    Quadratic,
    Simplex,
    SpectralBall,
    Sum,
)

DOUBLE = torch.float64
V = torch.tensor([2.0, -1.1, 0.45, 3.0, -0.6], dtype=DOUBLE)
Q = torch.diag(torch.tensor([1.0, 0.0, 2.0, 3.0, 0.5], dtype=DOUBLE)) + 0.5
T = 0.7

TERMS: dict[str, tuple[Any, Any]] = {
    "L1": (L1(0.9), lambda cp, y: (0.9 * cp.norm1(y), [])),
    "ElasticNet": (ElasticNet(0.9, 0.5), lambda cp, y: (0.9 * cp.norm1(y) + 0.25 * cp.sum_squares(y), [])),
    "Nonnegative": (Nonnegative(), lambda cp, y: (0, [y >= 0])),
    "Box": (Box(-0.5, 0.8), lambda cp, y: (0, [y >= -0.5, y <= 0.8])),
    "Simplex": (Simplex(1.7), lambda cp, y: (0, [y >= 0, cp.sum(y) == 1.7])),
    "L1Ball": (L1Ball(1.7), lambda cp, y: (0, [cp.norm1(y) <= 1.7])),
    "L2Ball": (L2Ball(1.7), lambda cp, y: (0, [cp.norm2(y) <= 1.7])),
    "L2": (L2(1.7), lambda cp, y: (1.7 * cp.norm2(y), [])),
    "LInf": (LInf(1.7), lambda cp, y: (1.7 * cp.norm_inf(y), [])),
    "LInfBall": (LInfBall(0.7), lambda cp, y: (0, [cp.norm_inf(y) <= 0.7])),
    "GroupLasso": (
        GroupLasso(1.5, [[0, 3], [1, 2, 4]]),
        lambda cp, y: (1.5 * cp.norm2(y[[0, 3]]) + 1.5 * cp.norm2(y[[1, 2, 4]]), []),
    ),
    "TV1D": (TV1D(0.9), lambda cp, y: (0.9 * cp.norm1(y[1:] - y[:-1]), [])),
    "Quadratic": (Quadratic(Q, 0.3), lambda cp, y: (cp.quad_form(y, Q.numpy()) / 2 + 0.3 * cp.sum(y), [])),
    "Affine": (Affine(L1(0.9), 1.5, -0.3), lambda cp, y: (0.9 * cp.norm1(1.5 * y - 0.3), [])),
    "AffineAny": (
        Affine(LInf(0.9), Q[:4] - 0.3, 0.2),
        lambda cp, y: (0.9 * cp.norm_inf((Q[:4] - 0.3).numpy() @ y + 0.2), []),
    ),
    "polyhedron": (
        Sum((Affine(Box(None, 0.4), Q[:3]), L1(0.2), Nonnegative())),
        lambda cp, y: (0.2 * cp.norm1(y), [Q[:3].numpy() @ y <= 0.4, y >= 0]),
    ),
    "Sum": (
        Sum((L1(0.5), TV1D(0.4), Box(-0.2, None))),
        lambda cp, y: (0.5 * cp.norm1(y) + 0.4 * cp.norm1(y[1:] - y[:-1]), [y >= -0.2]),
    ),
    "Sum-split": (
        Sum((Quadratic(Q), TV1D(0.4))),
        lambda cp, y: (cp.quad_form(y, Q.numpy()) / 2 + 0.4 * cp.norm1(y[1:] - y[:-1]), []),
    ),
}


@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")  # of 1e-12, which it may miss by little
@pytest.mark.parametrize(("term", "written"), TERMS.values(), ids=TERMS)
def test_the_map_is_the_minimizer_that_cvxpy_finds(term: Any, written: Any) -> None:
    cp = pytest.importorskip("cvxpy", reason="the oracle")
    y = cp.Variable(5)
    value, constraints = written(cp, y)
    problem = cp.Problem(cp.Minimize(value + cp.sum_squares(y - V.numpy()) / (2 * T)), constraints)
    accuracy = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-12)
    problem.solve(solver=cp.CLARABEL, **accuracy)
    torch.testing.assert_close(term.prox(V, T), torch.from_numpy(y.value), rtol=0, atol=1e-8)


def test_a_nuclear_norm_meets_its_conditions_of_optimality() -> None:
    """(V - Y) / t = w (U_1 V_1' + W) with U_1' W = 0, W V_1 = 0, |W| <= 1, for Y = U_1 s V_1'."""
    M = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    Y = NuclearNorm(1.3).prox(M, T)
    U, s, Vh = torch.linalg.svd(Y, full_matrices=False)
    rank = int((s > 1e-12).sum())
    assert 0 < rank < 4
    dual = (M - Y) / (T * 1.3)
    W = dual - U[:, :rank] @ Vh[:rank]
    torch.testing.assert_close(U[:, :rank].T @ W, torch.zeros(rank, 4, dtype=DOUBLE), rtol=0, atol=1e-12)
    torch.testing.assert_close(W @ Vh[:rank].T, torch.zeros(5, rank, dtype=DOUBLE), rtol=0, atol=1e-12)
    assert float(torch.linalg.matrix_norm(W, 2)) <= 1 + 1e-12


def test_repeated_and_vanishing_singular_values_have_finite_derivatives() -> None:
    for s in ([2.0, 2.0, 0.0], [0.0, 0.0, 0.0], [0.1, 0.1, 3.0]):
        M = torch.diag(torch.tensor(s, dtype=DOUBLE)).requires_grad_()
        (gradient,) = torch.autograd.grad(NuclearNorm(0.5).prox(M, 1.0), M, torch.ones(3, 3, dtype=DOUBLE))
        assert bool(gradient.isfinite().all())
    leaf = torch.eye(3, dtype=DOUBLE).requires_grad_()
    (first,) = torch.autograd.grad(NuclearNorm(0.5).prox(leaf, 1.0).square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="has a first derivative only"):
        torch.autograd.grad(first.sum(), leaf)


OUTSIDE = {
    "LInfBall": (LInfBall(1.0), V),
    "Box": (Box(-3.0, 1.0), V),
    "Nonnegative": (Nonnegative(), V),
    "Simplex": (Simplex(5.0), V.abs()),
    "L1Ball": (L1Ball(6.0), V),
    "L2Ball": (L2Ball(3.0), V),
    "GroupBall": (GroupBall(2.0, "all"), V),
    "SpectralBall": (SpectralBall(3.0), V[None]),
    "Sum": (Sum((L1(1.0), Nonnegative())), V),
    "Conjugate": (TV1D(1.0).conjugate(), V),
    "Conjugate of TV2D": (TV2D(1.0).conjugate(), V[None]),
}


@pytest.mark.parametrize(("term", "y"), OUTSIDE.values(), ids=OUTSIDE)
def test_the_value_is_infinite_outside_and_finite_at_images(term: Any, y: Tensor) -> None:
    assert float(term.value(y)) == float("inf")
    assert float(term.value(term.prox(y, 1.0))) < float("inf")


NEGATIVE = {
    "L1": L1(-1.0),
    "LInfBall": LInfBall(torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0])),
    "ElasticNet": ElasticNet(1.0, -1.0),
    "Box": Box(1.0, 0.0),
    "Simplex": Simplex(-1.0),
    "L1Ball": L1Ball(-1.0),
    "L2Ball": L2Ball(-1.0),
    "LInf": LInf(-1.0),
    "GroupLasso": GroupLasso(torch.tensor([1.0, -1.0]), [[0, 1, 2], [3, 4]]),
    "TV1D": TV1D(-1.0),
    "Quadratic": Quadratic(-Q),
    "Quadratic-number": Quadratic(-1.0),
    "Sum": Sum((L1(1.0), Quadratic(-1.0))),
    "Conjugate": L1(-1.0).conjugate(),
}


@pytest.mark.parametrize("term", NEGATIVE.values(), ids=NEGATIVE)
def test_what_is_not_convex_has_no_margin(term: Any) -> None:
    assert bool(term.margin(V, 1.0).isnan())


@pytest.mark.parametrize("term", [NuclearNorm(-1.0), SpectralBall(-1.0), TV2D(-1.0)], ids=repr)
def test_what_is_not_convex_has_no_margin_of_matrices(term: Any) -> None:
    assert bool(term.margin(V[None], 1.0).isnan())


ZERO = {
    "L1": L1(0.0),
    "L2": L2(0.0),
    "LInf": LInf(0.0),
    "ElasticNet": ElasticNet(0.0, 0.0),
    "GroupLasso": GroupLasso(0.0, "all"),
    "TV1D": TV1D(0.0),
    "Quadratic": Quadratic(0.0),
}


@pytest.mark.parametrize("term", ZERO.values(), ids=ZERO)
def test_weight_zero_is_no_term_and_no_kink_even_at_zero(term: Any) -> None:
    for v in (V, 0 * V):
        assert torch.equal(term.prox(v, T), v) and float(term.margin(v, T)) > 0.1
        P = term.derivative(v, T)
        assert torch.equal(P.times(P.parts, V), V)


@pytest.mark.parametrize("term", [L1Ball(0.0), L2Ball(0.0), LInfBall(0.0), GroupBall(0.0, "all")], ids=repr)
def test_a_ball_of_radius_zero_is_a_point_without_kinks(term: Any) -> None:
    for v in (V, 0 * V):
        assert not term.prox(v, T).any() and float(term.margin(v, T)) > 0.1
        P = term.derivative(v, T)
        assert not P.times(P.parts, V).any()


def test_ties_keep_the_sum_and_the_order() -> None:
    tied = torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=DOUBLE)
    torch.testing.assert_close(Simplex(1.5).prox(tied, 1.0), torch.tensor([0.5, 0.5, 0.5, 0.0], dtype=DOUBLE))
    torch.testing.assert_close(L1Ball(2.0).prox(tied, 1.0), tied / 2)
    torch.testing.assert_close(LInf(2.0).prox(tied, 1.0), tied / 2)


def test_a_sum_is_flat_and_keeps_what_bounds_do_not_move_from_being_a_kink() -> None:
    nested = Sum((L1(0.5), Sum((Nonnegative(), Quadratic(1.0)))))
    torch.testing.assert_close(nested.prox(V, 1.0), (V - 0.5).relu() / 2)
    small = torch.tensor([0.2, -0.3], dtype=DOUBLE)  # both are thresholded, and at a bound then: no kink
    assert float(nested.margin(small, 1.0)) > 0.1
    assert float(nested.margin(torch.tensor([0.5, 2.0], dtype=DOUBLE), 1.0)) == 0.0


REFUSED: dict[str, tuple[Any, str]] = {
    "empty group": (lambda: GroupLasso(1.0, [[0, 1], []]), "Got none in group 1"),
    "empty label": (lambda: GroupLasso(1.0, torch.tensor([0, 2])), "Got none in group 1"),
    "overlap": (lambda: GroupLasso(1.0, [[0, 1], [1]]), "without overlap. Got the index 1 in groups 0 and 1"),
    "hole": (lambda: GroupBall(1.0, [[0], [2]]), "Got no group with 1"),
    "negative label": (lambda: GroupLasso(1.0, torch.tensor([0, -1])), "must be labels 0, 1"),
    "too few labels": (lambda: GroupLasso(1.0, torch.tensor([0, 1])).prox(V, 1.0), "each of the 5 entries of y. Got 2"),
    "weights": (lambda: GroupLasso(torch.ones(3), "all").prox(V, 1.0), "each of the 1 groups. Got 3"),
    "zero matrix": (lambda: Affine(L1(1.0), 0 * Q), "a matrix of zeros"),
    "zero map": (lambda: Affine(L1(1.0), 0.0), "must be other than zero"),
    "columns": (lambda: Affine(L1(1.0), torch.eye(3)).prox(V.float(), 1.0), "must have 5 columns"),
    "not square": (lambda: Quadratic(torch.ones(2, 3)), "must be square"),
    "size of Q": (lambda: Quadratic(torch.ones(2)).prox(V.float(), 1.0), "for the 5 entries of y"),
    "no terms": (lambda: Sum(()), "must hold a term at least"),
    "differences": (lambda: TV1D(torch.ones(3)).prox(V, 1.0), "or hold 4, one for each difference. Got 3"),
    "no matrix": (lambda: NuclearNorm(1.0).prox(V, 1.0), "must be matrices"),
    "no grid": (lambda: TV2D(1.0).prox(V, 1.0), "must be one matrix"),
}


@pytest.mark.parametrize(("call", "text"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_term_is_refused_by_name(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def test_a_conjugate_without_a_closed_form_says_so_and_still_has_a_map() -> None:
    term = Sum((L2(0.5), TV1D(0.4))).conjugate()
    assert isinstance(term, Conjugate) and term.derivative(V, 1.0) is None
    with pytest.raises(NotImplementedError, match="the conjugate of `Sum`"):
        term.value(V)
    assert bool(term.prox(V, 1.0).isfinite().all())


def test_scaled_numbers_do_not_overflow_norms() -> None:
    v = torch.tensor([3e200, 4e200], dtype=DOUBLE)
    torch.testing.assert_close(L2Ball(1.0).prox(v, 1.0), torch.tensor([0.6, 0.8], dtype=DOUBLE))
    small = L2Ball(1e-200).prox(torch.tensor([3e-200, 4e-200], dtype=DOUBLE), 1.0)
    torch.testing.assert_close(1e200 * small, torch.tensor([0.6, 0.8], dtype=DOUBLE))
