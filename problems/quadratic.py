"""Both levels quadratic: everything about it is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import final

import torch
from torch import Tensor

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem
from bilevel._tree import Tree
from bilevel.arguments.checked import checked, fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, AT_LEAST_1, POSITIVE, SEED, SIZE
from bilevel.arguments.shapes import Shape, demand_shapes
from bilevel.certificates.certificate import Constants
from bilevel.problems._constants import structural


@final
@dataclass(frozen=True, eq=False)
class QuadraticFamily:
    """g = y'Ay / 2 - y'(Bx + c),  f = (y - t)'C(y - t) / 2 + x'Ey + x'Rx / 2 + s'x.

    Then y* = A^-1 (Bx + c), dy*/dx = A^-1 B, and grad Phi = E y* + R x + s + (A^-1 B)'(C (y* - t) + E'x). Where E
    is not zero, Phi may be nonconvex.

    Args:
        A: inner Hessian `(q, q)`, symmetric positive definite.
        B: coupling `(q, p)`; d2g/dxdy = -B'.
        c: inner linear term `(q,)`.
        C: outer Hessian in y `(q, q)`, symmetric.
        t: outer target `(q,)`.
        E: outer coupling `(p, q)`.
        R: outer Hessian in x `(p, p)`, symmetric.
        s: outer linear term `(p,)`.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> family = random_quadratic(2, 3, eigenvalues=[1.0, 2.0, 4.0])
        >>> family.constants().kappa is not None and round(family.constants().kappa, 6)
        4.0
    """

    A: Tensor
    B: Tensor
    c: Tensor
    C: Tensor
    t: Tensor
    E: Tensor
    R: Tensor
    s: Tensor

    def __post_init__(self) -> None:
        demand_types(self)
        axes = {"A": "q q", "B": "q p", "c": "q", "C": "q q", "t": "q", "E": "p q", "R": "p p", "s": "p"}
        demand_shapes("QuadraticFamily", {name: Shape(each) for name, each in axes.items()}, vars(self))

    @fitting
    def f(self, x: Tensor, y: Tensor) -> Tensor:
        """The outer objective."""
        d = y - self.t
        return (d * (self.C @ d)).sum() / 2 + (x * (self.E @ y + self.R @ x / 2 + self.s)).sum()

    @fitting
    def g(self, x: Tensor, y: Tensor) -> Tensor:
        """The inner objective."""
        return (y * (self.A @ y / 2 - self.B @ x - self.c)).sum()

    @fitting
    def solution(self, x: Tensor) -> Tensor:
        """y*(x) = A^-1 (Bx + c)."""
        y: Tensor = torch.linalg.solve(self.A, self.B @ x + self.c)
        return y

    def jacobian(self) -> Tensor:
        """dy*/dx = A^-1 B: `(q, p)`."""
        J: Tensor = torch.linalg.solve(self.A, self.B)
        return J

    @fitting
    def gradient(self, x: Tensor) -> Tensor:
        """The hypergradient at x: `(p,)`."""
        y = self.solution(x)
        return self.E @ y + self.R @ x + self.s + self.jacobian().T @ (self.C @ (y - self.t) + self.E.T @ x)

    def outer_hessian(self) -> Tensor:
        """d2Phi/dx2 = R + E J + (E J)' + J'CJ with J = dy*/dx: `(p, p)`."""
        J = self.jacobian()
        return self.R + self.E @ J + (self.E @ J).T + J.T @ self.C @ J

    def minimizer(self) -> Tensor | None:
        """x* = argmin Phi, or None where Phi has no unique minimum."""
        hessian = self.outer_hessian()
        if not bool(torch.linalg.eigvalsh(hessian)[0] > 0):
            return None
        x: Tensor = -torch.linalg.solve(hessian, self.gradient(torch.zeros_like(self.s)))
        return x

    def constants(self) -> Constants:
        """The constants, which are the same at every x; all of them are attained."""
        eigenvalues = torch.linalg.eigvalsh(self.A.double())

        def norm(matrix: Tensor) -> float:
            return float(torch.linalg.matrix_norm(matrix.double(), 2))

        return structural(
            mu=float(eigenvalues[0]),
            L=float(eigenvalues[-1]),
            L_fyy=norm(self.C),
            L_fxy=norm(self.E),
            C_G=norm(self.B),
            L_f_minus=max(0.0, -float(torch.linalg.eigvalsh(self.C.double())[0])),
        )

    @fitting
    def to(self, dtype: torch.dtype) -> QuadraticFamily:
        """The same problem in another dtype."""
        return QuadraticFamily(*(getattr(self, field.name).to(dtype) for field in fields(self)))

    @fitting
    def instance(self, x0: Tensor | None = None, y0: Tensor | None = None) -> Instance:
        """The problem with everything known about it; it starts at zero unless told otherwise."""
        constants = self.constants()
        return Instance(
            problem=BilevelProblem(self.f, self.g),
            x0=torch.zeros_like(self.s) if x0 is None else x0,
            y0=torch.zeros_like(self.c) if y0 is None else y0,
            description=f"quadratics: p={self.s.numel()}, q={self.c.numel()}, condition number {constants.kappa:.3g}",
            solution=self.solution,
            gradient=self.gradient,
            constants=partial(_everywhere, constants),
            minimizer=self.minimizer(),
            settings={"estimator": "aid-cg", "outer_step": 0.1, "max_steps": 200},
        )


def _everywhere(constants: Constants, _: Tree) -> Constants:
    return constants


@checked(p=SIZE, q=SIZE, eigenvalues=POSITIVE, cross=AT_LEAST_0, seed=SEED)
def random_quadratic(
    p: int, q: int, *, eigenvalues: Sequence[float], cross: float = 0.0, seed: int = 0
) -> QuadraticFamily:
    """A member of the family whose inner Hessian has the given eigenvalues and a random dense eigenbasis.

    Args:
        p: number of outer variables.
        q: number of inner variables.
        eigenvalues: the q eigenvalues of A.
        cross: the spectral norm of E; 0 keeps Phi strictly convex.
        seed: of the draw.

    Raises:
        ValueError: if there are not q positive eigenvalues.
    """
    if len(eigenvalues) != q:
        raise ValueError(
            f"`random_quadratic(p, q, eigenvalues=...)` needs q positive eigenvalues."
            f" Got q={q} and {len(eigenvalues)} of them."
        )
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    def symmetric(values: Tensor) -> Tensor:
        basis: Tensor = torch.linalg.qr(normal(len(values), len(values)))[0]
        matrix = (basis * values) @ basis.T
        return (matrix + matrix.T) / 2

    A = symmetric(torch.tensor(eigenvalues, dtype=torch.float64, device="cpu"))
    B = normal(q, p) / p**0.5
    E = normal(p, q)
    return QuadraticFamily(
        A=A,
        B=B,
        c=normal(q),
        C=symmetric(torch.linspace(0.5, 2.0, q, dtype=torch.float64, device="cpu")),
        t=normal(q),
        E=cross * E / torch.linalg.matrix_norm(E, 2),
        R=symmetric(torch.linspace(0.1, 1.0, p, dtype=torch.float64, device="cpu")),
        s=normal(p),
    )


@checked(p=SIZE, q=SIZE, kappa=AT_LEAST_1, mu=POSITIVE, cross=AT_LEAST_0, seed=SEED)
def quadratic(
    *,
    p: int = 4,
    q: int = 6,
    kappa: float = 10.0,
    mu: float = 1.0,
    cross: float = 0.0,
    seed: int = 0,
    double: bool = True,
) -> Instance:
    """Random quadratics at both levels, with inner eigenvalues spaced geometrically from mu to kappa mu.

    Args:
        p: number of outer variables.
        q: number of inner variables.
        kappa: condition number of the inner Hessian.
        mu: its smallest eigenvalue.
        cross: the norm of the term x'Ey of f; above about 0.5 Phi may be nonconvex.
        seed: of the draw.
        double: float64, else float32.

    Raises:
        ValueError: if kappa < 1 or mu <= 0.

    Example:
        >>> instance = quadratic(p=2, q=3)
        >>> instance.gradient(instance.minimizer).abs().max() < 1e-12
        tensor(True)
    """
    if not kappa * mu < math.inf:
        raise ValueError(f"`quadratic(kappa=..., mu=...)` must have a finite product. Got {kappa:g} and {mu:g}.")
    exponents = (
        torch.linspace(0.0, 1.0, q, dtype=torch.float64, device="cpu")
        if q > 1
        else torch.ones(1, dtype=torch.float64, device="cpu")
    )
    eigenvalues = (mu * kappa**exponents).tolist()
    family = random_quadratic(p, q, eigenvalues=eigenvalues, cross=cross, seed=seed)
    return family.to(torch.float64 if double else torch.float32).instance()
