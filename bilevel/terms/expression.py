"""Expressions of a variable, and sums of terms in them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel._numerics.batched import is_batched
from bilevel.arguments.checked import fitting
from bilevel.arguments.fits import demand_type, demand_types
from bilevel.arguments.ranges import AT_LEAST_0, demand_range
from bilevel.arguments.words import got
from bilevel.portable.pickling import AbstractPortable
from bilevel.terms.block import AbstractBlock
from bilevel.terms.linear_map import AbstractLinearMap, Identity, Size
from bilevel.terms.sampling import Matrix


@final
@dataclass(frozen=True, eq=False)
class Expression(AbstractPortable):
    """K y - c, written `K @ y - c`.

    Args:
        map: K.
        offset: c; None: zero. Axes in front of its shape are those of a batch.

    Raises:
        ValueError: if c is not of the shape of K y, and does not broadcast to it.
    """

    map: AbstractLinearMap
    offset: Tensor | None = None

    __array_ufunc__ = None  # `array @ expression` is asked here, and told to be a tensor

    def __post_init__(self) -> None:
        demand_types(self)
        if self.offset is not None:
            object.__setattr__(self, "offset", broadcast("Expression", "offset", self.offset, self.map.out_shape))

    def at(self, y: Tensor) -> Tensor:
        """K y - c."""
        image = self.map.forward(y)
        return image if self.offset is None else image - self.offset

    @property
    def is_variable(self) -> bool:
        """Whether it is y itself."""
        return isinstance(self.map, Identity) and bool(self.map.factor == 1) and self.offset is None

    def __rmatmul__(self, outer: Any) -> Expression:
        if isinstance(outer, Tensor):
            outer = Matrix(outer, self.map.out_shape)
        demand_type("A @ expression", "A", outer, AbstractLinearMap | Tensor)
        if isinstance(self.map, Identity) and self.map.factor == 1:
            if outer.in_shape != self.map.shape:
                raise ValueError(f"`A @ y` needs an A of arrays {self.map.shape}. Got one of {outer.in_shape}.")
            made = outer
        else:
            made = outer @ self.map
        return Expression(made, None if self.offset is None else outer.forward(self.offset))

    def __rmul__(self, factor: float | Tensor) -> Expression:
        demand_type("c * expression", "c", factor, float | Tensor)
        return Expression(factor * self.map, None if self.offset is None else factor * self.offset)

    def __mul__(self, factor: float | Tensor) -> Expression:
        return self.__rmul__(factor)

    def __truediv__(self, factor: float | Tensor) -> Expression:
        demand_type("expression / c", "c", factor, float | Tensor)
        return self.__rmul__(1 / factor)

    def __neg__(self) -> Expression:
        return -1.0 * self

    def __sub__(self, other: Any) -> Expression:
        demand_type("expression - c", "c", other, float | Tensor)
        c = torch.as_tensor(other)
        if not c.is_floating_point():
            c = c.to(torch.get_default_dtype())
        c = broadcast("expression - c", "c", c, self.map.out_shape)
        return replace(self, offset=c if self.offset is None else self.offset + c)

    def __add__(self, other: Any) -> Expression:
        demand_type("expression + c", "c", other, float | Tensor)
        return self.__sub__(-other)

    def __radd__(self, other: Any) -> Expression:
        return self.__add__(other)

    def __rsub__(self, other: Any) -> Expression:
        return (-self).__add__(other)


@final
@dataclass(frozen=True, eq=False)
class Term(AbstractPortable):
    """weight * block(expression): `w * norm1(D @ y)`.

    Args:
        block: what is taken of the expression.
        expression: K y - c.
        weight: of the objective, whatever algorithm minimizes it: a number, or a tensor `(*batch,)` of one for each
            array of a batch.
    """

    block: AbstractBlock
    expression: Expression
    weight: float | Tensor = 1.0

    __array_ufunc__ = None  # `np.float64(w) * term` is a term

    def __post_init__(self) -> None:
        demand_types(self)
        if isinstance(self.weight, Tensor):
            demand_signs("Term", "weight", self.weight, positive=False)
        else:
            demand_range("Term", "weight", self.weight, AT_LEAST_0)

    @property
    def axes(self) -> int:
        """How many axes K y has, without those of a batch."""
        return len(self.expression.map.out_shape)

    def value(self, y: Tensor) -> Tensor:
        """weight * block(K y - c) of each array of a batch: `(*batch,)`."""
        at = self.expression.at(y)
        own = self.block.value(at, self.axes)
        return torch.where(own == 0, own, self.weight * own)  # zero times infinity is none: an indicator has no weight

    def __add__(self, other: Any) -> SumOfTerms:
        return SumOfTerms((self,)).__add__(other)

    def __radd__(self, other: Any) -> SumOfTerms:
        return SumOfTerms((self,)).__add__(other)

    def __rmul__(self, factor: float | Tensor) -> Term:
        demand_type("w * term", "w", factor, float | Tensor)
        if not isinstance(factor, Tensor):
            demand_range("w * term", "w", factor, AT_LEAST_0)
        return replace(self, weight=factor * self.weight)

    def __mul__(self, factor: float | Tensor) -> Term:
        return self.__rmul__(factor)

    def __truediv__(self, factor: float | Tensor) -> Term:
        demand_type("term / c", "c", factor, float | Tensor)
        return self.__rmul__(1 / factor)


@final
@dataclass(frozen=True, eq=False)
class SumOfTerms(AbstractPortable):
    """F(y) = sum_j w_j h_j(K_j y - c_j): an objective, written as a sum.

    Args:
        terms: its terms, at least one.

    Raises:
        ValueError: if terms are of variables of different shapes.

    Example:
        >>> from bilevel.terms import norm1, sum_squares, variable
        >>> y = variable(2)
        >>> F = 0.5 * sum_squares(y - torch.tensor([3.0, 0.1])) + 1.0 * norm1(y)
        >>> F.value(torch.tensor([2.0, 0.0]))
        tensor(2.5050)
    """

    terms: tuple[Term, ...]
    shape: Size = field(init=False)

    def __post_init__(self) -> None:
        demand_types(self)
        shapes = {term.expression.map.in_shape for term in self.terms}
        if len(shapes) != 1:
            raise ValueError(f"terms of a sum must be of one variable. Got variables of shapes {sorted(shapes)}.")
        object.__setattr__(self, "shape", next(iter(shapes)))

    @fitting
    def value(self, y: Tensor) -> Tensor:
        """F(y) of each array of a batch `(*batch, *shape)`: `(*batch,)`."""
        total = self.terms[0].value(y)
        for term in self.terms[1:]:
            total = total + term.value(y)
        return total

    def __add__(self, other: Any) -> SumOfTerms:
        if isinstance(other, Term):
            return SumOfTerms((*self.terms, other))
        if isinstance(other, SumOfTerms):
            return SumOfTerms((*self.terms, *other.terms))
        if isinstance(other, int | float) and other == 0:  # sum() begins with it
            return self
        return NotImplemented

    def __radd__(self, other: Any) -> SumOfTerms:
        return self.__add__(other)

    def __rmul__(self, factor: float | Tensor) -> SumOfTerms:
        return SumOfTerms(tuple(term.__rmul__(factor) for term in self.terms))

    def __mul__(self, factor: float | Tensor) -> SumOfTerms:
        return self.__rmul__(factor)

    def __truediv__(self, factor: float | Tensor) -> SumOfTerms:
        return SumOfTerms(tuple(term / factor for term in self.terms))


def broadcast(call: str, name: str, c: Tensor, shape: Size) -> Tensor:
    """c with all axes of K y, and those of a batch in front.

    Raises:
        ValueError: if it does not go with K y.
    """
    own = tuple(c.shape[max(0, c.dim() - len(shape)) :])
    if c.layout != torch.strided or any(n not in (1, m) for n, m in zip(reversed(own), reversed(shape), strict=False)):
        raise ValueError(
            f"`{call}({name}=...)` must be a dense tensor of the shape of the expression, {shape}, with the axes of a"
            f" batch in front. Got {got(c)}."
        )
    return c.expand(*c.shape[: max(0, c.dim() - len(shape))], *shape)


def demand_signs(call: str, name: str, numbers: Tensor, *, positive: bool) -> None:
    """Refuse a tensor of other than real numbers that are positive, or at least 0; NaN is for runs to tell.

    Raises:
        ValueError: naming the argument.
    """
    wanted = "positive" if positive else "at least 0"
    real = numbers.layout == torch.strided and not (numbers.is_complex() or numbers.is_meta)
    real = real and numbers.dtype != torch.bool
    if not real:
        raise ValueError(f"`{call}({name}=...)` must be a dense tensor of numbers, {wanted}. Got {got(numbers)}.")
    if torch.compiler.is_compiling() or is_batched(numbers):  # whose values nobody can look at
        return
    if bool(((numbers <= 0) if positive else (numbers < 0)).any()):
        raise ValueError(f"`{call}({name}=...)` must be {wanted}. Got {float(numbers.min()):g}.")
