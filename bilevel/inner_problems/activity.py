"""Which bounds hold at a constrained minimizer, and by how much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._numerics.rows import matrix_times, positive_or_one
from bilevel._numerics.saddle_point import pseudo_inverse
from bilevel._result import Report
from bilevel.inner_problems.margins import kink_report
from bilevel.inner_problems.polytope import FlatPolytope

# A bound is taken at its word by distance alone where that is beyond rounding; multipliers decide after that.
_ROUNDS = 2  # multipliers tell which entries are free, and these the multipliers: a second round settles both


@final
@dataclass(frozen=True, eq=False)
class Activity:
    """Which bounds hold at y, and by how much.

    An entry is held where its multiplier exceeds its distance from the bound, both relative to the largest entries.

    Attributes:
        free: the entries that no bound holds `(*batch, q)`.
        upper: of the others, those on their upper bound.
        multipliers: of the equalities `(*batch, m)`.
        margin: the least, over entries that are not fixed, of the greater of relative distance and relative
            multiplier: `(*batch,)`. Zero where strict complementarity fails.
    """

    free: Tensor
    upper: Tensor
    multipliers: Tensor
    margin: Tensor

    @staticmethod
    def of(polytope: FlatPolytope, y: Tensor, gradient: Tensor, curved: Tensor, multipliers: Tensor | None) -> Activity:
        """From the gradient of g at y, H y (whose size it has cancelled from), and the multipliers where known."""
        A, b, lower, upper = (part.expand(*y.shape[:-1], *part.shape[y.dim() - 1 :]) for part in polytope.tensors())
        finite = torch.stack([torch.where(bound.isfinite(), bound, y) for bound in (lower, upper)])
        primal = positive_or_one(torch.maximum(finite.abs().amax(0), y.abs()).amax(-1, keepdim=True))
        near_lower, near = y - lower < upper - y, torch.minimum(y - lower, upper - y) / primal
        free = near > torch.finfo(y.dtype).eps ** 0.5
        if multipliers is None:
            multipliers = _fitted(A, gradient, free, torch.zeros_like(b))
        force = near
        for _ in range(_ROUNDS):
            pull = gradient + matrix_times(A.mT, multipliers)
            terms = torch.stack([gradient, curved, matrix_times(A.mT, multipliers)]).abs().amax(0)
            force = torch.where(near_lower, pull, -pull) / positive_or_one(terms.amax(-1, keepdim=True))
            free = (near > force.clamp_min(0)) & ~polytope.fixed
            multipliers = _fitted(A, gradient, free, multipliers)
        margin = torch.where(polytope.fixed, torch.inf, torch.where(free, near, force)).amin(-1)
        return Activity(free, ~near_lower, multipliers, margin)

    def report(self, margin: float) -> Report:
        """Strict complementarity, in words; the residual is the least margin."""
        return kink_report("active bounds", self.margin, margin)


def _fitted(A: Tensor, gradient: Tensor, free: Tensor, near: Tensor) -> Tensor:
    """The multipliers nearest to given ones that minimize |grad_F g + A_F' nu|."""
    A_F = A * free.unsqueeze(-2)
    left = (gradient + matrix_times(A.mT, near)) * free
    return near - matrix_times(pseudo_inverse(A_F @ A_F.mT), matrix_times(A_F, left))
