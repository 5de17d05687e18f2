"""Evolution-strategy Jacobian: a zeroth-order estimate of dy/dx."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import outer_gradients
from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver
from bilevel._result import Report, Solved, Status, Tally, report
from bilevel._validate import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, POSITIVE, demand_ranges
from bilevel.bounds.beforehand import Beforehand
from bilevel.bounds.bound import Bound
from bilevel.bounds.sampled import esj
from bilevel.hypergrad.directions import Distribution as Distribution, demand_distribution, directions
from bilevel.hypergrad.held import held
from bilevel.hypergrad.one_sided import FARTHER, one_sided
from bilevel.hypergrad.radius import (
    bent,
    changed,
    distortion,
    fitting,
    refined,
    rounding,
    size_of,
    spread,
    verdict,
)
from bilevel.inner_problems.kinds import inner_objective
from bilevel.requirements.properties import Property

_MIRRORED = 4  # directions whose other side is looked at: they are exchangeable, so that few tell of all


@final
@dataclass(frozen=True)
class ESJ(AbstractEstimator):
    """ESJ: h = grad_x f + (c/Q) sum_j <[y_N(x + r u_j) - y_N(x)] / r, grad_y f> u_j, no second derivatives.

    y_N(x) is what the inner solver returns from the same start with the same steps; the Q perturbed solves and the
    unperturbed one run as one batch, on the same data and the same random masks (common random numbers).

    Directions u_j in R^p, with E[c u u'] = I: "gaussian" N(0, I), "rademacher" signs, "sphere" uniform on the unit
    sphere with the dimension factor c = p, "orthonormal" Q <= p rows of a random rotation with c = p (for Q = p the
    estimate is deterministic, and equals `ITD` where y_N is affine in x).

    Where y_N has a kink at x the differences are those of one side. In the first estimate of a run the other side of
    the first direction is looked at as well, an inner solve that is not counted, and two more where it gives reason to:
    `Status.one_sided`.

    Cost: Q + 1 inner solves and one gradient of f; memory (Q + 1) q (in batches of `chunk`, less).

    Error where y_N is affine in x, w = J_N' grad_y f: unbiased for `ITD` at any radius, with mean squared deviation
    (p + 1)/Q |w|^2 for gaussian, (p - 1)/Q |w|^2 for rademacher and sphere, (p/Q - 1) |w|^2 for orthonormal
    directions. In general the bias is at most r sqrt(p) times the Lipschitz constant of x -> J_N(x)' grad_y f; the
    rounding of y_N over r, and the tolerance of an adaptive inner solver over r, come on top.
    `Estimate.standard_error` reports the deviation, estimated from the sample. `Estimate.bias` is the rest, measured at
    the first estimate of a run by up to 4 inner solves on the other side of x, which `stats` does not count: half the
    second difference over r, which sees the truncation as well as rounding and tolerances, and what the solves would
    change if they went on. A radius so short that these are more than a tenth of the estimate is reported as
    `Status.imprecise`; so is an inner solver whose solutions would make another estimate if they went on (up to 50
    steps more, not counted).

    Source: Sow, Ji, Liang, "On the convergence theory for Hessian-free bilevel algorithms", NeurIPS 2022, PZOBO.

    Args:
        inner: solves the inner problem; `Iterate` with fixed steps keeps perturbed and unperturbed runs alike.
        directions: Q.
        radius: r; None: eps^(1/3) max(1, the root mean square of x), eps the rounding unit: 6e-6 in float64, 5e-3 in
            float32, 0.2 in bfloat16. An estimate that is then off by more than a tenth is reported as `Status.biased`.
        distribution: of the directions.
        seed: of the random directions; call k of a warm-started sequence draws its own from (seed, k).
        chunk: solve at most so many perturbed problems at a time; None: all at once.

    Raises:
        ValueError: if a number is out of range, or more orthonormal directions than outer variables are asked for.

    Example:
        >>> import torch
        >>> from bilevel import ESJ, BilevelProblem, hypergradient
        >>> from bilevel.solvers import GradientDescent, Iterate
        >>> problem = BilevelProblem(lambda x, y: y.square().sum() / 2, lambda x, y: (y - x).square().sum() / 2)
        >>> esj = ESJ(Iterate(GradientDescent(1.0), max_steps=1), directions=2, radius=0.5, distribution="orthonormal")
        >>> x = torch.tensor([1.0, 2.0])
        >>> torch.allclose(hypergradient(problem, x, torch.zeros(2), estimator=esj).grad, x)
        True
    """

    inner: AbstractInnerSolver
    directions: int = 20
    radius: float | None = None
    distribution: Distribution = "orthonormal"
    seed: int = 0
    chunk: int | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, directions=AT_LEAST_1, radius=POSITIVE, chunk=AT_LEAST_1)
        demand_distribution("ESJ", self.distribution)

    @property
    def forgets_start(self) -> bool:
        # Solves that begin alike end alike: over the radius, what a tolerance leaves of them cancels. From a warm start
        # the perturbed ones would stop where their gradients are just below it, each at another place.
        return False

    @property
    def requires(self) -> frozenset[Property]:
        return frozenset({Property.outer_gradient})

    def with_seed(self, seed: int) -> ESJ:
        return replace(self, seed=seed)

    def error_bound(self, about: Beforehand) -> Bound:
        if about.outer_size is None or about.smoothness is None:
            raise ValueError(
                "`error_bound(ESJ(...))` needs outer_size and smoothness. Pass smoothness=0 where y_N is affine in x."
            )
        step, steps = self.inner.as_gradient_descent("bounds.esj")
        if self.radius is None:
            raise ValueError("`error_bound(ESJ(radius=None))` derives its radius at run time. Pass `radius=`.")
        return esj(
            about.constants,
            step=step,
            steps=steps,
            distance=about.distance,
            outer_gradient_norm=about.outer_gradient_norm,
            outer_size=about.outer_size,
            directions=self.directions,
            distribution=self.distribution,
            radius=self.radius,
            smoothness=about.smoothness,
        )

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        u, c = self._draw(x, start.count)
        radius = fitting(x) if self.radius is None else self.radius
        y, moved, solved = self._solve(problem, x, u, start.y, radius)
        value, fx, fy = outer_gradients(problem, x, y)
        slopes = (moved * fy).flatten(1).sum(1) / radius
        samples = c * slopes.unsqueeze(-1) * u  # (Q, p), each an unbiased estimate of J_N' grad_y f
        implicit = samples.mean(0)
        h = fx + implicit
        noise, measured = rounding(y, moved, fy, u, c, radius), None
        kinks, unfinished = tuple[Report, ...](), 0.0
        if start.count == 0:  # further on it would cost inner solves at each step
            quiet = problem.with_tally(Tally())
            _, back, _ = self._solve(quiet, x, -u[:_MIRRORED], start.y, radius)
            measured = bent(moved, back, fy, u, c, radius)
            some, left = moved[:_MIRRORED], float(solved.residual.max())
            points = torch.cat([x.unsqueeze(0), x + radius * u[:_MIRRORED]])
            found = refined(quiet, points, torch.cat([y.unsqueeze(0), y + some]), left, self.inner)
            unfinished = 0.0 if found is None else changed(some, found[1:] - found[0], fy, u, c, radius)
            kinks = self._kink(
                lambda u, r: self._solve(quiet, x, u.unsqueeze(0), start.y, r)[1][0],
                u[0],
                y,
                fy,
                radius,
                [moved[0], back[0]],
            )
        size, short = size_of((h, fx, implicit), spread(moved, fy, u, c, radius)), radius < fitting(x)
        undone = unfinished / size if size > 0 else math.inf if unfinished > 0 else 0.0
        if self.inner.forgets_start and start.count == 0 and not bool((moved != 0).any()):
            # No y moved though grad_y g did, within a tolerance, or at a maximum that no step leaves.
            most, least = float(solved.residual.max()), float(solved.residual.min())
            undone = math.inf if most > 2 * least else undone
        distorted = max(undone, distortion(x, u, radius))
        told = verdict(noise, measured, size, distorted, short, self.radius is not None)
        reports = (report("inner solver", solved), told, *kinks)
        return FlatEstimate(
            h,
            value,
            y,
            reports,
            standard_error=self._error(samples, implicit),
            bias=None if measured is None else measured + noise + unfinished,
        )

    def _kink(
        self, solve: Callable[[Tensor, float], Tensor], u: Tensor, y: Tensor, fy: Tensor, r: float, ends: list[Tensor]
    ) -> tuple[Report, ...]:
        """A report where <y_N, grad_y f> has other slopes to both sides of x along u; at the `ends` it is known."""

        def slope(moved: Tensor, length: float) -> float:
            return float((moved * fy).sum()) / length

        def farther() -> tuple[float, float]:
            far = FARTHER * r
            return slope(solve(u, far), far), slope(solve(-u, far), -far)

        right, left = slope(ends[0], r), slope(ends[1], -r)
        rounding = 100 * torch.finfo(y.dtype).eps * float((y.abs() * fy.abs()).sum()) / r
        if not one_sided(right, left, farther, rounding):
            return ()
        return (Report("slopes of y", Status.one_sided, abs(right - left), 0),)

    def _draw(self, x: Tensor, count: int) -> tuple[Tensor, float]:
        """Directions `(Q, p)` and the factor c."""
        return directions("ESJ", self.distribution, self.directions, x, self.seed * 1_000_003 + count)

    def _solve(
        self, problem: FlatProblem, x: Tensor, u: Tensor, start: Tensor, radius: float
    ) -> tuple[Tensor, Tensor, Solved]:
        """y_N(x), the Q differences y_N(x + r u_j) - y_N(x), and the verdict on all the solves."""
        y0 = problem.spread(start)
        y: Tensor | None = None
        differences, statuses, residuals, steps = [], list[Status](), [], 0
        for block in torch.split(u, self.chunk or len(u)):
            points = x + radius * torch.cat([torch.zeros_like(u[:1]), block])  # the unperturbed one comes first
            has_init = problem.problem.init is not None
            objective = inner_objective(problem, points)
            solved = self.inner.solve(  # of starts that are not named, so that the solver can let go of them
                objective,
                problem.start(points, y0).detach() if has_init else y0.expand(len(points), *y0.shape).clone(),
            )
            solved = held(objective, solved, self.inner.tolerance)
            y = solved.value[0].clone() if y is None else y  # and not a view, which would hold all of them
            differences.append(solved.value[1:] - solved.value[:1])
            statuses += solved.statuses
            residuals.append(solved.residual.reshape(-1))
            steps = max(steps, solved.steps)
            del solved
        assert y is not None
        moved = differences[0] if len(differences) == 1 else torch.cat(differences)
        return y, moved, Solved(y, tuple(statuses), torch.cat(residuals), steps)

    def _error(self, samples: Tensor, implicit: Tensor) -> float:
        """The root-mean-square deviation of the mean: from the sample, or where it cannot tell, from the law.

        With E|mean - w|^2 = a |w|^2 also E|mean|^2 = (1 + a) |w|^2, so that a / (1 + a) |mean|^2 estimates it.
        """
        k, p = samples.shape
        if self.distribution != "orthonormal" and k > 1:
            return math.sqrt(float((samples - implicit).square().sum()) / (k * (k - 1)))
        a = p / k - 1 if self.distribution == "orthonormal" else (p + 1 if self.distribution == "gaussian" else p - 1)
        return math.sqrt(a / (1 + a)) * float(torch.linalg.vector_norm(implicit))
