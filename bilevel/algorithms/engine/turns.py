"""The engine of loops in turns: some steps of y, some of v at the new y, then x."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple, final

from torch import Tensor

from bilevel._calculus import AbstractProducts
from bilevel._estimate import FlatEstimate
from bilevel._optimizer import AbstractOptimizer, OptimizerState
from bilevel.algorithms.algorithm import AbstractAlgorithm, Evaluated
from bilevel.algorithms.engine.direction import (
    AbstractDirection,
    Coupled,
    Drawn,
    Joint,
    Known,
    linear_distance,
    rows_of_inner_gradients,
    rows_of_outer_gradients,
)
from bilevel.algorithms.engine.reduction import AbstractReduction, Plain, Reduced, demand_direction
from bilevel.algorithms.engine.steps import (
    LoopState,
    RowStep,
    Schedule,
    along,
    are_alike,
    begun,
    demand_steps,
    lengths,
    moved,
    reports,
    required,
    size,
    within,
)
from bilevel.algorithms.oracle import Draws, Oracle
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, POSITIVE, demand_ranges
from bilevel.bounds.beforehand import Beforehand
from bilevel.bounds.bound import Bound, known
from bilevel.bounds.iterations import gradient_descent, neumann
from bilevel.requirements.properties import Property


@final
@dataclass(frozen=True)
class Turns(AbstractAlgorithm[LoopState]):
    """T steps y <- y - rho_t grad_y g, N steps v <- v - rho'_t (H v - grad_y f) at the new y, x <- P(x - gamma_t d_x).

    Each step of y has a batch of g of its own, and so has each of v, which share one of f; d_x is D_x of a direction
    at the new (y, v), on further batches of g and that of f, made less noisy. With a direction that has no linear
    iterate (`Neumann`, `RandomizedNeumann`) there are no steps of v. The counterpart of `SingleLoop`, where all three
    move at once, from the same parts.

    `tol` is compared with |(d_x, d_y, d_v)|, d_y and d_v those of the last of their steps: zero where y, v and x
    stay where they are.

    Cost: T + 1 calls of g and one of f for each sample of a batch, and N products, or those of the direction.

    Args:
        inner_step: rho, of y, or an optimizer in its place.
        outer_step: gamma, of x, or an optimizer in its place.
        linear_step: rho', of v; None: that of y, which must then be a number.
        inner_steps: T.
        linear_steps: N, where the direction has a linear iterate.
        direction: what x moves along.
        reduction: of the variance of d_x.
        schedule: step -> the factor of rho and rho'; None: constant.
        outer_schedule: the same of gamma; None: that of rho.
        linear_radius: v is projected on |v| <= this; None: it is not.
        apart: whether d_x has a batch of f of its own, and not that of the steps of v.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a step is not positive, a number of steps below 1, or rho' is left open where y is stepped by an
            optimizer.

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem, minimize
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> loop = Turns(inner_step=0.5, outer_step=0.5, inner_steps=2, linear_steps=2)
        >>> round(float(minimize(problem, x0, x0, algorithm=loop, max_steps=100).x), 6)
        3.0
    """

    inner_step: RowStep
    outer_step: RowStep
    linear_step: float | None = None
    inner_steps: int = 1
    linear_steps: int = 1
    direction: AbstractDirection = field(default_factory=Coupled)
    reduction: AbstractReduction = field(default_factory=Plain)
    schedule: Schedule | None = None
    outer_schedule: Schedule | None = None
    linear_radius: float | None = None
    apart: bool = False

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, linear_radius=POSITIVE, inner_steps=AT_LEAST_1, linear_steps=AT_LEAST_1)
        demand_steps(self, self.inner_step, self.outer_step, self.linear_step, self.direction.is_linear)

    @property
    def requires(self) -> frozenset[Property]:
        return required(self.direction)

    @property
    def draws(self) -> Draws:
        (f, g), further = self._first, self.direction.draws
        return Draws(f=f + further.f, g=g + further.g)

    @property
    def _first(self) -> tuple[int, int]:
        """The numbers of the first batches of f and of g that d_x is formed from."""
        linear = self.direction.is_linear
        return int(linear and self.apart), self.inner_steps + (self.linear_steps if linear else 0)

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> LoopState:
        x = oracle.project(x)
        y = oracle.problem().start(x, y).detach()
        at = Joint(x, y, self.direction.linear_start(y))
        memory = self.reduction.init(oracle, _OuterPart(self.direction, self.direction.products, *self._first), at)
        return LoopState(*at, memory, begun(self.outer_step, x), begun(self.inner_step, y))

    def evaluate(self, oracle: Oracle, state: LoopState) -> Evaluated:
        x, y, v, inner = state.x, state.y, state.v, state.inner
        rho = 1.0 if self.schedule is None else self.schedule(oracle.step)
        d_y = y  # at least one step follows
        for k in range(self.inner_steps):
            d_y = oracle.block("g", k).scale * rows_of_inner_gradients(oracle.problem(0, k), x, y)
            y, inner = moved(self.inner_step, rho, d_y, y, inner)
        d_v, known = None, None
        if v is not None:
            known = rows_of_outer_gradients(oracle.problem(0, self.inner_steps), x, y)
            b = oracle.block("f").scale * known[2]
            for k in range(self.inner_steps, self.inner_steps + self.linear_steps):
                hv = self.direction.products.curvature(oracle.problem(0, k), x, y).operator.mv(v)
                d_v = oracle.block("g", k).scale * hv - b
                length = lengths(self.inner_step, self.linear_step)
                v = within(self.linear_radius, along(v, d_v, rho, length))
        at = Joint(x, y, v)
        there = None if self.apart or known is None else (y, known)
        part = _OuterPart(self.direction, self.direction.products, *self._first, there)
        reduced = self.reduction.reduce(oracle, part, at, state.memory)
        d = Joint(reduced.joint.x, d_y, d_v)
        estimate = FlatEstimate(d.x, reduced.value, y, reports(d), v)
        return Evaluated(estimate, _Made(at, d, reduced, inner))

    def step(self, oracle: Oracle, state: LoopState, found: Evaluated) -> LoopState:
        made: _Made = found.kept
        schedule = self.schedule if self.outer_schedule is None else self.outer_schedule
        gamma = 1.0 if schedule is None else schedule(oracle.step)
        x, outer = moved(self.outer_step, gamma, made.d.x, state.x, state.outer)
        return LoopState(oracle.project(x), made.at.y, made.at.v, made.reduced.memory, outer, made.inner)

    def beside(self, inner_step: RowStep, outer_step: RowStep) -> AbstractAlgorithm[LoopState] | None:
        if not (self.direction.goes_beside and are_alike(self, inner_step, outer_step)):
            return None
        return replace(self, inner_step=inner_step, outer_step=outer_step)

    def of_seeds(self, seeds: tuple[int, ...]) -> AbstractAlgorithm[LoopState] | None:
        direction = self.direction.of_seeds(seeds)
        reduction = self.reduction.of_seeds(seeds)
        if direction is None or reduction is None:
            return None
        return replace(self, direction=direction, reduction=reduction)

    def stationarity(self, oracle: Oracle, state: LoopState, found: Evaluated) -> Tensor:
        made: _Made = found.kept
        return size(oracle, state.x, made.d)

    def error_bound(self, about: Beforehand) -> Bound:
        demand_direction(self.reduction)
        return self.direction.error_bound(self._after_turns(about))

    def _after_turns(self, about: Beforehand) -> Beforehand:
        """Where y and v are after the first T and N steps on all the data.

        |y_T - y*| <= rho^T |y_0 - y*|; and v*(y) = H^-1 grad_y f at y is at most s = (L_fyy + M_yy |v*|) |y - y*| / mu
        from v*, so that |v_N - v*| <= rho^N (|v_0 - v*| + s) + s.
        """
        call = f"error_bound({type(self).__name__}(...))"
        if isinstance(self.inner_step, AbstractOptimizer):
            raise ValueError(f"no bound is known for `{call}` with an optimizer as `inner_step`. Give a number.")
        factor, length = 1.0 if self.schedule is None else self.schedule(0), lengths(self.inner_step, self.linear_step)
        if isinstance(self.inner_step, Tensor) or isinstance(length, Tensor):
            raise ValueError(f"no bound is known for `{call}` with several runs side by side.")
        at = gradient_descent(
            about.constants, step=factor * self.inner_step, steps=self.inner_steps, distance=about.distance
        )
        if not self.direction.is_linear:
            return replace(about, distance=at)
        mu, L_fyy, M_yy = known(call, about.constants, "mu", "L_fyy", "M_yy", within=about.distance)
        s = (L_fyy + M_yy * about.outer_gradient_norm / mu) * at / mu
        eta = factor * length
        decay = neumann(about.constants, step=eta, terms=self.linear_steps)
        return replace(about, distance=at, linear_distance=decay * (linear_distance(about) + s) + s)

    def point(self, state: LoopState) -> tuple[Tensor, Tensor]:
        return state.x, state.y


class _Made(NamedTuple):
    """What an evaluation has come to: (x, y, v) after the turns of y and v, where they went, and d_x."""

    at: Joint
    d: Joint
    reduced: Reduced
    inner: OptimizerState | None


@final
@dataclass(frozen=True, eq=False)
class _OuterPart(AbstractDirection):
    """D_x of a direction, on batches from the numbers `f` and `g` on, as a direction of its own; its D_y is empty.

    Attributes:
        of: the direction.
        products: its own.
        f: the number of its batch of f.
        g: that of its first one of g.
        known: a point y, and f with its gradients there.
    """

    of: AbstractDirection
    products: AbstractProducts
    f: int
    g: int
    known: tuple[Tensor, Known] | None = None

    @property
    def draws(self) -> Draws:
        return self.of.draws

    @property
    def first(self) -> tuple[int, int]:
        return self.f, self.g

    def linear_start(self, y: Tensor) -> Tensor | None:
        return None

    def joint(self, drawn: Drawn, at: Joint) -> tuple[Joint, Tensor]:
        here = self.known is not None and drawn.chance is not None and at.y is self.known[0]
        d_x, value = self.of.outer(drawn, at, self.known[1] if here and self.known is not None else None)
        return Joint(d_x, d_x.new_zeros(0), None), value

    def outer(self, drawn: Drawn, at: Joint, known: Known | None = None) -> tuple[Tensor, Tensor]:
        return self.of.outer(drawn, at, known)
