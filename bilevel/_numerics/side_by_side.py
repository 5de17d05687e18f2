"""The arithmetic that an iteration for one system, or for many side by side, is written in once."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from bilevel._numerics.rows import row_dots, row_norm_numbers, safe_row_norms

Number: TypeAlias = Any  # a number a system: a float, or a tensor `(*batch,)`
Test: TypeAlias = Any  # whether something holds, a system: a bool, or a tensor `(*batch,)` of them


class AbstractSystems(abc.ABC):
    """What an iteration does with the vectors and the numbers of independent systems.

    Sums, products and comparisons of numbers, and `&` and `|` of tests, are Python's own. Numbers of one system are
    floats and its vectors are written over, so that little beside the products with the operator costs time; those of
    many are tensors, and a system that has ended stands still while the others go on.
    """

    @abc.abstractmethod
    def numbers(self, column: Tensor | float) -> Number:
        """A number a system, from a tensor `(*batch,)`; of one system that may be a float."""

    @abc.abstractmethod
    def listed(self, number: Number) -> list[Any]:
        """The numbers of the systems, one after the other."""

    @abc.abstractmethod
    def dot(self, a: Tensor, b: Tensor) -> Number:
        """Inner products."""

    @abc.abstractmethod
    def norm(self, a: Tensor) -> Number:
        """Euclidean norms, though their squares over- or underflow."""

    @abc.abstractmethod
    def any(self, test: Test) -> bool:
        """Whether it holds for any system."""

    @abc.abstractmethod
    def either(self, test: Test, a: Number, b: Number) -> Number:
        """The number a where the test holds, b elsewhere."""

    @abc.abstractmethod
    def ratio(self, test: Test, a: Number, b: Number) -> Number:
        """The quotient a / b where the test holds, zero elsewhere."""

    @abc.abstractmethod
    def kept(self, test: Test, a: Tensor, b: Tensor) -> Tensor:
        """The vectors a, as they are now, where the test holds, and b elsewhere."""

    @abc.abstractmethod
    def or_zero(self, test: Test, a: Tensor) -> Tensor:
        """The vectors a where the test holds; zero for systems that have ended, so that no NaN outlives them."""

    @abc.abstractmethod
    def add(self, test: Test, y: Tensor, factor: Number, x: Tensor) -> Tensor:
        """The vectors y + factor x where the test holds, y elsewhere; in the place of y where that can be."""

    @abc.abstractmethod
    def add_to(self, y: Tensor, factor: Number, x: Tensor) -> Tensor:
        """The vectors y + factor x; in the place of x where that can be."""


@final
@dataclass(frozen=True)
class OneSystem(AbstractSystems):
    """Vectors `(n,)`."""

    def numbers(self, column: Tensor | float) -> Number:
        return column.item() if isinstance(column, Tensor) else column

    def listed(self, number: Number) -> list[Any]:
        return [number]

    def dot(self, a: Tensor, b: Tensor) -> Number:
        return torch.dot(a, b).item()

    def norm(self, a: Tensor) -> Number:
        return row_norm_numbers(a)[0]

    def any(self, test: Test) -> bool:
        found: bool = test
        return found

    def either(self, test: Test, a: Number, b: Number) -> Number:
        return a if test else b

    def ratio(self, test: Test, a: Number, b: Number) -> Number:
        return a / b if test else 0.0

    def kept(self, test: Test, a: Tensor, b: Tensor) -> Tensor:
        return a.clone() if test else b

    def or_zero(self, test: Test, a: Tensor) -> Tensor:
        return a

    def add(self, test: Test, y: Tensor, factor: Number, x: Tensor) -> Tensor:
        return y.add_(x, alpha=factor) if test else y

    def add_to(self, y: Tensor, factor: Number, x: Tensor) -> Tensor:
        return torch.add(y, x, alpha=factor, out=x)  # one pass over memory, where `mul_` and `add_` take two


@final
@dataclass(frozen=True)
class ManySystems(AbstractSystems):
    """Vectors `(*batch, n)`."""

    def numbers(self, column: Tensor | float) -> Number:
        return column

    def listed(self, number: Number) -> list[Any]:
        found: list[Any] = number.reshape(-1).tolist()
        return found

    def dot(self, a: Tensor, b: Tensor) -> Number:
        return row_dots(a, b)

    def norm(self, a: Tensor) -> Number:
        return safe_row_norms(a)

    def any(self, test: Test) -> bool:
        return bool(test.any())

    def either(self, test: Test, a: Number, b: Number) -> Number:
        return torch.where(test, a, b)

    def ratio(self, test: Test, a: Number, b: Number) -> Number:
        return torch.where(test, a / b, 0.0)

    def kept(self, test: Test, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(test.unsqueeze(-1), a, b)

    def or_zero(self, test: Test, a: Tensor) -> Tensor:
        return torch.where(test.unsqueeze(-1), a, 0.0)

    def add(self, test: Test, y: Tensor, factor: Number, x: Tensor) -> Tensor:
        return torch.where(test.unsqueeze(-1), y + factor.unsqueeze(-1) * x, y)

    def add_to(self, y: Tensor, factor: Number, x: Tensor) -> Tensor:
        found: Tensor = y + factor.unsqueeze(-1) * x
        return found


_ONE, _MANY = OneSystem(), ManySystems()


def systems_of(vectors: Tensor) -> AbstractSystems:
    """The arithmetic for vectors `(n,)` or `(*batch, n)`."""
    return _ONE if vectors.dim() == 1 else _MANY
