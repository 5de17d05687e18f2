"""What a linear map between images, signals and vectors is, and how maps are combined."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import SEED
from bilevel.portable.pickling import AbstractPortable
from bilevel.prox.term import demand_number
from bilevel.terms.gram import Gram

Size = tuple[int, ...]


def demand_array(call: str, z: Tensor, shape: Size) -> None:
    """Refuse an array of another shape, which torch's operations may take and make something else of.

    Raises:
        ValueError: naming the call.
    """
    if z.shape[max(0, z.dim() - len(shape)) :] != shape:
        raise ValueError(
            f"`{call}` takes arrays of shape {shape}, with the axes of a batch in front. Got {tuple(z.shape)}."
        )


class AbstractLinearMap(AbstractPortable, abc.ABC):
    """A: arrays of `in_shape` -> arrays of `out_shape`, with its adjoint A', <A y, z> = <y, A' z>.

    Axes in front of the shapes are independent arrays side by side. `A @ B` is the composition, `c * A` a multiple,
    `A.T` the adjoint, `A @ y - b` an expression of a variable y. What is known of A'A decides how fast systems with it
    are solved: `gram` says it, and a map that says nothing is solved with by conjugate gradients.
    """

    @property
    @abc.abstractmethod
    def in_shape(self) -> Size:
        """Of y."""

    @property
    @abc.abstractmethod
    def out_shape(self) -> Size:
        """Of A y."""

    @abc.abstractmethod
    def forward(self, y: Tensor) -> Tensor:
        """A y, `(*batch, *in_shape)` -> `(*batch, *out_shape)`, in operations of torch."""

    @abc.abstractmethod
    def adjoint(self, z: Tensor) -> Tensor:
        """A' z, `(*batch, *out_shape)` -> `(*batch, *in_shape)`."""

    @property
    def gram(self) -> Gram:
        """A'A, where it has a form to solve with."""
        return Gram(known=False)

    @property
    def multiplier(self) -> tuple[Tensor, int] | None:
        """s and the number of axes where A = F^-1 diag(s) F, so that A commutes with other such maps."""
        return None

    def __matmul__(self, other: AbstractLinearMap) -> Composition:
        return Composition(self, other) if isinstance(other, AbstractLinearMap) else NotImplemented

    def __rmul__(self, factor: float | Tensor) -> Composition:
        return Composition(Identity(self.out_shape, factor), self)

    @property
    def T(self) -> Adjoint:  # noqa: N802
        """A'."""
        return Adjoint(self)


@final
@dataclass(frozen=True, eq=False)
class LinearMap(AbstractLinearMap):
    """A map of one's own: its two functions and its two shapes.

    Args:
        function: y -> A y.
        transposed: z -> A' z; `adjoint_gap` tells whether it is the adjoint.
        domain: the shape of y, without the axes of a batch.
        codomain: that of A y, likewise.
        known_gram: A'A, where it has a form to solve with.

    Example:
        >>> A = LinearMap(
        ...     lambda y: y[..., ::2], lambda z: torch.stack([z, 0 * z], -1).flatten(-2), (4,), (2,)
        ... )
        >>> A.forward(torch.arange(4.0)), adjoint_gap(A) < 1e-6
        (tensor([0., 2.]), True)
    """

    function: Callable[[Tensor], Tensor]
    transposed: Callable[[Tensor], Tensor]
    domain: Size = ()
    codomain: Size = ()
    known_gram: Gram | None = None

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def in_shape(self) -> Size:
        return self.domain

    @property
    def out_shape(self) -> Size:
        return self.codomain

    def forward(self, y: Tensor) -> Tensor:
        return self.function(y)

    def adjoint(self, z: Tensor) -> Tensor:
        return self.transposed(z)

    @property
    def gram(self) -> Gram:
        return Gram(known=False) if self.known_gram is None else self.known_gram


@final
@dataclass(frozen=True, eq=False)
class Identity(AbstractLinearMap):
    """A y = c y.

    Args:
        shape: of y.
        factor: c, a number or a tensor of one.
    """

    shape: Size
    factor: float | Tensor = 1.0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_number("Identity", "factor", self.factor)

    @property
    def in_shape(self) -> Size:
        return self.shape

    @property
    def out_shape(self) -> Size:
        return self.shape

    def forward(self, y: Tensor) -> Tensor:
        return y if isinstance(self.factor, float) and self.factor == 1 else self.factor * y

    def adjoint(self, z: Tensor) -> Tensor:
        return self.forward(z)

    @property
    def gram(self) -> Gram:
        return Gram(scalar=self.factor * self.factor)


@final
@dataclass(frozen=True, eq=False)
class Composition(AbstractLinearMap):
    """A B: first B, then A.

    (A B)'(A B) = B' (A'A) B is closed where A'A is a multiple of I, and where B is a convolution and A'A one as well.

    Raises:
        ValueError: if A does not take what B gives.
    """

    outer: AbstractLinearMap
    inner: AbstractLinearMap

    def __post_init__(self) -> None:
        demand_types(self)
        if self.outer.in_shape != self.inner.out_shape:
            raise ValueError(
                f"`A @ B` needs an A that takes what B gives, {self.inner.out_shape}. Got one of arrays"
                f" {self.outer.in_shape}."
            )

    @property
    def in_shape(self) -> Size:
        return self.inner.in_shape

    @property
    def out_shape(self) -> Size:
        return self.outer.out_shape

    def forward(self, y: Tensor) -> Tensor:
        return self.outer.forward(self.inner.forward(y))

    def adjoint(self, z: Tensor) -> Tensor:
        return self.inner.adjoint(self.outer.adjoint(z))

    @property
    def gram(self) -> Gram:
        outer, turns = self.outer.gram, self.inner.multiplier
        if not outer.known or outer.dense is not None or outer.diagonal is not None:
            return Gram(known=False)
        if outer.fourier is None:
            return outer.scalar * self.inner.gram
        if turns is None or turns[1] != outer.axes:
            return Gram(known=False)
        square = turns[0].abs().square()
        return Gram(fourier=(outer.fourier + outer.scalar) * square, axes=outer.axes)

    @property
    def multiplier(self) -> tuple[Tensor, int] | None:
        first, second = self.outer.multiplier, self.inner.multiplier
        if first is None or second is None or first[1] != second[1]:
            return None
        return first[0] * second[0], first[1]


@final
@dataclass(frozen=True, eq=False)
class Adjoint(AbstractLinearMap):
    """A'."""

    map: AbstractLinearMap

    @property
    def in_shape(self) -> Size:
        return self.map.out_shape

    @property
    def out_shape(self) -> Size:
        return self.map.in_shape

    def forward(self, y: Tensor) -> Tensor:
        return self.map.adjoint(y)

    def adjoint(self, z: Tensor) -> Tensor:
        return self.map.forward(z)

    @property
    def gram(self) -> Gram:
        turns = self.map.multiplier
        return Gram(known=False) if turns is None else self.map.gram

    @property
    def multiplier(self) -> tuple[Tensor, int] | None:
        turns = self.map.multiplier
        return None if turns is None else (turns[0].conj(), turns[1])


@final
@dataclass(frozen=True, eq=False)
class Stacked(AbstractLinearMap):
    """y -> (A_1 y, A_2 y, ...), each as a vector, one after the other.

    Raises:
        ValueError: if there is no map, or they take arrays of different shapes.
    """

    maps: tuple[AbstractLinearMap, ...]

    def __post_init__(self) -> None:
        demand_types(self)
        shapes = {each.in_shape for each in self.maps}
        if len(shapes) != 1:
            raise ValueError(f"`Stacked(maps=...)` needs maps of arrays of one shape. Got {sorted(shapes)}.")

    @property
    def in_shape(self) -> Size:
        return self.maps[0].in_shape

    @property
    def out_shape(self) -> Size:
        return (sum(math.prod(each.out_shape) for each in self.maps),)

    def forward(self, y: Tensor) -> Tensor:
        demand_array("Stacked.forward", y, self.in_shape)
        batch = y.shape[: y.dim() - len(self.in_shape)]
        return torch.cat([each.forward(y).reshape(*batch, -1) for each in self.maps], -1)

    def adjoint(self, z: Tensor) -> Tensor:
        demand_array("Stacked.adjoint", z, self.out_shape)
        parts = torch.split(z, [math.prod(each.out_shape) for each in self.maps], -1)
        found = [
            each.adjoint(part.reshape(*z.shape[:-1], *each.out_shape))
            for each, part in zip(self.maps, parts, strict=True)
        ]
        return torch.stack(found).sum(0)

    @property
    def gram(self) -> Gram:
        total = self.maps[0].gram
        for each in self.maps[1:]:
            total = total + each.gram
        return total


@checked(seed=SEED)
def adjoint_gap(map: AbstractLinearMap, seed: int = 0) -> float:
    """|<A y, z> - <y, A' z>| / (|A y| |z| + |y| |A' z|) at a random y and z in float64: about 1e-16 for an adjoint.

    Run it on a map of your own: an adjoint that is none makes solvers stand still and derivatives wrong, silently.

    Args:
        map: A.
        seed: of y and z.

    Raises:
        ValueError: if A y or A' z is not of the shape that the map declares.

    Example:
        >>> adjoint_gap(LinearMap(lambda y: 2 * y, lambda z: z, (3,), (3,))) > 0.01  # A' z is 2 z
        True
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(shape: Size) -> Tensor:
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64, device="cpu")

    y, z = drawn(map.in_shape), drawn(map.out_shape)
    Ay, Az = map.forward(y), map.adjoint(z)
    for name, found, wanted in (("forward", Ay, z), ("adjoint", Az, y)):
        if found.shape != wanted.shape:
            raise ValueError(
                f"`{type(map).__name__}.{name}` must return {tuple(wanted.shape)} for a batch of 2. Got"
                f" {tuple(found.shape)}. Write it for axes in front of those of the array."
            )
    gap = abs(float((Ay * z).sum() - (y * Az).sum()))
    size = float(Ay.norm() * z.norm() + y.norm() * Az.norm())
    return gap / size if size else 0.0
