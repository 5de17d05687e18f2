"""Proximal terms that are not separable, written as a user would: groups of entries, and the simplex."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.prox import AbstractProxTerm, ProxDerivative


@final
@dataclass(frozen=True, eq=False)
class Rows(AbstractProxTerm):
    """h(y) = w sum_i |y_i| over the rows y_i of a matrix y."""

    weight: Tensor

    def value(self, y: Any) -> Tensor:
        return self.weight * torch.linalg.vector_norm(y, dim=-1).sum()  # type: ignore[no-any-return]

    def prox(self, v: Any, step: Tensor | float) -> Tensor:
        return v * self._share(v, step)  # type: ignore[no-any-return]

    def _share(self, v: Tensor, step: Tensor | float) -> Tensor:
        sizes = v.square().sum(-1, keepdim=True)
        sizes = torch.where(sizes > 0, sizes, 1.0).sqrt()
        return (1 - step * self.weight / sizes).relu()

    def margin(self, v: Any, step: Tensor | float) -> Tensor:
        sizes, least = torch.linalg.vector_norm(v, dim=-1), step * self.weight
        return ((sizes - least).abs() / torch.maximum(sizes, least)).min()  # type: ignore[no-any-return]

    def derivative(self, v: Any, step: Tensor | float) -> ProxDerivative:
        unit = v / torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp_min(1e-300)
        return ProxDerivative((self._share(v, step), unit), _times, _inverse)

    def active(self, v: Any, step: Tensor | float) -> Tensor:
        return (self._share(v, step) > 0).reshape(-1).long()

    def conjugate(self) -> AbstractProxTerm:
        raise NotImplementedError


def _times(parts: tuple[Tensor, ...], w: Any) -> Any:
    """Along the unit vector of an active row 1, across it the share."""
    share, unit = parts
    along = (w * unit).sum(-1, keepdim=True) * unit
    return torch.where(share > 0, along + share * (w - along), 0.0)


def _inverse(parts: tuple[Tensor, ...], w: Any) -> Any:
    share, unit = parts
    along = (w * unit).sum(-1, keepdim=True) * unit
    return torch.where(share > 0, along + (w - along) / torch.where(share > 0, share, 1.0), 0.0)


@final
@dataclass(frozen=True, eq=False)
class Simplex(AbstractProxTerm):
    """h(y) = 0 where y >= 0 and the sum of y is the total, else infinite."""

    total: Tensor

    def value(self, y: Any) -> Tensor:
        inside = (y >= -1e-9).all() & ((y.sum() - self.total).abs() < 1e-9)
        return torch.where(inside, 0.0, torch.inf)

    def _level(self, v: Tensor) -> Tensor:
        ordered = v.sort(descending=True).values
        means = (ordered.cumsum(0) - self.total) / torch.arange(1, len(v) + 1, dtype=v.dtype)
        return means.gather(0, ((ordered > means).sum() - 1).reshape(1)).squeeze(0)

    def prox(self, v: Any, step: Tensor | float) -> Tensor:
        return (v - self._level(v)).relu()  # type: ignore[no-any-return]

    def margin(self, v: Any, step: Tensor | float) -> Tensor:
        return (v - self._level(v)).abs().min() / v.abs().max()  # type: ignore[no-any-return]

    def derivative(self, v: Any, step: Tensor | float) -> ProxDerivative:
        return ProxDerivative(((v > self._level(v)).to(v.dtype),), _centered, _centered)

    def conjugate(self) -> AbstractProxTerm:
        raise NotImplementedError


def _centered(parts: tuple[Tensor, ...], w: Any) -> Any:
    (on,) = parts
    return on * (w - (on * w).sum() / on.sum())


@final
@dataclass(frozen=True, eq=False)
class Without(AbstractProxTerm):
    """Another term that does not know the derivative of its map."""

    term: AbstractProxTerm

    def value(self, y: Any) -> Tensor:
        return self.term.value(y)

    def prox(self, v: Any, step: Tensor | float) -> Any:
        return self.term.prox(v, step)

    def margin(self, v: Any, step: Tensor | float) -> Tensor:
        return self.term.margin(v, step)

    def conjugate(self) -> AbstractProxTerm:
        return self.term.conjugate()
