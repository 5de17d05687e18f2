"""Convolutions and finite differences of images and signals that continue periodically."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor

from bilevel.arguments.fits import demand_types
from bilevel.arguments.words import got
from bilevel.terms.gram import Gram
from bilevel.terms.linear_map import AbstractLinearMap, Size, demand_array


@final
@dataclass(frozen=True, eq=False)
class Convolution(AbstractLinearMap):
    """(A y)(i) = sum_k K(k) y(i - k), the kernel centered, y periodic: A = F^-1 diag(F K) F.

    A'A is diagonal in Fourier space, so that least squares with A are solved by two transforms. Differentiable in K:
    the optics can be learned.

    Args:
        kernel: K, of as many axes as the convolution has, at most the last ones of y; its entry [n // 2] is that of
            k = 0.
        shape: of y, channels in front if there are any.

    Raises:
        ValueError: if the kernel is larger than y.

    Example:
        >>> blur = Convolution(torch.full((3,), 1 / 3), (6,))
        >>> blur.forward(torch.tensor([0.0, 0.0, 3.0, 0.0, 0.0, 0.0])).round(decimals=4).abs()
        tensor([0., 1., 1., 1., 0., 0.])
    """

    kernel: Tensor
    shape: Size
    _transfer: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        demand_types(self)
        if self.kernel.dtype not in (torch.float32, torch.float64):  # others have no Fourier transform everywhere
            raise ValueError(f"`Convolution(kernel=...)` must be of float32 or float64. Got {got(self.kernel)}.")
        own, room = tuple(self.kernel.shape), self.shape[len(self.shape) - self.kernel.dim() :]
        if not 0 < len(own) <= len(self.shape) or any(k > n for k, n in zip(own, room, strict=True)):
            raise ValueError(
                f"`Convolution(kernel=...)` must have no more axes and entries than y, {self.shape}. Got {own}."
            )
        object.__setattr__(self, "_transfer", self._transformed())

    @property
    def in_shape(self) -> Size:
        return self.shape

    @property
    def out_shape(self) -> Size:
        return self.shape

    def _transformed(self) -> Tensor:
        """F K."""
        room = self.shape[len(self.shape) - self.kernel.dim() :]
        padding = [
            part for n, k in zip(reversed(room), reversed(self.kernel.shape), strict=True) for part in (0, n - k)
        ]
        padded = torch.nn.functional.pad(self.kernel, padding)
        shifts = [-(k // 2) for k in self.kernel.shape]
        axes = tuple(range(self.kernel.dim()))
        found: Tensor = torch.fft.rfftn(torch.roll(padded, shifts, axes))
        return found

    def forward(self, y: Tensor) -> Tensor:
        demand_array("Convolution.forward", y, self.shape)
        return filtered(y, self._transfer, self.kernel.dim())

    def adjoint(self, z: Tensor) -> Tensor:
        demand_array("Convolution.adjoint", z, self.shape)
        return filtered(z, self._transfer.conj(), self.kernel.dim())

    @property
    def gram(self) -> Gram:
        s = self._transfer
        return Gram(fourier=s.real.square() + s.imag.square(), axes=self.kernel.dim())

    @property
    def multiplier(self) -> tuple[Tensor, int] | None:
        return self._transfer, self.kernel.dim()


@final
@dataclass(frozen=True, eq=False)
class Gradient(AbstractLinearMap):
    """(D y)_a(i) = y(i + e_a) - y(i) for each of the last axes a: `(*shape)` -> `(axes, *shape)`.

    `norm1(D @ y)` is the anisotropic, `norm2_sum(D @ y)` the isotropic total variation.

    Args:
        shape: of y.
        axes: how many of the last axes; None: all.
        boundary: "periodic": y goes on at the other end, D'D = F^-1 diag(sum_a 4 sin^2(pi k_a / n_a)) F; "free": the
            difference at the end is zero, D'D has no such form, and systems with it are solved by conjugate gradients.

    Example:
        >>> Gradient((3,), boundary="free").forward(torch.tensor([1.0, 3.0, 6.0]))
        tensor([[2., 3., 0.]])
    """

    shape: Size
    axes: int | None = None
    boundary: Literal["periodic", "free"] = "periodic"

    def __post_init__(self) -> None:
        demand_types(self)
        if not 0 < self._count <= len(self.shape):
            raise ValueError(f"`Gradient(axes=...)` must be from 1 to {len(self.shape)}. Got {self.axes}.")

    @property
    def _count(self) -> int:
        return len(self.shape) if self.axes is None else self.axes

    @property
    def in_shape(self) -> Size:
        return self.shape

    @property
    def out_shape(self) -> Size:
        return (self._count, *self.shape)

    def forward(self, y: Tensor) -> Tensor:
        demand_array("Gradient.forward", y, self.shape)
        found = [self._difference(y, axis) for axis in range(-self._count, 0)]
        return torch.stack(found, -len(self.shape) - 1)

    def adjoint(self, z: Tensor) -> Tensor:
        demand_array("Gradient.adjoint", z, self.out_shape)
        parts = z.unbind(-len(self.shape) - 1)
        found = [self._transposed(part, axis) for axis, part in zip(range(-self._count, 0), parts, strict=True)]
        total = found[0]
        for each in found[1:]:
            total = total + each
        return total

    def _difference(self, y: Tensor, axis: int) -> Tensor:
        if self.boundary == "periodic":
            return torch.roll(y, -1, axis) - y
        d = y.diff(dim=axis)
        return torch.cat([d, torch.zeros_like(y.narrow(axis, 0, 1))], axis)

    def _transposed(self, z: Tensor, axis: int) -> Tensor:
        if self.boundary == "periodic":
            return torch.roll(z, 1, axis) - z
        inside = z.narrow(axis, 0, z.shape[axis] - 1)
        edge = torch.zeros_like(z.narrow(axis, 0, 1))
        return torch.cat([edge, inside], axis) - torch.cat([inside, edge], axis)

    @property
    def gram(self) -> Gram:
        if self.boundary == "free":
            return Gram(known=False)
        sizes = self.shape[len(self.shape) - self._count :]
        return Gram(fourier=_laplacian(sizes), axes=self._count)


@functools.lru_cache(maxsize=32)
def _laplacian(sizes: Size) -> Tensor:
    """sum_a 4 sin^2(pi k_a / n_a), on the frequencies of `rfftn`."""
    counts = (*sizes[:-1], sizes[-1] // 2 + 1)
    total = torch.zeros(counts, dtype=torch.float64, device="cpu")
    for axis, (n, count) in enumerate(zip(sizes, counts, strict=True)):
        wave = 4 * (math.pi * torch.arange(count, dtype=torch.float64, device="cpu") / n).sin().square()
        total = total + wave.reshape([-1 if a == axis else 1 for a in range(len(sizes))])
    return total


def filtered(y: Tensor, transfer: Tensor, axes: int) -> Tensor:
    """F^-1 diag(transfer) F y over the last axes."""
    over = tuple(range(-axes, 0))
    found: Tensor = torch.fft.irfftn(torch.fft.rfftn(y, dim=over) * transfer, s=y.shape[-axes:], dim=over)
    return found
