"""Coordinate descent on a working set, for linear models with a separable term."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._inner import AbstractInnerSolver, Objective
from bilevel._numerics.pieces import Pieces, minimize
from bilevel._result import Solved, Status, judged
from bilevel._validate import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, SIZE, demand_ranges
from bilevel.inner_problems.separable import SeparableObjective
from bilevel.requirements.properties import DoesNotApply, Feature

_FEWEST = 50  # entries of a working set, which grows to twice the support
_INSIDE = 0.1  # of the tolerance, for the problem on the working set
_SWEEPS = 1000  # on a working set
_NEWTON = 50  # quadratic models on a working set, where the loss is no quadratic
_HALVINGS = 30
_SHORT, _DAMPING = 0.1, 1e-3  # a step that is this short calls for a damping of that, relative to a curvature of 1
_DECREASE = 1e-4  # of what the model promises, for a step to be taken


@final
@dataclass(frozen=True)
class CoordinateDescent(AbstractInnerSolver):
    """argmin_y sum_i w_i l(X_i y, b_i) + q'y + h(y) for a separable h of pieces, such as `L1`: lasso, logistic, SVM.

    From y0, in rounds: the gradient over all columns of X tells which entries may move; those, at most twice as many as
    there are on the support, join the working set W; there the problem is solved with the Gram matrix X_W' D X_W, D =
    w l'': coordinate descent, one entry after the other to its minimum, and after each sweep the entries at no kink
    together to the minimizer of their piece, where the objective falls. A loss that is no quadratic is
    minimized by such models, with a line search. What begins at the solution for a nearby x (`start=`, warm starts of
    `minimize`) has few rounds.

    It stops where the norm of the least element of grad g + dh is at most `tol` *and* the last solve has left every
    entry on the piece on which it was: the support is stable, without which the derivative is wrong by O(1).

    Cost: n d for a round, |W|^2 n for the Gram matrix where W is new, |W|^3 / 3 for a step to a minimizer. Memory
    n |W| + |W|^2. Problems side by side (folds) are solved one after the other.

    Converges for convex l; where it is the squared loss, in finitely many rounds.

    Source: Tseng, "Convergence of a block coordinate descent method for nondifferentiable minimization", JOTA 109
    (2001); Massias, Gramfort, Salmon, "Celer: a fast solver for the lasso with dual extrapolation", ICML 2018, for
    working sets; Lee, Battle, Raina, Ng, "Efficient sparse coding algorithms", NIPS 2006, for steps on a face.

    Args:
        tol: on the norm of the least subgradient.
        max_steps: at most so many rounds.

    Raises:
        DoesNotApply: from `solve`, unless g is a `LinearModel` and `prox` a term that has `pieces`.
        ValueError: if a number is out of range.

    Example:
        >>> from bilevel import AID, BilevelProblem, hypergradient
        >>> from bilevel.inner_problems import LinearModel
        >>> from bilevel.prox import L1
        >>> from bilevel.solvers import CG
        >>> g = LinearModel(torch.eye(2), torch.tensor([3.0, 0.5]), weights=torch.ones(2))
        >>> lasso = BilevelProblem(
        ...     lambda x, y: y.square().sum() / 2, g, prox=lambda x: L1(x)
        ... )  # y* = (3 - x, 0) at 1
        >>> hypergradient(
        ...     lasso,
        ...     torch.tensor(1.0),
        ...     torch.zeros(2),
        ...     estimator=AID(CoordinateDescent(1e-6), CG()),
        ... ).grad
        tensor(-2.)
    """

    tol: float = 1e-8
    max_steps: int = 200

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, tol=AT_LEAST_0, max_steps=SIZE)

    @property
    def heeds(self) -> frozenset[Feature]:
        return frozenset({Feature.prox})

    @property
    def forgets_start(self) -> bool:
        return True

    @property
    def tolerance(self) -> float:
        return self.tol

    def with_tolerance(self, tol: float) -> CoordinateDescent:
        return replace(self, tol=tol)

    def with_steps(self, steps: int) -> CoordinateDescent:
        return replace(self, max_steps=steps)

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        structure = objective.separable
        if structure is None:
            raise DoesNotApply(
                "`CoordinateDescent` reads the columns of a linear model and the pieces of a separable term. Write g as"
                " `LinearModel(X, targets, loss)` and `prox` as a term with `pieces`, such as `L1`; or use"
                " `ProximalGradient`."
            )
        batch = y0.shape[:-1]
        rows = y0.reshape(-1, y0.shape[-1])
        targets, weights = (
            part.expand(*batch, -1).reshape(rows.shape[0], -1) for part in (structure.targets, structure.weights)
        )
        pieces = structure.pieces.expand(*batch, -1, -1).reshape(rows.shape[0], 4, -1)
        with torch.no_grad():
            ends = [
                self._row(SeparableObjective(structure.model, b, w, h, structure.tally), y.detach())
                for y, b, w, h in zip(rows, targets, weights, pieces, strict=True)
            ]
            y, z, gradient, residual = (torch.stack(part) for part in list(zip(*ends, strict=True))[:4])
        y, z, gradient = (part.reshape(*batch, -1) for part in (y, z, gradient))
        objective.known_at(structure, y, z, gradient)
        steps = [end[5] for end in ends]
        objective.tally.inner_steps += sum(steps)
        return Solved(y, tuple(end[4] for end in ends), residual.reshape(batch), max(steps))

    def _row(self, at: SeparableObjective, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Status, int]:
        """One problem: y, X y, the gradient, the norm of the least subgradient, how it ended, and the rounds."""
        h = Pieces.of(at.pieces)
        if not bool((h.a >= 0).all() and (h.c >= 0).all() and (h.lower <= h.upper).all() and y.isfinite().all()):
            return y, at.predictions(y), y * torch.nan, y.new_tensor(torch.nan), Status.nonfinite, 0
        y = y.clamp(h.lower, h.upper)
        z = at.predictions(y)
        working = _WorkingSet(at, h)
        stable, steps = False, 0
        while True:
            gradient = at.gradient(z)
            left = h.subgradient(y, gradient)
            residual = torch.linalg.vector_norm(left)
            near = bool(residual <= self.tol)
            if (near and stable) or steps == self.max_steps or not bool(residual.isfinite()):
                break
            before, steps = y, steps + 1
            working.admit(y, left, everything=near)
            y, z = working.solve(y, z, gradient, _INSIDE * self.tol)
            stable = torch.equal(h.codes(y), h.codes(before))
            if torch.equal(y, before):  # nothing moves: to rounding this is the solution
                break
        return y, z, gradient, residual, self._status(float(residual), steps), steps

    def _status(self, residual: float, steps: int) -> Status:
        return judged(residual, self.tol, Status.max_steps if steps == self.max_steps else Status.stagnated)


@final
class _WorkingSet:
    """The entries that may move, with the Gram matrix of their columns; it grows."""

    def __init__(self, at: SeparableObjective, h: Pieces) -> None:
        self.at, self.h = at, h
        self.index = torch.zeros(0, dtype=torch.int64, device=at.weights.device)
        self.rows = at.weights.new_zeros(0, at.weights.shape[-1])  # of X_W'
        self.gram: Tensor | None = None
        self.curvatures: Tensor | None = None

    def admit(self, y: Tensor, left: Tensor, everything: bool) -> None:
        """Take in the support, and of the entries that are not at their minimum those that are farthest from it."""
        inside = torch.zeros_like(y, dtype=torch.bool)
        inside[self.index] = True
        support = self.h.free(y) & ~inside if not self.index.numel() else torch.zeros_like(inside)
        moving = (left != 0) & ~inside & ~support
        known = int(self.h.free(y).sum())
        room = y.numel() if everything else max(_FEWEST, 2 * known) - known
        candidates = moving.nonzero().squeeze(-1)
        if candidates.numel() > room:
            candidates = candidates[left[candidates].abs().topk(room).indices]
        new = torch.cat([support.nonzero().squeeze(-1), candidates])
        if new.numel():
            rows = self.at.model.X.mT[new]
            if self.gram is not None and self.curvatures is not None:
                self.gram = self._grown(rows * self.curvatures, rows)
            self.index, self.rows = torch.cat([self.index, new]), torch.cat([self.rows, rows])

    def _grown(self, weighted: Tensor, rows: Tensor) -> Tensor:
        """The Gram matrix with more columns."""
        assert self.gram is not None
        across, corner = self.rows @ weighted.mT, weighted @ rows.mT
        return torch.cat([torch.cat([self.gram, across], 1), torch.cat([across.mT, corner], 1)])

    def _model(self, z: Tensor) -> Tensor:
        """X_W' D X_W at z; kept where D does not change."""
        if self.gram is None or not self.at.model.loss.is_quadratic:
            self.curvatures = self.at.curvatures(z)
            self.gram = (self.rows * self.curvatures) @ self.rows.mT
        return self.gram

    def solve(self, y: Tensor, z: Tensor, gradient: Tensor, tol: float) -> tuple[Tensor, Tensor]:
        """The minimizer over the working set, and X y there."""
        h, u, s = self.h.on(self.index), y[self.index], gradient[self.index]
        quadratic, damping = self.at.model.loss.is_quadratic, 0.0
        for _ in range(1 if quadratic else _NEWTON):
            G = self._model(z)
            if damping:  # where there is hardly a curvature, its minimizer is far beyond where the model holds
                G = G + damping * torch.diag(self.at.weights @ self.rows.mT.square())
            to = minimize(G, s - torch.mv(G, u), h, u, tol, _SWEEPS)[0]
            step = to - u
            dz = torch.mv(self.rows.mT, step)
            if quadratic:
                u, z = to, z + dz
                break
            t = self._length(u, to, z, dz, s, h)
            if t < _SHORT:
                damping = max(10 * damping, _DAMPING)
            elif t == 1.0:
                damping = damping / 10 if damping > _DAMPING else 0.0
            if t == 0.0 and damping > 1 / _DAMPING:
                break
            u, z = (to if t == 1.0 else u + t * step), z + t * dz
            slopes = self.at.weights * self.at.model.loss.slope(z, self.at.targets)
            s = torch.mv(self.rows, slopes)
            s = s if self.at.model.linear is None else s + self.at.model.linear[self.index]
            if float(torch.linalg.vector_norm(h.subgradient(u, s))) <= tol:
                break
        return y.index_copy(0, self.index, u), z

    def _length(self, u: Tensor, to: Tensor, z: Tensor, dz: Tensor, s: Tensor, h: Pieces) -> float:
        """How far towards `to`: the longest of 1, 1/2, ... at which the objective falls enough; 0: none is."""
        model = self.at.model
        loss, step = model.loss, to - u
        before = loss.value(z, self.at.targets)
        h0, q = h.value(u), None if model.linear is None else model.linear[self.index]
        promised = float(s @ step + h.value(to) - h0)
        t = 1.0
        for _ in range(_HALVINGS):
            # differences sample by sample: less is lost to rounding
            change = self.at.weights @ (loss.value(z + t * dz, self.at.targets) - before)
            change = change + h.value(u + t * step) - h0 + (0.0 if q is None else t * (q @ step))
            if float(change) <= _DECREASE * t * promised:
                return t
            t /= 2
        return 1.0 if abs(promised) <= 1e-12 * float(before.abs().sum() * self.at.weights.max()) else 0.0
