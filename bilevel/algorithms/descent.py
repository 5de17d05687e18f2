"""Descent along hypergradient estimates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from bilevel._apply import apply_estimator
from bilevel._estimate import AbstractEstimator, FlatStart
from bilevel._optimizer import AbstractOptimizer, OptimizerState
from bilevel._validate import demand_types
from bilevel.algorithms.algorithm import AbstractAlgorithm, Evaluated
from bilevel.algorithms.oracle import Oracle
from bilevel.requirements.properties import Property
from bilevel.requirements.starts import starts_warm


@final
@dataclass(frozen=True, eq=False)
class DescentState:
    """Everything that the rest of a descent depends on.

    Attributes:
        x: the outer iterate `(p,)`.
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

    What `minimize` runs where it is given `estimator=` and `outer=`, or neither.

    Cost: one estimate a step. A step draws one batch of f and one of g.

    Args:
        estimator: estimates h, solving the inner problem at each step.
        outer: the outer optimizer.
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
        >>> problem = BilevelProblem(lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2)
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> descent = Descent(AID(LBFGS(), CG()), GradientDescent(0.5))
        >>> round(float(minimize(problem, x0, x0, algorithm=descent).x), 4)
        3.0
    """

    estimator: AbstractEstimator
    outer: AbstractOptimizer
    warm_start: bool | None = None
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        demand_types(self, {"estimator": "an estimator such as `AID(LBFGS(), CG())`"})
        if self.outer.needs_curvature:
            raise ValueError(f"`Descent(outer={type(self.outer).__name__}())` needs a step size: pass `step=...`.")

    @property
    def requires(self) -> frozenset[Property]:
        return frozenset()  # the estimator has requirements of its own

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> DescentState:
        x = oracle.project(x)
        return DescentState(x, y, None, self.outer.init(x))

    def evaluate(self, oracle: Oracle, state: DescentState) -> Evaluated:
        start = FlatStart(state.y, state.v, oracle.step)
        return Evaluated(apply_estimator(self.estimator, oracle.problem(), state.x, start, self.chunk_size))

    def step(self, oracle: Oracle, state: DescentState, found: Evaluated) -> DescentState:
        h = found.estimate
        x, memory = self.outer.step(h.grad, state.x, state.memory)
        warm = starts_warm(self.warm_start, self.estimator, oracle.like.problem)
        y, v = (h.y, h.v) if warm else (state.y, state.v)
        return DescentState(oracle.project(x).detach(), y, v, memory)

    def stationarity(self, oracle: Oracle, state: DescentState, found: Evaluated) -> Tensor:
        # A projection moves no further than its argument: the certified error adds to either measure.
        error = 0.0 if found.estimate.bound is None else found.estimate.bound
        return oracle.residual(state.x, found.estimate.grad) + error

    def point(self, state: DescentState) -> tuple[Tensor, Tensor]:
        return state.x, state.y
