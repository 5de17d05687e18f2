"""What a term with a proximal map is."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bilevel._numerics.nesting import aligned, flatten
from bilevel._tree import Tree, tree_leaves, tree_map, tree_parts
from bilevel.arguments.ranges import NUMBERS, demand_range
from bilevel.portable.pickling import AbstractPortable
from bilevel.prox.derivative import ProxDerivative

if TYPE_CHECKING:
    from bilevel.prox.linear_image import LinearImage


class AbstractProxTerm(AbstractPortable, abc.ABC):
    """A closed convex h(y) with prox_{t h}(v) = argmin_y h(y) + |y - v|^2 / (2 t).

    y is any structure; parameters are tensors, through which the map is differentiated where they depend on x. Every
    operation is elementwise or batched by `torch.vmap`.
    """

    @abc.abstractmethod
    def value(self, y: Tree) -> Tensor:
        """h(y): a scalar, infinite where y is not admitted."""

    @abc.abstractmethod
    def prox(self, v: Tree, step: Tensor | float) -> Tree:
        """prox_{step h}(v), differentiable in v and in the parameters almost everywhere."""

    @abc.abstractmethod
    def margin(self, v: Tree, step: Tensor | float) -> Tensor:
        """How far v is from where the map has a kink, relative to its entries: a scalar; zero at a kink."""

    @abc.abstractmethod
    def conjugate(self) -> AbstractProxTerm:
        """h*(u) = sup_y <u, y> - h(y), so that prox_{t h}(v) + t prox_{h*/t}(v/t) = v (Moreau).

        Where no class is it, `Conjugate(self)`, which works through that equation.
        """

    def conjugate_value(self, u: Tree) -> Tensor:
        """h*(u), for `Conjugate(self)`.

        Raises:
            NotImplementedError: if there is no closed form, which is the default.
        """
        raise NotImplementedError(
            f"the conjugate of `{type(self).__name__}` has a proximal map, and no value in closed form."
        )

    def derivative(self, v: Tree, step: Tensor | float) -> ProxDerivative | None:
        """The derivative of v -> prox_{step h}(v) at v in closed form; None, which is the default: there is none.

        Where there is one, y*(x) is differentiated on the active manifold, by a symmetric system; else by that of the
        fixed point.
        """
        return None

    def active(self, v: Tree, step: Tensor | float) -> Tensor:
        """Which manifold prox_{step h}(v) is on: integer codes `(k,)`, equal where the manifold is the same one.

        The support and its signs, the active groups, the rank, the pieces. Inner solvers go on until it stays. A term
        that says nothing has one manifold: no codes.
        """
        return torch.cat([leaf.new_zeros(0, dtype=torch.int64) for leaf in tree_leaves(v)])

    def pieces(self, y: Tree) -> Tensor | None:
        """h(y) = sum_i a_i |y_i| + c_i y_i^2 / 2 on l <= y <= u, as rows a, c, l, u `(4, q)`; None: it is not so.

        What coordinate descent reads. The bounds may be infinite; y is one tensor, and only its shape is read.
        """
        return None

    def composition(self, y: Tree) -> LinearImage | None:
        """h(y) = k(A y + b) with the map of k known, and that of h only by an iteration; None: it is not so.

        What solvers take apart that split, `ADMM` and `PrimalDual`; of y only the structure is read.
        """
        return None

    @property
    def separable(self) -> bool:
        """Whether h is a sum over entries, so that the derivative of the map is diagonal. False unless it says so."""
        return False


def demand_number(call: str, name: str, value: float | Tensor) -> None:
    """Refuse a number that is none; the entries of tensors are for `margin` to tell.

    Raises:
        ValueError: naming the argument.
    """
    if not isinstance(value, Tensor):
        demand_range(call, name, value, NUMBERS)


def on_leaves(function: Callable[[Tensor, Any], Tensor], y: Tree, parameter: Any) -> Tree:
    """The function of each leaf of y and of its parameter: one for all leaves, or a structure like y.

    Raises:
        ValueError: if the parameter is a structure and not that of y.

    Example:
        >>> on_leaves(torch.mul, {"a": torch.ones(2)}, {"a": 3.0})
        {'a': tensor([3., 3.])}
    """
    leaves, build = tree_parts(y)
    if isinstance(parameter, Tensor | float | int):
        parameters: list[Any] = [parameter] * len(leaves)
    else:
        parameters = []
        nesting = flatten(aligned(parameter, y), parameters)
        if nesting != flatten(y, []):
            raise ValueError(
                f"a parameter of a proximal term must be a number, a tensor, or a structure like y, {_shown(y)}."
                f" Got {_shown(parameter)}."
            )
    return build([function(leaf, each) for leaf, each in zip(leaves, parameters, strict=True)])


def _shown(tree: Tree) -> str:
    return str(tree_map(lambda leaf: tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf, tree))


def piece_rows(y: Tree, a: Any = 0.0, c: Any = 0.0, lower: Any = -torch.inf, upper: Any = torch.inf) -> Tensor | None:
    """The rows of `AbstractProxTerm.pieces`, of numbers or tensors that broadcast to y; None where y is no tensor."""
    if not isinstance(y, Tensor) or not all(isinstance(part, Tensor | float | int) for part in (a, c, lower, upper)):
        return None
    rows = [torch.as_tensor(part, dtype=y.dtype, device=y.device).expand(y.shape) for part in (a, c, lower, upper)]
    return torch.stack([row.reshape(-1) for row in rows])


def codes(parts: Tree) -> Tensor:
    """All entries of all leaves, as integers `(k,)`: what `active` returns."""
    return torch.cat([leaf.reshape(-1).long() for leaf in tree_leaves(parts)])


def total(parts: Tree) -> Tensor:
    """The sum of all entries of all leaves: a scalar."""
    return torch.stack([leaf.sum() for leaf in tree_leaves(parts)]).sum()


def least(parts: Tree) -> Tensor:
    """The least entry of all leaves: a scalar."""
    return torch.stack([leaf.min() for leaf in tree_leaves(parts)]).min()


def relative_gap(size: Tensor, threshold: Tensor | float) -> Tensor:
    """|size - threshold| over the larger of the two, entry by entry: how far a size is from a threshold.

    One for a threshold of zero, which is none; NaN for one below: such a weight is of no convex term, and an estimate
    with it must not succeed.
    """
    other = torch.as_tensor(threshold, dtype=size.dtype, device=size.device)
    gap = (size - other).abs() / torch.maximum(size, other.expand_as(size)).clamp_min(tiny(size))
    return torch.where(other > 0, gap, torch.where(other < 0, torch.nan, torch.ones_like(gap)))


def below(size: Tensor, threshold: Tensor | float) -> Tensor:
    """Whether size <= threshold, for a threshold that is not zero: which of two sides of a kink, itself below."""
    other = torch.as_tensor(threshold, dtype=size.dtype, device=size.device)
    return (size <= other) & (other != 0)


def above(size: Tensor, threshold: Tensor | float) -> Tensor:
    """Whether size > threshold, or both are zero; NaN is not."""
    other = torch.as_tensor(threshold, dtype=size.dtype, device=size.device)
    return (size > other) | ((size == other) & (other == 0))


def outside(excess: Tensor, size: Tensor | float, count: int) -> Tensor:
    """Zero where an excess over a bound of this size is rounding of a sum over so many entries, infinite elsewhere."""
    slack = 4 * count * torch.finfo(excess.dtype).eps * size
    return torch.where(excess <= slack, torch.zeros_like(excess), torch.inf)


def tiny(like: Tensor) -> float:
    """The least normal number of a dtype."""
    return torch.finfo(like.dtype).tiny
