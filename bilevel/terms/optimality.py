"""How far an image is from the minimizer of an objective, whatever the lengths of the steps that led to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from bilevel.terms.expression import Term
from bilevel.terms.least_squares import Parts


@final
class Optimality:
    """The conditions of a minimizer, K_j y - c_j = v_j and grad q(y) + sum_j K_j' s_j = 0 with s_j in w_j dh_j(v_j).

    Proximal algorithms hold v_j and s_j of which the last condition is true, so that the two others are what is left
    to look at. The gap is the largest of |K_j y - c_j - v_j| and |grad q(y) + sum_j K_j' s_j|, each relative to the
    largest of the parts that it is made of: it does not change with the unit of y or of the objective, nor with the
    step sizes, which the distance of two iterates does. Where the parts may all vanish at the minimizer, what is
    measured is the scale: with g = - grad q(0), |K_j| of the first step of steepest descent from zero.

    Args:
        parts: of the objective.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts, self._right = parts, parts.right_hand_side()

    def gap(
        self,
        y: Tensor,
        points: Sequence[tuple[Term, Tensor]],
        slopes: Sequence[tuple[Term, Tensor]],
        slope: Tensor | None = None,
    ) -> Tensor:
        """The gap of each array of a batch, `(*batch,)`.

        Args:
            y: the image.
            points: v_j, of the blocks whose first condition is to be looked at.
            slopes: s_j, of the blocks that pull by K_j'.
            slope: what pulls beside them.
        """
        axes, right = self._parts.axes, torch.as_tensor(self._right, dtype=y.dtype, device=y.device)
        curved = self._parts.product(y)
        pulled = torch.zeros_like(y) if slope is None else slope
        for term, s in slopes:
            pulled = pulled + term.expression.map.adjoint(s)
        sizes = [_size(part, axes) for part in (curved, right.expand_as(y), pulled)]
        worst = _ratio(_size(curved - right + pulled, axes), sizes)
        descended = self._descended(y, right.expand_as(y))
        for term, v in points:
            K, c, own = term.expression.map, term.expression.offset, len(term.expression.map.out_shape)
            image = K.forward(y)
            apart = image - v if c is None else image - c - v
            parts = [image, v, K.forward(descended)] + ([] if c is None else [c.to(v).expand_as(v)])
            worst = torch.maximum(worst, _ratio(_size(apart, own), [_size(part, own) for part in parts]))
        return worst

    def _descended(self, y: Tensor, g: Tensor) -> Tensor:
        """g <g, g> / <g, M g>, with M the Hessian of q: of the size of y, as what is measured tells it."""
        axes = self._parts.axes
        largest = g.abs().amax(tuple(range(-axes, 0)), keepdim=True) if axes else g.abs()
        unit = g / torch.where(largest > 0, largest, 1.0)  # so that no square over- or underflows
        curvature = (unit * self._parts.product(unit)).sum(_over(axes), keepdim=bool(axes))
        length = unit.square().sum(_over(axes), keepdim=bool(axes)) * largest
        return torch.where(curvature > 0, unit * (length / torch.where(curvature > 0, curvature, 1.0)), 0.0)


def _over(axes: int) -> tuple[int, ...]:
    return tuple(range(-axes, 0))


def _size(z: Tensor, axes: int) -> Tensor:
    """The length of each array of a batch."""
    return torch.linalg.vector_norm(z, dim=_over(axes)) if axes else z.abs()


def _ratio(apart: Tensor, sizes: list[Tensor]) -> Tensor:
    """What is apart, relative to the largest of its parts; zero where it is zero."""
    scale = sizes[0]
    for each in sizes[1:]:
        scale = torch.maximum(scale, each)
    return torch.where(apart == 0, 0.0, apart / scale)
