"""What may stand in a term: squares, linear functions, terms with a proximal map, denoisers."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.arguments.fits import demand_types
from bilevel.portable.pickling import AbstractPortable
from bilevel.prox.term import AbstractProxTerm, above


class AbstractBlock(AbstractPortable, abc.ABC):
    """h of an array z; arrays of a batch lie side by side in the axes in front."""

    @abc.abstractmethod
    def value(self, z: Tensor, axes: int) -> Tensor:
        """h(z) over the last `axes` axes: `(*batch,)`."""

    @abc.abstractmethod
    def prox(self, v: Tensor, step: Tensor | float, axes: int) -> Tensor:
        """prox_{step h}(v)."""


def over(axes: int) -> tuple[int, ...]:
    """The last axes, as `sum` wants them."""
    return tuple(range(-axes, 0)) if axes else ()


@final
@dataclass(frozen=True)
class Squares(AbstractBlock):
    """|z|^2; prox_{t h}(v) = v / (1 + 2 t)."""

    def value(self, z: Tensor, axes: int) -> Tensor:
        return z.square().sum(over(axes)) if axes else z.square()

    def prox(self, v: Tensor, step: Tensor | float, axes: int) -> Tensor:
        return v / (1 + 2 * step)


@final
@dataclass(frozen=True, eq=False)
class Product(AbstractBlock):
    """<c, z>; prox_{t h}(v) = v - t c."""

    c: Tensor

    def value(self, z: Tensor, axes: int) -> Tensor:
        product = self.c * z
        return product.sum(over(axes)) if axes else product

    def prox(self, v: Tensor, step: Tensor | float, axes: int) -> Tensor:
        return v - step * self.c


@final
@dataclass(frozen=True)
class Absolute(AbstractBlock):
    """sum_i |z_i|; prox_{t h}(v) = sign(v) max(|v| - t, 0), soft thresholding."""

    def value(self, z: Tensor, axes: int) -> Tensor:
        return z.abs().sum(over(axes)) if axes else z.abs()

    def prox(self, v: Tensor, step: Tensor | float, axes: int) -> Tensor:
        return v.sign() * (v.abs() - step).relu()


@final
@dataclass(frozen=True)
class Norms(AbstractBlock):
    """sum_i |z_i| over the places i, |z_i| the length of z along its first axis: isotropic total variation."""

    def value(self, z: Tensor, axes: int) -> Tensor:
        sizes: Tensor = torch.linalg.vector_norm(z, dim=-axes)
        return sizes.sum(over(axes - 1)) if axes > 1 else sizes

    def prox(self, v: Tensor, step: Tensor | float, axes: int) -> Tensor:
        sizes = torch.linalg.vector_norm(v.detach(), dim=-axes, keepdim=True)
        large = above(sizes, step)
        safe = torch.where(large, v, 1.0)  # of which the length has a derivative
        length = torch.linalg.vector_norm(safe, dim=-axes, keepdim=True)
        return torch.where(large, (1 - step / length) * v, 0.0)


@final
@dataclass(frozen=True, eq=False)
class Proximal(AbstractBlock):
    """h of `bilevel.prox`."""

    term: AbstractProxTerm

    def __post_init__(self) -> None:
        demand_types(self)

    def value(self, z: Tensor, axes: int) -> Tensor:
        batch = z.shape[: z.dim() - axes]
        if not batch:
            return self.term.value(z)
        rows = z.reshape(math.prod(batch), *z.shape[len(batch) :])
        return torch.stack([self.term.value(row) for row in rows]).reshape(batch)

    def prox(self, v: Tensor, step: Tensor | float, axes: int) -> Tensor:
        batch = v.shape[: v.dim() - axes]
        if self.term.separable or not batch:
            found: Tensor = self.term.prox(v, step)
            return found
        rows = v.reshape(math.prod(batch), *v.shape[len(batch) :])
        if isinstance(step, Tensor) and step.dim():
            steps = step.reshape(step.shape[: step.dim() - axes]).expand(batch).reshape(-1)
            together: Tensor = torch.vmap(self.term.prox)(rows, steps)
        else:
            together = torch.vmap(lambda row: self.term.prox(row, step))(rows)
        return together.reshape(v.shape)


@final
@dataclass(frozen=True, eq=False)
class Denoiser(AbstractBlock):
    """v -> D(v, sqrt(step)) in the place of a proximal map: noise of variance `step`. There need be no h with that map.

    Args:
        function: D, of images side by side and the standard deviation of the noise.
    """

    function: Callable[[Tensor, Tensor | float], Tensor]

    def value(self, z: Tensor, axes: int) -> Tensor:
        raise ValueError(
            "`SumOfTerms.value(y)` is of terms that have a value. Got a denoiser, which has no value: it defines"
            " the fixed point of an algorithm and no objective."
        )

    def prox(self, v: Tensor, step: Tensor | float, axes: int) -> Tensor:
        return self.function(v, step.sqrt() if isinstance(step, Tensor) else math.sqrt(step))
