"""The inner iteration within a program."""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from torch import Tensor

from bilevel._calculus import grad, total
from bilevel._flat import FlatProblem
from bilevel._result import GROWTH
from bilevel.compiled.norms import column, count, row_norm
from bilevel.compiled.tracing import Tracing
from bilevel.inner_problems.kinds import inner_objective
from bilevel.solvers.armijo import rounding
from bilevel.solvers.iterate import Iterate

ENDS = ("successful", "nonfinite", "max_steps", "diverged")  # statuses by their codes


class Iterated(NamedTuple):
    """Where an inner iteration ends.

    Attributes:
        y: `(*tasks, q)`.
        steps: `()`.
        taken: steps of all rows together, `()`.
        gradients: that were formed, `()`.
        first_norm: |grad_y g| at the start `(*tasks,)`.
        first_value: g there.
    """

    y: Tensor
    steps: Tensor
    taken: Tensor
    gradients: Tensor
    first_norm: Tensor
    first_value: Tensor


def value_and_gradient(problem: FlatProblem, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """g `(*tasks,)` and grad_y g `(*tasks, q)`."""
    y = y.detach().requires_grad_()
    value = problem.g(x, y)
    return value.detach().clone(), grad(total(value), y)


def start(problem: FlatProblem, x: Tensor, y0: Tensor) -> tuple[Tensor]:
    """Where the iteration starts."""
    return (problem.start(x, y0).detach().clone(),)


@final
class Iteration:
    """`Iterate.solve` up to the returned point, step by step the same.

    Args:
        tracing: the computation that this is a part of.
        solver: with its step sizes.
        x: an example.
        y: an example `(*tasks, q)`.
    """

    def __init__(self, tracing: Tracing, solver: Iterate, x: Tensor, y: Tensor) -> None:
        self.tracing, self.solver = tracing, solver
        like = solver.begin(y.detach().clone())

        def advanced(problem: FlatProblem, x: Tensor, g: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return solver.advance(inner_objective(problem, x), g, state, 0)

        self.gradient = tracing.piece(value_and_gradient, x, y)
        self.advance = tracing.piece(advanced, x, y, *like)
        self.begin = tracing.piece(lambda _, y: solver.begin(y.detach().clone()), y)

    def run(self, x: Tensor, y: Tensor) -> Iterated:
        """From a start `(*tasks, q)`."""
        solver, tol = self.solver, self.solver.tol or 0.0
        if not tol and solver.max_steps:
            return self._all_steps(x, y)

        def goes(k: Tensor, done: Tensor, *_: Tensor) -> Tensor:
            return (k < solver.max_steps) & ~done

        def step(carried: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            k, done, taken, first, first_value, *state = carried
            y, (x,) = state[0], fixed
            value, g = self.gradient(x, y)
            first, first_value = torch.where(k == 0, g, first), torch.where(k == 0, value, first_value)
            new = self.advance(x, g, *state)
            if not tol:
                return k + 1, done.clone(), taken + y.shape[:-1].numel(), first, first_value, *new
            norm = row_norm(g)
            moving = ((norm > tol) | (k < solver.min_steps)) & norm.isfinite()
            done = ~moving.any()
            held = torch.where(column(moving), new[0], y)
            return k + (~done), done, taken + moving.sum(), first, first_value, held, *new[1:]

        zero = torch.zeros_like(y[..., 0])
        begun = (count(), count() > 0, count(), torch.zeros_like(y), zero, *self.begin(y))
        k, done, taken, first, first_value, y, *_ = self.tracing.loop(goes, step, begun, (x,))
        return Iterated(y, k, taken, k + done, row_norm(first), first_value)

    def _all_steps(self, x: Tensor, y: Tensor) -> Iterated:
        """The same without a tolerance: what is known of the first step is no part of the loop over the others.

        What a loop carries is written anew in each of its rounds, which for small problems is most of what they take.
        """
        most = self.solver.max_steps

        def step(carried: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            k, *state = carried
            return k + 1, *self.advance(fixed[0], self.gradient(fixed[0], state[0])[1], *state)

        begun = self.begin(y)
        value, g = self.gradient(x, begun[0])
        state = self.advance(x, g, *begun)
        if most > 1:
            state = self.tracing.loop(lambda k, *_: k < most, step, (count() + 1, *state), (x,))[1:]
        taken = count() + most
        rows = y.shape[:-1].numel()
        return Iterated(state[0], taken, taken * rows, taken.clone(), row_norm(g), value)


def codes(found: Iterated, residual: Tensor, value: Tensor, tol: float, max_steps: int) -> Tensor:
    """How each row ended `(*tasks,)`, as `ended` says, by the residual and g at the end."""
    first = found.first_norm if max_steps else residual
    before = found.first_value + rounding(found.first_value) if max_steps else value
    grown = residual > GROWTH * first
    code = torch.where(grown & ~(value <= before), 3, 2 if tol else 0)
    code = torch.where((residual <= tol) & (tol > 0), 0, code)
    lost = ~residual.isfinite() | (grown & ~value.isfinite())
    return torch.where(lost, 1, code)
