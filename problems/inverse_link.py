"""Smooth inner problems that are not quadratic, with y* an inverse function: asinh, Lambert's W, Cardano, atanh."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import softplus

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem
from bilevel.arguments.checked import checked, fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import SEED, SIZE, Range
from bilevel.arguments.shapes import Shape, demand_shapes
from bilevel.certificates.certificate import Constants
from bilevel.problems._constants import RADIUS, structural


class AbstractPotential(abc.ABC):
    """A convex function psi of one variable, applied to each entry, whose derivative has a known inverse."""

    @abc.abstractmethod
    def value(self, y: Tensor) -> Tensor:
        """The potential: psi(y)."""

    @abc.abstractmethod
    def slope(self, y: Tensor) -> Tensor:
        """Its derivative: psi'(y)."""

    @abc.abstractmethod
    def inverse(self, z: Tensor) -> Tensor:
        """The y with psi'(y) = z."""

    @abc.abstractmethod
    def curvature(self, y: Tensor) -> Tensor:
        """The second derivative: psi''(y)."""

    @abc.abstractmethod
    def bounds(self, low: Tensor, high: Tensor) -> tuple[float, float, float]:
        """The least and greatest psi'', and the greatest |psi'''|, over y in the box [low, high]."""


def _far(low: Tensor, high: Tensor) -> float:
    return float(torch.maximum(low.abs(), high.abs()).max())


def _near(low: Tensor, high: Tensor) -> float:
    """The least |y| in the box, over all entries."""
    return float(torch.maximum(torch.maximum(low, -high), torch.zeros_like(low)).min())


@final
@dataclass(frozen=True)
class Sinh(AbstractPotential):
    """psi = cosh y, so that y = asinh z."""

    def value(self, y: Tensor) -> Tensor:
        return torch.cosh(y)

    def slope(self, y: Tensor) -> Tensor:
        return torch.sinh(y)

    def inverse(self, z: Tensor) -> Tensor:
        return torch.asinh(z)

    def curvature(self, y: Tensor) -> Tensor:
        return torch.cosh(y)

    def bounds(self, low: Tensor, high: Tensor) -> tuple[float, float, float]:
        far = _far(low, high)
        return math.cosh(_near(low, high)), math.cosh(far), math.sinh(far)


@final
@dataclass(frozen=True)
class Cubic(AbstractPotential):
    """psi = y^2/2 + y^4/4, so that y is Cardano's root of y + y^3 = z."""

    def value(self, y: Tensor) -> Tensor:
        return y.square() / 2 + y.square().square() / 4

    def slope(self, y: Tensor) -> Tensor:
        return y + y * y * y

    def inverse(self, z: Tensor) -> Tensor:
        # The hyperbolic form: Cardano's difference of cube roots cancels for small z.
        return 2 / math.sqrt(3) * torch.sinh(torch.asinh(1.5 * math.sqrt(3) * z) / 3)

    def curvature(self, y: Tensor) -> Tensor:
        return 1 + 3 * y.square()

    def bounds(self, low: Tensor, high: Tensor) -> tuple[float, float, float]:
        far = _far(low, high)
        return 1 + 3 * _near(low, high) ** 2, 1 + 3 * far**2, 6 * far


@final
@dataclass(frozen=True)
class Exponential(AbstractPotential):
    """psi = y^2/2 + exp y, so that y = z - W(exp z) with Lambert's W."""

    def value(self, y: Tensor) -> Tensor:
        return y.square() / 2 + y.exp()

    def slope(self, y: Tensor) -> Tensor:
        return y + y.exp()

    def inverse(self, z: Tensor) -> Tensor:
        # Newton's method from above: psi' is convex and increasing, so it descends to the root monotonically.
        y = torch.where(z > 1, z.clamp_min(1.0).log(), z)
        for _ in range(25):
            y = y - (y + y.exp() - z) / (1 + y.exp())
        return y

    def curvature(self, y: Tensor) -> Tensor:
        return 1 + y.exp()

    def bounds(self, low: Tensor, high: Tensor) -> tuple[float, float, float]:
        top = math.exp(float(high.max()))
        return 1 + math.exp(float(low.min())), 1 + top, top


@final
@dataclass(frozen=True)
class LogCosh(AbstractPotential):
    """psi = log cosh y, so that y = atanh z for |z| < 1; the curvature 1 - z^2 vanishes at the ends."""

    def value(self, y: Tensor) -> Tensor:
        return y + softplus(-2 * y, threshold=1000) - math.log(2)

    def slope(self, y: Tensor) -> Tensor:
        return torch.tanh(y)

    def inverse(self, z: Tensor) -> Tensor:
        return torch.atanh(z)

    def curvature(self, y: Tensor) -> Tensor:
        return 1 - torch.tanh(y).square()

    def bounds(self, low: Tensor, high: Tensor) -> tuple[float, float, float]:
        # |psi'''| = 2 sech^2 tanh is greatest, 4 / (3 sqrt 3), at tanh^2 = 1/3.
        return math.cosh(_far(low, high)) ** -2, math.cosh(_near(low, high)) ** -2, 4 / (3 * math.sqrt(3))


@final
@dataclass(frozen=True, eq=False)
class InverseLink:
    """g = sum psi(y) - y'(Bx + c),  f = |y - t|^2 / 2: y* = (psi')^-1 (Bx + c), and Phi(x*) = 0 at y*(x*) = t.

    No constant of g but C_G holds for every y; those given hold for |y - y*(x)| <= 1.

    Args:
        potential: psi.
        B: `(q, q)`, invertible.
        c: `(q,)`.
        t: `(q,)`.
    """

    potential: AbstractPotential
    B: Tensor
    c: Tensor
    t: Tensor

    def __post_init__(self) -> None:
        demand_types(self)
        demand_shapes("InverseLink", {"B": Shape("q q"), "c": Shape("q"), "t": Shape("q")}, vars(self))

    @fitting
    def f(self, _: Tensor, y: Tensor) -> Tensor:
        """The outer objective."""
        return (y - self.t).square().sum() / 2

    @fitting
    def g(self, x: Tensor, y: Tensor) -> Tensor:
        """The inner objective."""
        return self.potential.value(y).sum() - (y * (self.B @ x + self.c)).sum()

    @fitting
    def solution(self, x: Tensor) -> Tensor:
        """y*(x)."""
        return self.potential.inverse(self.B @ x + self.c)

    @fitting
    def gradient(self, x: Tensor) -> Tensor:
        """The hypergradient at x: B' ((y* - t) / psi''(y*))."""
        y = self.solution(x)
        return self.B.T @ ((y - self.t) / self.potential.curvature(y))

    @fitting
    def minimizer(self) -> Tensor:
        """x* = B^-1 (psi'(t) - c)."""
        x: Tensor = torch.linalg.solve(self.B, self.potential.slope(self.t) - self.c)
        return x

    @fitting
    def constants(self, x: Tensor) -> Constants:
        """The constants for |y - y*(x)| <= 1."""
        y = self.solution(x)
        mu, L, M_yy = self.potential.bounds(y - RADIUS, y + RADIUS)
        return structural(
            mu=mu, L=L, L_fyy=1.0, M_yy=M_yy, C_G=float(torch.linalg.matrix_norm(self.B, 2)), radius=RADIUS
        )

    @fitting
    def instance(self, description: str, x0: Tensor | None = None) -> Instance:
        """The problem with everything known about it; it starts at x = 0 unless told otherwise."""
        return Instance(
            problem=BilevelProblem(self.f, self.g),
            x0=torch.zeros_like(self.c) if x0 is None else x0,
            y0=torch.zeros_like(self.c),
            description=description,
            solution=self.solution,
            gradient=self.gradient,
            constants=self.constants,
            minimizer=self.minimizer(),
            settings={"estimator": "aid-cg", "outer_step": 0.1, "max_steps": 200},
        )


def _random(potential: AbstractPotential, q: int, seed: int) -> InverseLink:
    if q < 1:
        raise ValueError(f"an inner problem needs `q` of at least 1. Got {q}.")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    left, right = (torch.linalg.qr(normal(q, q))[0] for _ in range(2))
    B = left @ torch.diag(torch.linspace(0.5, 1.5, q, dtype=torch.float64, device="cpu")) @ right.T
    return InverseLink(potential, B, 0.5 * normal(q), 0.7 * normal(q))


@checked(q=SIZE, seed=SEED)
def asinh(*, q: int = 5, seed: int = 0) -> Instance:
    """y* = asinh(Bx + c), from g = sum cosh(y) - y'(Bx + c); see :class:`InverseLink`.

    Args:
        q: number of inner and of outer variables.
        seed: of the draw.

    Example:
        >>> instance = asinh()
        >>> instance.value(instance.minimizer) < 1e-20
        True
    """
    return _random(Sinh(), q, seed).instance("inner problem of the form cosh, y* an asinh")


@checked(q=SIZE, seed=SEED)
def lambert(*, q: int = 5, seed: int = 0) -> Instance:
    """y* = z - W(exp z), z = Bx + c, from g = |y|^2 / 2 + sum exp(y) - y'z; see :class:`InverseLink`.

    Args:
        q: number of inner and of outer variables.
        seed: of the draw.
    """
    return _random(Exponential(), q, seed).instance("inner problem with an exponential, y* by Lambert's W")


@checked(q=SIZE, seed=SEED)
def cardano(*, q: int = 5, seed: int = 0) -> Instance:
    """y* + y*^3 = Bx + c, from g = |y|^2 / 2 + sum y^4 / 4 - y'(Bx + c); see :class:`InverseLink`.

    Args:
        q: number of inner and of outer variables.
        seed: of the draw.
    """
    return _random(Cubic(), q, seed).instance("quartic inner problem, y* by Cardano's formula")


@checked(target=Range(-1.0, 1.0, open=True))
def atanh(*, target: float = 0.8) -> Instance:
    """y* = atanh x for |x| < 1, from g = log cosh y - xy; f = (y - target)^2 / 2, so that x* = tanh(target).

    g is convex, but not strongly convex for every y: the curvature at y*(x) is 1 - x^2. Outside |x| < 1 there is
    no inner solution.

    Args:
        target: the outer target.

    Example:
        >>> round(float(atanh(target=0.5).minimizer), 6)
        0.462117
    """
    one = torch.ones((1, 1), dtype=torch.float64, device="cpu")
    family = InverseLink(LogCosh(), one, torch.zeros(1, dtype=torch.float64, device="cpu"), one[0] * target)
    return family.instance("inner curvature 1 - x^2, y* = atanh x", x0=torch.full_like(family.c, -0.3))
