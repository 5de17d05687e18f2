"""The derivative of a proximal map at a point, as products that can be taken many times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, final

import torch
from torch import Tensor

from bilevel._tree import Tree, tree_leaves, tree_parts
from bilevel.arguments.fits import demand_types
from bilevel.portable.pickling import AbstractPortable

Parts: TypeAlias = tuple[Tensor, ...]


@final
@dataclass(frozen=True, eq=False)
class ProxDerivative(AbstractPortable):
    """P, the derivative of v -> prox_{t h}(v) at v: a symmetric matrix with 0 <= P <= I.

    At a kink of the map it is one element of the generalized derivative, that of autograd.

    Everything that P is made of is in `parts`, and computed once; the functions hold sizes and labels only. So a
    derivative can be made inside of `torch.vmap`: its parts leave that as results, and the functions take them, or
    one row of them, anywhere. They do not depend on values: neither on those of the parts nor of w.

    Args:
        parts: tensors that P is made of.
        times: (parts, w) -> P w, for w a structure like y.
        inverse: (parts, w) -> P^+ w, the pseudo-inverse: zero on what is orthogonal to the range of P.
        co_inverse: (parts, w) -> (I - P)^+ w, which the map of the conjugate term takes; None: it is not known.

    Example:
        >>> from bilevel.prox import L1
        >>> P = L1(1.0).derivative(torch.tensor([3.0, 0.5]), 1.0)
        >>> P.times(P.parts, torch.ones(2))
        tensor([1., 0.])
    """

    parts: Parts
    times: Callable[[Parts, Tree], Tree]
    inverse: Callable[[Parts, Tree], Tree]
    co_inverse: Callable[[Parts, Tree], Tree] | None = None

    def __post_init__(self) -> None:
        demand_types(self)

    def onto(self, parts: Parts, w: Tree) -> Tree:
        """P P^+ w: the orthogonal projection of w onto the range of P, tangent to the active manifold."""
        return self.times(parts, self.inverse(parts, w))


def diagonal(entries: Tree) -> ProxDerivative:
    """P = diag(entries), entries a structure like y with values in [0, 1].

    Example:
        >>> P = diagonal(torch.tensor([0.5, 0.0]))
        >>> P.inverse(P.parts, torch.ones(2))
        tensor([2., 0.])
    """
    return ProxDerivative(tuple(tree_leaves(entries)), _times, _inverse, _co_inverse)


def projection(parts: Parts, times: Callable[[Parts, Tree], Tree]) -> ProxDerivative:
    """P = P P, an orthogonal projection: its own pseudo-inverse, and so is I - P."""
    return ProxDerivative(parts, times, times, partial(_rest, times))


def complement(P: ProxDerivative) -> ProxDerivative:
    """I - P, the derivative of v - prox(v).

    Raises:
        ValueError: if P does not know the pseudo-inverse of I - P.
    """
    if P.co_inverse is None:
        raise ValueError("`complement(P)` must be of a derivative with a `co_inverse`. Got None.")
    return ProxDerivative(P.parts, partial(_rest, P.times), P.co_inverse, P.inverse)


def composed(outer: ProxDerivative, inner: ProxDerivative) -> ProxDerivative:
    """The product of two derivatives that commute, which makes it symmetric and its pseudo-inverse the product."""
    count = len(outer.parts)

    def both(name: int, parts: Parts, w: Tree) -> Tree:
        first, second = ((inner.times, outer.times), (inner.inverse, outer.inverse))[name]
        return second(parts[:count], first(parts[count:], w))

    return ProxDerivative((*outer.parts, *inner.parts), partial(both, 0), partial(both, 1))


def scaled(P: ProxDerivative, factor: Tensor | float, like: Tensor) -> ProxDerivative:
    """The derivative times a number in (0, 1], of the dtype of `like`."""
    number = torch.as_tensor(factor, dtype=like.dtype, device=like.device)
    return ProxDerivative((*P.parts, number), partial(_scaled, P.times, 1), partial(_scaled, P.inverse, -1))


def _scaled(product: Callable[[Parts, Tree], Tree], power: int, parts: Parts, w: Tree) -> Tree:
    leaves, build = tree_parts(product(parts[:-1], w))
    return build([leaf * parts[-1] ** power for leaf in leaves])


def _rest(times: Callable[[Parts, Tree], Tree], parts: Parts, w: Tree) -> Tree:
    leaves, build = tree_parts(w)
    return build([leaf - own for leaf, own in zip(leaves, tree_leaves(times(parts, w)), strict=True)])


def _times(parts: Parts, w: Tree) -> Tree:
    return _by_leaves(torch.mul, parts, w)


def _inverse(parts: Parts, w: Tree) -> Tree:
    return _by_leaves(_quotient, parts, w)


def _co_inverse(parts: Parts, w: Tree) -> Tree:
    return _by_leaves(lambda leaf, part: _quotient(leaf, 1 - part), parts, w)


def _by_leaves(function: Callable[[Tensor, Tensor], Tensor], parts: Parts, w: Tree) -> Tree:
    leaves, build = tree_parts(w)
    return build([function(leaf, part) for leaf, part in zip(leaves, parts, strict=True)])


def _quotient(leaf: Tensor, part: Tensor) -> Tensor:
    return torch.where(part > 0, leaf / torch.where(part > 0, part, 1.0), 0.0)
