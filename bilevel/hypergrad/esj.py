"""Evolution-strategy Jacobian: a zeroth-order estimate of dy/dx."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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
from bilevel.hypergrad.directions import Distribution as Distribution, demand_distribution, directions, in_blocks
from bilevel.hypergrad.one_sided import FARTHER, one_sided
from bilevel.hypergrad.perturbed import Perturbed, joined
from bilevel.hypergrad.radius import (
    bent,
    changed,
    distortion,
    fitting,
    rounding,
    size_of,
    spread,
    verdict,
)
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

    Cost: Q + 1 inner solves and one gradient of f. An `encode` is evaluated Q + 1 times for g, without a graph and
    outside of the solves, and once for f: a network under a head takes forward passes and one backward pass. Memory:
    (Q + 1)(p + q), with `chunk` = k (k + 1)(p + q) and Q q, where orthonormal directions are held all the same.

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
        chunk: draw and solve at most so many perturbed problems at a time; None: all at once.

    Raises:
        ValueError: if a number is out of range, or more orthonormal directions than outer variables are asked for.

    Example:
        >>> import torch
        >>> from bilevel import ESJ, BilevelProblem, hypergradient
        >>> from bilevel.solvers import GradientDescent, Iterate
        >>> problem = BilevelProblem(
        ...     lambda x, y: y.square().sum() / 2, lambda x, y: (y - x).square().sum() / 2
        ... )
        >>> esj = ESJ(
        ...     Iterate(GradientDescent(1.0), max_steps=1),
        ...     directions=2,
        ...     radius=0.5,
        ...     distribution="orthonormal",
        ... )
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
        blocks, c = self._blocks(x, start.count)
        radius = fitting(x) if self.radius is None else self.radius
        quiet, near = problem.with_tally(Tally()), Perturbed(problem, self.inner, x, start.y, radius)
        moved, verdicts, slopes, sizes = list[Tensor](), list[Solved](), list[Tensor](), list[Tensor]()
        back, some, finer = list[Tensor](), list[Tensor](), list[Tensor]()
        kinks, distorted = tuple[Report, ...](), 0.0
        y = fx = fy = value = implicit = torch.zeros_like(x[:0])
        for u in blocks:  # all that is held of the directions is one block of them
            at, found, solved = near.moved(problem, u)
            if not moved:
                y, (value, fx, fy), implicit = at, outer_gradients(problem, x, at), torch.zeros_like(x)
            slopes.append((found * fy).flatten(1).sum(1) / radius)
            share = c / self.directions  # of samples c <...> u_j, each an unbiased estimate of J_N' grad_y f
            if len(u) == 1:  # in place
                implicit.add_(u[0], alpha=share * float(slopes[-1]))
            else:
                implicit += share * slopes[-1] @ u
            sizes.append(torch.linalg.vector_norm(u, dim=-1))
            distorted = max(distorted, distortion(x, u, radius))
            moved.append(found)
            verdicts.append(Solved(at, solved.statuses, solved.residual, solved.steps))
            left = _MIRRORED - sum(map(len, back))
            if start.count == 0 and left > 0:  # further on it would cost inner solves at each step
                back.append(near.moved(quiet, -u[:left])[1])
                more = near.further(quiet, u[:left], y, found[:left], float(solved.residual.max()))
                if more is not None:
                    some.append(found[:left])
                    finer.append(more)
                if len(back) == 1:
                    kinks = self._kink(
                        lambda v, r: near.moved(quiet, v.unsqueeze(0), r)[1][0],
                        u[0],
                        y,
                        fy,
                        radius,
                        [found[0], back[0][0]],
                    )
        every, lengths, solved = _together(moved), torch.cat(sizes), joined(verdicts, y)
        spreads = c / math.sqrt(self.directions) * float(lengths.mean())
        h, noise, measured, unfinished = fx + implicit, rounding(y, every, fy, spreads, radius), None, 0.0
        if back:
            measured = bent(every, _together(back), fy, spreads, radius)
        if finer:
            unfinished = changed(_together(some), _together(finer), fy, spreads, radius)
        size, short = size_of((h, fx, implicit), spread(every, fy, spreads, radius)), radius < fitting(x)
        undone = unfinished / size if size > 0 else math.inf if unfinished > 0 else 0.0
        if self.inner.forgets_start and start.count == 0 and not bool((every != 0).any()):
            # No y moved though grad_y g did, within a tolerance, or at a maximum that no step leaves.
            most, least = float(solved.residual.max()), float(solved.residual.min())
            undone = math.inf if most > 2 * least else undone
        told = verdict(noise, measured, size, max(undone, distorted), short, self.radius is not None)
        reports = (report("inner solver", solved), told, *kinks)
        return FlatEstimate(
            h,
            value,
            y,
            reports,
            standard_error=self._error(c * torch.cat(slopes) * lengths, implicit),
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

    def _blocks(self, x: Tensor, count: int) -> tuple[Iterator[Tensor], float]:
        """The same, `chunk` at a time."""
        seed = self.seed * 1_000_003 + count
        return in_blocks("ESJ", self.distribution, self.directions, x, seed, self.chunk)

    def _error(self, sizes: Tensor, implicit: Tensor) -> float:
        """The root-mean-square deviation of the mean: from the samples of these sizes, or else from the law.

        With E|mean - w|^2 = a |w|^2 also E|mean|^2 = (1 + a) |w|^2, so that a / (1 + a) |mean|^2 estimates it.
        """
        k, p, mean = len(sizes), implicit.shape[-1], float(torch.linalg.vector_norm(implicit))
        if self.distribution != "orthonormal" and k > 1:
            deviations = float(sizes.square().sum()) - k * mean**2
            return math.sqrt(max(deviations, 0.0) / (k * (k - 1)))
        a = p / k - 1 if self.distribution == "orthonormal" else (p + 1 if self.distribution == "gaussian" else p - 1)
        return math.sqrt(a / (1 + a)) * mean


def _together(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)
