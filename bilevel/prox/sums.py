"""Sums of terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._tree import Tree, ravel, tree_map
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import POSITIVE, SIZE, demand_ranges
from bilevel.prox.closed_sums import Closed, closed_form
from bilevel.prox.conjugate import Conjugate
from bilevel.prox.derivative import ProxDerivative
from bilevel.prox.linear_image import LinearImage
from bilevel.prox.splitting import Split, split_derivative, split_prox
from bilevel.prox.stacked import stacked
from bilevel.prox.term import AbstractProxTerm


@final
@dataclass(frozen=True, eq=False)
class Sum(AbstractProxTerm):
    """h(y) = sum_i h_i(y); in closed form where the maps compose, else by splitting.

    In closed form are one term and any of q |y|^2 / 2 + c' y (`Quadratic` with a number q); a separable one and bounds
    (`L1`, `ElasticNet`, diagonal `Quadratic` | `Box`, `Nonnegative`, `LInfBall`); `TV1D`, or an anisotropic `TV2D`, and
    such ones whose parameters are numbers; `L1`, `Nonnegative`, or both, and a group lasso; and any of these norms,
    cones and total variations, or a sum of them that is one of the above, and the Euclidean norm or ball.

    A sum of which one is `Affine` with any matrix is one of a linear image, of all of them side by side, and found as
    that is. The others are split: prox_{t h}(v) is the y at rest, with k terms, of

        y = (v + sum_i (y_i + d_i)) / (k + 1),  y_i = prox_{t h_i}(y - d_i),  d_i <- d_i + y_i - y,

    the alternating direction method of multipliers, over-relaxed, to |y_i - y|, |y - y_before| <= tol max(|v|, |y|), or
    eps of the dtype. That is locally linear; the error of y is this residual times 1 / (1 - rate). The same iteration,
    with the derivatives P_i of the maps for these, gives products with the derivative and its adjoint: terms that have
    none make a sum that cannot be differentiated. If it does not come to rest, as for sets that do not meet, the margin
    is NaN, and an estimate ends with `Status.nonfinite`. y is in the sets of the terms to the tolerance, the value
    there may be infinite.

    Source: Combettes and Pesquet, "Proximal splitting methods in signal processing", 2011; Friedman et al., "Pathwise
    coordinate optimization", Ann. Appl. Stat. 1 (2007), for `TV1D` and `L1`; Yu, "On decomposing the proximal map",
    NeurIPS 2013; Eckstein and Bertsekas, Math. Programming 55 (1992), for over-relaxation.

    Args:
        terms: h_1, h_2, ...
        tol: of the splitting, relative.
        max_steps: of it.

    Raises:
        ValueError: if there is no term.

    Example:
        >>> from bilevel.prox import L1, Nonnegative
        >>> Sum((L1(1.0), Nonnegative())).prox(torch.tensor([3.0, -2.0]), 0.5)
        tensor([2.5000, 0.0000])
    """

    terms: tuple[AbstractProxTerm, ...]
    tol: float = 1e-12
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, tol=POSITIVE, max_steps=SIZE)
        if not self.terms:
            raise ValueError("`Sum(terms=...)` must hold a term at least. Got ().")

    def value(self, y: Tree) -> Tensor:
        return torch.stack([term.value(y) for term in self.terms]).sum()

    def prox(self, v: Tree, step: Tensor | float) -> Tree:
        closed = self._closed()
        if closed is None and (image := self.composition(v)) is not None:
            flat, structure = ravel(v, "v")
            return structure.unravel(image.prox(flat, step))
        return split_prox(self._split(v, step), v, step) if closed is None else closed.prox(v, step)

    def margin(self, v: Tree, step: Tensor | float) -> Tensor:
        closed = self._closed()
        if closed is None and (image := self.composition(v)) is not None:
            return image.margin(ravel(v, "v")[0], step)
        if closed is None:
            return self._split(v, step).margin(step)
        margin, value = closed.margin(v, step), self.value(closed.prox(v, step))
        return torch.where(value < torch.inf, margin, torch.nan)  # sets that do not meet

    def derivative(self, v: Tree, step: Tensor | float) -> ProxDerivative | None:
        closed = self._closed()
        if closed is None and (image := self.composition(v)) is not None:
            return image.derivative(ravel(v, "v")[0], step)
        return split_derivative(self._split(v, step), step) if closed is None else closed.derivative(v, step)

    def active(self, v: Tree, step: Tensor | float) -> Tensor:
        closed = self._closed()
        if closed is None and (image := self.composition(v)) is not None:
            return image.active(ravel(v, "v")[0], step)
        points = self._split(v, step).points if closed is None else closed.points(v, step)
        terms, step = (self.terms, step) if closed is None else (closed.chain, closed.step(step))
        found = [term.active(point, step) for term, point in zip(terms, points, strict=True)]
        return torch.cat([*found, AbstractProxTerm.active(self, v, step)])

    def composition(self, y: Tree) -> LinearImage | None:
        return stacked(self.flat(), y, self.tol, self.max_steps)

    def conjugate(self) -> Conjugate:
        return Conjugate(self)

    @property
    def separable(self) -> bool:
        return all(term.separable for term in self.terms)

    def _closed(self) -> Closed | None:
        return closed_form(self.flat())

    def flat(self) -> tuple[AbstractProxTerm, ...]:
        """The terms, with those of sums among them in their place."""
        return tuple(part for term in self.terms for part in (term.flat() if isinstance(term, Sum) else (term,)))

    def _split(self, v: Tree, step: Tensor | float) -> Split:
        return Split.of(self.terms, tree_map(lambda leaf: leaf.detach(), v), step, self.tol, self.max_steps)
