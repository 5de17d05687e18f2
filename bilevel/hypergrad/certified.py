"""Certified accuracy: an implicit estimator whose solvers are asked for what the error of its hypergradient needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from bilevel._calculus import Exact, demand_beyond_start
from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._numerics.quasi_newton import Pairs, Recycled
from bilevel._numerics.rows import safe_row_norms
from bilevel._result import Report, Solved, Status, Tally, report
from bilevel._tree import Tree
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, demand_ranges
from bilevel.bounds.beforehand import Beforehand
from bilevel.bounds.bound import Bound
from bilevel.certificates.accuracy import Accuracy, inner_tolerance, linear_tolerance
from bilevel.certificates.applies import CERTIFIABLE
from bilevel.certificates.assumptions import contradiction, moved
from bilevel.certificates.certificate import Constants, NonfiniteError
from bilevel.certificates.completed import with_curvature
from bilevel.certificates.measured import Measured, measured
from bilevel.certificates.theorems import Terms, bounded
from bilevel.hypergrad.abstract_implicit import AbstractImplicit
from bilevel.hypergrad.implicit_point import ImplicitPoint, Solves
from bilevel.requirements.properties import Property

_ATTEMPTS = 100  # solves in all: mostly two to four are needed, more where solvers take few steps each
_FIRST = 0.1  # the relative residual of the first linear solve: one digit tells how large v and h are
_INNER = 0.6  # of the target, which y aims at where its part exceeds half; v has what is left, with room to spare
_SLACK = 0.95  # of the target: the norms of v and h change while it is being met
_PROGRESS = 0.5  # what each solve must at least reduce its residual to, so that a target out of reach ends soon
_FLOOR = 0.9  # an inner solver that reduces its residual to no less than this is at its rounding floor
_REST = 0.1  # of the inner part and rounding: v as accurate as makes sense where these alone miss the target
_INSIDE = 0.5  # of the radius within which the constants hold: the distance that is aimed at where y is beyond it
_CONDITION = 1e8  # at most L over the least curvature, where L is not given and rounding may be left to it
_STALE = 2.0  # times C_G as it was measured: where its extension to y has grown so much, it is measured anew
_PAIRS = 20  # products that precondition the solves after them: 40 q of memory, and 80 q flops a step


@final
@dataclass(frozen=True)
class Certified(AbstractEstimator):
    """The h of an implicit estimator, solved for until |h - grad Phi(x)| <= max(target_error, relative_error |h|).

    The bound is that of `certify` (theorem A or B of the certificates), and is `Estimate.bound`. It costs nothing: its
    residuals are those at hand. Only where L is not given, and rounding would miss the target were L 1e8 times the
    curvature along v (which it is not for condition numbers up to 1e8), a gradient and some 14 Hessian products bound
    it: with a target near rounding at every estimate, which giving L saves.

    Whichever of the two problems keeps the bound above the target is solved to the tolerance that the theorem asks for;
    the tolerances that its solvers came with do not matter. Linear systems are solved for the correction of v. Near a
    warm start y is corrected by Newton steps with the linear solver, and by the inner solver where these gain little. A
    linear solver that takes a preconditioner and has none is preconditioned by the last 20 products, for 40 q of
    memory. A solver without a tolerance is used as it is.

    Cost: from a warm start that is accurate enough one gradient of g and of f, one Hessian product and one cross
    product; otherwise that of its solvers, which grows with the logarithm of the target.

    Where the target is below the rounding of f and g, or a solver fails, the best that was found is returned, with its
    bound and `Status.stagnated`.

    Source: the bound is derived in docs/certificates.md; for accuracy tied to what it is needed for, Ehrhardt, Roberts,
    "Analyzing inexact hypergradients for bilevel learning", IMA J. Appl. Math. 89 (2024).

    Args:
        estimator: `AID(inner, linear)`, without damping and with exact products; its own targets do not matter.
        target_error: the target for the bound.
        relative_error: the same, relative to |h|: below 1 it certifies a descent direction. With both, the larger
            target counts.
        constants: what is known of f and g, or a function of x that tells. None: estimated at the start, which makes
            the bound a heuristic.

    Raises:
        ValueError: if there is no target, or one is negative; if the estimator is damped or its products are not
            exact; from `estimate`, where the estimator does not apply, and if a constant that is needed is unknown.

    Example:
        >>> import torch
        >>> from bilevel import AID, BilevelProblem, Constants, hypergradient
        >>> from bilevel.solvers import CG, LBFGS
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (y - x).square().sum() / 2
        ... )
        >>> known = Constants(mu=1.0, L_fyy=1.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0, C_G=1.0)
        >>> certified = Certified(AID(LBFGS(), CG()), target_error=1e-6, constants=known)
        >>> x = torch.ones(2, dtype=torch.float64)
        >>> hypergradient(problem, x, torch.zeros_like(x), estimator=certified).bound <= 1e-6
        True
    """

    estimator: AbstractImplicit
    target_error: float | None = None
    relative_error: float | None = None
    constants: Constants | Callable[[Tree], Constants] | None = None

    def __post_init__(self) -> None:
        demand_types(self, {"estimator": "an implicit estimator such as `AID(LBFGS(), CG())`"})
        demand_ranges(self, target_error=AT_LEAST_0, relative_error=AT_LEAST_0)
        self._accuracy()
        if self.estimator.damping:
            raise ValueError(
                f"`Certified(estimator=...)` needs damping = 0: a damped system is biased by an unknown amount."
                f" Got {self.estimator.damping}. Leave out `damping=`."
            )
        if not isinstance(self.estimator.products, Exact):
            raise ValueError(
                f"`Certified(estimator=...)` needs `Exact()` products, whose errors are those of rounding only."
                f" Got `{type(self.estimator.products).__name__}`. Leave out `products=`."
            )

    @property
    def forgets_start(self) -> bool:
        return True  # it is within its target, from wherever it starts

    @property
    def requires(self) -> frozenset[Property]:
        # Certificates are of smooth minimization, and their products of second derivatives.
        return self.estimator.requires | CERTIFIABLE | {Property.second_derivatives}

    def certified(
        self,
        target_error: float | None,
        relative_error: float | None,
        constants: Constants | Callable[[Tree], Constants] | None,
    ) -> Certified:
        own = self.constants if constants is None else constants
        return Certified(self.estimator, target_error, relative_error, own)

    def error_bound(self, about: Beforehand) -> Bound:
        raise ValueError(
            "`Certified` certifies its own error. Read `Estimate.bound`, or call `bounds.aid` with the distance and the"
            " linear error that are reached."
        )

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        accuracy, y = self._accuracy(), problem.start(x, start.y).detach()
        if start.v is None:  # else the first product with G tells
            demand_beyond_start(problem.with_tally(Tally()), x, y)
        solves = Solves(problem, x, self.estimator, Recycled(Pairs(_PAIRS, y.reshape(-1, y.shape[-1]))))
        at = self.estimator.products.linearize(problem, x, y)
        try:
            return self._from(solves.point(y, at, start.v), accuracy, solves, start.v is not None)
        except NonfiniteError:
            point = solves.point(y, at, start.v)
            ended = Report("certified accuracy", Status.nonfinite, math.inf, 0)
            return FlatEstimate(point.h, point.value, y, (ended,), point.v, bound=math.inf)

    def _from(self, point: ImplicitPoint, accuracy: Accuracy, solves: Solves, warm: bool) -> FlatEstimate:
        """The estimate, by solves from a point; `warm` says that its v is a guess."""
        problem, x, anchor = solves.problem, solves.x, point.y
        known = accuracy.known(problem, x, anchor)
        attempt, stuck, failed = 0, False, False
        newton = warm  # near y*, where the linear solver is the faster one
        solved: Solved | None = None
        system: Solved | None = None
        while True:
            here = moved(known, float(safe_row_norms(point.y - anchor).max()))
            if here.mu is None or (here.C_G or 0.0) > _STALE * (known.C_G or 0.0):  # measured too far from here
                known, anchor = accuracy.known(problem, x, point.y), point.y
                here = known
            now = _judge(point, here, accuracy)
            refuted = here.radius == math.inf and bool(contradiction(now.found, here))
            finite = math.isfinite(float(now.found.r.sum()))
            if now.met or refuted or failed or attempt == _ATTEMPTS or not finite:
                if here.L is not None or refuted or not finite:
                    break
                L = _CONDITION * _curvature(point)
                if math.isfinite(L):
                    granted = _judge(point, replace(here, L=L, local=here.local | {"L"}), accuracy)
                    if granted.met:
                        now = granted
                        break
                known, anchor = with_curvature(problem, x, point.y, here)[0], point.y
                continue
            attempt += 1
            guessed = warm or system is not None  # how large v and h are
            if guessed and not stuck and (now.terms.inner > now.target / 2 or not now.valid):
                before = float(safe_row_norms(point.at.gradient).max())
                tol = min(
                    inner_tolerance(_INNER * now.target, now.found, here),
                    _PROGRESS * before,
                    _INSIDE * here.radius * now.terms.mu,
                )
                inner = self.estimator.inner.with_tolerance(tol)
                newton = newton and inner is not None  # a solver without a tolerance, a closed form, needs no help
                if newton:
                    solved, at = solves.newton(point.at, tol)
                    newton = solved.status.ok
                else:
                    solved, at = solves.inner(point.y, self.estimator.inner if inner is None else inner)
                    stuck = not float(solved.residual.max()) < _FLOOR * before
                point = solves.point(solved.value, at, point.v)
            else:
                if point.r.shape != point.fy.shape:  # its norm is known, but not itself
                    point = solves.measured_anew(point)
                size = float(safe_row_norms(point.r).max())
                floor = now.terms.inner + now.found.rounding
                left = _SLACK * now.target - now.terms.inner - now.found.rounding
                last = guessed and (stuck or left <= 0)  # the target is out of reach: no better than makes sense
                needed = linear_tolerance(max(left, _REST * floor), here) / point.y.shape[:-1].numel()
                tol = min(needed, _PROGRESS * size) if guessed else _FIRST * size
                system = solves.linear(point.at, point.r, tol, size)
                failed = last or not (system.status.ok or float(system.residual.max()) < _PROGRESS * size)
                point = solves.corrected(point, system)
        return _estimate(point, now, solved, system, attempt)

    def _accuracy(self) -> Accuracy:
        return Accuracy(self.constants, self.target_error or 0.0, self.relative_error or 0.0)


@final
@dataclass(frozen=True, eq=False)
class _Verdict:
    """What is certified at a point, and whether that is what was asked for."""

    found: Measured
    terms: Terms
    bound: float
    target: float
    valid: bool  # whether y is known to be where the constants hold

    @property
    def met(self) -> bool:
        return self.bound <= self.target and self.valid


def _judge(point: ImplicitPoint, here: Constants, accuracy: Accuracy) -> _Verdict:
    # H v = grad_y f - r, but for the rounding of both, which L bounds.
    hv = point.fy - point.r if here.L is not None and point.r.shape == point.fy.shape else None
    found = measured(point.y, point.v, point.at.gradient, point.r, point.fx, point.fy, point.fx - point.h, here, hv)
    terms = bounded(found, here)
    target = accuracy.target(safe_row_norms(point.h))
    return _Verdict(found, terms, terms.total + found.rounding, target, terms.distance <= here.radius)


def _curvature(point: ImplicitPoint) -> float:
    """At least |H v| / |v|, which is at least the least eigenvalue of H; the largest over the tasks; Inf at v = 0."""
    norms = [safe_row_norms(t.double()) for t in (point.fy, point.r, point.v)]
    return float(((norms[0] + norms[1]) / norms[2]).nan_to_num(math.inf, math.inf).max())


def _estimate(
    point: ImplicitPoint, last: _Verdict, solved: Solved | None, system: Solved | None, attempts: int
) -> FlatEstimate:
    status = Status.successful if last.met else Status.stagnated
    parts = (("inner solver", solved, point.at.gradient), ("linear solver", system, point.r))
    reports = [report(name, solution, left) for name, solution, left in parts if solution is not None]
    if status.ok:  # the target is met: what the solvers could not do was not needed
        reports = [replace(each, status=Status.successful) for each in reports]
    reports.append(Report("certified accuracy", status, last.bound, attempts))
    bound = last.bound if last.valid and not math.isnan(last.bound) else math.inf
    note = f"no certificate: {last.terms.reason}" if last.terms.reason else ""
    return FlatEstimate(point.h, point.value, point.y, tuple(reports), point.v, bound=bound, note=note)
