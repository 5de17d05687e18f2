"""BOME: the value function as a constraint that descent keeps improving."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, final, get_args

import torch
from torch import Tensor

from bilevel._calculus import inner_gradient_in_x, inner_gradients
from bilevel._estimate import FlatEstimate
from bilevel._flat import FlatProblem
from bilevel._optimizer import OptimizerState
from bilevel.algorithms.algorithm import AbstractAlgorithm, Evaluated
from bilevel.algorithms.engine.direction import residual_report, rows_of_outer_gradients
from bilevel.algorithms.engine.slopes import REQUIRES, arrival, demand_in_g, demand_own_steps, slope
from bilevel.algorithms.engine.steps import RowStep, Schedule, are_alike, begun, moved
from bilevel.algorithms.oracle import Draws, Oracle
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, POSITIVE, demand_ranges
from bilevel.requirements.properties import Property

Barrier: TypeAlias = Literal["gradient", "value"]


@final
@dataclass(frozen=True, eq=False)
class Pair:
    """Everything that the rest of a run depends on: x `(p,)`, y `(*tasks, q)`, and their optimizers' states."""

    x: Tensor
    y: Tensor
    outer: OptimizerState | None = None
    of_y: OptimizerState | None = None


@final
@dataclass(frozen=True, eq=False)
class Descended:
    """The direction d = grad f + multiplier grad q of x and y, and grad q.

    Attributes:
        x: d_x `(p,)`.
        y: d_y `(*tasks, q)`.
        q_x: grad_x q.
        q_y: grad_y q.
        multiplier: lambda `(*several,)`.
        barrier: phi `(*several,)`.
    """

    x: Tensor
    y: Tensor
    q_x: Tensor
    q_y: Tensor
    multiplier: Tensor
    barrier: Tensor


@final
@dataclass(frozen=True)
class BOME(AbstractAlgorithm[Pair]):
    """BOME: (x, y) <- (x, y) - xi (grad f + lambda grad q), q(x, y) = g(x, y) - g(x, y_T), lambda from a barrier phi.

    y_T is made of y by T = `inner_steps` steps of gradient descent on g(x, .), and held fixed in

        grad q = (grad_x g(x, y) - grad_x g(x, y_T), grad_y g(x, y))
        lambda = max(0, (phi - <grad f, grad q>) / |grad q|^2),   phi = eta |grad q|^2, or eta q

    so that d = grad f + lambda grad q is the direction nearest to grad f with <grad q, d> >= phi, with equality where
    lambda > 0: q, which is zero at y*, falls at least at the rate phi. Where grad q vanishes lambda is 0.

    Each of the T steps is on a batch of its own, from y and not from the last y_T; d is on one more, whose noise makes
    lambda a biased estimate. With tasks, f and q are means over them.

    `Estimate.y` is y_T, `Estimate.value` f(x, y), `Estimate.grad` d_x. `tol` is compared with |(d, grad q)|, which
    tends to zero at a point where f has no descent among those with q = 0.

    Cost: T + 4 calls for each sample of a batch, first derivatives only. Memory: one more y.

    Converges: where g satisfies a Polyak-Lojasiewicz inequality, with steps of the order of K^-1/2, the least |d|^2 + q
    of K steps is O(K^-1/4); lambda is not bounded (no constraint qualification holds at q = 0), and with constant steps
    it ends *near* a stationary point only.

    Source: Liu, Ye, Wright, Stone, Liu, "BOME! Bilevel optimization made easy: a simple first-order approach", NeurIPS
    2022.

    Args:
        inner_step: of the T steps, or an optimizer, which begins anew at each outer step.
        outer_step: xi, of x and y, or an optimizer, of each.
        inner_steps: T.
        rate: eta.
        barrier: "gradient" for eta |grad q|^2, "value" for eta q.
        schedule: step -> the factor of both steps; None: constant.
        outer_schedule: the same of xi alone, where it is another one.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a step or the rate is not positive, `inner_steps` below 1, or there is no such barrier; from
            `minimize`, if y is constrained or no minimizer of g.

    Example:
        >>> from bilevel import BilevelProblem, minimize
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> solution = minimize(
        ...     problem, x0, x0, algorithm=BOME(0.5, 0.1, inner_steps=5), max_steps=300
        ... )
        >>> round(float(solution.x), 3)
        3.0
    """

    inner_step: RowStep
    outer_step: RowStep
    inner_steps: int = 1
    rate: float = 0.5
    barrier: Barrier = "gradient"
    schedule: Schedule | None = None
    outer_schedule: Schedule | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_own_steps(self, inner_step=self.inner_step, outer_step=self.outer_step)
        demand_ranges(self, inner_steps=AT_LEAST_1, rate=POSITIVE)
        if self.barrier not in get_args(Barrier):
            raise ValueError(
                f"`BOME(barrier=...)` must be one of {', '.join(get_args(Barrier))}. Got {self.barrier!r}."
            )

    @property
    def requires(self) -> frozenset[Property]:
        return REQUIRES

    @property
    def draws(self) -> Draws:
        return Draws(f=1, g=self.inner_steps + 1)

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> Pair:
        x = oracle.project(x)
        y = oracle.problem().start(x, y).detach()
        demand_in_g(oracle, x, y)
        return Pair(x, y, begun(self.outer_step, x), begun(self.outer_step, y))

    def evaluate(self, oracle: Oracle, state: Pair) -> Evaluated:
        x, y = state.x, state.y
        rho = 1.0 if self.schedule is None else self.schedule(oracle.step)
        best, memory = y, begun(self.inner_step, y)
        for number in range(1, self.inner_steps + 1):
            d = slope(oracle.problem(g=number), x, best, oracle.block("g", number).scale)
            best, memory = moved(self.inner_step, rho, d, best, memory)
        problem, of_f, of_g = oracle.problem(), oracle.block("f").scale, oracle.block("g").scale
        value, fx, fy = rows_of_outer_gradients(problem, x, y)
        of_g = of_g / (problem.tasks or 1)
        g, gx, gy = inner_gradients(problem, x, y)
        gx_best = inner_gradient_in_x(problem, x, best)
        q_x = torch.zeros_like(x) if gx is None or gx_best is None else of_g * (gx - gx_best)
        q_y = of_g * gy
        size = _products(q_x, q_y, q_x, q_y)
        barrier = self.rate * (size if self.barrier == "gradient" else _times_rows(of_g, _gap(problem, x, g, best)))
        found = _descent((of_f * fx, of_f * fy), (q_x, q_y), size, barrier)
        reports = residual_report("inner iterate", found.q_y), residual_report("direction of y", found.y)
        return Evaluated(FlatEstimate(found.x, value, best, reports), found)

    def step(self, oracle: Oracle, state: Pair, found: Evaluated) -> Pair:
        d: Descended = found.kept
        rho = 1.0 if self.schedule is None else self.schedule(oracle.step)
        xi = rho if self.outer_schedule is None else self.outer_schedule(oracle.step)
        x, outer = moved(self.outer_step, xi, d.x, state.x, state.outer)
        y, of_y = moved(self.outer_step, xi, d.y, state.y, state.of_y)
        return Pair(oracle.project(x), y, outer, of_y)

    def beside(self, inner_step: RowStep, outer_step: RowStep) -> AbstractAlgorithm[Pair] | None:
        if not are_alike(self, inner_step, outer_step):
            return None
        return replace(self, inner_step=inner_step, outer_step=outer_step)

    def stationarity(self, oracle: Oracle, state: Pair, found: Evaluated) -> Tensor:
        d: Descended = found.kept
        return arrival(oracle.residual(state.x, d.x), d.y, d.q_x, d.q_y)

    def point(self, state: Pair) -> tuple[Tensor, Tensor]:
        return state.x, state.y


def _gap(problem: FlatProblem, x: Tensor, g: Tensor, best: Tensor) -> Tensor:
    """The sum over tasks of g(x, y) - g(x, y_T) `(*several,)`."""
    problem.tally.values += best.shape[:-1].numel()
    with torch.no_grad():
        gap = g - problem.g(x, best)
    return gap.sum(-1) if problem.tasks else gap


def _times_rows(factor: float | Tensor, values: Tensor) -> Tensor:
    """factor values `(*several,)`, for a factor of each of several runs `(runs, 1)` as well."""
    return factor.squeeze(-1) * values if isinstance(factor, Tensor) else factor * values


def _products(x: Tensor, y: Tensor, other_x: Tensor, other_y: Tensor) -> Tensor:
    """<(x, y), (other_x, other_y)> `(*several,)`."""
    return (x * other_x).sum(-1) + (y * other_y).flatten(x.dim() - 1).sum(-1)


def _descent(f: tuple[Tensor, Tensor], q: tuple[Tensor, Tensor], size: Tensor, barrier: Tensor) -> Descended:
    """grad f + lambda grad q: gradients in x and in y, |grad q|^2 and phi."""
    multiplier = torch.where(size > 0, (barrier - _products(*f, *q)).clamp_min(0) / size, torch.zeros_like(size))
    in_y = multiplier.reshape(*multiplier.shape, *(1 for _ in q[1].shape[multiplier.dim() :]))
    return Descended(f[0] + multiplier.unsqueeze(-1) * q[0], f[1] + in_y * q[1], *q, multiplier, barrier)
