"""Problems whose hypergradient is known in closed form, from harmless to hopeless: what `test_doubt` draws from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel import BilevelProblem, Polytope, prox
from bilevel.inner_problems import Iteration

D = torch.float64


@final
@dataclass(frozen=True, eq=False)
class Case:
    """A problem, where it is asked, and what is true there.

    Attributes:
        family: which.
        problem: f and g.
        x: where, in the dtype that everything is computed in.
        y0: where y starts.
        truth: x in float64 -> grad Phi there; None: there is none, and nothing may be successful.
        size: x -> how large the terms are that the hypergradient is made of.
        mu: x -> the least curvature of g at y*, L: x -> the largest.
        steps: the truth is that of so many steps of descent with step 0.3, for whoever takes these.
        zero: x occurs nowhere: a zero is no answer.
        stationary: the truth of the stationary point that y is, for whoever does not mind what kind of point it is.
    """

    family: str
    problem: BilevelProblem
    x: Tensor
    y0: Tensor
    truth: Callable[[Tensor], Tensor] | None
    size: Callable[[Tensor], float] = lambda x: 1.0
    mu: float = 1.0
    L: float = 1.0
    steps: int | None = None
    zero: bool = False
    stationary: Callable[[Tensor], Tensor] | None = None

    def __repr__(self) -> str:
        return f"{self.family}(x={self.x.tolist()}, y0={self.y0.tolist()}, {self.x.dtype})"


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, width=32).map(lambda v: round(v, 3))


@st.composite
def vectors(draw: st.DrawFn, low: float, high: float, size: int | None = None) -> Tensor:
    n = draw(st.integers(1, 3)) if size is None else size
    return torch.tensor([draw(numbers(low, high)) for _ in range(n)], dtype=D)


DTYPES = st.sampled_from([torch.float64, torch.float64, torch.float32])


@st.composite
def quadratic(draw: st.DrawFn) -> Case:
    """G = s (y - B x)' diag(h) (y - B x) / 2, f = s (|y - c|^2 / 2 + <x, y>), at any scale and condition number."""
    x = draw(vectors(-3, 3))
    n, dtype = len(x), draw(DTYPES)
    condition = 10.0 ** draw(st.sampled_from([0, 0, 1, 2, 4, 6, 8] if dtype == D else [0, 0, 1, 2, 3]))
    limits = [0, 0, 0, -5, 5, -22, -30, 15] if dtype == torch.float32 else [0, 0, 0, -8, 8, -100, -170, 100]
    scale = 10.0 ** draw(st.sampled_from(limits))
    h = torch.logspace(0, float(torch.log10(torch.tensor(condition))), n + 1, dtype=D)
    B, c = torch.cat([torch.eye(n, dtype=D), torch.ones(1, n, dtype=D)]), draw(vectors(-2, 2, n + 1))
    E = torch.cat([torch.eye(n, dtype=D), torch.zeros(1, n, dtype=D)])
    h_, B_, c_, E_ = (t.to(dtype) for t in (h, B, c, E))

    def f(x: Tensor, y: Tensor) -> Tensor:
        return scale * ((y - c_).square().sum() / 2 + (E_ @ x) @ y)

    def g(x: Tensor, y: Tensor) -> Tensor:
        return scale * (h_ * (y - B_ @ x).square()).sum() / 2

    def truth(x: Tensor) -> Tensor:
        y = B @ x
        return scale * (E.T @ y + B.T @ (y - c + E @ x))

    def size(x: Tensor) -> float:
        y = B @ x
        return scale * float(y.norm() + 2 * (y.norm() + c.norm() + x.norm()) + 1)

    y0 = draw(vectors(-3, 3, n + 1)).to(dtype)
    name = f"quadratic, condition {condition:g}, scale {scale:g}"
    return Case(name, BilevelProblem(f, g), x.to(dtype), y0, truth, size, scale, scale * condition)


SCALARS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    # g by entries, y*(x), dy*/dx
    "asinh": (lambda x, y: y * y.asinh() - (1 + y * y).sqrt() - x * y, torch.sinh, torch.cosh),
    "cosh": (lambda x, y: y.cosh() - x * y, torch.asinh, lambda x: 1 / (1 + x * x).sqrt()),
    "exponential": (
        lambda x, y: x.exp() * y * y / 2 - x * y, lambda x: x * (-x).exp(), lambda x: (1 - x) * (-x).exp()
    ),
    "shifted": (lambda x, y: (y - x.sin()).square() / 2, torch.sin, torch.cos),
}  # fmt: skip


@st.composite
def smooth(draw: st.DrawFn) -> Case:
    """Smooth and strongly convex, with a curvature that changes along the way from y0."""
    name, dtype = draw(st.sampled_from(sorted(SCALARS))), draw(DTYPES)
    g_of, solution, slope = SCALARS[name]
    x, center = draw(vectors(-2, 2)), draw(numbers(-3, 3))
    y0 = draw(vectors(-5, 5, len(x)))

    def truth(x: Tensor) -> Tensor:
        return (solution(x) - center) * slope(x) + x

    def size(x: Tensor) -> float:
        return float((solution(x).abs() + abs(center) + 1).norm() * (1 + slope(x).abs().max()) + x.norm())

    problem = BilevelProblem(
        lambda x, y: ((y - center).square().sum() + x.square().sum()) / 2, lambda x, y: g_of(x, y).sum()
    )
    return Case(name, problem, x.to(dtype), y0.to(dtype), truth, size, mu=0.1, L=10.0)


@st.composite
def quartic(draw: st.DrawFn) -> Case:
    """G = y^4/4 + y^2/2 - x y at x = y*^3 + y*."""
    y, center = draw(vectors(-2.5, 2.5)), draw(numbers(-3, 3))
    x = y**3 + y

    def root(x: Tensor) -> Tensor:
        y = x.sign() * x.abs().pow(1 / 3).clamp(max=1e3)
        for _ in range(80):
            y = y - (y**3 + y - x) / (3 * y * y + 1)
        return y

    def truth(x: Tensor) -> Tensor:
        y = root(x)
        return (y - center) / (3 * y * y + 1)

    problem = BilevelProblem(
        lambda x, y: (y - center).square().sum() / 2, lambda x, y: (y**4 / 4 + y * y / 2 - x * y).sum()
    )
    y0 = draw(vectors(-5, 5, len(x)))
    return Case("quartic", problem, x, y0, truth, lambda x: float((root(x).abs() + abs(center) + 1).norm()), 1.0, 20.0)


@st.composite
def constrained(draw: st.DrawFn) -> Case:
    """y* = clamp(x, -1, upper), away from its kinks."""
    x = draw(vectors(-3, 3).filter(lambda x: bool(((x + 1).abs() > 0.1).all() and ((x - 1).abs() > 0.1).all())))
    c = draw(vectors(-2, 2, len(x)))

    def truth(x: Tensor) -> Tensor:
        return torch.where((x > -1) & (x < 1), x - c, 0.0)

    problem = BilevelProblem(
        lambda x, y: (y - c).square().sum() / 2, lambda x, y: (y - x).square().sum() / 2,
        constraints=lambda x: Polytope(lower=-1.0, upper=1.0),
    )  # fmt: skip
    return Case(
        "constrained", problem, x, draw(vectors(-1, 1, len(x))), truth, lambda x: float((x.abs() + c.abs() + 1).norm())
    )


@st.composite
def composite(draw: st.DrawFn) -> Case:
    """y* is the soft threshold of (3, -2, 0.2, ...) at e^x, off its kinks."""
    x = draw(numbers(-1, 0.5).filter(lambda x: abs(2.71828**x - 0.2) > 0.05))
    a, c = torch.tensor([3.0, -2.0, 0.2], dtype=D), draw(vectors(-2, 2, 3))

    def truth(x: Tensor) -> Tensor:
        y = a.sign() * (a.abs() - x.exp()).clamp_min(0)
        return ((y - c) * torch.where(y != 0, -a.sign() * x.exp(), 0.0)).sum().reshape(1)

    problem = BilevelProblem(
        lambda x, y: (y - c).square().sum() / 2, lambda x, y: (y - a).square().sum() / 2,
        prox=lambda x: prox.L1(x[0].exp()),
    )  # fmt: skip
    return Case("composite", problem, torch.tensor([x], dtype=D), torch.zeros(3, dtype=D), truth, lambda x: 15.0)


@st.composite
def iterative(draw: st.DrawFn) -> Case:
    """y_N = x^N y_0."""
    x, N = draw(vectors(-1.5, 1.5)), draw(st.integers(1, 4))
    y0 = draw(vectors(-2, 2, len(x)))
    problem = BilevelProblem(lambda x, y: y.square().sum() / 2, inner=Iteration(lambda x, y, k: x * y, steps=N))

    def truth(x: Tensor) -> Tensor:
        return x**N * y0 * N * x ** (N - 1) * y0

    return Case(
        "iterative", problem, x, y0, truth, lambda x: float((1 + x.abs() ** (2 * N)).sum() * (1 + y0.norm() ** 2) * N)
    )


@st.composite
def from_start(draw: st.DrawFn) -> Case:
    """From y_0 = x, and g without x: only so many steps, and where they begin, make a hypergradient."""
    x, a, N = draw(vectors(-2, 2)), draw(numbers(-2, 2)), draw(st.integers(1, 4))

    def truth(x: Tensor) -> Tensor:
        return (a + 0.7**N * (x - a) - 3) * 0.7**N

    problem = BilevelProblem(
        lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (y - a).square().sum() / 2, init=lambda x: x
    )
    return Case("from its start", problem, x, torch.zeros_like(x), truth, lambda x: 6.0 * len(x), steps=N)


@st.composite
def kinked(draw: st.DrawFn) -> Case:
    """|y - x| + (y - 3 x)^2 / 2 w: y* = x where |2 x| < w, and 3 x -+ w elsewhere; Phi is smooth off |2 x| = w."""
    w = draw(st.sampled_from([0.5, 1.0, 4.0]))
    x = draw(vectors(-3, 3).filter(lambda x: bool(((2 * x.abs() - w).abs() > 0.2).all() and (x.abs() > 0.2).all())))
    c = draw(numbers(-2, 2))
    kind = draw(st.sampled_from(["abs", "max", "relu"]))

    def size(v: Tensor) -> Tensor:
        if kind == "abs":
            return v.abs()
        if kind == "max":
            return torch.maximum(v, -v)
        return torch.relu(v) + torch.relu(-v)

    def truth(x: Tensor) -> Tensor:
        at_kink = 2 * x.abs() < w
        y = torch.where(at_kink, x, 3 * x - w * (2 * x).sign())
        return (y - c) * torch.where(at_kink, 1.0, 3.0)

    problem = BilevelProblem(
        lambda x, y: (y - c).square().sum() / 2, lambda x, y: (w * size(y - x) + (y - 3 * x).square() / 2).sum()
    )
    y0 = draw(st.sampled_from([torch.zeros_like(x), x.clone(), x + 0.3]))
    return Case(f"kinked, {kind}", problem, x, y0, truth, lambda x: float(3 * (3 * x.abs() + w + abs(c)).norm()))


@st.composite
def without_minimum(draw: st.DrawFn) -> Case:
    """A maximum or a saddle point of g where a minimum should be."""
    x = draw(vectors(-2, 2, 2))
    signs = torch.tensor(draw(st.sampled_from([[-1.0, -1.0], [1.0, -1.0]])), dtype=D)
    problem = BilevelProblem(lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (signs * (y - x).square()).sum() / 2)
    y0 = draw(st.sampled_from([x.clone(), x + 0.5]))
    return Case("without a minimum", problem, x, y0, None, lambda x: 12.0, stationary=lambda x: x - 3)


@st.composite
def lost(draw: st.DrawFn) -> Case:
    """f or g does not see x or y, as it should."""
    x = draw(vectors(-2, 2))
    how = draw(st.sampled_from(["f from y", "g from y", "g from x", "nowhere", "noise"]))

    def f(x: Tensor, y: Tensor) -> Tensor:
        return ((y.detach() if how == "f from y" else y) - 3).square().sum() / 2

    def g(x: Tensor, y: Tensor) -> Tensor:
        if how == "noise":
            return (y * (1 + 0.2 * torch.rand(y.shape, dtype=y.dtype)) - x).square().sum() / 2
        if how == "nowhere":
            return (y - 1).square().sum() / 2
        return ((y.detach() if how == "g from y" else y) - (x.detach() if how == "g from x" else x)).square().sum() / 2

    def truth(x: Tensor) -> Tensor:
        return x - 3

    right = truth if how in ("f from y", "g from x") else None  # values alone are right there
    problem, y0 = BilevelProblem(f, g), torch.zeros_like(x)
    return Case(f"lost, {how}", problem, x, y0, right, lambda x: float((x.abs() + 3).norm()), zero=how == "nowhere")


CASES: st.SearchStrategy[Case] = st.one_of(
    quadratic(), quadratic(), smooth(), smooth(), quartic(), constrained(), composite(), iterative(), from_start(),
    kinked(), without_minimum(), lost(),
)  # fmt: skip
