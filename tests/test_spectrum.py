"""The estimate of the largest eigenvalue is a bound, and never far above."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from strategies import SEEDS, batch_of, gaussian, spd, spd_matrices
from torch import Tensor

from bilevel._linear import LinearOperator
from bilevel._numerics.spectrum import largest_eigenvalue


def operator(A: Tensor) -> LinearOperator:
    return LinearOperator(lambda v: (A @ v.unsqueeze(-1)).squeeze(-1), A.shape[-1])


@given(A=spd_matrices(max_size=12, max_condition=1e6))
def test_the_largest_eigenvalue_of_a_small_matrix_is_found(A: Tensor) -> None:
    """Exact after n steps or where the Krylov space is exhausted before; at most the overshoot above."""
    found, true = float(largest_eigenvalue(operator(A), A[0])), float(torch.linalg.eigvalsh(A)[-1])
    assert true * (1 - 1e-10) <= found <= true / (1 - 0.1) * (1 + 1e-10)
    if len(A) <= 10:
        assert found == pytest.approx(true, rel=1e-10)


@pytest.mark.parametrize("overshoot", [0.05, 0.1, 0.3])
def test_the_bound_holds_and_is_at_most_the_overshoot_above(overshoot: float) -> None:
    for seed in range(10):
        eigenvalues = 1 + gaussian(300, seed=seed).square()
        A = spd(eigenvalues, seed + 1)
        found = float(largest_eigenvalue(operator(A), A[0], overshoot=overshoot, seed=seed))
        true = float(eigenvalues.max())
        assert true <= found <= true / (1 - overshoot) * (1 + 1e-10)


def test_the_bound_holds_where_the_largest_eigenvalue_is_hard_to_see() -> None:
    """One eigenvalue a little above a dense cluster, and a start that hardly contains it."""
    A = torch.diag(torch.cat([torch.linspace(0, 1, 999), torch.tensor([1.1])]))
    failures = sum(float(largest_eigenvalue(operator(A), A[0], seed=seed)) < 1.1 for seed in range(50))
    assert failures == 0


@pytest.mark.parametrize("n", [5, 300, 4000])
def test_the_number_of_products_is_as_documented(n: int) -> None:
    calls = []
    diagonal = torch.linspace(1, 2, n)

    def mv(v: Tensor) -> Tensor:
        calls.append(1)
        return diagonal * v

    largest_eigenvalue(LinearOperator(mv, n), diagonal)
    assert len(calls) == min(n, math.ceil(0.5 * (1 + math.log(1.648 * math.sqrt(n) / 0.01) / math.sqrt(0.1))))


@given(system=batch_of(spd_matrices(min_size=2, max_size=12)))
def test_a_batch_equals_a_loop(system: tuple[Tensor, Tensor]) -> None:
    A, b = system
    both = largest_eigenvalue(operator(A), b)
    loop = torch.stack([largest_eigenvalue(operator(A[k]), b[k]) for k in range(len(b))])
    torch.testing.assert_close(both, loop, rtol=1e-9, atol=0.0)


@given(seed=SEEDS)
def test_the_same_seed_gives_the_same_bits(seed: int) -> None:
    A = spd(torch.linspace(1, 2, 40), 1)
    assert torch.equal(*(largest_eigenvalue(operator(A), A[0], seed=seed) for _ in range(2)))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_estimate_scales_with_the_operator_in_float32(size: float) -> None:
    A = spd(torch.linspace(1, 5, 30), 3)
    found = largest_eigenvalue(operator((A * size).float()), A[0].float())
    assert found.dtype == torch.float32
    assert 5.0 <= float(found) / size * (1 + 1e-5) <= 5.0 / 0.9 * (1 + 1e-4)


def test_degenerate_operators_are_bounded() -> None:
    assert float(largest_eigenvalue(operator(torch.zeros(4, 4)), torch.zeros(4))) == 0.0
    assert float(largest_eigenvalue(operator(3 * torch.eye(4)), torch.zeros(4))) == pytest.approx(3.0)
    rank_one = torch.outer(torch.ones(50), torch.ones(50))
    assert 50.0 <= float(largest_eigenvalue(operator(rank_one), torch.zeros(50))) * (1 + 1e-12) <= 50 / 0.9 * 1.001


def test_nan_is_reported_for_its_row_only() -> None:
    A = torch.stack([torch.eye(3), 2 * torch.eye(3)])
    A[0, 0, 0] = math.nan
    found = largest_eigenvalue(operator(A), torch.zeros(2, 3))
    assert math.isnan(float(found[0]))
    assert float(found[1]) == pytest.approx(2.0)
