"""The outer method of deterministic problems: limited-memory BFGS on a convex set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._numerics.compact_bfgs import CompactBFGS, inverse_product
from bilevel._numerics.search_state import SearchState
from bilevel._numerics.wolfe import DECREASE
from bilevel._optimizer import AbstractMinimizer, Move, OptimizerState, Told
from bilevel._result import Status
from bilevel._sets import AbstractSet
from bilevel._validate import demand_types

_RTOL = {torch.float64: 1e-5}
_COARSE_RTOL = 1e-3
_MOST_FAILURES = 10  # in one search: at 0.2 a time, the step is then 1e-7 of what it was
_MOST_TRIALS = 20  # in one search: each is an estimate
_MOST_EDGES = 5  # searches in a row that came to where estimates fail: Phi falls towards there, and no further is known
_PATIENCE = 10  # accepted points in a row without the least progress of value or gradient
_MOST_FACES = 10  # that are tried for a direction
_DESCENT = 1e-10  # the least cosine between a direction and the projected gradient's


@final
@dataclass(frozen=True)
class QuasiNewton(AbstractMinimizer):
    """x <- x + t d, d = -B^-1 h, t by a strong Wolfe line search: L-BFGS, along the faces of a constraint on x.

    B is the BFGS matrix of the last `memory` steps and changes of h; those without positive curvature are not
    remembered, and where d is no direction of descent, or its search fails, it begins again along -h. With a
    constraint, d leads to the minimizer of the model h'd + d'B d / 2 on a face of the set: first the one that a
    projected gradient step leads to, then those that the minimizers run into; t <= 1, so that every point is in the
    set. `Box`, `Simplex` and dicts of them have such faces; a set that has none (`AbstractSet.face`) is walked along
    projected gradients.

    An accurate h of one function Phi is what it needs. Values differ by the error of y too: differences below what the
    estimate says of that are not believed, and slopes decide. An estimate that fails at a trial point is no decrease:
    the search goes back, and after five searches in a row that were cut off so, it ends.

    Cost: each evaluation is one estimate and one step of `minimize`; 1.0 to 1.5 an iteration as a rule, and one more at
    the end where the steps run out within a search. Memory 2 memory p, which checkpoints hold too.

    Converges: linearly near a strict minimum of a smooth Phi, in practice much faster; to a stationary point of one
    that is bounded below. Without `minimize(tol=...)` it ends where |h|, or |x - P(x - h)|, is at most

        rtol min(|h(x0)|, max(1, |Phi(x)|)),

    a share of the gradient at the start, but not of one that a bad start has made large. Missing it is no error:
    `Solution.converged` is false then.

    Source: Liu, Nocedal, "On the limited memory BFGS method for large scale optimization", Math. Program. 45 (1989);
    Byrd, Lu, Nocedal, Zhu, "A limited memory algorithm for bound constrained optimization", SIAM J. Sci. Comput. 16
    (1995), the direct primal method; Hager, Zhang, SIAM J. Optim. 16 (2005), for the noise of values.

    Args:
        memory: how many steps are remembered; None: 50, fewer where x has more than 20 000 entries, at least 10.
        rtol: of its own tolerance; None: 1e-5, in float32 1e-3; 0: it has none, and takes all the steps.

    Raises:
        ValueError: if `memory` is less than 1, or `rtol` not in [0, 1).

    Example:
        >>> from bilevel import BilevelProblem, minimize
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> solution = minimize(problem, x0, x0, outer=QuasiNewton())
        >>> round(float(solution.x), 6), solution.converged, len(solution.history)
        (3.0, True, 3)
    """

    memory: int | None = None
    rtol: float | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        if self.memory is not None and self.memory < 1:
            raise ValueError(f"`QuasiNewton(memory=...)` must be at least 1, or None. Got {self.memory}.")
        if self.rtol is not None and not 0 <= self.rtol < 1:
            raise ValueError(f"`QuasiNewton(rtol=...)` must be in [0, 1), or None. Got {self.rtol}.")

    def init(self, point: Tensor) -> OptimizerState:
        none = point.new_zeros(0, point.numel())
        return SearchState(point, torch.zeros_like(point), none, none, torch.zeros_like(point)).as_dict()

    def tell(self, told: Told, point: Tensor, state: OptimizerState, region: AbstractSet | None) -> Move:
        at = SearchState(**state)
        finite = math.isfinite(told.value) and bool(told.grad.isfinite().all())
        # A point is as good as the one before it if neither, or both, come from an estimate that succeeded.
        usable = finite and (told.failed is None or not at.good)
        if not at.begun:
            at = at.accepting(told, point)
            if not finite:
                return self._move(at, point, False, told.failed or Status.nonfinite)
            return self._search(at, region)
        slope = float(told.grad @ at.direction)
        outcome = at.search(told.value if usable else math.inf, slope if usable else math.nan)
        if at.failures and usable and told.value <= at.value + DECREASE * at.t * at.slope:
            outcome = Status.successful  # next to where estimates fail, a decrease is enough: the rest is beyond
        rejected = not usable or told.value > at.value + at.noise
        if not usable:
            at = at.but(failures=at.failures + 1, failed=(told.failed or Status.nonfinite).name)
        if isinstance(outcome, float) and at.failures < _MOST_FAILURES and len(at.trials) < _MOST_TRIALS:
            trials = [*at.trials, [at.t, told.value if usable else math.inf, slope if usable else math.nan]]
            at = at.but(t=outcome, trials=trials)
            return self._move(at, _moved(at, region), rejected, None)
        if outcome is Status.successful:
            at = at.at_edge(point).paired(told.grad, point, self._pairs(point.numel())).accepting(told, point)
            if at.idle >= _PATIENCE:
                return self._move(at, point, False, Status.stagnated)
            if at.edges >= _MOST_EDGES:
                return self._move(at, point, False, Status.line_search_failed)
            return self._search(at, region)
        if isinstance(outcome, float):
            ended = Status.nonfinite if at.failed == Status.nonfinite.name else Status.line_search_failed
        elif 0.5 * abs(at.slope) * at.first <= at.noise:
            ended = Status.stagnated
        else:
            ended = Status.line_search_failed
        if at.plain or ended is Status.stagnated:
            return self._move(at, at.x, True, ended)
        move = self._search(at.but(steps=at.steps[:0], changes=at.changes[:0]), region)  # again, along -h
        return Move(move.point, move.state, at.x, True, move.ended, move.tol)

    def _pairs(self, p: int) -> int:
        """How many are kept: an evaluation costs more than they do, up to where they fill the memory."""
        return max(10, min(50, 1_000_000 // max(p, 1))) if self.memory is None else self.memory

    def _search(self, at: SearchState, region: AbstractSet | None) -> Move:
        """Begin a line search from where it stands."""
        found = _direction(at, region)
        if found is None:
            return self._move(at, at.x, False, Status.stagnated)
        d, slope, plain, most = found
        # Without curvature the first step is of length 1, whatever the scale of Phi.
        length = float(torch.linalg.vector_norm(d))
        first = min(1 / length if plain and region is None else 1.0, at.reach / length)
        at = at.but(
            direction=d, slope=slope, first=first, t=first, most=most, plain=plain, trials=[], failures=0, failed=""
        )
        return self._move(at, _moved(at, region), False, None)

    def _move(self, at: SearchState, point: Tensor, rejected: bool, ended: Status | None) -> Move:
        rtol = (_RTOL.get(at.x.dtype, _COARSE_RTOL)) if self.rtol is None else self.rtol
        tol = rtol * min(at.scale, max(1.0, abs(at.value))) if rtol else None
        return Move(point, at.as_dict(), at.x, rejected, ended, tol)


def _moved(at: SearchState, region: AbstractSet | None) -> Tensor:
    """The trial point, in the set to the last bit."""
    point = torch.add(at.x, at.direction, alpha=at.t)
    return point if region is None else region.project(point)


def _direction(at: SearchState, region: AbstractSet | None) -> tuple[Tensor, float, bool, float] | None:
    """A direction of descent, the slope along it, whether it is the gradient's own, and how far it may be gone.

    None: there is none, to rounding.
    """
    if region is None:
        if at.steps.shape[0]:
            d = -inverse_product(at.steps, at.changes, at.grad)
            slope = float(d @ at.grad)
            if slope < -_DESCENT * float(torch.linalg.vector_norm(d) * torch.linalg.vector_norm(at.grad)):
                return d, slope, False, math.inf
        d = -at.grad
        slope = float(d @ at.grad)
        return (d, slope, True, math.inf) if slope < 0 else None
    left = float(torch.linalg.vector_norm(at.x - region.project(at.x - at.grad)))
    if not left > 0:
        return None
    B = CompactBFGS(at.steps, at.changes, sigma=left / at.length)
    toward = at.x - at.grad / B.sigma
    nearest = region.project(toward) - at.x
    plain = float(nearest @ at.grad)
    if at.steps.shape[0]:
        bent = _along_face(B, at, region, toward)
        if bent is not None:
            slope = float(bent @ at.grad)
            if slope < min(0.0, 1e-4 * plain):
                return bent, slope, False, 1.0
    return (nearest, plain, not at.steps.shape[0], 1.0) if plain < 0 else None


def _along_face(B: CompactBFGS, at: SearchState, region: AbstractSet, toward: Tensor) -> Tensor | None:
    """The step to the minimizer of the quadratic model on a face: that of a projected gradient step, and its faces.

    A minimizer that is outside of the set leads to the face that is nearest, where the model is minimized again.
    """
    inside = at.x
    for _ in range(_MOST_FACES):
        along = region.face(toward)
        if along is None:
            return None
        nearest = region.project(toward) - at.x
        off = nearest - along(nearest)
        d = off - B.solve(along(at.grad + B.product(off)), along)
        if not bool(d.isfinite().all()):
            return None
        toward = at.x + d
        inside = region.project(toward)
        if torch.allclose(inside, toward, rtol=0, atol=1e-3 * float(torch.linalg.vector_norm(d))):
            break
    return inside - at.x
