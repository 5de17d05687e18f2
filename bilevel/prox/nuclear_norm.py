"""The nuclear norm, and its conjugate, the ball of the spectral norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor

from bilevel._tree import Tree, tree_leaves, tree_parts
from bilevel.arguments.fits import demand_type
from bilevel.prox.derivative import Parts, ProxDerivative, complement
from bilevel.prox.differentiated import differentiated
from bilevel.prox.l1 import soft
from bilevel.prox.term import AbstractProxTerm, below, codes, least, on_leaves, outside, relative_gap, total

_PARTS = 5  # U, V', and three kinds of divided differences: those of one matrix


@final
@dataclass(frozen=True, eq=False)
class NuclearNorm(AbstractProxTerm):
    """h(Y) = w sum_i s_i(Y), the sum of the singular values; prox_{t h}(U diag(s) V') = U diag(soft(s, t w)) V'.

    With f = soft(., t w) the derivative in V takes W, Z = U' W V, to

        U [A o (Z + Z') / 2 + B o (Z - Z') / 2] V' + (I - U U') W V diag(f(s_i) / s_i) V',
        A_ij = (f(s_i) - f(s_j)) / (s_i - s_j), B_ij = (f(s_i) + f(s_j)) / (s_i + s_j),

    which is finite for equal and for vanishing singular values: kinks are where one is t w. A second derivative is an
    error. Leaves of y are matrices; where there are several, the norms add up.

    Cost: one singular value decomposition.

    Source: Cai, Candes and Shen, "A singular value thresholding algorithm for matrix completion", SIAM J. Optim. 20
    (2010); Lewis and Sendov, "Nonsmooth analysis of singular values", Set-Valued Anal. 13 (2005).

    Args:
        weight: w >= 0: a number, or a structure of numbers like y. An estimate at a negative weight ends with
            `Status.nonfinite`.

    Example:
        >>> NuclearNorm(1.0).prox(torch.diag(torch.tensor([3.0, 0.2])), 0.5)
        tensor([[2.5000, 0.0000],
                [0.0000, 0.0000]])
    """

    weight: Tree = 1.0

    def __post_init__(self) -> None:
        for leaf in tree_leaves(self.weight, "`NuclearNorm(weight=...)`"):
            demand_type("NuclearNorm", "weight", leaf, float | Tensor)

    def value(self, y: Tree) -> Tensor:
        return total(on_leaves(lambda leaf, w: w * torch.linalg.svdvals(_matrix(leaf)).sum(), y, self.weight))

    def prox(self, v: Tree, step: Tensor | float) -> Tree:
        return on_leaves(lambda leaf, w: _mapped(leaf, step * w, soft, _PULL_NUCLEAR), v, self.weight)

    def margin(self, v: Tree, step: Tensor | float) -> Tensor:
        return least(on_leaves(lambda leaf, w: relative_gap(_values(leaf), step * w), v, self.weight))

    def derivative(self, v: Tree, step: Tensor | float) -> ProxDerivative:
        return _derivative(v, self.weight, step)

    def active(self, v: Tree, step: Tensor | float) -> Tensor:
        return codes(on_leaves(lambda leaf, w: ~below(_values(leaf), step * w), v, self.weight))

    def conjugate(self) -> SpectralBall:
        return SpectralBall(self.weight)


@final
@dataclass(frozen=True, eq=False)
class SpectralBall(AbstractProxTerm):
    """h(Y) = 0 where the largest singular value is at most r, infinite elsewhere.

    prox_{t h}(U diag(s) V') = U diag(min(s, r)) V', the projection, whatever t; its derivative in V is I minus that of
    the map of `NuclearNorm` with threshold r, and that in r is the sum of u_i v_i' over s_i > r.

    Args:
        radius: r: a number, or a structure of numbers like y.

    Example:
        >>> SpectralBall(1.0).prox(torch.diag(torch.tensor([3.0, 0.2])), 0.5)
        tensor([[1.0000, 0.0000],
                [0.0000, 0.2000]])
    """

    radius: Tree

    def __post_init__(self) -> None:
        for leaf in tree_leaves(self.radius, "`SpectralBall(radius=...)`"):
            demand_type("SpectralBall", "radius", leaf, float | Tensor)

    def value(self, y: Tree) -> Tensor:
        def one(leaf: Tensor, r: Tensor | float) -> Tensor:
            return outside(_values(leaf).max() - r, r, leaf.numel())

        return total(on_leaves(one, y, self.radius))

    def prox(self, v: Tree, step: Tensor | float) -> Tree:
        return on_leaves(lambda leaf, r: _mapped(leaf, r, _clipped, _PULL_BALL), v, self.radius)

    def margin(self, v: Tree, step: Tensor | float) -> Tensor:
        return least(on_leaves(lambda leaf, r: relative_gap(_values(leaf), r), v, self.radius))

    def derivative(self, v: Tree, step: Tensor | float) -> ProxDerivative:
        return complement(_derivative(v, self.radius, 1.0))

    def active(self, v: Tree, step: Tensor | float) -> Tensor:
        return codes(on_leaves(lambda leaf, r: below(_values(leaf), r), v, self.radius))

    def conjugate(self) -> NuclearNorm:
        return NuclearNorm(self.radius)


def _matrix(leaf: Tensor) -> Tensor:
    if leaf.dim() != 2:
        raise ValueError(
            f"the leaves of y must be matrices where there is a nuclear or a spectral norm. Got shape"
            f" {tuple(leaf.shape)}."
        )
    return leaf


def _values(leaf: Tensor) -> Tensor:
    whole = _matrix(leaf).isfinite().all()
    return torch.where(whole, torch.linalg.svdvals(torch.where(whole, leaf, 0.0)), torch.nan)


def _clipped(s: Tensor, threshold: Tensor) -> Tensor:
    return torch.minimum(s, threshold)


def _decomposed(leaf: Tensor, threshold: Tensor) -> tuple[Tensor, ...]:
    """U, s, V', A, B, f(s) / s, of the matrix or, if it is wide, of its transpose: the parts with s."""
    whole = torch.where(leaf.isfinite().all(), leaf, 0.0)  # which LAPACK demands
    tall = whole if leaf.shape[0] >= leaf.shape[1] else whole.mT
    U, s, V = torch.linalg.svd(tall, full_matrices=False)
    dead, f = below(s, threshold), soft(s, threshold)
    alike = dead.unsqueeze(0) == dead.unsqueeze(1)
    both = torch.where(dead, 0.0, torch.ones_like(s)).expand(len(s), len(s))
    apart = (s.unsqueeze(1) - s.unsqueeze(0)).abs()  # of one dead and one alive it is no less than f of that
    mixed = torch.maximum(f.unsqueeze(1), f.unsqueeze(0)) / torch.where(alike, 1.0, apart)
    sums, limit = s.unsqueeze(1) + s.unsqueeze(0), (threshold == 0).to(s.dtype)
    B = torch.where(sums > 0, (f.unsqueeze(1) + f.unsqueeze(0)) / torch.where(sums > 0, sums, 1.0), limit)
    ratio = torch.where(s > 0, f / torch.where(s > 0, s, 1.0), limit)
    return U, s, V, torch.where(alike, both, mixed), B, ratio


def _mapped(leaf: Tensor, threshold: Tensor | float, of: Callable[..., Tensor], pull: Callable[..., Parts]) -> Tensor:
    """U diag(of(s, threshold)) V', differentiable in the matrix and in the threshold."""
    r = torch.as_tensor(threshold, dtype=leaf.dtype, device=leaf.device)
    with torch.no_grad():
        whole = _matrix(leaf).isfinite().all()
        U, s, V, *differences = _decomposed(leaf, r)
        value = torch.where(whole, (U * of(s, r)) @ V, torch.nan)
        in_r = (U * (s > r).to(s.dtype)) @ V
        if leaf.shape[0] < leaf.shape[1]:
            value, in_r = value.mT, in_r.mT
    return differentiated(value, (leaf, r), (U, V, *differences, in_r), pull)


def _derivative(v: Tree, weight: Tree, step: Tensor | float) -> ProxDerivative:
    parts: list[Tensor] = []

    def one(leaf: Tensor, w: Tensor | float) -> Tensor:
        r = torch.as_tensor(step * w, dtype=leaf.dtype, device=leaf.device)
        U, _, V, *differences = _decomposed(_matrix(leaf), r)
        parts.extend([U, V, *differences])
        return leaf

    on_leaves(one, v, weight)
    return ProxDerivative(tuple(parts), *(partial(_on_matrices, kind) for kind in (_same, _reciprocal, _co_reciprocal)))


def _on_matrices(kind: Callable[[Tensor], Tensor], parts: Parts, w: Tree) -> Tree:
    leaves, build = tree_parts(w)
    return build([_product(kind, parts[_PARTS * k : _PARTS * (k + 1)], leaf) for k, leaf in enumerate(leaves)])


def _product(kind: Callable[[Tensor], Tensor], parts: Parts, w: Tensor) -> Tensor:
    U, V, A, B, ratio = parts
    wide = w.shape[-2] < w.shape[-1]
    W = (w.mT if wide else w) @ V.mT
    Z = U.mT @ W
    inner = kind(A) * (Z + Z.mT) / 2 + kind(B) * (Z - Z.mT) / 2
    found = (U @ inner + (W - U @ Z) * kind(ratio)) @ V
    return found.mT if wide else found


def _same(numbers: Tensor) -> Tensor:
    return numbers


def _reciprocal(numbers: Tensor) -> Tensor:
    return torch.where(numbers > 0, 1 / torch.where(numbers > 0, numbers, 1.0), 0.0)


def _co_reciprocal(numbers: Tensor) -> Tensor:
    return _reciprocal(1 - numbers)


def _pull(ball: bool, parts: Parts, w: Tensor) -> Parts:
    own, along = _product(_same, parts[:_PARTS], w), (parts[_PARTS] * w).sum()
    return (w - own, along) if ball else (own, -along)


_PULL_NUCLEAR, _PULL_BALL = partial(_pull, False), partial(_pull, True)
