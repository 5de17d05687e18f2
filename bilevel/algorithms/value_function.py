"""Optimistic bilevel programs without a unique inner minimizer: active sets, and cuts by the value function."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, final

import torch
from torch import Tensor

from bilevel._estimate import FlatEstimate
from bilevel._result import Report, Status
from bilevel._sets import Box
from bilevel._tree import Tree
from bilevel.algorithms.algorithm import AbstractAlgorithm, Evaluated
from bilevel.algorithms.engine.active_sets import LinearConditions
from bilevel.algorithms.engine.danskin import danskin, gradients, multipliers_at
from bilevel.algorithms.engine.descent_left import descent_left
from bilevel.algorithms.engine.global_inner import InnerMinimum, by_linear_program, by_multistart, is_linear
from bilevel.algorithms.engine.optimistic import Optimistic
from bilevel.algorithms.engine.programs import Program, in_numpy
from bilevel.algorithms.oracle import Oracle
from bilevel.algorithms.outer_constraints import OuterConstraints
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, COUNT, POSITIVE, demand_ranges
from bilevel.requirements.properties import Property
from bilevel.solvers._scipy import as_numpy, scipy_optimize

if TYPE_CHECKING:
    import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"
Function: TypeAlias = Callable[..., Tree]

_RELAXATIONS = (1.0, 1e-2, 1e-4, 1e-6)
_SHIFT = 1e3  # by how much a cut is relaxed where the point that it is from is infeasible: times the violation squared
_ROUNDS = 8  # after so many what has passed the tests is what is returned
_CHECK = 7919  # the seed of the independent solve
_FEASIBLE = 1e-6
_DESCENT = 1e-2  # of f, in terms of its gradient: y is known to 1e-3 where g is flat to second order
_APART = 1e-2  # relative distance of minimizers that are two
# What a cut leaves of the inner gap that is taken for none. A cut from a y_k beside y holds with equality there and has
# next to no gradient, whose direction is chance: linearized, it would hold (x, y) where it is.
_ROOM = 0.25 * _FEASIBLE


@final
@dataclass(frozen=True, eq=False)
class ValueFunctionState:
    """Everything that the rest of a run depends on.

    Attributes:
        x: `(p,)`.
        y: `(q,)`.
        cuts: points y_k whose values bound V from above `(k, q)`.
        solved: whether (x, y) is a local solution of a relaxed program, and not the start.
        round: how many programs have been solved.
        best: (x, y) of the lowest f that has passed the tests so far `(p + q,)`, or None.
        value: f there; inf: there is none.
        final: whether (x, y) is that, and nothing better is looked for.
    """

    x: Tensor
    y: Tensor
    cuts: Tensor
    solved: bool
    round: int
    best: Tensor | None = None
    value: float = math.inf
    final: bool = False


@final
@dataclass(frozen=True, eq=False)
class ValueFunction(AbstractAlgorithm[ValueFunctionState]):
    """min over x, y of f(x, y)  s.t.  g(x, y) <= V(x) = min {g(x, .) : c <= 0, e = 0},  c <= 0, e = 0, C <= 0, E = 0.

    For inner problems with several minimizers, or nonconvex ones: among the minimizers of g(x, .) that the outer
    constraints C(x, y) <= 0 and E(x, y) = 0 allow, y is the best for f (optimistic).

    Where all constraints are affine in (x, y), and grad_y g is affine in x and does not depend on y, the conditions
    of the inner linear program are affine but for lambda_i c_i = 0, and the first step is branch and bound over these:
    nodes are linear programs where f is affine too (the result is then the global optimum), local minimizations of f
    elsewhere. Other steps solve, by sequential quadratic programming from (x, y) and from
    (x, a global minimizer of g(x, .)), with multipliers lambda and nu,

        min f  s.t.  grad_y (g + lambda'c + nu'e) = 0,  lambda >= 0,  -lambda_i c_i <= t,  c <= 0, e = 0, C <= 0, E = 0,
                     g(x, y) <= g(x, y_k) + M |max(c(x, y_k), 0), e(x, y_k)|^2 + 2.5e-7  for the cuts y_k,

    for t falling from 1 to 1e-6 (Scholtes), and then exactly, with c_i = 0 where lambda_i > -c_i and lambda_i = 0
    elsewhere. At the solution V(x) is computed globally: by a linear program where g, c and e are affine in y (HiGHS),
    or by local searches from many points. Its minimizer is a new cut unless the inner gap g(x, y) - V(x) is at most
    `tol`: cuts are what tells a global minimizer from a stationary point. Every second step leaves out the conditions
    on the gradient, which no minimizer needs to satisfy where the constraints have no regular multipliers. Lower values
    of f than that of the best point that has passed these tests are followed up, for at most eight steps.

    The run ends where max(inner gap, violation of any constraint) <= `minimize(tol=...)`, 1e-6 if that is None, at a
    local solution, and an independent global solve, with other points, four times as many, finds no lower value of g:
    y is a minimizer as far as these solves tell (a proof only where they are linear programs). It is `successful` if f
    does not fall from there to first order, see `engine.descent_left`, and `descent_left` if it may: f is then not
    known to be least even locally. Neither is a proof of the global optimum beyond the first step: run it from
    several x0. Where steps end first, the status says so. `Estimate.grad` is grad_x f - mu (grad_x g - grad V) for the
    multiplier mu of the gap that fits best in y, with grad V = grad_x (g + lambda'c + nu'e) at the minimizer (Danskin).

    Cost: a step some 10 programs of p + q + k unknowns, with a backward pass for each of their constraints at each of
    some 20 iterations; `searches` + k + 1 of q unknowns; `samples` values of g and c as one batch. Small problems only:
    memory and time of the quadratic programs are cubic in the numbers of unknowns.

    Needs `pip install "bilevel[scipy]"`.

    Source: Outrata, "On the numerical solution of a class of Stackelberg problems", ZOR 34 (1990), for the value
    function; Mitsos, Lemonidis, Barton, "Global solution of bilevel programs with a nonconvex inner program", J. Glob.
    Optim. 42 (2008), for cuts; Bard, Moore, "A branch and bound algorithm for the bilevel programming problem", SIAM J.
    Sci. Stat. Comput. 11 (1990); Scholtes, "Convergence properties of a regularization scheme for mathematical programs
    with complementarity constraints", SIAM J. Optim. 11 (2001).

    Args:
        inequalities: C(x, y), called as f is; None: none. `minimize(outer_inequalities=...)` sets it.
        equalities: E(x, y), likewise.
        inner: "lp": g, c and e are affine in y; "multistart": they need not be; "auto": values at random points tell.
        samples: how many points the global solve draws.
        searches: how many of them it searches from.
        radius: half the side of the cube that they are drawn in, about y and about 0, in units of max(1, |y|).
        nodes: how many nodes of the branch and bound over active sets are looked at at most.
        seed: of the draws.

    Raises:
        ImportError: at its use, without scipy.
        ValueError: if a setting is out of range.

    Example:
        >>> from bilevel import BilevelProblem, Box, minimize
        >>> problem = BilevelProblem(  # y = 1 where x < 0, y = -1 where x > 0, and anything at 0
        ...     lambda x, y: (x - y).square(),
        ...     lambda x, y: x * y,
        ...     inequalities=lambda x, y: torch.stack([y - 1, -1 - y]),
        ... )
        >>> x0 = torch.tensor(0.5, dtype=torch.float64)
        >>> solution = minimize(
        ...     problem, x0, x0, algorithm=ValueFunction(), constraint=Box(-2.0, 2.0)
        ... )
        >>> round(float(solution.value), 6), solution.converged
        (0.0, True)
    """

    inequalities: Function | None = None
    equalities: Function | None = None
    inner: Literal["auto", "lp", "multistart"] = "auto"
    samples: int = 400
    searches: int = 4
    radius: float = 10.0
    nodes: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, samples=AT_LEAST_1, searches=AT_LEAST_1, radius=POSITIVE, nodes=AT_LEAST_1, seed=COUNT)

    @property
    def requires(self) -> frozenset[Property]:
        return frozenset()

    @property
    def best_by_measure(self) -> bool:
        return True

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> ValueFunctionState:
        scipy_optimize("ValueFunction")
        _bounds(oracle, x)
        problem = oracle.problem()
        if problem.tasks is not None or problem.problem.encode is not None:
            raise ValueError("`ValueFunction` takes no tasks and no `encode`: it solves one small program.")
        own = problem.problem
        if own.prox is not None or own.inner is not None or own.iterative:
            raise ValueError(
                "`ValueFunction` needs an inner problem that is g with `inequalities`, `equalities` and `constraints`."
            )
        y = problem.start(x, y).detach()
        return ValueFunctionState(oracle.project(x), y, y.new_zeros(0, y.numel()), solved=False, round=0)

    def evaluate(self, oracle: Oracle, state: ValueFunctionState) -> Evaluated:
        problem, x, y = self._problem(oracle), state.x, state.y
        with torch.no_grad():
            value, g = problem.problem.f(x, y), float(problem.problem.g(x, y))
            (C, E), (c, e) = problem.outer(x, y), problem.inner(x, y)
        least = self._least(problem, x, y, state, state.round)
        gap = g - least.value if math.isfinite(least.value) else math.inf
        outer = float(torch.cat([C, E.abs()]).clamp_min(0).max()) if len(C) + len(E) else 0.0
        own = float(torch.cat([c, e.abs()]).clamp_min(0).max()) if len(c) + len(e) else 0.0
        measure = max(gap, outer, own)
        if state.solved and measure <= _FEASIBLE and not least.exact:
            again = self._least(problem, x, y, state, _CHECK + state.round, 4)
            least = least if again.value >= least.value else again
            measure = max(measure, g - least.value)
        if not math.isfinite(measure):
            measure = math.inf
        reports: tuple[Report, ...] = (
            Report("inner gap and constraints", Status.successful, max(measure, 0.0), state.round),
        )
        if state.final and measure <= _FEASIBLE:
            left = self._descent_left(oracle, problem, state, g)
            status = Status.successful if left <= _DESCENT else Status.descent_left
            reports = (*reports, Report("descent of f to first order", status, left, state.round))
        grad = self._slope(problem, x, y, least)
        estimate = FlatEstimate(grad=grad, value=value.detach(), y=y, reports=reports)
        told = OuterConstraints(outer, max(outer, 0.0), 0.0, (), ())
        shown = max(measure, 0.0) if state.final else max(measure, 1.0)
        return Evaluated(estimate, (least, max(measure, 0.0), shown), None, None, 1e-6, told)

    def step(self, oracle: Oracle, state: ValueFunctionState, found: Evaluated) -> ValueFunctionState:
        import numpy as np

        least, measure, _ = found.kept
        if state.solved and measure <= _FEASIBLE and float(found.estimate.value) < state.value:
            state = replace(state, best=torch.cat([state.x, state.y]), value=float(found.estimate.value))
        problem = self._problem(oracle)
        cuts = state.cuts
        if state.solved and math.isfinite(least.value):
            cuts = torch.cat([cuts, least.y.unsqueeze(0)])
        p, q = state.x.numel(), state.y.numel()
        if state.round == 0 and self.inner != "multistart":
            conditions = LinearConditions.of(problem, state.x, state.y)
            if conditions is not None:
                start = np.concatenate([as_numpy(state.x), as_numpy(state.y)])
                low, high = _bounds(oracle, state.x)
                limits = as_numpy(low), as_numpy(high)
                z, _ = conditions.solve(problem, start, state.x, limits, self.nodes)
                if z is not None:
                    at = torch.from_numpy(z.copy()).to(state.x)
                    return ValueFunctionState(oracle.project(at[:p]), at[p:], cuts, solved=True, round=1, final=True)
        lowest: tuple[float, float, Array] | None = None
        regular = state.round % 2 == 0
        for y in (least.y, state.y):
            for z, value, left in self._candidates(oracle, problem, state.x, y, cuts, regular):
                good = left <= _FEASIBLE / 10
                rank = (0.0, value) if good else (left, value)
                if lowest is None or rank < lowest[:2]:
                    lowest = (*rank, z)
        if lowest is None or not np.isfinite(lowest[2]).all():
            return replace(state, cuts=cuts, round=state.round + 1)
        point = torch.from_numpy(lowest[2].copy()).to(state.x)
        after = replace(state, cuts=cuts, solved=True, round=state.round + 1)
        lower = lowest[0] == 0.0 and lowest[1] < state.value - 1e-6 * max(1.0, abs(state.value))
        if state.best is not None and state.round > 0 and (not lower or state.round >= _ROUNDS):
            return replace(after, x=state.best[:p], y=state.best[p:], final=True)
        return replace(after, x=oracle.project(point[:p]), y=point[p : p + q], final=False)

    def stationarity(self, oracle: Oracle, state: ValueFunctionState, found: Evaluated) -> Tensor:
        return state.x.new_tensor(found.kept[2])

    def point(self, state: ValueFunctionState) -> tuple[Tensor, Tensor]:
        return state.x, state.y

    def _problem(self, oracle: Oracle) -> Optimistic:
        return Optimistic(oracle.problem(), self.inequalities, self.equalities)

    def _least(
        self, problem: Optimistic, x: Tensor, y: Tensor, state: ValueFunctionState, seed: int, times: int = 1
    ) -> InnerMinimum:
        linear = self.inner == "lp" or (self.inner == "auto" and is_linear(problem, x, y))
        if linear:
            return by_linear_program(problem, x, y)
        near = torch.cat([y.unsqueeze(0), state.cuts])
        return by_multistart(
            problem,
            x,
            near,
            samples=times * self.samples,
            searches=min(times, 2) * self.searches,
            radius=self.radius,
            seed=self.seed + seed,
        )

    def _candidates(
        self, oracle: Oracle, problem: Optimistic, x: Tensor, y: Tensor, cuts: Tensor, regular: bool
    ) -> list[tuple[Array, float, float]]:
        """Local solutions of the relaxed programs, and of the exact ones at their active sets."""
        import numpy as np

        c, e = problem.inner(x, y)
        k, m = len(c), len(e)
        multipliers = multipliers_at(problem, x, y) if regular else np.zeros(k + m)
        lower, upper = (as_numpy(bound) for bound in _bounds(oracle, x))
        free = np.full(y.numel(), np.inf)
        if not regular:
            program = Program(
                in_numpy(lambda z: _cut_program(problem, z, x.numel(), cuts), x),
                len(problem.outer(x, y)[1]) + m,
                np.concatenate([lower, -free]),
                np.concatenate([upper, free]),
            )
            return [program.solve(np.concatenate([as_numpy(x), as_numpy(y)]))]
        z = np.concatenate([as_numpy(x), as_numpy(y), multipliers])
        low = np.concatenate([lower, -free, np.zeros(k), np.full(m, -np.inf)])
        high = np.concatenate([upper, free, np.full(k + m, np.inf)])
        sizes = (x.numel(), y.numel(), k)
        equalities = len(problem.outer(x, y)[1]) + m + y.numel()
        found = []
        value = left = math.inf
        for t in _RELAXATIONS:
            function = in_numpy(partial(_program, problem, sizes=sizes, cuts=cuts, t=t), x)
            z, value, left = Program(function, equalities, low, high).solve(z, max_steps=60)
            if not (math.isfinite(value) and math.isfinite(left)):
                break
        else:
            found.append((z, value, left))
            at, own = torch.from_numpy(z).to(x), z[sizes[0] + sizes[1] : sizes[0] + sizes[1] + k]
            active = own > -as_numpy(problem.inner(at[: sizes[0]], at[sizes[0] : sizes[0] + sizes[1]])[0])
            fixed = high.copy()
            fixed[sizes[0] + sizes[1] : sizes[0] + sizes[1] + k][~active] = 0.0
            held = torch.from_numpy(active).to(x.device)
            function = in_numpy(partial(_program, problem, sizes=sizes, cuts=cuts, t=None, active=held), x)
            found.append(Program(function, equalities, low, fixed).solve(np.clip(z, low, fixed)))
        return found

    def _descent_left(self, oracle: Oracle, problem: Optimistic, state: ValueFunctionState, g: float) -> float:
        """What :func:`descent_left` says at a minimizer y, with the cuts that are as low for other minimizers."""
        x, y = state.x, state.y
        rows = []
        for other in state.cuts:
            with torch.no_grad():
                value, (c, e) = float(problem.problem.g(x, other)), problem.inner(x, other)
            feasible = not torch.cat([c, e.abs()]).gt(_FEASIBLE).any()
            apart = float((other - y).abs().max()) > _APART * max(1.0, float(y.abs().max()))
            if feasible and apart and value <= g + _FEASIBLE * max(1.0, abs(g)):
                rows.append(torch.cat([other, danskin(problem, x, other)]))
        others = torch.stack(rows) if rows else x.new_zeros(0, y.numel() + x.numel())
        lower, upper = (as_numpy(bound) for bound in _bounds(oracle, x))
        return descent_left(problem, x, y, (lower, upper), others)

    def _slope(self, problem: Optimistic, x: Tensor, y: Tensor, least: InnerMinimum) -> Tensor:
        """grad_x f - mu (grad_x g - grad V), mu the least squares solution of grad_y f = mu grad_y g, at least 0."""
        with torch.enable_grad():
            leaf, own = x.detach().requires_grad_(), y.detach().requires_grad_()
            fx, fy = gradients(problem.problem.f(leaf, own), leaf, own)
            gx, gy = gradients(problem.problem.g(leaf, own), leaf, own)
        if not math.isfinite(least.value):
            return fx
        square = float(gy @ gy)
        mu = max(0.0, -float(fy @ gy) / square) if square > 1e-12 else 0.0
        return fx + mu * (gx - danskin(problem, x, least.y))


def _cuts(problem: Optimistic, x: Tensor, y: Tensor, cuts: Tensor) -> Tensor:
    """g(x, y) - g(x, y_k) - M |violation at (x, y_k)|^2 - room, which is below 0 where y is a minimizer."""
    if not len(cuts):
        return x.new_zeros(0)
    wide = x.expand(len(cuts), -1)
    c, e = problem.inner(wide, cuts)
    slack = c.clamp_min(0).square().sum(-1) + e.square().sum(-1)
    return problem.problem.g(x, y) - problem.problem.g(wide, cuts) - _SHIFT * slack - _ROOM


def _cut_program(problem: Optimistic, z: Tensor, p: int, cuts: Tensor) -> Tensor:
    x, y = z[:p], z[p:]
    (C, E), (c, e) = problem.outer(x, y), problem.inner(x, y)
    return torch.cat([problem.problem.f(x, y).reshape(1), E, e, C, c, _cuts(problem, x, y, cuts)])


def _program(
    problem: Optimistic,
    z: Tensor,
    sizes: tuple[int, int, int],
    cuts: Tensor,
    t: float | None,
    active: Tensor | None = None,
) -> Tensor:
    """f, the equalities and the inequalities; with t None exact, c_i = 0 for the active ones."""
    p, q, k = sizes
    x, y, multipliers, nu = z[:p], z[p : p + q], z[p + q : p + q + k], z[p + q + k :]
    (C, E), (c, e) = problem.outer(x, y), problem.inner(x, y)
    stationary = problem.stationarity(x, y, multipliers, nu)
    compl = -multipliers * c - t if t is not None else -c[active]
    cut = _cuts(problem, x, y, cuts)
    return torch.cat([problem.problem.f(x, y).reshape(1), E, e, stationary, C, c, compl, cut])


def _bounds(oracle: Oracle, x: Tensor) -> tuple[Tensor, Tensor]:
    if oracle.region is None:
        return torch.full_like(x, -torch.inf), torch.full_like(x, torch.inf)
    if not isinstance(oracle.region, Box):
        raise ValueError(
            "`ValueFunction` takes a `constraint=` that is a `Box`, and others by `outer_inequalities` and"
            f" `outer_equalities`. Got {type(oracle.region).__name__}."
        )
    return oracle.region.bounds(x)
