"""Whether a y that no step improves is held by kinks of g from all sides: a minimizer where no gradient vanishes."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from bilevel._inner import Objective
from bilevel._result import Solved, Status

_STUCK = frozenset({Status.line_search_failed, Status.stagnated})
_NEAR = 0.75  # power of the rounding unit: line searches end within it of a kink, and y* moves by far more
_MOST = 100  # gradients a row: one more than there are kinks, and some that turn out not to be needed
_WEIGHT = 1e-12  # below it a gradient has no part in the combination


def held(objective: Objective, solved: Solved, tol: float | None) -> Solved:
    """`solved`, with rows successful in which 0 is in the convex hull of gradients of g around y, to `tol`.

    With e tiny, the vector s of least norm in the hull of some gradients within e of y is either a direction, -s, in
    which g decreases, or its gradient a step e along that is a vector of the hull that was missing. Where s vanishes,
    y is a point of the e-subdifferential that holds 0: a minimizer to e, of a convex g. Rows that are not (g decreases
    along a kink, say) keep their status.

    Cost: nothing where the solver succeeded; otherwise a gradient for each kink that holds y, and two.

    Source: Lemarechal, "An extension of Davidon methods to non differentiable problems", Math. Programming Study 3
    (1975); Wolfe, "Finding the nearest point in a polytope", Math. Programming 11 (1976).

    Args:
        objective: g.
        solved: how an inner solver ended.
        tol: its tolerance; None where it has none, and nothing is looked at.
    """
    stuck = torch.tensor([status in _STUCK for status in solved.statuses], device=solved.value.device)
    if tol is None or not (objective.is_plain and objective.solves) or not bool(stuck.any()):
        return solved
    y = solved.value.reshape(-1, solved.value.shape[-1])
    near = torch.finfo(y.dtype).eps ** _NEAR * (1 + torch.linalg.vector_norm(y, dim=-1, keepdim=True))

    def gradient(y: Tensor) -> Tensor:
        return objective.gradient(y.reshape(solved.value.shape)).reshape(y.shape)

    hulls = [_Hull(row) for row in gradient(y).double()]
    going = stuck.tolist()
    for _ in range(_MOST):
        norms = [float(torch.linalg.vector_norm(hull.least)) for hull in hulls]
        going = [on and norm > tol for on, norm in zip(going, norms, strict=True)]
        if not any(going):
            break
        down = torch.stack([-hull.least / (norm or 1.0) for hull, norm in zip(hulls, norms, strict=True)]).to(y)
        found = gradient(y + near * down).double()
        for row, (hull, norm) in enumerate(zip(hulls, norms, strict=True)):
            if going[row]:
                going[row] = float(found[row] @ hull.least) < norm**2 / 2 and hull.add(found[row])
    left = torch.stack([torch.linalg.vector_norm(hull.least) for hull in hulls])
    settled = stuck & (left <= tol)
    statuses = tuple(
        Status.successful if now else before for now, before in zip(settled.tolist(), solved.statuses, strict=True)
    )
    residual = torch.where(settled, left.to(solved.residual), solved.residual.reshape(-1))
    return Solved(solved.value, statuses, residual.reshape(solved.residual.shape), solved.steps)


@final
class _Hull:
    """The vector of least norm in the convex hull of some vectors, as these arrive (Wolfe 1976)."""

    def __init__(self, first: Tensor) -> None:
        self.vectors, self.weights = first.unsqueeze(0), first.new_ones(1)
        self.least = first

    def add(self, vector: Tensor) -> bool:
        """Take one more vector; whether that made the least norm smaller."""
        before = torch.linalg.vector_norm(self.least)
        self.vectors = torch.cat([self.vectors, vector.unsqueeze(0)])
        self.weights = torch.cat([self.weights, self.weights.new_zeros(1)])
        while True:
            wanted = self._affine()
            if bool((wanted > _WEIGHT).all()):
                self.weights = wanted
                break
            # As far towards it as all weights allow; what reaches zero there goes.
            falls = wanted <= _WEIGHT
            ratios = self.weights[falls] / (self.weights[falls] - wanted[falls]).clamp_min(_WEIGHT)
            weights = self.weights + ratios.min().clamp(0, 1) * (wanted - self.weights)
            stays = weights > _WEIGHT
            if bool(stays.all()):
                stays[torch.argmin(weights)] = False
            self.vectors, self.weights = self.vectors[stays], weights[stays] / weights[stays].sum()
        self.least = self.weights @ self.vectors
        return bool(torch.linalg.vector_norm(self.least) < before)

    def _affine(self) -> Tensor:
        """The weights, of any sign but of sum one, whose combination has the least norm."""
        gram = self.vectors @ self.vectors.T
        k, scale = len(gram), gram.abs().max().clamp_min(torch.finfo(gram.dtype).tiny)
        system = gram.new_zeros(k + 1, k + 1)
        system[0, 1:] = system[1:, 0] = 1
        system[1:, 1:] = gram / scale
        ones = gram.new_zeros(k + 1)
        ones[0] = 1
        found: Tensor = torch.linalg.pinv(system, hermitian=True) @ ones
        return found[1:]
