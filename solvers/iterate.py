"""An optimizer run for a number of steps: the inner solver that can be unrolled."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import final

import torch
from torch import Tensor

from bilevel._inner import AbstractUnrollable, Objective, State, unbounded
from bilevel._numerics.rows import norms_beside, safe_row_norms
from bilevel._optimizer import AbstractOptimizer, number
from bilevel._result import GROWTH, Solved, Status, ended
from bilevel._validate import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, demand_ranges
from bilevel.arguments.unchecked import unchecked
from bilevel.bounds.iterations import gradient_descent, stationary
from bilevel.certificates.certificate import Constants
from bilevel.solvers._on_the_way import curvature_on_the_way, is_time_to_give_up, lost_its_way
from bilevel.solvers.armijo import Armijo, descend, rounding
from bilevel.solvers.gradient_descent import GradientDescent

_solved = unchecked(Solved)


@final
@dataclass(frozen=True)
class Iterate(AbstractUnrollable):
    """y_{k+1} = step(y_k, grad_y g(x, y_k)): an optimizer for `max_steps` steps, or until |grad_y g| <= tol.

    Without a tolerance, completing the steps is success. Rows of a batch that meet the tolerance, or meet NaN, stop
    moving while the others go on.

    Divergence: where at the end |grad g| is more than 10 times what it was at y0 and g is larger than there, the
    status says so, also where no tolerance was given, and whether the iterates blow up or settle into a cycle. `Adam`,
    whose first step has full length whatever the gradient, can meet this from a start very near the minimum; a
    tolerance stops it before.

    Cost: one gradient a step, and one at the returned point; all rows of a batch are evaluated, and counted, at
    each. With a line search one gradient a step and one at y0, and one value a trial. Memory O(q).

    Args:
        optimizer: what a step is. Step sizes left open (`GradientDescent()`) are derived, at the start of each
            solve, from an upper estimate of the largest curvature at y0: some 10 to 20 Hessian products. Where they
            fail, by divergence or by making no way towards the tolerance, the solve is repeated with step sizes from
            the largest curvature on the way, which takes about as many gradients to find as the solve has steps.
            Settings that are functions of x, or of (x, k) with k = 0, 1, ... the number of the step, take their values
            at the x of the solve; the inner problem is then an iteration, whatever g is, and a value that is out of its
            range ends the solve with `Status.nonfinite`.
        max_steps: how many steps.
        tol: stop when the gradient norm is at most this; None or 0: take all the steps.
        line_search: finds the step length at each step, for `GradientDescent` (whose step, if it has one, multiplies
            it). The steps then depend on y in a way that cannot be differentiated: `ITD` refuses it.
        min_steps: take at least so many, for `ITD`, whose derivative needs them even where y starts at the solution,
            and which, where this is at least 1, goes on until the derivative is right; a line search ignores it.

    Raises:
        ValueError: if `max_steps` or `tol` is negative, `min_steps` is not between 0 and `max_steps`, or there is a
            line search for another optimizer.

    Example:
        >>> objective = Objective(lambda y: (y - 1).square().sum() / 2)
        >>> Iterate(GradientDescent(0.5), max_steps=2).solve(objective, torch.zeros(1)).value
        tensor([0.7500])
    """

    optimizer: AbstractOptimizer
    max_steps: int
    tol: float | None = None
    line_search: Armijo | None = None
    min_steps: int = 0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, {"tol": "Pass None to take all the steps."}, max_steps=AT_LEAST_0, tol=AT_LEAST_0)
        if not 0 <= self.min_steps <= self.max_steps:
            raise ValueError(
                f"`Iterate(min_steps=...)` must be between 0 and max_steps={self.max_steps}. Got {self.min_steps}."
            )
        if self.line_search is not None and not isinstance(self.optimizer, GradientDescent):
            raise ValueError(
                f"`Iterate(line_search=...)` applies to `GradientDescent` only. Got {type(self.optimizer).__name__}."
            )
        if self.line_search is not None and self.optimizer.settings:
            raise ValueError("`Iterate(line_search=...)` finds the step length itself: the step must be no function.")

    @property
    def forgets_start(self) -> bool:
        return bool(self.tol) and not self.why_iteration

    @property
    def why_iteration(self) -> str:
        return self.optimizer.why_iteration

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        if self.line_search is not None:
            assert isinstance(self.optimizer, GradientDescent)
            step = number("Iterate", "optimizer", self.optimizer.step_size)
            return descend(
                self.line_search, 1.0 if step is None else step, objective, y0, self.max_steps, self.tol or 0.0
            )
        tuned = self.tuned(objective, y0)
        found, norms = tuned._run(objective, y0, gives_up=tuned is not self)
        if tuned is self or not any(lost_its_way(status, norms) for status in found.statuses):
            return found
        safer = self.tuned_on_the_way(objective, y0)
        if safer is None and not is_time_to_give_up(norms):  # they were not given up: there is nothing to add
            return found
        again, _ = (tuned if safer is None else safer)._run(objective, y0)
        failed = [not status.ok for status in found.statuses]
        if all(failed):
            return again
        held = torch.tensor(failed, device=y0.device).reshape(again.residual.shape)
        y = torch.where(held.unsqueeze(-1), again.value, found.value)
        ends = zip(failed, again.statuses, found.statuses, strict=True)
        residual = safe_row_norms(objective.last_gradient(y))
        return Solved(y, tuple(a if new else b for new, a, b in ends), residual, max(found.steps, again.steps))

    def _run(self, objective: Objective, y0: Tensor, gives_up: bool = False) -> tuple[Solved, list[Tensor]]:
        """The steps, and the norms of the gradients where they are compared with a tolerance."""
        # The steps are those of `advance`, not called through it nor through the walk of `ITD`: an optimizer of any
        # state, such as `TorchOptim`, can be run though it cannot be unrolled.
        tol, norms = self.tol or 0.0, list[Tensor]()
        optimizer, every_step = self._set(objective, 0), any(setting.of_step for setting in self.optimizer.settings)
        size = norms_beside(y0.dtype, tol)
        y = y0.detach().clone()
        state = optimizer.init(y)
        first: tuple[Tensor, Tensor] | None = None  # |grad g| and g at y0
        rows = y.shape[:-1].numel()
        moving = torch.ones(y.shape[:-1], dtype=torch.bool, device=y.device) if tol and y.dim() > 1 else None
        steps = 0
        for steps in range(self.max_steps + 1):
            if steps == self.max_steps:
                break
            value, gradient = objective.value_and_gradient(y)
            if tol or first is None:
                norm = size(gradient)
                first = (norm, value) if first is None else first
                if tol:
                    norms.append(norm)
                    if moving is None:  # one problem: it moves, or the loop ends
                        size_now = norm.item()
                        going = (size_now > tol or steps < self.min_steps) and math.isfinite(size_now)
                    else:
                        moving = ((norm > tol) | (steps < self.min_steps)) & norm.isfinite()
                        going = bool(moving.any())
                    if not going or (gives_up and is_time_to_give_up(norms)):
                        del gradient
                        break
            optimizer = self._set(objective, steps) if every_step and steps else optimizer
            moved, state = optimizer.step(gradient, y, state)
            y = moved if moving is None else torch.where(moving.unsqueeze(-1), moved, y)
            del gradient, moved  # not to be held while the next gradient is formed
            objective.tally.inner_steps += rows if moving is None else int(moving.sum())
        residual = safe_row_norms(objective.last_gradient(y))
        return _solved(y, _statuses(objective, y, residual, first, tol), residual, steps), norms

    def _set(self, objective: Objective, step: int) -> AbstractOptimizer:
        """The optimizer with the values of its settings at the x at hand, for a step."""
        if not self.optimizer.settings:
            return self.optimizer
        with torch.no_grad():
            return self.optimizer.at(partial(objective.setting, step=step))

    @property
    def tolerance(self) -> float | None:
        return self.tol or None

    def with_tolerance(self, tol: float) -> Iterate:
        return replace(self, tol=tol)

    def with_steps(self, steps: int) -> Iterate:
        return replace(self, max_steps=steps, min_steps=0)

    def solution_bound(self, constants: Constants, distance: float) -> float:
        if self.tol:
            return stationary(constants, self.tol)
        step, steps = self.as_gradient_descent("bounds.gradient_descent")
        return gradient_descent(constants, step=step, steps=steps, distance=distance)

    def as_gradient_descent(self, call: str) -> tuple[float, int]:
        if not isinstance(self.optimizer, GradientDescent) or self.line_search is not None:
            raise unbounded(self, call)
        step = self.optimizer.step_size
        if callable(step):
            raise unbounded(self, call)
        if not isinstance(step, int | float):
            raise ValueError(
                f"`GradientDescent(step=None)` derives its step at run time. Call `{call}` with that step."
            )
        if self.tol:
            raise ValueError(
                f"`Iterate(tol=...)` takes a number of steps that is not known in advance. Leave it out, or call"
                f" `{call}` with the number that it took."
            )
        return float(step), self.max_steps

    def tuned(self, objective: Objective, y0: Tensor) -> Iterate:
        if not self.optimizer.needs_curvature or self.line_search is not None:
            return self
        return self._with_curvature(_at(objective, y0))

    def tuned_on_the_way(self, objective: Objective, y0: Tensor) -> Iterate | None:
        if not self.optimizer.needs_curvature or self.line_search is not None:
            return None
        start = _at(objective, y0)
        largest = curvature_on_the_way(objective, y0, start, self.max_steps, self.tol or 0.0)
        return self._with_curvature(largest) if bool((largest > start).any()) else None

    def _with_curvature(self, largest: Tensor) -> Iterate:
        return replace(self, optimizer=self.optimizer.tuned(largest.unsqueeze(-1) if largest.dim() else largest))

    def begin(self, y0: Tensor) -> State:
        if self.line_search is not None:
            raise ValueError(
                "`ITD` cannot differentiate through a line search. Drop `line_search=`: the step of `GradientDescent()`"
                " is derived from the curvature."
            )
        state = self.optimizer.init(y0)
        for key, entry in state.items():
            if not isinstance(entry, Tensor):
                raise ValueError(
                    f"`ITD` cannot differentiate through {type(self.optimizer).__name__} (its state {key!r} is not a"
                    f" tensor). Use `GradientDescent`, `HeavyBall`, `Nesterov` or `Adam`."
                )
        return (y0, *state.values())

    def advance(self, objective: Objective, gradient: Tensor | None, state: State, index: int) -> State:
        assert gradient is not None
        y, *entries = state
        optimizer = self.optimizer
        if optimizer.settings:
            optimizer = optimizer.at(partial(objective.setting, step=index))
        keys = optimizer.init(y.detach()).keys() if entries else ()
        point, new = optimizer.step(gradient, y, dict(zip(keys, entries, strict=True)))
        return (point, *new.values())


def _at(objective: Objective, y0: Tensor) -> Tensor:
    """The largest curvature at y0; 1, which is neutral, where g is flat or concave along every direction tried."""
    largest = objective.largest_curvature(y0)
    return torch.where(largest > 0, largest, 1.0).clamp_min(torch.finfo(largest.dtype).tiny)


def _statuses(
    objective: Objective, y: Tensor, residual: Tensor, first: tuple[Tensor, Tensor] | None, tol: float
) -> tuple[Status, ...]:
    """How each row ended; the objective is evaluated, one value, only if the gradient of some row has grown."""
    r0, g0 = first or (residual, torch.zeros_like(residual))
    if not residual.dim() and not residual.item() > GROWTH * r0.item():  # one problem, and nothing more to know
        return (ended(residual.item(), 0.0, r0.item(), 0.0, tol=tol),)
    grown = residual > GROWTH * r0
    g = torch.where(grown, objective.value(y), 0.0) if bool(grown.any()) else torch.zeros_like(g0)
    table = torch.stack([residual, g, r0, g0 + rounding(g0)]).reshape(4, -1).tolist()
    return tuple(ended(*row, tol=tol) for row in zip(table[0], table[1], table[2], table[3], strict=True))
