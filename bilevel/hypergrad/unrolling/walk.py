"""The walk along the steps of an inner iteration, with a graph or without: the one unrolled loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import Linearization, grad, total
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractUnrollable, Objective, State
from bilevel._numerics.rows import norms_beside, safe_row_norms
from bilevel._numerics.second_derivatives import refuse_dropped_terms
from bilevel.solvers._on_the_way import is_time_to_give_up


@final
class Walk:
    """The iteration state_{k+1} = T_k(x, state_k) of an inner solver, as a differentiable map; for one estimate.

    Args:
        problem: the problem, at whose tally oracle calls are counted.
        inner: the iteration, its step sizes fixed.
        objective: what the steps see of the inner problem, at the leaf x.
        fixed: the same at an x without a graph, for the steps that take none.
        x: the outer variable `(p,)`, a leaf that requires grad.
        start: where the iteration starts `(*tasks, q)`, with its graph from x.
        to_converge: whether the steps have a tolerance, and tend to something that y solves.
        linearized: y -> the condition that it solves, to first order there; None: it is not known.
        least: how many steps are taken though the tolerance is met; None: as many as `inner` says.
        gives_up: whether to stop where the steps have lost their way, since others can be taken instead.
        judged: whether it will be asked how the steps ended; else the residual before the latest step is enough.

    Attributes:
        steps: how many steps have been taken.
        met: whether they ended since every row has met the tolerance, or is not finite.
        probe: zero, and a leaf, which is added to the gradients of g that steps with a graph take: the derivative in it
            is the sum of the derivatives in them. None: it is not asked for.
        first: before the first step: the norm of the residual, which `tol` is compared with, and g; `(*tasks,)` each.
        last: before the latest step, where the verdict on the end rests on that: the residual `(*tasks, q)`, and g.
        lost: whether to give up now.
        norms: the residuals of all steps `(*tasks,)` each, where they are compared with a tolerance.
        is_own: whether the steps are the inner problem itself, whatever its g is.
        has_init: whether the start depends on x.
        checked: whether the iteration is to converge, and its derivative with it.
        length: a where the residual is (y_k - y_{k+1}) / a, known after the step; None: it is grad_y g at y_k.
    """

    def __init__(
        self,
        problem: FlatProblem,
        inner: AbstractUnrollable,
        objective: Objective,
        fixed: Objective,
        x: Tensor,
        start: Tensor,
        to_converge: bool,
        linearized: Callable[[Tensor], Linearization] | None = None,
        least: int | None = None,
        gives_up: bool = False,
        judged: bool = True,
    ) -> None:
        self.problem, self.inner, self.objective, self.fixed = problem, inner, objective, fixed
        self.x, self.start = x, start
        self.rows = start.shape[:-1].numel()
        self.has_init, self.needs_gradient = problem.problem.init is not None, inner.needs_gradient
        self.checked = to_converge and not self.has_init
        self.is_own = objective.own is not None or not self.needs_gradient
        self.length = 1.0 if inner.residual_step is None and self.is_own else inner.residual_step
        self.linearized = linearized if self.checked and self.needs_gradient else None
        self.probe = None if self.linearized is None else torch.zeros_like(start.detach()).requires_grad_()
        self.steps, self.met, self.least = 0, False, inner.min_steps if least is None else least
        self.norms: list[Tensor] = []
        self.gives_up, self.lost = gives_up, False
        self.first: tuple[Tensor, Tensor] | None = None
        self.last: tuple[Tensor, Tensor] | None = None
        self._judged, self._is_own_end = judged, not inner.tol and (self.has_init or self.is_own)
        self._is_differentiable = False  # known so far
        self._none_moves = False

    def step(self, state: State, index: int, with_graph: bool) -> State | None:
        """T(x, state), step number `index`; None if every row has met the tolerance. Rows that have stand still.

        A step that is taken again is taken, whatever a g that is random says the second time.
        """
        value, gradient = self.gradient(state[0], with_graph)
        moving: Tensor | None = None
        if self.length is None:
            assert gradient is not None
            moving = self.moving(gradient.detach(), value, index, state[0])
            if index >= self.steps and self.is_over(moving):
                return None
        with torch.set_grad_enabled(with_graph):
            new = self.inner.advance(self.objective if with_graph else self.fixed, gradient, state, index)
        if self.length is not None:
            moving = self.moving(self.moved(state, new), value, index, state[0])
            if index >= self.steps and self.is_over(moving):
                return None
        return self.hold(moving, new, state)

    def gradient(self, y: Tensor, with_graph: bool) -> tuple[Tensor, Tensor | None]:
        """g `(*tasks,)`, without a graph, and grad_y g `(*tasks, q)`; zero and None where the steps need neither."""
        if not self.needs_gradient:
            return y.new_zeros(y.shape[:-1]), None
        if not with_graph:
            return self.fixed.value_and_gradient(y)
        self.problem.tally.gradients += self.rows
        with torch.enable_grad():
            at = y if y.requires_grad else y.detach().requires_grad_()
            value = self.objective.function(at)
            if not self._is_differentiable:
                refuse_dropped_terms(value, at)
                self._is_differentiable = True  # the steps that follow are the same function
            found = grad(total(value), at, create_graph=True, checked=True)
            return value.detach(), found if self.probe is None else found + self.probe

    def moved(self, state: State, new: State) -> Tensor:
        """The residual (y_k - y_{k+1}) / a of a step, without a graph: `(*tasks, q)`."""
        return self.inner.moved(state, new).detach() / (1.0 if self.length is None else self.length)

    def moving(self, residual: Tensor, value: Tensor, index: int, y: Tensor) -> Tensor | None:
        """The rows that take step number `index`: those above the tolerance, or all of them at first; None: all."""
        if index >= self.steps:  # and not a step taken again
            if not self._judged or self._is_own_end:
                self.last = residual, value
            if self._judged and self.first is None:
                self.first = safe_row_norms(residual), value
        if not self.inner.tol:
            return None
        norm = norms_beside(residual.dtype, self.inner.tol)(residual)
        new = index >= self.steps
        if new:
            self.norms.append(norm)
        self.lost = new and self.gives_up and is_time_to_give_up(self.norms)
        moving: Tensor = (norm > self.inner.allowed(y.detach())) | ((index < self.least) & norm.isfinite())
        self._none_moves = not bool(moving.any())
        if new and self._none_moves:
            self.last = residual, value
        return moving

    def is_over(self, moving: Tensor | None) -> bool:
        """Whether no row moves any more, or the steps are given up."""
        over = moving is not None and self._none_moves
        self.met = self.met or over
        return over or self.lost

    def hold(self, moving: Tensor | None, new: State, old: State) -> State:
        """The new states, or tangents, of the rows that move, and the old ones of the others."""
        if moving is None or self.problem.tasks is None:
            return new
        held, shape = moving.unsqueeze(-1), old[0].shape
        return tuple(torch.where(held, n, o) if n.shape == shape else n for n, o in zip(new, old, strict=True))

    def without_graph(self, visit: Callable[[int, State], None], stop: int) -> State:
        """Steps without a graph up to `stop`; `visit(k, state)` sees the state before step k."""
        with torch.no_grad():
            state = self.inner.begin(self.start.detach())
        while self.steps < stop:
            new = self.step(state, self.steps, with_graph=False)
            if new is None:
                break
            visit(self.steps, state)
            state, self.steps = new, self.steps + 1
        return state

    def from_leaves(self, state: State, index: int, length: int) -> tuple[State, State, int]:
        """Up to `length` steps with a graph, from leaves that hold `state`, which is that before step `index`.

        Returns:
            The leaves, the state after the steps, and how many there were.
        """
        leaves = tuple(s.detach().requires_grad_() for s in state)
        end, taken = self._with_graph(leaves, index, length)
        return leaves, end, taken

    def whole(self) -> State:
        """The last state with its graph from x, through all steps and through the start."""
        with torch.enable_grad():
            state = self.inner.begin(self.start)
        end, self.steps = self._with_graph(state, 0, self.inner.max_steps)
        return end

    def _with_graph(self, state: State, index: int, length: int) -> tuple[State, int]:
        taken = 0
        while taken < length:
            new = self.step(state, index + taken, with_graph=True)
            if new is None:
                break
            state, taken = new, taken + 1
        return state, taken
