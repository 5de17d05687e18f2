"""Sums of terms whose proximal map is a composition of theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._tree import Tree, tree_leaves, tree_map
from bilevel.prox.box import Box, Nonnegative
from bilevel.prox.derivative import ProxDerivative, composed, diagonal, scaled
from bilevel.prox.elastic_net import ElasticNet
from bilevel.prox.group_lasso import GroupLasso
from bilevel.prox.l1 import L1, LInfBall
from bilevel.prox.l1_ball import LInf
from bilevel.prox.l2_ball import L2, L2Ball
from bilevel.prox.nuclear_norm import NuclearNorm
from bilevel.prox.quadratic import Quadratic
from bilevel.prox.term import AbstractProxTerm, least, on_leaves
from bilevel.prox.total_variation import TV1D
from bilevel.prox.total_variation_2d import TV2D

_HOMOGENEOUS = (L1, L2, LInf, Nonnegative, GroupLasso, NuclearNorm, TV1D, TV2D)
_INTERVALS = (Box, Nonnegative, LInfBall)


@final
@dataclass(frozen=True, eq=False)
class Closed:
    """sum_i h_i(y) + q |y|^2 / 2 + c' y, where the map of sum_i h_i is that of h_1, then that of h_2, and so on.

    prox_t(v) = prox_{t' sum h_i}((v - t c) / (1 + t q)), t' = t / (1 + t q).

    Attributes:
        chain: h_1, h_2, ... : subgradients of each at its image are some at the images of those that follow.
        squares: the quadratics, of numbers q.
    """

    chain: tuple[AbstractProxTerm, ...]
    squares: tuple[Quadratic, ...]

    def step(self, step: Tensor | float) -> Any:
        """t'."""
        return step * self._factor(step)

    def points(self, v: Tree, step: Tensor | float) -> list[Tree]:
        """Where each map of the chain is evaluated."""
        return self._images(v, step)[:-1]

    def prox(self, v: Tree, step: Tensor | float) -> Tree:
        """The composition."""
        return self._images(v, step)[-1]

    def margin(self, v: Tree, step: Tensor | float) -> Tensor:
        """The least of those of the chain, and of the quadratics, which are of no kink."""
        own, margins = self.step(step), [each.margin(v, step) for each in self.squares]
        moving = tree_map(torch.ones_like, v)  # of what does not move, no kink that follows is one
        for term, point in zip(self.chain, self.points(v, step), strict=True):
            if isinstance(term, _INTERVALS):
                gaps = _box(term).gaps(point)
                margins.append(least(on_leaves(lambda gap, m: torch.where(m > 0, gap, 1.0), gaps, moving)))
            else:
                margins.append(term.margin(point, own))
            P = term.derivative(point, own) if term.separable else None
            moving = moving if P is None else P.times(P.parts, moving)
        return torch.stack([*margins, tree_leaves(v)[0].new_ones(())]).min()

    def derivative(self, v: Tree, step: Tensor | float) -> ProxDerivative | None:
        """The product of those of the chain, which commute."""
        found: ProxDerivative = diagonal(tree_map(torch.ones_like, v))
        for term, point in zip(self.chain, self.points(v, step), strict=True):
            P = term.derivative(point, self.step(step))
            if P is None:
                return None
            found = composed(P, found)
        return scaled(found, self._factor(step), tree_leaves(v)[0])

    def _factor(self, step: Tensor | float) -> Any:
        whole = 1 + step * sum(each.Q for each in self.squares)
        return 1 / whole if isinstance(whole, Tensor) or whole else torch.nan

    def _images(self, v: Tree, step: Tensor | float) -> list[Tree]:
        for each in self.squares:
            v = on_leaves(lambda leaf, c: leaf - c, v, each.shift(v, step))
        factor = self._factor(step)
        found = [tree_map(lambda leaf: leaf * factor, v)]
        for term in self.chain:
            found.append(term.prox(found[-1], self.step(step)))
        return found


def closed_form(terms: tuple[AbstractProxTerm, ...]) -> Closed | None:
    """How the maps of these terms compose; None: not that one knows."""
    squares = tuple(term for term in terms if isinstance(term, Quadratic) and _is_number(term.Q))
    rest = [term for term in terms if not any(term is each for each in squares)]
    scaling = _scaling(rest)
    if (
        scaling is not None
    ):  # a norm and a ball shrink the image u of the others, whose subgradients there are all a u's
        found = closed_form(tuple(term for term in rest if term is not scaling))
        return None if found is None else Closed((*found.chain, scaling), squares)
    first = [term for term in rest if isinstance(term, TV1D) or (isinstance(term, TV2D) and not term.isotropic)]
    last = [term for term in rest if isinstance(term, GroupLasso)]
    bounds = [term for term in rest if isinstance(term, _INTERVALS)]
    others = [term for term in rest if not any(term is each for each in (*first, *last, *bounds))]
    if len(rest) <= 1:
        chain = rest
    elif (
        len(others) > 1
        or not all(term.separable for term in others)
        or len(first) + len(last) > 1
        or (first and not all(_is_uniform(term) for term in (*others, *bounds)))
        or (last and not all(isinstance(term, L1 | Nonnegative) for term in (*others, *bounds)))
    ):
        return None
    else:
        chain = [*first, *others, *bounds, *last]
    return Closed(tuple(chain), squares)


def _scaling(terms: list[AbstractProxTerm]) -> AbstractProxTerm | None:
    """The Euclidean ball, or norm, where the others are h(a y) = a h(y) for a > 0; None: that is not so.

    With u the image of the others at v, v - u is in t dh(u) = t dh(a u): a u is the image of the sum, a what the ball
    or the norm makes of u. As h moves along u with it, P u = u, and the derivatives commute.
    """
    balls: list[AbstractProxTerm] = [term for term in terms if isinstance(term, L2Ball)]
    round_ = balls or [term for term in terms if isinstance(term, L2)]
    if not round_ or len(terms) < 2:
        return None
    others = [term for term in terms if term is not round_[-1]]
    return round_[-1] if all(isinstance(term, _HOMOGENEOUS) for term in others) else None


def _box(term: AbstractProxTerm) -> Box:
    """Bounds, as a box."""
    if isinstance(term, LInfBall):
        return Box(tree_map(lambda r: -r, term.radius), term.radius)
    return term if isinstance(term, Box) else Box(0.0)


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) or (isinstance(value, Tensor) and not value.dim())


def _is_uniform(term: AbstractProxTerm) -> bool:
    """Whether it is the same function of every entry."""
    if isinstance(term, L1):
        return _is_number(term.weight)
    if isinstance(term, ElasticNet):
        return _is_number(term.l1) and _is_number(term.l2)
    if isinstance(term, LInfBall):
        return _is_number(term.radius)
    if isinstance(term, Box):
        return all(bound is None or _is_number(bound) for bound in (term.lower, term.upper))
    return isinstance(term, Nonnegative)
