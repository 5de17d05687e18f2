"""The unrolled estimate as one computation: the steps, and the way back through all of them."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from bilevel._calculus import grad, total
from bilevel._flat import FlatProblem
from bilevel._result import Status
from bilevel.compiled import inner
from bilevel.compiled.inner import Iterated, value_and_gradient
from bilevel.compiled.norms import count, row_norm
from bilevel.compiled.outer import Found, outer
from bilevel.compiled.packed import Legend
from bilevel.compiled.tracing import Tracing
from bilevel.hypergrad.itd import ITD
from bilevel.hypergrad.unrolling.truncated import Truncated
from bilevel.inner_problems.kinds import inner_objective
from bilevel.solvers.iterate import Iterate


@final
class Unrolled:
    """ITD with a fixed number of steps of `Iterate`: a loop that keeps its states, and one back along them.

    Memory: N states, and the graph of one step; a step is computed once more on the way back.

    Args:
        tracing: the computation.
        estimator: which.
        x: an example.
        y: an example `(*tasks, q)`, one row for each task.
    """

    def __init__(self, tracing: Tracing, estimator: ITD, x: Tensor, y: Tensor) -> None:
        solver = estimator.inner
        assert isinstance(solver, Iterate)
        self.tracing, self.inner, self.y = tracing, solver, y
        steps, form = solver.max_steps, estimator.unrolling
        self.back = min(form.steps, steps) if isinstance(form, Truncated) else steps
        self.has_init = tracing.code.problem.init is not None
        like = solver.begin(y.detach().clone())

        def advanced(problem: FlatProblem, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
            """g and grad_y g before a step, and the state after it."""
            value, gradient = value_and_gradient(problem, x, state[0])
            with torch.no_grad():
                return value, gradient, *solver.advance(inner_objective(problem, x), gradient, state, 0)

        def pulled(problem: FlatProblem, x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
            """The derivatives of <T(x, state), adjoint> in x and in the state."""
            state = tuple(each.detach().requires_grad_() for each in given[: len(like)])
            adjoint, x = given[len(like) :], x.detach().requires_grad_()
            gradient = grad(total(problem.g(x, state[0])), state[0], create_graph=True)
            new = solver.advance(inner_objective(problem, x), gradient, state, 0)
            pairs = [(n, a) for n, a in zip(new, adjoint, strict=True) if n.requires_grad]
            ends, weights = zip(*pairs, strict=True)
            found = torch.autograd.grad(ends, (x, *state), weights, allow_unused=True, materialize_grads=True)
            return tuple(found)

        def begun(problem: FlatProblem, x: Tensor, y0: Tensor) -> tuple[Tensor, ...]:
            return solver.begin(problem.start(x, y0).detach().clone())

        def from_start(problem: FlatProblem, x: Tensor, y0: Tensor, *adjoint: Tensor) -> tuple[Tensor, ...]:
            x = x.detach().requires_grad_()
            state = solver.begin(problem.start(x, y0))
            pairs = [(s, a) for s, a in zip(state, adjoint, strict=True) if s.requires_grad]
            if not pairs:
                return (torch.zeros_like(x),)
            ends, weights = zip(*pairs, strict=True)
            return torch.autograd.grad(ends, x, weights, allow_unused=True, materialize_grads=True)

        self.advance, self.pull = tracing.piece(advanced, x, *like), tracing.piece(pulled, x, *like, *like)
        self.begin, self.f = tracing.piece(begun, x, y), tracing.piece(outer, x, y)
        self.from_start = tracing.piece(from_start, x, y, *like) if self.has_init else None
        self.gradient = tracing.piece(value_and_gradient, x, y)

    @property
    def legend(self) -> Legend:
        """How the numbers are read."""
        parts = (("inner solver", tuple(Status[name] for name in inner.ENDS)),)
        return Legend(parts, self.y.shape[:-1].numel(), self.y.dim() > 1)

    def compute(self, x: Tensor, y0: Tensor, guess: Tensor | None) -> Found:
        """h `(p,)`, y, no v, and the numbers about them."""
        steps, back = self.inner.max_steps, self.back
        state = self.begin(x, y0)
        size, rows = len(state), self.y.shape[:-1].numel()
        zero = torch.zeros_like(state[0][..., 0])

        def goes(k: Tensor, *_: Tensor) -> Tensor:
            return k < steps

        def step(carried: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            k, first, value0, _, _, *rest = carried
            state, room = rest[:size], rest[size:]
            value, gradient, *new = self.advance(fixed[0], *state)
            first, value0 = torch.where(k == 0, gradient, first), torch.where(k == 0, value, value0)
            at = (k % back).reshape(1)
            room = [each.index_put((at,), s.unsqueeze(0)) for each, s in zip(room, state, strict=True)]
            return k + 1, first, value0, gradient, value, *new, *room

        room = [s.new_zeros((back, *s.shape)) for s in state]
        none = torch.zeros_like(state[0])
        begun = (count(), none, zero, none, zero, *state, *room)
        k, first, value0, latest, value_of_g, *rest = self.tracing.loop(goes, step, begun, (x,))
        end, kept = rest[:size], rest[size:]
        y = end[0]
        found = Iterated(y, k, k * rows, k, row_norm(first), value0)
        if self.has_init and steps:  # y is what the steps make of their start: the residual before the last one will do
            residual, value_of_g, measured = row_norm(latest), value_of_g + 0.0 * y.sum(-1), 0
        else:
            value_of_g, gradient = self.gradient(x, y)
            residual, measured = row_norm(gradient), 1
        ends = inner.codes(found, residual, value_of_g, 0.0, steps)
        value, fx, fy = self.f(x, y)

        def returns(k: Tensor, *_: Tensor) -> Tensor:
            return k > steps - back

        def pull(carried: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            k, h, *adjoint = carried
            x, states = fixed[0], fixed[1:]
            k = k - 1
            state = [each.index_select(0, (k % back).reshape(1)).squeeze(0) for each in states]
            in_x, *before = self.pull(x, *state, *adjoint)
            return k, h + in_x, *before

        ending = (count() + steps, fx, fy, *(torch.zeros_like(s) for s in end[1:]))
        _, h, *adjoint = self.tracing.loop(returns, pull, ending, (x, *kept))
        if self.from_start is not None and back == steps:
            h = h + self.from_start(x, y0, *adjoint)[0]
        through = steps if self.from_start is not None else max(back - 1, 0)
        nothing = torch.zeros_like(value)
        numbers = {
            "value": value,
            "value_error": nothing,
            "share": nothing,
            "inner_steps": k,
            "linear_steps": nothing,
            "gradients": k + measured,
            "hvps": nothing + through,
            "cross_products": nothing + back,
            "inner_taken": k * rows,
        }
        return h, y, None, numbers, [residual, ends]
