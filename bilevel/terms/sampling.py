"""Maps that see a part of an image: frequencies, colors, pixels; and matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import SIZE, demand_ranges
from bilevel.arguments.shapes import Shape, demand_shapes
from bilevel.arguments.words import got
from bilevel.terms.gram import Gram
from bilevel.terms.linear_map import AbstractLinearMap, Size, demand_array


@final
@dataclass(frozen=True, eq=False)
class FourierSamples(AbstractLinearMap):
    """A y = (Re, Im) of (F y)(k) at the sampled frequencies k, F unitary: what a magnetic resonance scanner measures.

    For real y, A'A = F^-1 diag((M(k) + M(-k)) / 2) F, so that least squares are solved by two transforms.

    Args:
        mask: M, of booleans: which frequencies, as `torch.fft.fftn` orders them; all axes of y.

    Raises:
        ValueError: if the mask is not of booleans.

    Example:
        >>> mean = FourierSamples(torch.tensor([True, False, False, False]))
        >>> mean.forward(torch.ones(4)), mean.out_shape
        (tensor([[2., 0.]]), (1, 2))
    """

    mask: Tensor
    _at: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        demand_types(self)
        if self.mask.dtype != torch.bool or not self.mask.dim():
            raise ValueError(f"`FourierSamples(mask=...)` must be a tensor of booleans. Got {got(self.mask)}.")
        object.__setattr__(self, "_at", self.mask.reshape(-1).nonzero().squeeze(-1))

    @property
    def in_shape(self) -> Size:
        return tuple(self.mask.shape)

    @property
    def out_shape(self) -> Size:
        return (len(self._at), 2)

    def forward(self, y: Tensor) -> Tensor:
        demand_array("FourierSamples.forward", y, self.in_shape)
        d = self.mask.dim()
        spectrum = torch.fft.fftn(y, dim=tuple(range(-d, 0)), norm="ortho")
        return torch.view_as_real(spectrum.flatten(-d).index_select(-1, self._at))

    def adjoint(self, z: Tensor) -> Tensor:
        demand_array("FourierSamples.adjoint", z, self.out_shape)
        d, values = self.mask.dim(), torch.view_as_complex(z.contiguous())
        empty = values.new_zeros(*values.shape[:-1], self.mask.numel())
        spectrum = empty.index_copy(-1, self._at, values).reshape(*values.shape[:-1], *self.in_shape)
        found: Tensor = torch.fft.ifftn(spectrum, dim=tuple(range(-d, 0)), norm="ortho").real
        return found

    @property
    def gram(self) -> Gram:
        axes = tuple(range(self.mask.dim()))
        own = self.mask.double()
        mirrored = torch.roll(own.flip(axes), [1] * len(axes), axes)  # k -> -k
        half = ((own + mirrored) / 2).narrow(-1, 0, self.mask.shape[-1] // 2 + 1)
        return Gram(fourier=half, axes=len(axes))


@final
@dataclass(frozen=True, eq=False)
class Diagonal(AbstractLinearMap):
    """(A y)_i = d_i y_i: masks of pixels, gains.

    Args:
        weights: d, of the shape of y.
    """

    weights: Tensor

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def in_shape(self) -> Size:
        return tuple(self.weights.shape)

    @property
    def out_shape(self) -> Size:
        return tuple(self.weights.shape)

    def forward(self, y: Tensor) -> Tensor:
        demand_array("Diagonal.forward", y, self.in_shape)
        return self.weights * y

    def adjoint(self, z: Tensor) -> Tensor:
        demand_array("Diagonal.adjoint", z, self.in_shape)
        return self.weights * z

    @property
    def gram(self) -> Gram:
        return Gram(diagonal=self.weights.square())


@final
@dataclass(frozen=True, eq=False)
class Mosaic(AbstractLinearMap):
    """(A y)(i) = y_c(i)(i): each pixel sees the one color c(i) of `(colors, *shape)` that its filter lets through.

    Args:
        colors: c, of integers; `bayer` makes the usual one.
        count: how many colors there are.

    Raises:
        ValueError: if an entry is no color.

    Example:
        >>> Mosaic(bayer(2, 2)).forward(torch.arange(12.0).reshape(3, 2, 2))
        tensor([[ 0.,  5.],
                [ 6., 11.]])
    """

    colors: Tensor
    count: int = 3

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, count=SIZE)
        demand_shapes("Mosaic", {"colors": Shape("...", kind="integer")}, vars(self))
        if not bool(((self.colors >= 0) & (self.colors < self.count)).all()):
            raise ValueError(
                f"`Mosaic(colors=...)` must be from 0 to {self.count - 1}, as `count` is {self.count}."
                f" Got {got(self.colors)}."
            )

    @property
    def in_shape(self) -> Size:
        return (self.count, *self.colors.shape)

    @property
    def out_shape(self) -> Size:
        return tuple(self.colors.shape)

    def _masks(self, like: Tensor) -> Tensor:
        each = torch.arange(self.count, device=like.device).reshape(-1, *(1 for _ in self.colors.shape))
        return (self.colors == each).to(like.dtype)

    def forward(self, y: Tensor) -> Tensor:
        demand_array("Mosaic.forward", y, self.in_shape)
        return (self._masks(y) * y).sum(-self.colors.dim() - 1)

    def adjoint(self, z: Tensor) -> Tensor:
        demand_array("Mosaic.adjoint", z, self.out_shape)
        return self._masks(z) * z.unsqueeze(-self.colors.dim() - 1)

    @property
    def gram(self) -> Gram:
        return Gram(diagonal=self._masks(torch.zeros((), dtype=torch.float64, device=self.colors.device)))


@checked(height=SIZE, width=SIZE)
def bayer(height: int, width: int) -> Tensor:
    """The colors of a Bayer filter, RGGB: red 0 and blue 2 on every other pixel of every other row, else green 1.

    Args:
        height: rows.
        width: columns.

    Example:
        >>> bayer(2, 4).tolist()
        [[0, 1, 0, 1], [1, 2, 1, 2]]
    """
    rows, columns = torch.arange(height, device="cpu") % 2, torch.arange(width, device="cpu") % 2
    return rows.unsqueeze(-1) + columns


@final
@dataclass(frozen=True, eq=False)
class Matrix(AbstractLinearMap):
    """y -> A y for a matrix, y a vector or an array that is read as one.

    Least squares with it are solved by a factorization of q x q. `A @ y` with a tensor A makes one.

    Args:
        matrix: A `(m, q)`.
        shape: of y; None: `(q,)`.

    Raises:
        ValueError: if A is no matrix, or its columns are not as many as y has entries.
    """

    matrix: Tensor
    shape: Size | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_shapes("Matrix", {"matrix": Shape("m q", finite=False)}, vars(self))
        if math.prod(self.in_shape) != self.matrix.shape[1]:
            raise ValueError(
                f"`Matrix(matrix=...)` must have {math.prod(self.in_shape)} columns, as y has entries. Got"
                f" {self.matrix.shape[1]}."
            )

    @property
    def in_shape(self) -> Size:
        return (self.matrix.shape[1],) if self.shape is None else self.shape

    @property
    def out_shape(self) -> Size:
        return (self.matrix.shape[0],)

    def forward(self, y: Tensor) -> Tensor:
        demand_array("Matrix.forward", y, self.in_shape)
        return y.flatten(y.dim() - len(self.in_shape)) @ self.matrix.mT

    def adjoint(self, z: Tensor) -> Tensor:
        demand_array("Matrix.adjoint", z, self.out_shape)
        return (z @ self.matrix).reshape(*z.shape[:-1], *self.in_shape)

    @property
    def gram(self) -> Gram:
        if len(self.in_shape) > 1:
            return Gram(known=False)
        return Gram(dense=self.matrix.mT @ self.matrix)
