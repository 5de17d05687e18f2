"""Products of a linear solve precondition the next: of one matrix, exactly on their span; of one nearby, well."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings, strategies as st
from strategies import spd_matrices, systems
from torch import Tensor

from bilevel._linear import LinearOperator
from bilevel._numerics.quasi_newton import Pairs, Recycled
from bilevel.solvers import CG, MINRES, Jacobi


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operator(A: Tensor) -> LinearOperator:
    """Of a matrix, or of a batch of them."""
    return LinearOperator(lambda v: (A @ v.unsqueeze(-1)).squeeze(-1), A.shape[-1], positive_definite=True)


def recycled(b: Tensor, size: int = 20) -> Recycled:
    return Recycled(Pairs(size, b.reshape(-1, b.shape[-1])))


@given(systems(spd_matrices(max_size=8, max_condition=100.0)), st.integers(0, 1000))
@settings(max_examples=30)
def test_on_the_span_of_the_directions_it_is_the_inverse(system: tuple[Tensor, Tensor], seed: int) -> None:
    A, b = system
    memory = recycled(b)
    first = CG(rtol=1e-10, recompute=False).solve(memory.watched(operator(A)), b)
    assert first.status.ok
    directions = torch.cat([s for s, _, _ in memory.pairs.pairs])
    assert len(directions) == first.steps
    v = normal(len(directions), seed=seed) @ directions
    found = memory.build(operator(A), v)(A @ v)
    assert float((found - v).norm()) <= 1e-6 * float(v.norm())
    assert CG(rtol=1e-6, preconditioner=memory).solve(operator(A), b).steps <= 1


def test_a_matrix_nearby_takes_fewer_steps() -> None:
    eigenvalues = torch.logspace(0, 4, 60)
    Q = torch.linalg.qr(normal(60, 60, seed=1))[0]
    A = Q @ torch.diag(eigenvalues) @ Q.T
    near = A + torch.diag(0.05 * normal(60, seed=2).abs())
    b, other = normal(60, seed=3), normal(60, seed=4)
    memory = recycled(b, size=60)
    CG(rtol=1e-8, recompute=False).solve(memory.watched(operator(A)), b)
    plain = CG(rtol=1e-6).solve(operator(near), other)
    helped = CG(rtol=1e-6, preconditioner=memory).solve(operator(near), other)
    assert helped.status.ok
    assert helped.steps <= plain.steps / 2, (helped.steps, plain.steps)


def test_rows_of_a_batch_keep_to_themselves() -> None:
    A = torch.stack([torch.diag(torch.tensor([1.0, 2.0, 30.0])), torch.diag(torch.tensor([5.0, 0.5, 7.0]))])
    b = normal(2, 3, seed=1)
    b[1, 1:] = 0.0  # which ends after one step, while the other row goes on
    together = recycled(b)
    CG(rtol=1e-12, recompute=False).solve(together.watched(operator(A)), b)
    r = normal(2, 3, seed=2)
    rows = together.build(operator(A), r)(r)
    for i in range(2):
        alone = recycled(b[i])
        CG(rtol=1e-12, recompute=False).solve(alone.watched(operator(A[i])), b[i])
        torch.testing.assert_close(rows[i], alone.build(operator(A[i]), r[i])(r[i]), rtol=1e-9, atol=0.0)


def test_a_preconditioner_stands_still_while_its_solve_adds_pairs() -> None:
    A, b = torch.diag(torch.tensor([1.0, 4.0, 9.0])), normal(3, seed=1)
    memory = recycled(b)
    CG(rtol=0.0, max_steps=1).solve(memory.watched(operator(A)), b)
    fixed = memory.build(operator(A), b)
    before = fixed(b)
    assert torch.equal(before, memory.pairs.product(b.reshape(1, 3))[0])
    CG(rtol=0.0, max_steps=2).solve(memory.watched(operator(A)), normal(3, seed=2))
    assert torch.equal(fixed(b), before)
    assert not torch.equal(memory.build(operator(A), b)(b), before)


def test_directions_of_no_curvature_are_not_remembered() -> None:
    memory = recycled(torch.zeros(2))
    watched = memory.watched(LinearOperator(lambda v: torch.zeros_like(v), 2))
    watched.mv(torch.ones(2))
    watched.mv(torch.full((2,), torch.nan))
    assert memory.pairs.pairs == []


def test_a_row_without_curvature_keeps_what_it_had() -> None:
    signs = torch.tensor([[1.0], [-1.0]])
    memory = recycled(torch.zeros(2, 2))
    memory.watched(LinearOperator(lambda v: 2 * v, 2)).mv(normal(2, 2, seed=1))
    before = memory.pairs.product(normal(2, 2, seed=2))
    memory.watched(LinearOperator(lambda v: 3 * signs * v, 2)).mv(normal(2, 2, seed=3))
    after = memory.pairs.product(normal(2, 2, seed=2))
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[0], before[0])


def test_no_more_pairs_are_kept_than_asked_for() -> None:
    memory = recycled(torch.zeros(3), size=2)
    for seed in range(4):
        memory.watched(LinearOperator(lambda v: 2 * v, 3)).mv(normal(3, seed=seed))
    assert [pair[0].tolist() for pair in memory.pairs.pairs] == [[normal(3, seed=seed).tolist()] for seed in (3, 2)]


def test_a_solver_keeps_a_preconditioner_of_its_own_and_one_that_takes_none_says_so() -> None:
    memory, own = recycled(torch.zeros(2)), CG(preconditioner=Jacobi())
    assert own.with_preconditioner(memory) is own
    assert MINRES().with_preconditioner(memory) is None
    assert CG(atol=0.1).with_preconditioner(memory) == replace(CG(atol=0.1), preconditioner=memory)
