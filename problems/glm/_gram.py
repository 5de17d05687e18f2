"""Squared losses with fixed weights, by X'WX alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

Terms: TypeAlias = Iterable[tuple[Callable[[], Tensor], ...]]


@final
@dataclass(frozen=True, eq=False)
class Gram:
    """sum_i w_i |X_i y - b_i|^2 / 2 = y'Gy / 2 - q'y + s / 2, with penalties added to it.

    Attributes:
        G: X'WX `(d, d)`.
        q: b'WX `(C, d)`.
        s: b'Wb `()`.
    """

    G: Tensor
    q: Tensor
    s: Tensor

    @staticmethod
    @torch.no_grad()
    def of(X: Tensor, b: Tensor, w: Tensor | None) -> Gram:
        """From n samples; None: 1 / n each. b is `(n,)` or `(n, C)`."""
        b = b.unsqueeze(0) if b.dim() == 1 else b.mT
        weights = X.new_full((), 1 / X.shape[0]) if w is None else w
        scaled = weights * b
        G = X.mT @ (weights.unsqueeze(-1) * X if weights.dim() else weights * X)
        return Gram((G + G.mT) / 2, scaled @ X, (scaled * b).sum())

    def expand(self, y: Tensor, terms: Terms, c: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The value, the gradient, and y, which is all that products need to know."""
        V = y.unsqueeze(0) if y.dim() == 1 else y
        gradient = V @ self.G - self.q
        total = ((gradient - self.q) * V).sum() / 2 + self.s / 2
        gradient = gradient.reshape(y.shape)
        for (value, first, _), each in zip(terms, c[1:], strict=True):
            total, gradient = total + (each * value()).sum(), gradient + each * first()
        return total, gradient, (y,)

    def product(self, v: Tensor, terms: Terms, c: tuple[Tensor, ...]) -> Tensor:
        """H v."""
        found = v @ self.G
        for (_, _, second), each in zip(terms, c[1:], strict=True):
            found = found + each * second() * v
        return found

    def diagonal(self, y: Tensor, terms: Terms, c: tuple[Tensor, ...]) -> Tensor:
        """That of H."""
        found = self.G.diagonal().expand(y.shape)
        for (_, _, second), each in zip(terms, c[1:], strict=True):
            found = found + each * second()
        return found
