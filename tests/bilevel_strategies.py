"""Random bilevel problems for hypothesis: quadratic ones with prescribed spectra, a logistic one, nested structures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel import BilevelProblem
from bilevel.problems.quadratic import QuadraticFamily, random_quadratic
from bilevel.testing.logistic import Logistic as Logistic


@st.composite
def families(draw: st.DrawFn, max_p: int = 5, max_q: int = 6, kappa: float = 30.0) -> QuadraticFamily:
    """Members of the quadratic family: inner eigenvalues in [mu, kappa mu], with repetitions and every scale of mu."""
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


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def logistic(draw: st.DrawFn) -> tuple[Logistic, Tensor, Tensor]:
    """A logistic problem with a point x and a start y0."""
    n, q, seed = draw(st.integers(2, 8)), draw(st.integers(1, 4)), draw(st.integers(0, 1000))
    Z, U = normal(n, q, seed=seed), normal(n, q, seed=seed + 2)
    problem = Logistic(Z, normal(n, seed=seed + 1).sign(), U, normal(n, seed=seed + 3).sign())
    return problem, 0.5 * normal(q + n, seed=seed + 4), torch.zeros(q, dtype=torch.float64)


@st.composite
def smooth_problems(draw: st.DrawFn) -> tuple[BilevelProblem, Tensor, Tensor]:
    """A quadratic or a logistic problem, an outer point and an inner start."""
    if draw(st.booleans()):
        family = draw(families(kappa=10.0))
        x = normal(family.s.numel(), seed=draw(st.integers(0, 99)))
        return BilevelProblem(family.f, family.g), x, torch.zeros_like(family.c)
    data, x, y0 = draw(logistic())
    return BilevelProblem(data.f, data.g), x, y0


@st.composite
def nestings(draw: st.DrawFn, size: int) -> Callable[[Tensor], Any]:
    """A way to cut a vector of this size into a nested structure; a map from vectors to structures."""
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
