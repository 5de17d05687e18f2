"""Problems with all constants and an exact hypergradient, and inexact solutions of them, for tests of certificates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from bilevel_strategies import families
from hypothesis import strategies as st
from torch import Tensor

from bilevel import BilevelProblem, Constants, ravel
from bilevel._flat import FlatProblem
from bilevel.problems.hyper_cleaning import HyperCleaning
from bilevel.problems.logistic import Logistic

THIRD = 4 / (3 * math.sqrt(3))  # the greatest |third derivative| of log cosh


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def to(data: Any, dtype: torch.dtype) -> Any:
    """A dataclass of tensors in another dtype."""
    content = {each.name: getattr(data, each.name) for each in fields(data)}
    return replace(
        data,
        **{
            name: tensor.to(dtype)
            for name, tensor in content.items()
            if isinstance(tensor, Tensor) and tensor.dtype.is_floating_point
        },
    )


@dataclass(frozen=True, eq=False)
class Curved:
    """g = m |y|^2 / 2 + c x_0 |y|^2 / 2 + s sum log cosh y - x'B y,  f = b'y + k |y - t|^2 / 2 + w x_0 sum y.

    Strongly convex, with every constant of theorem A; f is linear in y where k = 0.
    """

    B: Tensor
    b: Tensor
    t: Tensor
    m: float
    c: float
    s: float
    k: float
    w: float

    def g(self, x: Tensor, y: Tensor) -> Tensor:
        """The inner objective."""
        square = y.square().sum()
        logcosh = (torch.nn.functional.softplus(2 * y) - y).sum()
        return (self.m + self.c * x[0]) * square / 2 + self.s * logcosh - (x @ self.B @ y)

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        """The outer objective."""
        return (self.b * y).sum() + self.k * (y - self.t).square().sum() / 2 + self.w * x[0] * y.sum()

    def constants(self, x: Tensor) -> Constants:
        """The constants, for every y; C_G is left to be bounded."""
        mu = self.m + self.c * float(x[0])
        w = abs(self.w) * math.sqrt(self.b.numel())
        return Constants(mu, mu + self.s, self.k, w, self.s * THIRD, abs(self.c), L_f_minus=0.0, source="structural")


@dataclass(frozen=True, eq=False)
class DoubleWell:
    """g = sum a_j (y_j^2 - 1)^2 / 4 + c x_0 |y|^2 / 2 - x'B y,  f = |y - t|^2 / 2 + w x_0 sum y: many wells."""

    a: Tensor
    B: Tensor
    t: Tensor
    signs: Tensor
    c: float
    w: float

    RADIUS = 0.5

    def g(self, x: Tensor, y: Tensor) -> Tensor:
        """The inner objective."""
        wells = (self.a * (y.square() - 1).square()).sum() / 4
        return wells + self.c * x[0] * y.square().sum() / 2 - (x @ self.B @ y)

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        """The outer objective."""
        return (y - self.t).square().sum() / 2 + self.w * x[0] * y.sum()

    def constants(self, y: Tensor) -> Constants:
        """For the local theorem, on the ball of the radius around points at most twice the radius away from y."""
        M_yy = float((6 * self.a * (y.abs() + 3 * self.RADIUS)).max())
        w = abs(self.w) * math.sqrt(self.t.numel())
        return Constants(None, None, 1.0, w, M_yy, abs(self.c), L_f_minus=0.0, radius=self.RADIUS, source="structural")


@dataclass(frozen=True, eq=False)
class Drawn:
    """A problem in float64, and in float32 with the same data; a point, its constants, y* and h, exactly.

    Attributes:
        kind: which family.
        exact: the problem in float64.
        user: the same in the dtype under test.
        x: the point, in that dtype.
        constants: of the problem there.
        y: y* `(q,)` in float64.
        h: the hypergradient `(p,)` in float64.
    """

    kind: str
    exact: BilevelProblem
    user: BilevelProblem
    x: Tensor
    y0: Tensor
    constants: Constants
    y: Tensor = field(init=False)
    h: Tensor = field(init=False)

    def __post_init__(self) -> None:
        y = stationary(self.flat(torch.float64), self.x.double(), self.y0.double().reshape(-1))
        object.__setattr__(self, "y", y)
        object.__setattr__(self, "h", hypergradient_at(self.flat(torch.float64), self.x.double(), y))

    def flat(self, dtype: torch.dtype) -> FlatProblem:
        """The problem in vectors."""
        x, y = (ravel(t.to(dtype))[1] for t in (self.x, self.y0))
        return FlatProblem(self.exact if dtype == torch.float64 else self.user, x, y)


def derivatives(problem: FlatProblem, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad_y g, H, G, grad_x f, grad_y f, densely, by nothing but autograd."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    (e,) = torch.autograd.grad(problem.g(x, y), y, create_graph=True)
    rows = [torch.autograd.grad(e_j, (y, x), retain_graph=True) for e_j in e]
    fx, fy = torch.autograd.grad(problem.f(x, y), (x, y), allow_unused=True, materialize_grads=True)
    return e.detach(), torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows]).T, fx, fy


def stationary(problem: FlatProblem, x: Tensor, y: Tensor) -> Tensor:
    """y* near y by dense Newton steps, damped while the gradient does not fall; asserted to be a strict minimum."""
    for _ in range(200):
        e, H, *_ = derivatives(problem, x, y)
        step, t = torch.linalg.solve(H, e), 1.0
        while t > 1e-3 and derivatives(problem, x, y - t * step)[0].norm() > e.norm():
            t /= 2
        if t <= 1e-3:
            break
        y = y - t * step
        if step.norm() <= 1e-15 * (1 + y.norm()):
            break
    e, H, *_ = derivatives(problem, x, y)
    assert e.norm() <= 1e-12 * max(1.0, float(torch.linalg.matrix_norm(H, 2)))
    assert torch.linalg.eigvalsh(H)[0] > 0
    return y


def hypergradient_at(problem: FlatProblem, x: Tensor, y: Tensor) -> Tensor:
    """fx - G H^-1 fy, densely."""
    _, H, G, fx, fy = derivatives(problem, x, y)
    h: Tensor = fx - G @ torch.linalg.solve(H, fy)
    return h


KINDS = ("quadratic", "logistic", "cleaning", "curved", "double-well")
TERMS = {"c": 1.0, "s": 1.0, "k": 1.0, "w": 0.5}  # of curved problems, with their weights


@st.composite
def drawn(
    draw: st.DrawFn,
    kinds: tuple[str, ...] = KINDS,
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32),
    terms: tuple[str, ...] = ("all", *TERMS),
) -> Drawn:
    """A problem of one of the kinds, in one of the dtypes; a curved one with all terms or one alone.

    With a single term, the constant that belongs to it is the only one of M_xy, M_yy, L_fyy and L_fxy that counts.
    """
    kind, seed = draw(st.sampled_from(kinds)), draw(st.integers(0, 10_000))
    dtype = draw(st.sampled_from(dtypes))
    closed = draw(st.booleans())  # whether f and g close over float32 data, so that they cannot be evaluated in float64
    q = draw(st.integers(1, 4))
    if kind == "quadratic":
        family: Any = draw(families(max_p=4, max_q=5, kappa=draw(st.sampled_from([3.0, 10.0, 30.0, 100.0]))))
        x = normal(family.s.numel(), seed=seed).to(dtype)
        return build(kind, family, x, torch.zeros_like(family.c), dtype, closed, lambda data, _: data.constants())
    if kind == "logistic":
        n, classes = draw(st.integers(4, 12)), draw(st.sampled_from([2, 3]))
        per_feature, eps = draw(st.booleans()), draw(st.sampled_from([None, 0.5]))
        family = Logistic(*samples(n, q, classes, seed), 1 if classes == 2 else classes, eps)
        x = 0.5 * normal(q if per_feature else 1, seed=seed + 7) + draw(st.sampled_from([-2.0, -1.0, 0.0]))
        kind = kind if eps is None else "logistic with L1"
        return build(kind, family, wrapped(x, eps, dtype), family.zero(), dtype, closed, of_logistic(eps, per_feature))
    if kind == "cleaning":
        n, classes, c = draw(st.integers(3, 10)), draw(st.sampled_from([2, 3])), draw(st.sampled_from([0.02, 0.1, 0.5]))
        family = HyperCleaning(*samples(n, q, classes, seed), 1 if classes == 2 else classes, c)
        x = normal(n, seed=seed + 7).to(dtype)
        y0 = torch.zeros(family.outputs, q)
        return build(kind, family, x, y0, dtype, closed, lambda data, x: data.constants(x))
    p = draw(st.integers(1, 3))
    B, t = normal(p, q, seed=seed), normal(q, seed=seed + 1)
    if kind == "curved":
        m, only = draw(st.sampled_from([0.3, 1.0])), draw(st.sampled_from(terms))
        c, s, k, w = (weight if only in ("all", name) else 0.0 for name, weight in TERMS.items())
        scale = draw(st.sampled_from([0.01, 1.0]))
        b = draw(st.sampled_from([0.01, 1.0, 10.0])) * normal(q, seed=seed + 2)
        family = Curved(scale * B, b, t, m, c, s, k, w)
        x = torch.cat([normal(1, seed=seed + 3).abs(), normal(p - 1, seed=seed + 4)]).to(dtype)
        return build(kind, family, x, torch.zeros(q), dtype, closed, lambda data, x: data.constants(x))
    signs = normal(q, seed=seed + 5).sign()
    family = DoubleWell(1 + t.abs(), 0.2 * B / B.norm(), t, signs, draw(st.sampled_from([0.0, 0.1])), 0.5)
    x = normal(p, seed=seed + 6).clamp(-1, 1).to(dtype)
    found = build(kind, family, x, signs, dtype, closed, lambda data, _: data.constants(signs.double()))
    return replace(found, constants=to(family, dtype).constants(found.y))


def samples(n: int, q: int, classes: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and validation inputs and labels, each class in each of them."""
    generator = torch.Generator().manual_seed(seed + 3)
    X, U = normal(n, q, seed=seed), normal(n + 1, q, seed=seed + 1)
    return (
        X,
        torch.randint(classes, (n,), generator=generator),
        U,
        torch.randint(classes, (n + 1,), generator=generator),
    )


def wrapped(x: Tensor, eps: float | None, dtype: torch.dtype) -> Tensor:
    """The outer variable of a logistic problem as one vector; with a weight of the L1 norm at its end."""
    return (x if eps is None else torch.cat([x, torch.tensor([-1.0])])).to(dtype)


def of_logistic(eps: float | None, per_feature: bool) -> Callable[[Any, Tensor], Constants]:
    """The constants of a logistic problem; those but C_G hold for every y."""

    def constants(data: Any, x: Tensor) -> Constants:
        known: Constants = data.constants(penalties(x, eps, per_feature))
        return replace(known, C_G=None, radius=math.inf)

    constants.per_feature, constants.eps = per_feature, eps  # type: ignore[attr-defined]
    return constants


def penalties(x: Tensor, eps: float | None, per_feature: bool) -> Any:
    """The outer variable in the structure of the logistic problem."""
    l2 = x if eps is None else x[:-1]
    l2 = l2 if per_feature else l2[0]
    return l2 if eps is None else {"log_l2": l2, "log_l1": x[-1]}


def build(
    kind: str,
    family: Any,
    x: Tensor,
    y0: Tensor,
    dtype: torch.dtype,
    closed: bool,
    constants: Callable[[Any, Tensor], Constants],
) -> Drawn:
    """The problem of a family with its data rounded to the dtype."""
    data = to(to(family, dtype), torch.float64)
    own = to(family, dtype) if closed else data

    def cut(x: Tensor) -> Any:
        return penalties(x, constants.eps, constants.per_feature) if "logistic" in kind else x  # type: ignore[attr-defined]

    def cast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if closed:
            return lambda x, y: function(cut(x), y)
        return lambda x, y: function(cut(x.double()), y.double())

    exact = BilevelProblem(lambda x, y: data.f(cut(x), y), lambda x, y: data.g(cut(x), y))
    user = BilevelProblem(cast(own.f), cast(own.g))
    return Drawn(kind, exact, user, x, y0.to(dtype), constants(data, x.double()))


def pairs(case: Drawn, seed: int, ys: int, vs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inexact (y, v) near (y*, v(y)) in the dtype of the case, crude to tight: ys times vs of them."""
    exact, x, q = case.flat(torch.float64), case.x.double(), case.y.numel()
    single = case.x.dtype != torch.float64
    finest = -6.0 if single else -9.0
    coarsest = -1.2 if case.kind == "double-well" else 0.3
    for i in range(ys):
        direction = normal(q, seed=seed + 31 * i)
        size = 10.0 ** (coarsest + (finest - coarsest) * i / max(ys - 1, 1))
        y = (case.y + size * direction / direction.norm()).to(case.x.dtype)
        _, H, _, _, fy = derivatives(exact, x, y.double())
        shift = max(0.0, 1e-3 - float(torch.linalg.eigvalsh(H)[0]))
        v = torch.linalg.solve(H + shift * torch.eye(q), fy)
        for j in range(vs):
            noise = normal(q, seed=seed + 31 * i + 7 * j + 1)
            off = 0.0 if j == 0 else 10.0 ** (finest * (vs - 1 - j) / max(vs - 2, 1)) * float(1 + v.norm())
            yield y, (v + off * noise / noise.norm()).to(case.x.dtype)
