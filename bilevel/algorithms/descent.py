"""Descent along hypergradient estimates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import cast, final

import torch
from torch import Tensor

from bilevel._apply import apply_estimator
from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._numerics.rows import all_finite
from bilevel._optimizer import AbstractMinimizer, AbstractOptimizer, Move, OptimizerState, Told, demand_numbers
from bilevel._result import Status
from bilevel._validate import demand_types
from bilevel.algorithms.algorithm import AbstractAlgorithm, Evaluated
from bilevel.algorithms.oracle import Oracle
from bilevel.arguments.unchecked import unchecked
from bilevel.bounds.beforehand import Beforehand
from bilevel.bounds.bound import Bound
from bilevel.ranks.ranks import Ranks
from bilevel.requirements.properties import Property
from bilevel.requirements.starts import starts_warm


@cache
def _minimizes(kind: type) -> bool:
    """Whether an outer method is told values, and not asked for steps; kept, as it is asked twice a step."""
    return not issubclass(kind, AbstractOptimizer)


_start, _evaluated = unchecked(FlatStart), unchecked(Evaluated)


@final
@dataclass(frozen=True, eq=False)
class DescentState:
    """Everything that the rest of a descent depends on.

    Attributes:
        x: the outer iterate `(p,)`; of a minimizer the point where Phi is evaluated next.
        y: where the next inner solve starts.
        v: where the next linear solve starts, or None.
        memory: the outer optimizer's state.
    """

    x: Tensor
    y: Tensor
    v: Tensor | None
    memory: OptimizerState


@final
@dataclass(frozen=True, eq=False)
class Descent(AbstractAlgorithm[DescentState]):
    """x <- P(step(x, h)): any hypergradient estimate h, any optimizer, and a projection where x is constrained.

    With a minimizer (`QuasiNewton`) x <- x + t d, where t is found by a line search on estimates of Phi and h. Each of
    its evaluations is a step. An estimate that fails at a trial point is no decrease: the search goes back.

    What `minimize` runs where it is given `estimator=` and `outer=`, or neither.

    Cost: one estimate a step. A step draws one batch of f and one of g.

    Args:
        estimator: estimates h, solving the inner problem at each step.
        outer: the outer optimizer, or minimizer.
        warm_start: start each estimate from the inner and linear solutions of the one before; None: where the estimate
            forgets its start, see `minimize`.
        chunk_size: in task mode, how many tasks to treat at a time.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if the optimizer's step size is left open.

    Example:
        >>> import torch
        >>> from bilevel import AID, BilevelProblem, minimize
        >>> from bilevel.solvers import CG, LBFGS, GradientDescent
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> descent = Descent(AID(LBFGS(), CG()), GradientDescent(0.5))
        >>> round(float(minimize(problem, x0, x0, algorithm=descent).x), 4)
        3.0
    """

    estimator: AbstractEstimator
    outer: AbstractOptimizer | AbstractMinimizer
    warm_start: bool | None = None
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        demand_types(self, {"estimator": "an estimator such as `AID(LBFGS(), CG())`"})
        if isinstance(self.outer, AbstractOptimizer):
            demand_numbers("Descent", "outer", self.outer)
        if isinstance(self.outer, AbstractOptimizer) and self.outer.needs_curvature:
            raise ValueError(f"`Descent(outer={type(self.outer).__name__}())` needs a step size: pass `step=...`.")

    @property
    def requires(self) -> frozenset[Property]:
        return frozenset()  # the estimator has requirements of its own

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> DescentState:
        x = oracle.project(x)
        return DescentState(x, y, None, self.outer.init(x))

    @property
    def values_are_phi(self) -> bool:
        return True

    def evaluate(self, oracle: Oracle, state: DescentState) -> Evaluated:
        start = _start(state.y, state.v, oracle.step)
        # Whether it applies was asked where the run began, of the whole algorithm.
        found = apply_estimator(self.estimator, oracle.problem(), state.x, start, self.chunk_size, applies=True)
        if not _minimizes(type(self.outer)):
            return _evaluated(found)
        assert isinstance(self.outer, AbstractMinimizer)
        distance = float(self._distance(oracle, state, found))
        told = Told(float(found.value), found.grad, _failure(found), distance, found.value_error)
        move = self.outer.tell(told, state.x, state.memory, oracle.region)
        back = None if not move.rejected else DescentState(move.stands, state.y, state.v, state.memory)
        return Evaluated(found, move, back, move.ended, move.tol)

    def step(self, oracle: Oracle, state: DescentState, found: Evaluated) -> DescentState:
        h = found.estimate
        move: Move | None = found.kept
        warm = starts_warm(self.warm_start, self.estimator, oracle.like.problem)
        y, v = (h.y, h.v) if warm else (state.y, state.v)
        if move is not None:
            if _failure(h) is not None:  # nothing to start from
                y, v = state.y, state.v
            return DescentState(move.point.detach(), y, v, move.state)
        outer = cast(AbstractOptimizer, self.outer)  # a minimizer would have moved
        x, memory = outer.step(h.grad, state.x, state.memory)
        return DescentState(oracle.project(x).detach(), y, v, memory)

    def stationarity(self, oracle: Oracle, state: DescentState, found: Evaluated) -> Tensor:
        return self._distance(oracle, state, found.estimate)

    def on_everything(self, oracle: Oracle, state: DescentState, found: Evaluated) -> FlatEstimate | None:
        warm = starts_warm(self.warm_start, self.estimator, oracle.like.problem)
        y, v = (found.estimate.y, found.estimate.v) if warm else (state.y, state.v)
        start = FlatStart(y, v, oracle.step)
        return apply_estimator(self.estimator, oracle.whole(), state.x, start, self.chunk_size)

    def error_bound(self, about: Beforehand) -> Bound:
        return self.estimator.error_bound(about)

    def is_apart(self, state: DescentState) -> bool:
        return state.y.dim() > 1  # the tasks of this rank

    def gathered(self, state: DescentState, ranks: Ranks) -> DescentState:
        if not self.is_apart(state):
            return state
        parts = ranks.gathered((state.y.cpu(), None if state.v is None else state.v.cpu()))
        y = torch.cat([y for y, _ in parts]).to(state.y.device)
        vs = [v for _, v in parts if v is not None]
        return replace(state, y=y, v=torch.cat(vs).to(y.device) if vs else None)

    def of_rank(self, state: DescentState, ranks: Ranks) -> DescentState:
        if not self.is_apart(state):
            return state
        rows = ranks.rows(len(state.y))
        return replace(state, y=state.y[rows], v=None if state.v is None else state.v[rows])

    def point(self, state: DescentState) -> tuple[Tensor, Tensor]:
        return state.x, state.y

    def _distance(self, oracle: Oracle, state: DescentState, found: FlatEstimate) -> Tensor:
        # A projection moves no further than its argument: the certified error adds to either measure.
        distance = oracle.residual(state.x, found.grad)
        return distance if found.bound is None else distance + found.bound


def _failure(found: FlatEstimate) -> Status | None:
    """Why an estimate is not to be used; None: it is. On a kink of y*(x) its value is right, and h is of one side."""
    if not (math.isfinite(float(found.value)) and all_finite(found.grad)):
        return Status.nonfinite
    status = Status.worst(report.status for report in found.reports)
    return None if status.ok or status is Status.weakly_active else status
