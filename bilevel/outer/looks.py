"""When a run on batches looks at all the data, and what it sees there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

from bilevel._estimate import FlatEstimate
from bilevel._flat import FlatProblem
from bilevel._result import Report, Status
from bilevel._tree import Tree
from bilevel.algorithms.algorithm import AbstractAlgorithm, Evaluated
from bilevel.algorithms.oracle import Oracle
from bilevel.certificates.certificate import Constants
from bilevel.inner_problems.kinds import inner_problem
from bilevel.outer.assessment import assessed, bounded, joint_norm
from bilevel.requirements.iterations import why_iteration
from bilevel.requirements.properties import Property

_SMOOTH = frozenset({Property.stationary, Property.minimum, Property.smooth})
BLOWN = "the iterates"
# Between two looks nine times as many calls as the latest one took: looks are then at most a tenth of the work.
_REST = 9
_UNCOUNTED = 100  # steps between two looks, where batches are not counted by sample
# Of the measure of stationarity since the start, in a run that is lost: growth is exponential, no noise is so large.
_GROWTH = 1e6


@final
@dataclass(frozen=True, eq=False)
class Look:
    """What is known at a point, by all the data.

    Attributes:
        problem: on them.
        estimate: there.
        norm: what is recorded as its distance from stationarity.
        measure: what a tolerance is compared with: certified, where it can be.
        cost: how many calls for samples it took, without those for a certificate.
        tried: the norm at which the latest certificate was not enough, or that at the start; infinite: none so far.
    """

    problem: FlatProblem
    estimate: FlatEstimate
    norm: float
    measure: float
    cost: int = 0
    tried: float = math.inf


@final
@dataclass(frozen=True)
class Looks:
    """When to look, and what for.

    Attributes:
        every: so many steps from one look to the next; None: as many as make looks a tenth of the calls.
        tol: the tolerance of the run; None: it has none.
        constants: of f and g, or a function of x that tells, for the certificate at which a run with a tolerance ends;
            None: estimated.
    """

    every: int | None = None
    tol: float | None = None
    constants: Constants | Callable[[Tree], Constants] | None = None

    def due(self, step: int, spent: int, cost: int) -> bool:
        """Whether it is time.

        Args:
            step: which step.
            spent: calls for samples since the latest look.
            cost: how many that one took, at least 1; 0: there has been none.
        """
        if cost == 0:
            return True
        if self.every is not None:
            return step % self.every == 0
        return spent >= _REST * cost if spent else step % _UNCOUNTED == 0

    def look(
        self, algorithm: AbstractAlgorithm[Any], oracle: Oracle, state: Any, found: Evaluated, tried: float = math.inf
    ) -> Look:
        """At x and y, and v where the algorithm has one, with f and g on all the data.

        A certificate takes as many calls as some ten looks. It is asked for where |D_x| meets the tolerance, and the
        norm of all directions it too, or is half of what it was when that was last done, or at the start.
        """
        before = oracle.like.tally.sampled
        problem, x = oracle.whole(), algorithm.point(state)[0]
        certifiable = inner_problem(oracle.like.problem).offers >= _SMOOTH and not why_iteration(algorithm)
        certifiable = certifiable and not problem.sharded  # else products of all of y would be needed
        seen = algorithm.on_everything(oracle, state, found)
        if seen is not None:
            residual = norm = float(oracle.residual(x, seen.grad))
            if not certifiable:  # Phi is what its steps make of it
                return Look(problem, seen, norm, norm, oracle.like.tally.sampled - before)
        elif not certifiable:  # y is no stationary point of a smooth g, and what a batch says of it is luck
            value = problem.f(x, found.estimate.y).detach()
            norm = float(algorithm.stationarity(oracle, state, found))
            cost = oracle.like.tally.sampled - before
            return Look(problem, replace(found.estimate, value=value), norm, math.inf, cost)
        else:
            second = Property.second_derivatives in algorithm.requires
            seen = assessed(problem, x, found.estimate.y, found.estimate.v, second_derivatives=second)
            seen = replace(seen, note=found.estimate.note)
            residual = float(oracle.residual(x, seen.grad))
            norm = joint_norm(residual, seen)
        cost = oracle.like.tally.sampled - before
        worth = norm <= tried / 2 if math.isfinite(tried) else self.tol is not None and norm <= self.tol
        if self.tol is None or not (residual <= self.tol and worth):
            return Look(problem, seen, norm, math.inf, cost, norm if tried == math.inf else tried)
        known = self.constants
        if known is not None and not isinstance(known, Constants):
            known = known(problem.x.unravel(x))
        seen = bounded(problem, x, seen, known)
        return Look(problem, seen, norm, math.inf if seen.bound is None else residual + seen.bound, cost, norm)


def blown(look: Look, first: float) -> Look:
    """The same, with a report of divergence where the measure has grown beyond all bounds.

    Args:
        look: at a point.
        first: the norm at the start of the run.
    """
    if not (math.isfinite(look.norm) and look.norm > _GROWTH * first > 0):
        return look
    lost = Report(BLOWN, Status.diverged, look.norm, 0)
    return replace(look, estimate=replace(look.estimate, reports=(*look.estimate.reports, lost)))


def is_finite(found: FlatEstimate) -> bool:
    """Whether a direction and a value are numbers: what a step without a record is looked at for."""
    residuals = [report.residual for report in found.reports]  # numbers already, where a value is a tensor
    return all(map(math.isfinite, (*residuals, float(found.grad.sum()), float(found.value))))
