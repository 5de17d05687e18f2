"""A term of an affine map: scaled, translated, rotated."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from bilevel._tree import Tree, ravel, tree_leaves, tree_map
from bilevel.arguments.fits import demand_type, demand_types
from bilevel.arguments.ranges import POSITIVE, SIZE, demand_ranges
from bilevel.arguments.shapes import Shape, demand_shapes
from bilevel.prox.conjugate import Conjugate
from bilevel.prox.derivative import Parts, ProxDerivative
from bilevel.prox.linear_image import LinearImage
from bilevel.prox.quadratic import as_vector
from bilevel.prox.structured import on_vector
from bilevel.prox.term import AbstractProxTerm, demand_number, on_leaves, outside, total


@final
@dataclass(frozen=True, eq=False)
class Affine(AbstractProxTerm):
    """y -> h(A y + b); where A A' = a I its prox is v + A' (prox_{a t h}(z) - z) / a, z = A v + b.

    So for a number A = s: v + (prox_{s^2 t h}(s v + b) - s v - b) / s. The derivative is I - A' (I - P) A / a, with P
    that of h at z. The conjugate is h*(A u / a) - b' A u / a where u is in the range of A', else infinite.

    For any other matrix the map is an iteration, see `LinearImage`: to `tol`, by the method of multipliers with steps
    of Newton's, some milliseconds for m = 60 and q = 60. The derivative is then one of dense matrices, and h needs one.
    If it does not come to rest, as for a set that A y + b does not meet, the margin is NaN, and an estimate ends with
    `Status.nonfinite`; A y + b is in a set to the tolerance, so that the value there may be infinite. The conjugate has
    no value in closed form. Where A' is not injective, the margin is that of one of several multipliers, and may be
    less than that of the best. `ADMM` and `PrimalDual` take such a term apart, and solve for y without its map.

    Source: Combettes and Pesquet, "Proximal splitting methods in signal processing", 2011, Table 10.1.

    Args:
        term: h.
        A: a number other than zero; or a matrix `(m, q)` other than zero, for y as one vector. h is then of vectors
            `(m,)`.
        b: a number, a vector, or a structure like y.
        tol: of the iteration, relative.
        max_steps: of it.

    Raises:
        ValueError: if A is zero.

    Example:
        >>> from bilevel.prox import L1
        >>> Affine(L1(1.0), b=-3.0).prox(torch.tensor([3.2, 5.0]), 1.0)  # |y - 3|
        tensor([3., 4.])
    """

    term: AbstractProxTerm
    A: float | Tensor = 1.0
    b: Tree = 0.0
    tol: float = 1e-12
    max_steps: int = 10_000
    _tight: bool = field(init=False, repr=False, default=True)

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, tol=POSITIVE, max_steps=SIZE)
        demand_number("Affine", "A", self.A)
        for leaf in tree_leaves(self.b, "`Affine(b=...)`"):
            demand_type("Affine", "b", leaf, float | Tensor)
        if isinstance(self.A, Tensor):
            axes = "m q" if self.A.dim() else ""
            demand_shapes("Affine", {"A": Shape(axes, kind="number", finite=False)}, vars(self))
            if self.A.dim():
                object.__setattr__(self, "_tight", _is_tight(self.A))
        elif self.A == 0:
            raise ValueError("`Affine(A=...)` must be other than zero. Got 0: h(b) is a constant.")

    def value(self, y: Tree) -> Tensor:
        return self.term.value(self._image(y))

    def prox(self, v: Tree, step: Tensor | float) -> Tree:
        if (general := self.composition(v)) is not None:
            flat, structure = ravel(v, "v")
            return structure.unravel(general.prox(flat, step))
        z = self._image(v)
        moved = on_leaves(lambda new, old: new - old, self.term.prox(z, self._square() * step), z)
        if self._is_number:
            return on_leaves(lambda leaf, m: leaf + m / self.A, v, moved)
        flat, structure = ravel(v, "v")
        return structure.unravel(flat + self._matrix(flat).mT @ (moved / self._square()))

    def margin(self, v: Tree, step: Tensor | float) -> Tensor:
        if (general := self.composition(v)) is not None:
            return general.margin(ravel(v, "v")[0], step)
        return self.term.margin(self._image(v), self._square() * step)

    def derivative(self, v: Tree, step: Tensor | float) -> ProxDerivative | None:
        if (general := self.composition(v)) is not None:
            return general.derivative(ravel(v, "v")[0], step)
        P = self.term.derivative(self._image(v), self._square() * step)
        if P is None or self._is_number:
            return P
        A = self._matrix(ravel(v, "v")[0])
        parts = (*P.parts, A / self._square() ** 0.5)
        inside = None if P.co_inverse is None else on_vector(partial(_inside, P.co_inverse))
        return ProxDerivative(
            parts, on_vector(partial(_rotated, P.times)), on_vector(partial(_rotated, P.inverse)), inside
        )

    def active(self, v: Tree, step: Tensor | float) -> Tensor:
        if (general := self.composition(v)) is not None:
            return general.active(ravel(v, "v")[0], step)
        return self.term.active(self._image(v), self._square() * step)

    def conjugate(self) -> Conjugate:
        return Conjugate(self)

    def composition(self, y: Tree) -> LinearImage | None:
        if self._tight:
            return None
        flat = ravel(y, "y")[0]
        A = self._matrix(flat)
        return LinearImage(self.term, A, self._shift(torch.zeros_like(A[:, 0])), self.tol, self.max_steps)

    def conjugate_value(self, u: Tree) -> Tensor:
        if not self._tight:
            return AbstractProxTerm.conjugate_value(self, u)
        if self._is_number:
            z = tree_map(lambda leaf: leaf / self.A, u)
            return self.term.conjugate().value(z) - total(on_leaves(lambda leaf, b: leaf * b, z, self.b))
        flat = ravel(u, "u")[0]
        A = self._matrix(flat)
        z = A @ flat / self._square()
        off = torch.linalg.vector_norm(flat - A.mT @ z)
        value: Tensor = self.term.conjugate().value(z) - z @ self._shift(z) + outside(off, flat.abs().sum(), len(flat))
        return value

    @property
    def separable(self) -> bool:
        return self._is_number and self.term.separable

    @property
    def _is_number(self) -> bool:
        return not isinstance(self.A, Tensor) or not self.A.dim()

    def _square(self) -> Any:
        """a, with A A' = a I."""
        if self._is_number:
            return self.A * self.A
        assert isinstance(self.A, Tensor)
        return self.A.square().sum() / len(self.A)

    def _matrix(self, flat: Tensor) -> Tensor:
        A = torch.as_tensor(self.A, dtype=flat.dtype, device=flat.device)
        if A.shape[1] != len(flat):
            raise ValueError(f"`Affine(A=...)` must have {len(flat)} columns, as y has entries. Got {A.shape[1]}.")
        return A

    def _shift(self, z: Tensor) -> Tensor:
        return as_vector(self.b, ravel(z)[1], "Affine(b=...)")

    def _image(self, y: Tree) -> Tree:
        """A y + b."""
        if self._is_number:
            return on_leaves(lambda leaf, b: self.A * leaf + b, y, self.b)
        flat = ravel(y, "y")[0]
        z = self._matrix(flat) @ flat
        return z + self._shift(z)


def _is_tight(A: Tensor) -> bool:
    """Whether A A' = a I, to rounding, for all that are side by side."""
    every = torch.func.debug_unwrap(A.detach(), recurse=True)
    every = every if every.is_floating_point() else every.double()
    probe = torch.cos(1.0 + torch.arange(every.shape[-2], device="cpu").to(every)).unsqueeze(-1)
    image, length = every @ (every.mT @ probe), every.square().sum((-2, -1), keepdim=True) / every.shape[-2]
    if not bool(((image - length * probe).abs() <= torch.finfo(every.dtype).eps ** 0.5 * length).all()):
        return False  # as cheap as a product
    gram = every @ every.mT
    a = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    if bool((a == 0).any()):
        raise ValueError("`Affine(A=...)` must be other than zero. Got a matrix of zeros: h(b) is a constant.")
    off = (gram - a * torch.eye(gram.shape[-1], dtype=every.dtype, device=every.device)).abs()
    return bool((off <= torch.finfo(every.dtype).eps ** 0.75 * a).all())


def _rotated(product: Any, parts: Parts, w: Tensor) -> Tensor:
    E = parts[-1]
    z = E @ w
    found: Tensor = w + E.mT @ (product(parts[:-1], z) - z)
    return found


def _inside(product: Any, parts: Parts, w: Tensor) -> Tensor:
    E = parts[-1]
    found: Tensor = E.mT @ product(parts[:-1], E @ w)
    return found
