"""Hypothesis strategies: matrices of bounded condition number, bilevel problems, structures.

Needs hypothesis, which is imported when a strategy is first made: `pip install "bilevel[test]"`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from bilevel._flat import FlatProblem
from bilevel._problem import BilevelProblem
from bilevel._tree import ravel
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import COUNT, SEED, SIZE
from bilevel.arguments.shapes import Shape
from bilevel.inner_problems.kinds import inner_objective
from bilevel.problems.quadratic import QuadraticFamily, random_quadratic
from bilevel.prox import L1, AbstractProxTerm, LInfBall
from bilevel.solvers.fista import FISTA
from bilevel.testing.fixed_points import FixedPointFamily
from bilevel.testing.logistic import Logistic
from bilevel.testing.programs import Program

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
    eigenvalues = eigenvalues.to(Q)
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
def composites(
    draw: DrawFn,
    max_p: int = 4,
    max_q: int = 6,
    kappa: float = 30.0,
    margin: float = 1e-3,
    terms: Sequence[Callable[[Tensor], AbstractProxTerm]] = (),
) -> tuple[BilevelProblem, Tensor, Tensor]:
    """Strongly convex quadratics g with a non-smooth term, an outer point and an inner start, away from kinks.

    The eigenvalues of d2g/dy2 are in [mu, kappa mu], mu of every scale. At x the relative distance of y* from a kink is
    at least `margin`: what is nearer is not drawn.

    Args:
        draw: of hypothesis, given by it.
        max_p: the most entries of x.
        max_q: the most entries of y.
        kappa: the largest condition number.
        margin: the least distance.
        terms: x -> a term for y `(q,)`; none: weighted L1 norms and boxes whose sizes depend on x, of the size of y.
    """
    from hypothesis import assume

    st = _hypothesis()
    family = draw(quadratics(max_p, max_q, kappa))
    x = gaussian(family.s.numel(), seed=draw(st.integers(0, 99)))
    y0 = torch.zeros_like(family.c)
    part = 10.0 ** -draw(st.integers(0, 2))
    smooth = BilevelProblem(family.f, family.g)
    flat = FlatProblem(smooth, ravel(x)[1], ravel(y0)[1])
    force = float(torch.linalg.vector_norm(_gradient_of(flat, x, y0))) + 1e-3
    weights = force * part * (0.5 + torch.rand(len(y0), generator=torch.Generator().manual_seed(1)).double())
    size = part * float(torch.linalg.vector_norm(family.solution(x))) + 1e-3
    own: list[Callable[[Tensor], AbstractProxTerm]] = [
        lambda x: L1(force * part * x[0].sigmoid()),
        lambda x: L1(weights * (x.sum() / 4).exp()),
        lambda x: LInfBall(size * x[-1].sigmoid()),
    ]
    term = draw(st.sampled_from(list(terms) or own))
    problem = BilevelProblem(family.f, family.g, prox=term)
    solved = FISTA(tol=1e-12 * force, max_steps=20_000).solve(
        inner_objective(FlatProblem(problem, flat.x, flat.y), x), y0
    )
    y = solved.value
    gradient = _gradient_of(flat, x, y)
    t = float(y.abs().max() / gradient.abs().max()) if bool((y != 0).any() & (gradient != 0).any()) else 1.0
    assume(solved.status.ok and float(term(x).margin(y - t * gradient, t)) > margin)
    return problem, x, y0


@_composite
def programs(
    draw: DrawFn, max_p: int = 3, max_q: int = 5, max_k: int = 6, kappa: float = 30.0, margin: float = 1e-2
) -> Program:
    """Quadratic programs with their solution: bounded condition numbers, and a margin of strict complementarity.

    The eigenvalues of Q are in [1, kappa]; rows that hold are independent, with singular values in [1, 3]; multipliers
    of those, and distances of the others, are at least `margin`. The first example is diagonal, with nothing that
    holds.

    Args:
        draw: of hypothesis, given by it.
        max_p: the most entries of x.
        max_q: the most entries of y.
        max_k: the most inequalities.
        kappa: the largest condition number.
        margin: the least multiplier of what holds, and the least distance of what does not.
    """
    st = _hypothesis()
    q, p, seed = draw(st.integers(1, max_q)), draw(st.integers(1, max_p)), draw(st.integers(0, 1000))
    m, held = draw(st.integers(0, min(1, q - 1))), draw(st.integers(0, q))
    held = min(held, q - m, max_k)
    k = draw(st.integers(max(held, 1), max_k))
    exponents = draw(st.lists(st.integers(0, 4), min_size=q, max_size=q))
    sizes = draw(st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=q, max_size=q))
    rows = torch.tensor(sizes, dtype=torch.float64, device="cpu").unsqueeze(-1) * orthogonal(q, seed)
    amounts = draw(st.lists(st.sampled_from([margin, 0.1, 1.0, 3.0]), min_size=k, max_size=k))
    sizes_of = torch.tensor(amounts, dtype=torch.float64, device="cpu")
    holds = torch.arange(k, device="cpu") < held
    return Program(
        Q=spd(torch.tensor([kappa ** (e / 4) for e in exponents], dtype=torch.float64, device="cpu"), seed),
        B=gaussian(q, p, seed=seed + 1),
        A=rows[held : held + m],
        G=torch.cat([rows[:held], gaussian(k - held, q, seed=seed + 2)]),
        H=gaussian(k, p, seed=seed + 3),
        t=gaussian(q, seed=seed + 4),
        y=gaussian(q, seed=seed + 5),
        multipliers=torch.where(holds, sizes_of, 0.0),
        slack=torch.where(holds, 0.0, sizes_of),
        nu=gaussian(m, seed=seed + 6),
    )


def _gradient_of(problem: FlatProblem, x: Tensor, y: Tensor) -> Tensor:
    """grad_y g(x, y)."""
    return inner_objective(problem, x).gradient(y)


@_composite
def fixed_points(
    draw: DrawFn, max_p: int = 3, max_q: int = 6, radius: float = 0.9, tanh: bool = False
) -> tuple[FixedPointFamily, Tensor, Tensor]:
    """Fixed points y = A y + B x + c, or of the tanh of that, with their oracle; an outer point and an inner start.

    A is in Schur form, in a random basis: one eigenvalue is -radius, the others are in [-m, m], m = min(radius, 0.9),
    or in pairs of such moduli, and what is above the diagonal makes it far from normal, or not. So the spectral radius
    is `radius`, and 1 is no eigenvalue. Failures shrink to one entry, and to A diagonal.

    Args:
        draw: of hypothesis, given by it.
        max_p: the most entries of x.
        max_q: the most entries of y.
        radius: the spectral radius of A; not 1.
        tanh: whether T is the tanh of the linear map.
    """
    st = _hypothesis()
    p, q = draw(st.integers(1, max_p)), draw(st.integers(1, max_q))
    small = draw(st.lists(st.floats(-1.0, 1.0, width=16), min_size=q - 1, max_size=q - 1))
    turn, above, seed = draw(st.booleans()), draw(st.sampled_from([0.0, 0.3, 1.0])), draw(st.integers(0, 2**20))
    moduli = [-radius, *(min(radius, 0.9) * share for share in small)]
    A = torch.diag(torch.tensor(moduli, dtype=torch.float64, device="cpu"))
    A = A + above * torch.triu(gaussian(q, q, seed=seed + 1), 1)
    if turn and q >= 3:  # a pair of complex eigenvalues
        A[1, 1], A[2, 2], A[1, 2], A[2, 1] = 0.0, 0.0, moduli[1], -moduli[1]
    Q = orthogonal(q, seed)
    B, c, t = gaussian(q, p, seed=seed + 2), gaussian(q, seed=seed + 3), gaussian(q, seed=seed + 4)
    family = FixedPointFamily(Q @ A @ Q.T, B, c, t, gaussian(p, seed=seed + 5), tanh)
    return family, gaussian(p, seed=draw(st.integers(0, 99))), torch.zeros_like(c)


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
