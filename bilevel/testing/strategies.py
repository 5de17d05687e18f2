"""Hypothesis strategies: matrices of bounded condition number, bilevel problems, structures.

Needs hypothesis, which is imported when a strategy is first made: `pip install "bilevel[test]"`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from bilevel._problem import BilevelProblem
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import COUNT, SEED, SIZE
from bilevel.arguments.shapes import Shape
from bilevel.problems.quadratic import QuadraticFamily, random_quadratic
from bilevel.testing.logistic import Logistic

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

P = ParamSpec("P")
T = TypeVar("T")


def _hypothesis() -> Any:
    try:
        from hypothesis import strategies
    except ImportError as error:
        raise ImportError(
            '`bilevel.testing.strategies` needs hypothesis. Install it with `pip install "bilevel[test]"`.'
        ) from error
    return strategies


def _composite(function: Callable[Concatenate[DrawFn, P], T]) -> Callable[P, SearchStrategy[T]]:
    """`hypothesis.strategies.composite`, applied at the first call."""

    @functools.wraps(function)
    def strategy(*args: P.args, **options: P.kwargs) -> SearchStrategy[T]:
        made: SearchStrategy[T] = _hypothesis().composite(function)(*args, **options)
        return made

    return strategy


@checked(shape=COUNT, seed=SEED)
def gaussian(*shape: int, seed: int) -> Tensor:
    """Standard normal entries in float64; the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")


@checked(n=SIZE, seed=SEED)
def orthogonal(n: int, seed: int) -> Tensor:
    """An orthogonal matrix `(n, n)`; the identity for seed 0, so that failures shrink to diagonal matrices."""
    return (
        torch.eye(n, dtype=torch.float64, device="cpu") if seed == 0 else torch.linalg.qr(gaussian(n, n, seed=seed)).Q
    )


@checked(eigenvalues=Shape("n"), seed=SEED)
def spd(eigenvalues: Tensor, seed: int) -> Tensor:
    """The symmetric matrix with these eigenvalues and random eigenvectors."""
    Q = orthogonal(eigenvalues.shape[0], seed)
    A = Q @ torch.diag(eigenvalues) @ Q.T
    return 0.5 * (A + A.T)


@_composite
def spectra(draw: DrawFn, min_size: int = 1, max_size: int = 8, max_condition: float = 1e3) -> Tensor:
    """Positive numbers in [1, max_condition], spread evenly in logarithm: `(n,)`."""
    st = _hypothesis()
    exponents = draw(st.lists(st.floats(0.0, 1.0, width=32), min_size=min_size, max_size=max_size))
    return max_condition ** torch.tensor(exponents, dtype=torch.float64, device="cpu")


@_composite
def spd_matrices(draw: DrawFn, min_size: int = 1, max_size: int = 8, max_condition: float = 1e3) -> Tensor:
    """Symmetric positive definite matrices with eigenvalues in [1, max_condition]."""
    return spd(draw(spectra(min_size, max_size, max_condition)), draw(_hypothesis().integers(0, 2**20)))


@_composite
def quadratics(draw: DrawFn, max_p: int = 5, max_q: int = 6, kappa: float = 30.0) -> QuadraticFamily:
    """Quadratic problems with all constants: inner eigenvalues in [mu, kappa mu], some repeated, mu of every scale."""
    st = _hypothesis()
    p, q = draw(st.integers(1, max_p)), draw(st.integers(1, max_q))
    mu = 10.0 ** draw(st.integers(-2, 2))
    exponents = draw(st.lists(st.integers(0, 4), min_size=q, max_size=q))
    return random_quadratic(
        p,
        q,
        eigenvalues=[mu * kappa ** (e / 4) for e in exponents],
        cross=draw(st.sampled_from([0.0, 0.5, 3.0])),
        seed=draw(st.integers(0, 1000)),
    )


@_composite
def logistics(draw: DrawFn) -> tuple[Logistic, Tensor, Tensor]:
    """A logistic problem with a point x and a start y0."""
    st = _hypothesis()
    n, q, seed = draw(st.integers(2, 8)), draw(st.integers(1, 4)), draw(st.integers(0, 1000))
    Z, U = gaussian(n, q, seed=seed), gaussian(n, q, seed=seed + 2)
    data = Logistic(Z, gaussian(n, seed=seed + 1).sign(), U, gaussian(n, seed=seed + 3).sign())
    return data, 0.5 * gaussian(q + n, seed=seed + 4), torch.zeros(q, dtype=torch.float64, device="cpu")


@_composite
def smooth_problems(draw: DrawFn) -> tuple[BilevelProblem, Tensor, Tensor]:
    """A quadratic or a logistic problem, an outer point and an inner start."""
    st = _hypothesis()
    if draw(st.booleans()):
        family = draw(quadratics(kappa=10.0))
        x = gaussian(family.s.numel(), seed=draw(st.integers(0, 99)))
        return BilevelProblem(family.f, family.g), x, torch.zeros_like(family.c)
    data, x, y0 = draw(logistics())
    return BilevelProblem(data.f, data.g), x, y0


@_composite
def structures(draw: DrawFn, size: int) -> Callable[[Tensor], Any]:
    """A way to cut a vector of this size into a nested structure; a map from vectors to structures."""
    st = _hypothesis()
    cuts = sorted(draw(st.sets(st.integers(1, size - 1), max_size=3))) if size > 1 else []
    bounds = [0, *cuts, size]
    kinds = draw(
        st.lists(st.sampled_from(["plain", "row", "deep"]), min_size=len(bounds) - 1, max_size=len(bounds) - 1)
    )
    outer = draw(st.sampled_from(["dict", "list", "tuple"]))

    def cut(vector: Tensor) -> Any:
        leaves = []
        for low, high, kind in zip(bounds[:-1], bounds[1:], kinds, strict=True):
            leaf = vector[low:high]
            leaf = leaf.reshape(()) if high - low == 1 and kind == "plain" else leaf
            leaves.append(
                {"a": [leaf.reshape(1, -1)]} if kind == "deep" else leaf.reshape(-1, 1) if kind == "row" else leaf
            )
        if outer == "dict":
            return {f"k{i}": leaf for i, leaf in enumerate(leaves)}
        return leaves if outer == "list" else tuple(leaves)

    return cut
