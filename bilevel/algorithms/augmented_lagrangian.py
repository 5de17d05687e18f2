"""Minimization over x under constraints on x and y*(x): the augmented Lagrangian method."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._apply import apply_estimator
from bilevel._estimate import FlatStart
from bilevel._numerics.rows import safe_row_norms
from bilevel._optimizer import AbstractMinimizer
from bilevel._result import Status
from bilevel.algorithms.algorithm import AbstractAlgorithm, Evaluated
from bilevel.algorithms.augmented_f import Function, Lagrange, augmented
from bilevel.algorithms.descent import Descent, DescentState
from bilevel.algorithms.oracle import Oracle
from bilevel.algorithms.outer_conditions import FAILED, STATIONARY, conditions, first_weight, largest
from bilevel.algorithms.outer_constraints import OuterConstraints, outer_values
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, AT_LEAST_1, POSITIVE, Range, demand_ranges
from bilevel.requirements.properties import Property
from bilevel.requirements.starts import starts_warm

_IDLE = 3  # rounds in a row that could not move x: rounding has been reached


@final
@dataclass(frozen=True, eq=False)
class AugmentedState:
    """Everything that the rest of a run depends on.

    Attributes:
        descent: that of the minimization of the augmented Lagrangian.
        inequalities: lambda `(*tasks, k)`.
        equalities: nu `(*tasks, m)`.
        weight: w; 0 before the first evaluation, which it is derived from.
        round: which minimization.
        steps: how many evaluations it has had.
        omega: at which stationarity it ends.
        violation: max(c, -lambda / w, |e|) at the end of the one before.
        failed: how many in a row have not lowered it enough.
        own: the outer method's own tolerance, as it was at the start; 0: it has none.
        closing: whether this is the last evaluation of the round, at the point that its search went back to.
        idle: how many rounds in a row could not move x.
    """

    descent: DescentState
    inequalities: Tensor
    equalities: Tensor
    weight: float
    round: int
    steps: int
    omega: float
    violation: float
    failed: int
    own: float
    closing: bool
    idle: int


@final
@dataclass(frozen=True, eq=False)
class _Kept:
    """What the step needs of an evaluation: lambda+ and nu+, the measures, and whether the round is over."""

    found: Evaluated
    inequalities: Tensor
    equalities: Tensor
    distance: float
    measure: float
    violation: float
    over: bool
    failed: int


@final
@dataclass(frozen=True, eq=False)
class AugmentedLagrangian(AbstractAlgorithm[AugmentedState]):
    """min_x f(x, y*(x))  s.t.  c(x, y*(x)) <= 0,  e(x, y*(x)) = 0,  x in the constraint of `minimize`.

    Rounds minimize, by `descent`, with its projection onto the constraint,

        L(x) = f + sum_i (max(0, lambda_i + w c_i)^2 - lambda_i^2) / (2 w) + sum_j nu_j e_j + w e_j^2 / 2

    at (x, y*(x)): an outer objective like any other, so that every hypergradient estimator gives its derivative. At the
    end of a round lambda <- max(0, lambda + w c), nu <- nu + w e, kept within +-`bound`, and w <- `growth` w unless
    max(c, -lambda / w, |e|) has fallen to `decrease` of what it was. Round k ends where |x - P(x - grad L)| is at most
    omega_k, a tenth of omega_{k-1}, where the outer method can go no further, or after `round_steps` steps.

    What `minimize(outer_inequalities=, outer_equalities=)` runs. The gradient of L at lambda is that of the Lagrangian
    at lambda+, so that every evaluation knows how far it is from the Karush-Kuhn-Tucker conditions: its measure is

        max(|x - P(x - grad L)|, max_i |min(-c_i, lambda+_i)|, max_j |e_j|),

    and the run ends where that is at most `tol`. Values are those of f. With tasks the constraints hold in each task,
    f and L are means over tasks: the Lagrangian is mean_i (f_i + lambda_i'c_i + nu_i'e_i).

    It ends otherwise as `infeasible_stationary` where the violation does not fall although w rises, and
    x is stationary for it, |x - P(x - grad (|max(c, 0)|^2 + |e|^2) / 2)| <= 0.001 |(max(c, 0), e)|: one estimate, made
    for this alone; as `weight_limit` where w would exceed `most`; or as every run does, its steps used up.

    Cost: one estimate and one value of the constraints a step. Memory: that of `descent`, and the multipliers.

    Converges: to points that satisfy the conditions, where the gradients of active constraints in x (through y*(x)) are
    linearly independent, or to stationary points of the violation, if rounds reach their omega_k; w stays
    bounded where multipliers are unique and second-order sufficiency and strict complementarity hold.

    Source: Andreani, Birgin, Martinez, Schuverdt, "On augmented Lagrangian methods with general lower-level
    constraints", SIAM J. Optim. 18 (2008), algorithm 3.1; Birgin, Martinez, "Practical augmented Lagrangian methods for
    constrained optimization" (2014), for the first weight; Bertsekas, "Constrained optimization and Lagrange
    multiplier methods" (1982).

    Args:
        descent: minimizes L: an estimator and an outer method.
        inequalities: c: `inequalities(x, y) -> tensors`, or with the data that f is given; None: there are none.
        equalities: e, likewise.
        weight: w at the start; None: 10 max(1, |f|) / max(1, |(max(c, 0), e)|^2 / 2) at x0, within [1e-6, 10].
        growth: of w.
        decrease: by which share the violation has to fall.
        most: what w may be.
        bound: of multipliers; larger ones are cut off where a round begins.
        round_steps: how many steps a round may take.
        tol: what rounds tend to: that of `minimize`; None: the outer method's own.

    Raises:
        ValueError: if there are no constraints, or a setting is out of range.

    Example:
        >>> from bilevel import AID, BilevelProblem, minimize
        >>> from bilevel.solvers import CG, LBFGS, QuasiNewton
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> descent = Descent(AID(LBFGS(), CG()), QuasiNewton())
        >>> method = AugmentedLagrangian(descent, inequalities=lambda x, y: y - 1, weight=10.0)
        >>> solution = minimize(problem, x0, x0, algorithm=method, tol=1e-6)
        >>> round(float(solution.x), 4), round(solution.outer_constraints.inequalities[0], 4)
        (1.0, 2.0)
    """

    descent: Descent
    inequalities: Function | None = None
    equalities: Function | None = None
    weight: float | None = None
    growth: float = 10.0
    decrease: float = 0.5
    most: float = 1e12
    bound: float = 1e9
    round_steps: int = 100
    tol: float | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, weight=POSITIVE, most=POSITIVE, bound=POSITIVE, tol=AT_LEAST_0, round_steps=AT_LEAST_1)
        demand_ranges(self, growth=Range(least=1.0, open=True), decrease=Range(below=1.0))
        if self.inequalities is None and self.equalities is None:
            raise ValueError(
                "`AugmentedLagrangian(inequalities=..., equalities=...)` needs one of them. Got None. Without"
                " constraints `Descent` is enough."
            )

    @property
    def requires(self) -> frozenset[Property]:
        return frozenset()  # the estimator has requirements of its own

    @property
    def best_by_measure(self) -> bool:
        return True

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> AugmentedState:
        problem, descent = oracle.problem(), self.descent.init(oracle, x, y)
        c, e = self._values(oracle, descent.x, problem.start(descent.x, y).detach())
        none = Lagrange(torch.zeros_like(c), torch.zeros_like(e), 0.0)
        return AugmentedState(
            descent, none.inequalities, none.equalities, 0.0, 0, 0, math.inf, math.inf, 0, 0.0, closing=False, idle=0
        )

    def evaluate(self, oracle: Oracle, state: AugmentedState) -> Evaluated:
        inside = self._augmented(oracle, state)
        found = self.descent.evaluate(inside, state.descent)
        x, y = state.descent.x, found.estimate.y
        c, e = self._values(oracle, x, y)
        raised, shifted, gap, told = conditions(c, e, Lagrange(state.inequalities, state.equalities, state.weight))
        distance = float(self.descent.stationarity(inside, state.descent, found))
        measure = max(distance, told.complementarity, largest(e.abs()))
        ends = state.closing or found.ended is not None or state.steps + 1 >= self.round_steps
        over = found.back is None and state.weight > 0 and (ends or distance <= state.omega)
        fell = gap <= max(self.decrease * state.violation, 0.5 * self._target(state))
        failed = 0 if fell else state.failed + 1
        ended = self._ended(oracle, state, x, y, told, failed) if over else None
        if over and ended is None and state.idle >= _IDLE:
            ended = found.ended
        if not state.weight and not over and found.ended is Status.nonfinite:
            ended = found.ended
        with torch.no_grad():
            value = oracle.problem().f(x, y)
        back = None if found.back is None else replace(state, descent=found.back)
        own = found.tol if not state.weight else state.own or None
        kept = _Kept(found, raised, shifted, distance, measure, gap, over, failed)
        return Evaluated(replace(found.estimate, value=value.detach()), kept, back, ended, own, told)

    def step(self, oracle: Oracle, state: AugmentedState, found: Evaluated) -> AugmentedState:
        kept: _Kept = found.kept
        if not state.weight:
            own = kept.found.tol or 0.0
            c, e = self._values(oracle, state.descent.x, found.estimate.y)
            weight = first_weight(float(found.estimate.value), c, e) if self.weight is None else self.weight
            begun = replace(state, weight=weight, own=own)
            omega = max(0.5 * self._target(begun), 0.1 * min(1.0, kept.distance) if kept.distance else 0.1)
            return replace(begun, descent=self._anew(oracle, state, found), omega=omega)
        if kept.over:
            grows = kept.failed > 0
            return replace(
                state,
                descent=self._anew(oracle, state, found),
                inequalities=kept.inequalities.clamp_max(self.bound),
                equalities=kept.equalities.clamp(-self.bound, self.bound),
                weight=state.weight * self.growth if grows else state.weight,
                round=state.round + 1,
                steps=0,
                omega=max(0.5 * self._target(state), 0.1 * state.omega),
                violation=kept.violation,
                failed=kept.failed,
                closing=False,
                idle=0 if state.steps else state.idle + 1,
            )
        if kept.found.ended is not None and found.back is not None:
            back: AugmentedState = found.back
            return replace(back, closing=True)
        descent = self.descent.step(self._augmented(oracle, state), state.descent, kept.found)
        return replace(state, descent=descent, steps=state.steps + 1)

    def stationarity(self, oracle: Oracle, state: AugmentedState, found: Evaluated) -> Tensor:
        kept: _Kept = found.kept
        return state.descent.x.new_tensor(kept.measure)

    def point(self, state: AugmentedState) -> tuple[Tensor, Tensor]:
        return state.descent.x, state.descent.y

    def _values(self, oracle: Oracle, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        problem = oracle.problem()
        return (
            outer_values(problem, self.inequalities, "outer_inequalities", x, y),
            outer_values(problem, self.equalities, "outer_equalities", x, y),
        )

    def _augmented(self, oracle: Oracle, state: AugmentedState) -> Oracle:
        at = Lagrange(state.inequalities, state.equalities, state.weight)
        return augmented(oracle, self.inequalities, self.equalities, at)

    def _target(self, state: AugmentedState) -> float:
        return state.own if self.tol is None else self.tol

    def _anew(self, oracle: Oracle, state: AugmentedState, found: Evaluated) -> DescentState:
        """The start of the next round: from the y and v that were found; what a minimizer knows is of another L."""
        memory = state.descent.memory
        if isinstance(self.descent.outer, AbstractMinimizer):
            memory = self.descent.outer.init(state.descent.x)
        warm = starts_warm(self.descent.warm_start, self.descent.estimator, oracle.like.problem)
        warm = warm and bool(found.estimate.y.isfinite().all())
        y, v = (found.estimate.y, found.estimate.v) if warm else (state.descent.y, state.descent.v)
        return DescentState(state.descent.x, y, v, memory)

    def _ended(
        self, oracle: Oracle, state: AugmentedState, x: Tensor, y: Tensor, told: OuterConstraints, failed: int
    ) -> Status | None:
        """Why no further round can help; None: one may."""
        if failed >= FAILED and told.violation > self._target(state):
            c, e = self._values(oracle, x, y)
            left = torch.cat([c.clamp_min(0).flatten(), e.flatten()])
            at = Lagrange(state.inequalities, state.equalities, math.inf)
            problem = augmented(oracle, self.inequalities, self.equalities, at).problem()
            start = FlatStart(y, None, max(1, oracle.step))
            slope = apply_estimator(self.descent.estimator, problem, x, start, self.descent.chunk_size).grad
            if float(oracle.residual(x, slope)) <= STATIONARY * float(safe_row_norms(left)) / (oracle.like.tasks or 1):
                return Status.infeasible_stationary
        if failed and state.weight * self.growth > self.most:
            return Status.weight_limit
        return None
