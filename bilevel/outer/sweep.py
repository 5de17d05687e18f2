"""Many configurations of an algorithm side by side, for a while; the best one goes on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from bilevel._flat import FlatProblem
from bilevel._numerics.rows import safe_row_norms
from bilevel._optimizer import AbstractOptimizer
from bilevel._problem import Split
from bilevel._result import Status
from bilevel.algorithms.algorithm import AbstractAlgorithm
from bilevel.algorithms.engine.direction import rows_of_outer_gradients
from bilevel.algorithms.engine.each_run import beside_steps
from bilevel.algorithms.engine.preset import AbstractPreset
from bilevel.algorithms.engine.rows import is_row, row_of
from bilevel.algorithms.finite_sum import FiniteSum
from bilevel.algorithms.oracle import AbstractData, Oracle
from bilevel.algorithms.several_orders import SeveralOrders
from bilevel.inner_problems.kinds import inner_objective, inner_problem
from bilevel.outer.trial import Trial
from bilevel.requirements.iterations import why_iteration
from bilevel.requirements.properties import Property
from bilevel.requirements.why_not import why_not

STEPS = ("inner_step", "outer_step")  # what runs side by side may differ in


@final
@dataclass(frozen=True, eq=False)
class Winner:
    """What goes on: an algorithm with its data, from a state.

    Attributes:
        algorithm: with the settings that were chosen.
        data: in the order that was chosen.
        state: where it is.
        steps: how many steps have led there.
        trials: all rows, the chosen one marked.
    """

    algorithm: AbstractAlgorithm[Any]
    data: AbstractData | Split
    state: Any
    steps: int
    trials: tuple[Trial, ...]


def combinations(algorithm: AbstractAlgorithm[Any], sweep: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the settings: by fields of the algorithm, with `seed` that of the order of the data.

    `ratio` stands for inner_step / outer_step.

    Raises:
        ValueError: if there is no such field, no value, or both `ratio` and `outer_step`.
    """
    known = {field.name for field in fields(algorithm)} | {"ratio", "seed"}  # type: ignore[arg-type]
    unknown = [name for name in sweep if name not in known]
    call = type(algorithm).__name__
    if unknown:
        raise ValueError(
            f"`minimize(sweep=...)` must name fields of `{call}`, or `ratio` (inner_step over outer_step) or `seed`."
            f" Got {', '.join(map(repr, unknown))}. Fields: {', '.join(sorted(known))}."
        )
    if {"ratio", "outer_step"} <= sweep.keys():
        raise ValueError("`minimize(sweep=...)` needs `ratio` or `outer_step`, which is inner_step / ratio. Got both.")
    empty = [name for name, values in sweep.items() if isinstance(values, str) or not list(values)]
    if empty or not sweep:
        raise ValueError(f"`minimize(sweep=...)` needs a list of values for each name. Got none for {empty or 'any'}.")
    found = [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]
    for settings in found:
        configured(algorithm, settings)  # refuses what the algorithm does
    return found


def configured(algorithm: AbstractAlgorithm[Any], settings: Mapping[str, Any]) -> AbstractAlgorithm[Any]:
    """The algorithm with these settings."""
    own = {name: value for name, value in settings.items() if name not in ("ratio", "seed")}
    changed: Any = replace(algorithm, **own)  # type: ignore[type-var]
    if "ratio" in settings:
        if not isinstance(changed.inner_step, int | float):
            raise ValueError("`minimize(sweep={'ratio': ...})` needs an `inner_step` that is a number.")
        changed = replace(changed, outer_step=changed.inner_step / settings["ratio"])
    if "seed" in settings and _has_seed(changed):
        changed = replace(changed, seed=settings["seed"])
    found: AbstractAlgorithm[Any] = changed
    return found


def _has_seed(algorithm: Any) -> bool:
    """Whether it draws random numbers of its own, beside the order of the data."""
    return any(field.name == "seed" for field in fields(algorithm))


def reordered(data: AbstractData | Split, settings: Mapping[str, Any]) -> AbstractData | Split:
    """The data in the order of the seed among the settings.

    Raises:
        ValueError: if there is one, and the data have no order that a seed says.
    """
    if "seed" not in settings:
        return data
    if isinstance(data, Split):
        seed, sides = settings["seed"], (data.f, data.g)
        if any(isinstance(side, FiniteSum) for side in sides):
            f, g = (replace(side, seed=seed) if isinstance(side, FiniteSum) else side for side in sides)
            return Split(f=f, g=g)
    raise ValueError("`minimize(sweep={'seed': ...})` is the seed of a `FiniteSum`. Pass `data=FiniteSum(...)`.")


def _side_by_side(data: AbstractData | Split, each: Sequence[Mapping[str, Any]], like: Tensor) -> AbstractData | Split:
    """The data for several runs at once, each in the order of its settings."""
    orders = [reordered(data, settings) for settings in each]
    if not isinstance(data, Split) or "seed" not in each[0]:
        return data

    def stacked(sides: list[AbstractData]) -> AbstractData:
        sums = tuple(side for side in sides if isinstance(side, FiniteSum))
        return SeveralOrders.of(sums, like) if sums else sides[0]

    f, g = (stacked([getattr(order, side) for order in orders]) for side in ("f", "g"))
    return Split(f=f, g=g)


def swept(
    algorithm: AbstractAlgorithm[Any],
    sweep: Mapping[str, Sequence[Any]],
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    steps: int,
    slack: float = 0.0,
    made: Callable[[AbstractAlgorithm[Any]], AbstractAlgorithm[Any]] = lambda algorithm: algorithm,
) -> Winner:
    """Run every combination for so many steps from the same start, and say which one has come furthest.

    Combinations that differ in `inner_step`, `outer_step`, `ratio` or `seed` alone are one batch over a leading axis,
    where the algorithm can be (`AbstractAlgorithm.beside`, and `of_seeds` where it has coins); what else is swept makes
    one batch after the other. The best is that of the lowest Phi on all the data, among those that are numbers.

    Args:
        algorithm: what is run.
        sweep: lists of its settings by name.
        oracle: of step 0.
        x: the start `(p,)`.
        y: the start `(q,)`, of one task.
        steps: how many steps each takes.
        slack: the first combination is taken that comes so near to the best, as a share of how far rows differ; 0: the
            best itself. What is best for a while may be too long a step for later.
        made: what becomes of an algorithm that is run, such as one whose steps are programs; the winner is as it was.

    Where all have diverged, the first goes on from the start, as if there had been no sweep: the run then ends as one
    that diverges does, by its status, and with the best of its iterates.

    Cost: `steps` steps of every combination, and for each a gradient of f, and some ten of g, on all the data.
    """
    found = combinations(algorithm, sweep)
    for settings in found:
        if why := why_not(configured(algorithm, settings), oracle.like.problem):
            raise ValueError(why)
    rows: dict[int, _Row] = {}
    for members in _alike(found, range(len(found)), (*STEPS, "ratio", "seed")):
        for batch in _batches(algorithm, found, members, oracle.data, x):
            at = Oracle(oracle.like, batch.data, batch.draws, oracle.region)
            rows |= replace(batch, algorithm=made(batch.algorithm)).run(at, x, y, steps)
    sound = [k for k, row in rows.items() if math.isfinite(row.value)]
    best = _chosen(rows, sound, slack)
    trials = tuple(
        Trial(
            found[k],
            rows[k].value if math.isfinite(rows[k].value) else math.inf,
            Status.successful if k in sound else Status.diverged,
            k == best,
        )
        for k in range(len(found))
    )
    chosen, order = configured(algorithm, found[best]), reordered(oracle.data, found[best])
    if not sound:  # from the start, for the run to say how it is lost, and to keep the best of its iterates
        at = Oracle(oracle.like, order, chosen.draws, oracle.region)
        return Winner(chosen, order, chosen.init(at, x, y), 0, trials)
    return Winner(chosen, order, rows[best].state(), steps, trials)


def _chosen(rows: Mapping[int, _Row], sound: Sequence[int], slack: float) -> int:
    """Which combination goes on; the first where all have diverged."""
    if not sound:
        return 0
    least, most = (pick(rows[k].value for k in sound) for pick in (min, max))
    near = [k for k in sound if rows[k].value <= least + slack * (most - least)]
    return near[0] if slack else min(sound, key=lambda k: rows[k].value)


@final
@dataclass(frozen=True, eq=False)
class _Row:
    """Where a combination has come to: Phi there, and how its state is had."""

    value: float
    state: Callable[[], Any]


def recalled(
    algorithm: AbstractAlgorithm[Any],
    sweep: Mapping[str, Sequence[Any]],
    data: AbstractData | Split,
    told: Sequence[Mapping[str, Any]],
) -> Winner | None:
    """What goes on, where the run that is resumed has swept already; its state is in its checkpoint.

    Args:
        algorithm: that was swept.
        sweep: over which settings: a file tells optimizers and the like in words.
        data: of the run.
        told: the rows, as `Trial.to_dict` has made them; None is returned where there are none, or those of another
            sweep, whose file is refused for its settings.
    """
    found = combinations(algorithm, sweep)
    rows = [Trial.from_dict(row) for row in told]
    if len(rows) != len(found):
        return None
    trials = tuple(replace(row, settings=settings) for row, settings in zip(rows, found, strict=True))
    chosen = [trial for trial in trials if trial.chosen]
    if not chosen:
        return None
    settings = chosen[0].settings
    return Winner(configured(algorithm, settings), reordered(data, settings), None, 0, trials)


@final
@dataclass(frozen=True, eq=False)
class _Batch:
    """Combinations that run side by side; one alone without a leading axis."""

    algorithm: AbstractAlgorithm[Any]
    data: AbstractData | Split
    members: list[int]
    rows: int  # 0: one, without an axis

    @property
    def draws(self) -> Any:
        return self.algorithm.draws

    def run(self, oracle: Oracle, x: Tensor, y: Tensor, steps: int) -> dict[int, _Row]:
        """Where each is after so many steps."""
        if self.rows:
            x = x.expand(self.rows, -1).clone()
            y = oracle.like.spread(y)
            y = y.expand(self.rows, *y.shape).clone()
        algorithm = self.algorithm
        state = algorithm.init(oracle, x, y)
        for _ in range(steps):
            state = algorithm.step(oracle, state, algorithm.evaluate(oracle, state))
            oracle = oracle.at(oracle.step + 1)
        values = _phi(oracle, algorithm, state)
        if not self.rows:
            return {self.members[0]: _Row(float(values), lambda: state)}
        pairs = enumerate(zip(self.members, values.tolist(), strict=True))
        return {k: _Row(value, partial(row_of, state, row)) for row, (k, value) in pairs}


def _alike(found: list[dict[str, Any]], members: Iterable[int], but_for: Sequence[str]) -> list[list[int]]:
    """Combinations in groups of those that differ in these settings alone, their steps being of one kind."""
    groups: dict[str, list[int]] = {}
    for k in members:
        rest = {name: value for name, value in found[k].items() if name not in but_for}
        kinds = [isinstance(found[k].get(name), AbstractOptimizer) for name in STEPS]
        groups.setdefault(repr((rest, kinds)), []).append(k)
    return list(groups.values())


def _are_rows(
    beside: AbstractAlgorithm[Any], algorithm: AbstractAlgorithm[Any], each: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether each row is the combination that it stands for, but for its seed: no setting is one that steps make."""
    seed = {"seed": each[0]["seed"]} if "seed" in each[0] else {}
    for k, settings in enumerate(each):
        one = configured(algorithm, {**settings, **seed})
        alone = one.loop if isinstance(one, AbstractPreset) else one
        if type(alone) is type(beside) and not is_row(beside, k, alone):  # else it is nobody's but its author's
            return False
    return True


def _batches(
    algorithm: AbstractAlgorithm[Any],
    found: list[dict[str, Any]],
    members: list[int],
    data: AbstractData | Split,
    like: Tensor,
) -> list[_Batch]:
    """Combinations of one group as one batch, or as several where the algorithm cannot be side by side."""
    each = [configured(algorithm, found[k]) for k in members]
    if len(members) > 1:
        inner, outer = (beside_steps([getattr(one, name, None) for one in each], like) for name in STEPS)
        beside = None if inner is None or outer is None else each[0].beside(inner, outer)
        if beside is not None and not _are_rows(beside, algorithm, [found[k] for k in members]):
            beside = None
        orders = _alike(found, members, (*STEPS, "ratio"))
        if beside is not None and len(orders) > 1 and _has_seed(algorithm):
            beside = beside.of_seeds(tuple(found[k]["seed"] for k in members))
            if beside is None:
                return [batch for group in orders for batch in _batches(algorithm, found, group, data, like)]
        if beside is not None:
            together = _side_by_side(data, [found[k] for k in members], like)
            return [_Batch(beside, together, members, len(members))]
    return [_Batch(one, reordered(data, found[k]), [k], 0) for one, k in zip(each, members, strict=True)]


def _phi(oracle: Oracle, algorithm: AbstractAlgorithm[Any], state: Any) -> Tensor:
    """Phi(x) of each row, on all the data: where y lags behind x, or runs away from it, f(x, y) may be anything.

    y is solved to some digits from where it is; f(x, y) where y is no minimizer of a smooth g. Infinite for rows that
    have run away.
    """
    from bilevel.solvers.lbfgs import LBFGS

    problem: FlatProblem = oracle.whole()
    x, y = algorithm.point(state)
    solved = {Property.minimum, Property.smooth} <= inner_problem(problem.problem).offers
    if not solved or why_iteration(algorithm):
        return rows_of_outer_gradients(problem, x, y)[0]
    lead = x.dim() - 1
    lags = safe_row_norms(inner_objective(problem, x).gradient(y).flatten(lead))
    finite = lags[lags.isfinite()]
    if not finite.numel():
        return torch.full_like(lags, math.inf)
    typical = finite.median()
    near = lags <= _RUNAWAY * typical
    if lead:
        x, y = x[near], y[near]
    solver = LBFGS(tol=_DIGITS * float(typical), max_steps=_SOLVED)
    y = solver.solve(inner_objective(problem, x), y).value
    found = torch.full_like(lags, math.inf)
    found[near] = rows_of_outer_gradients(problem, x, y)[0]
    return found


_RUNAWAY = 1e3  # times the lag of the median row, which differs from that of other rows by their steps alone
_DIGITS, _SOLVED = 1e-2, 30  # of the lag, and steps at most: rows differ by more than what these leave
