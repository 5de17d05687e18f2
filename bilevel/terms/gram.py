"""A'A of a linear map, in a form in which w_1 A_1'A_1 + w_2 A_2'A_2 + ... can be solved with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._numerics.batched import is_batched
from bilevel.arguments.fits import demand_types


@final
@dataclass(frozen=True, eq=False)
class Gram:
    """A'A = c I + F^-1 diag(s) F + diag(d) + G: a sum of what has each a form of its own.

    F is the real Fourier transform over the last axes, s real and even. Sums and multiples of such forms are again of
    the form; (A'A)^-1 is closed where at most one of s, d, G is there.

    Args:
        scalar: c.
        fourier: s `(*shape, n // 2 + 1)`, as `torch.fft.rfftn` orders the frequencies; broadcasts over channels.
        axes: how many axes F is taken over.
        diagonal: d, of the shape of y or one that broadcasts to it.
        dense: G `(q, q)`, where y is a vector.
        known: False: nothing is known of A'A.

    Example:
        >>> gram = Gram(scalar=2.0) + 3.0 * Gram(diagonal=torch.tensor([0.0, 1.0]))
        >>> gram.solve(torch.tensor([2.0, 10.0]))
        tensor([1., 2.])
    """

    scalar: float | Tensor = 0.0
    fourier: Tensor | None = None
    axes: int = 0
    diagonal: Tensor | None = None
    dense: Tensor | None = None
    known: bool = True

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def closed(self) -> bool:
        """Whether `solve` has a closed form."""
        return self.known and sum(part is not None for part in (self.fourier, self.diagonal, self.dense)) <= 1

    @property
    def singular(self) -> bool:
        """Whether the closed form is found not to be positive definite; not looked at under `torch.vmap`."""
        parts = [part for part in (self.scalar, self.fourier, self.diagonal, self.dense) if isinstance(part, Tensor)]
        if not self.closed or any(is_batched(part) for part in parts):
            return False
        if self.dense is not None:
            eye = torch.eye(len(self.dense), dtype=self.dense.dtype, device=self.dense.device)
            return bool(torch.linalg.cholesky_ex(self.dense.detach() + self.scalar * eye)[1])
        diagonal = self.diagonal if self.fourier is None else self.fourier
        on = self.scalar if diagonal is None else diagonal.detach() + self.scalar
        if not isinstance(on, Tensor):
            return on <= 0
        return bool(on.min() <= 4 * torch.finfo(on.dtype).eps * on.max())

    def __add__(self, other: Gram) -> Gram:
        return self.plus(1.0, other)

    def plus(self, factor: float | Tensor, other: Gram) -> Gram:
        """This and a multiple of another.

        Args:
            factor: of the other.
            other: what is added.
        """
        if not (self.known and other.known):
            return Gram(known=False)
        both = self.fourier is not None and other.fourier is not None
        if both and self.axes != other.axes:
            return Gram(known=False)
        diagonal, dense = _sum(self.diagonal, factor, other.diagonal), _sum(self.dense, factor, other.dense)
        if diagonal is not None and dense is not None and diagonal.dim() == 1:
            dense, diagonal = dense + torch.diag(diagonal), None
        return Gram(
            self.scalar + factor * other.scalar if _counts(other.scalar) else self.scalar,
            _sum(self.fourier, factor, other.fourier),
            max(self.axes, other.axes),
            diagonal,
            dense,
        )

    def __rmul__(self, factor: float | Tensor) -> Gram:
        return Gram().plus(factor, self)

    def solve(self, r: Tensor) -> Tensor:
        """(A'A)^-1 r, where that is closed: two transforms, a division, or a factorization."""
        if self.fourier is not None:
            return self._divided(self._inverse(r), r)
        if self.dense is not None:
            eye = torch.eye(len(self.dense), dtype=self.dense.dtype, device=self.dense.device)
            return torch.cholesky_solve(r.unsqueeze(-1), _factor(self.dense + self.scalar * eye)).squeeze(-1)
        return r / (self.scalar if self.diagonal is None else self.diagonal + self.scalar)

    def _inverse(self, like: Tensor) -> Tensor:
        below = self.fourier.to(like) if self.fourier is not None else like
        return (below + self.scalar if _counts(self.scalar) else below).reciprocal()

    def _divided(self, inverse: Tensor, r: Tensor) -> Tensor:
        """By a product, which complex numbers take less time for than for a division."""
        axes = tuple(range(-self.axes, 0))
        found: Tensor = torch.fft.irfftn(torch.fft.rfftn(r, dim=axes) * inverse, s=r.shape[-self.axes :], dim=axes)
        return found

    def prepared(self) -> Callable[[Tensor], Tensor]:
        """r -> (A'A)^-1 r, for many r: what does not depend on them is computed once."""
        if self.fourier is not None:
            inverse = self._inverse(self.fourier)  # here, with the graph of here, whatever the steps are taken in
            return lambda r: self._divided(inverse.to(r), r)
        if self.dense is None:
            return self.solve
        eye = torch.eye(len(self.dense), dtype=self.dense.dtype, device=self.dense.device)
        whole = torch.cholesky_inverse(_factor(self.dense + self.scalar * eye))
        return lambda r: r @ whole

    def largest(self) -> Tensor | float:
        """A bound on the largest eigenvalue of A'A, exact where there is one part beside the scalar."""
        top = self.scalar
        if self.fourier is not None:
            top = top + self.fourier.max()
        if self.diagonal is not None:
            top = top + self.diagonal.max()
        if self.dense is not None:
            top = top + torch.linalg.matrix_norm(self.dense, 2)
        return top


def _counts(scalar: float | Tensor) -> bool:
    """Whether it is more than a zero that needs no operation of torch."""
    return isinstance(scalar, Tensor) or scalar != 0


def _factor(M: Tensor) -> Tensor:
    """The Cholesky factor, NaN where there is none: a run then says that it met NaN, as a division by zero does."""
    L, info = torch.linalg.cholesky_ex(M)
    return torch.where(info == 0, L, math.nan)


def _sum(a: Tensor | None, factor: float | Tensor, b: Tensor | None) -> Tensor | None:
    if b is None:
        return a
    b = b if isinstance(factor, float) and factor == 1 else factor * b
    return b if a is None else a + b
