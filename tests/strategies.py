"""Hypothesis strategies: matrices of bounded condition number, and right-hand sides for them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from bilevel.testing.strategies import (
    gaussian as gaussian,
    orthogonal as orthogonal,
    spd as spd,
    spd_matrices as spd_matrices,
    spectra as spectra,
)

SEEDS = st.integers(0, 2**20)


@st.composite
def indefinite_matrices(draw: DrawFn, min_size: int = 1, max_size: int = 8, max_condition: float = 1e2) -> Tensor:
    """Symmetric matrices with moduli of the eigenvalues in [1, max_condition] and any signs."""
    moduli = draw(spectra(min_size, max_size, max_condition))
    signs = draw(st.lists(st.sampled_from([1.0, -1.0]), min_size=len(moduli), max_size=len(moduli)))
    return spd(moduli * torch.tensor(signs, dtype=torch.float64), draw(SEEDS))


@st.composite
def invertible_matrices(draw: DrawFn, min_size: int = 1, max_size: int = 8, max_condition: float = 1e2) -> Tensor:
    """General square matrices with singular values in [1, max_condition]."""
    values = draw(spectra(min_size, max_size, max_condition))
    return orthogonal(len(values), draw(SEEDS)) @ torch.diag(values) @ orthogonal(len(values), draw(SEEDS))


@st.composite
def right_hand_sides(draw: DrawFn, n: int) -> Tensor:
    """Vectors `(n,)` of norm about 1: normal entries, some of them zero, never all of them."""
    kept = draw(st.lists(st.booleans(), min_size=n, max_size=n).map(lambda mask: [not m for m in mask]))
    b = gaussian(n, seed=draw(SEEDS)) * torch.tensor(kept, dtype=torch.float64)
    return b if bool(b.any()) else torch.ones(n, dtype=torch.float64)


@st.composite
def systems(draw: DrawFn, matrices: SearchStrategy[Tensor]) -> tuple[Tensor, Tensor]:
    """A matrix `(n, n)` and a right-hand side `(n,)`."""
    A = draw(matrices)
    return A, draw(right_hand_sides(A.shape[0]))


def batch_of(matrices: SearchStrategy[Tensor]) -> SearchStrategy[tuple[Tensor, Tensor]]:
    """Two to four systems of one size, drawn as one matrix each shifted and scaled: `(k, n, n)` and `(k, n)`."""
    return st.builds(_batch, systems(matrices), st.lists(st.floats(0.25, 4.0, width=32), min_size=2, max_size=4), SEEDS)


def _batch(system: tuple[Tensor, Tensor], factors: list[float], seed: int) -> tuple[Tensor, Tensor]:
    A, b = system
    Q = orthogonal(len(b), seed)
    matrices = [factor * (A if k % 2 == 0 else Q.T @ A @ Q) for k, factor in enumerate(factors)]
    return torch.stack(matrices), torch.stack([b if k % 2 == 0 else Q.T @ b + b for k in range(len(factors))])
