"""Derivatives through an inner iteration: reverse mode over segments of steps, and forward mode."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import TypeAlias, final

import torch
from torch import Tensor

from bilevel._calculus import grad, inner_gradient_in_x
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractUnrollable, State
from bilevel._numerics.second_derivatives import explained, refuse_dropped_terms
from bilevel._result import Report, Solved, Status

_GROWTH = 10.0  # a gradient this many times larger than at the start, at a larger objective, is a divergence
_LEFT = 1e-2  # the part of the derivative that an iteration with a tolerance may lack

Segment: TypeAlias = Callable[[], tuple[State, State, int]]  # () -> its first state (leaves), its last, its steps


@final
class Unroll:
    """The iteration state_{k+1} = T(x, state_k) of an inner solver, as a differentiable map.

    Args:
        problem: the problem, at whose tally oracle calls are counted.
        inner: the iteration, its step sizes fixed.
        x: the outer variable `(p,)`, a leaf that requires grad.
        start: where the iteration starts `(*tasks, q)`, with its graph from x.
    """

    def __init__(self, problem: FlatProblem, inner: AbstractUnrollable, x: Tensor, start: Tensor) -> None:
        self.problem, self.inner = problem, inner
        self.x, self.start = x, start
        self.y0 = start.detach()
        self.rows = start.shape[:-1].numel()
        self.steps = 0
        self.left = 0.0
        self.first: tuple[Tensor, Tensor] | None = None  # grad_y g and g at the start
        self.last: tuple[Tensor, Tensor] | None = None  # the same before the latest step
        self.is_differentiable = False  # known so far

    @property
    def has_init(self) -> bool:
        """Whether the start depends on x."""
        return self.problem.problem.init is not None

    @property
    def checked(self) -> bool:
        """Whether the iteration is to converge, and its derivative with it."""
        return bool(self.inner.tol) and not self.has_init and not self.problem.problem.iterative

    # One step

    def step(self, state: State, index: int, with_graph: bool) -> State | None:
        """T(x, state), step number `index`; None if every row has met the tolerance. Rows that have stand still."""
        y = state[0]
        self.problem.tally.gradients += self.rows
        with torch.set_grad_enabled(True):
            at = y if y.requires_grad else y.detach().requires_grad_()
            value = self.problem.g(self.x if with_graph else self.x.detach(), at)
            if with_graph and not self.is_differentiable:
                refuse_dropped_terms(value, at)
                self.is_differentiable = True  # the steps that follow are the same function
            gradient = grad(value.sum(), at, create_graph=with_graph, checked=True)
        self.last = gradient.detach(), value.detach()
        if self.first is None:
            self.first = self.last
        if not self.inner.tol:
            with torch.set_grad_enabled(with_graph):
                return self.inner.advance(gradient, state)
        moving = self._moving(torch.linalg.vector_norm(self.last[0], dim=-1), index)
        if not moving.any():
            return None
        with torch.set_grad_enabled(with_graph):
            new = self.inner.advance(gradient, state)
        if self.problem.tasks is None:
            return new
        held = moving.unsqueeze(-1)
        return tuple(torch.where(held, n, s) if n.shape == y.shape else n for n, s in zip(new, state, strict=True))

    def _moving(self, norm: Tensor, index: int) -> Tensor:
        """The rows that take step number `index`: those above the tolerance, or all of them at first."""
        return (norm > (self.inner.tol or 0.0)) | ((index < self.inner.min_steps) & norm.isfinite())

    def walk(self, visit: Callable[[int, State], None], stop: int) -> State:
        """Steps without a graph up to `stop`; `visit(k, state)` sees the state before step k."""
        with torch.no_grad():
            state = self.inner.begin(self.y0)
        while self.steps < stop:
            new = self.step(state, self.steps, with_graph=False)
            if new is None:
                break
            visit(self.steps, state)
            state, self.steps = new, self.steps + 1
        return state

    def live(self, state: State, index: int, length: int) -> tuple[State, State, int]:
        """Up to `length` steps with a graph, from leaves that hold `state`, which is that before step `index`."""
        leaves = tuple(s.detach().requires_grad_() for s in state)
        with torch.enable_grad():
            end, taken = leaves, 0
            while taken < length:
                new = self.step(end, index + taken, with_graph=True)
                if new is None:
                    break
                end, taken = new, taken + 1
        return leaves, end, taken

    # Reverse mode: its forms differ only in how the steps are cut into segments

    def whole(self) -> Tensor:
        """y_N with its graph from x, through all steps and the start: one segment, of which f can be the end."""
        with torch.enable_grad():
            state = self.inner.begin(self.start)
            while self.steps < self.inner.max_steps:
                new = self.step(state, self.steps, with_graph=True)
                if new is None:
                    break
                state, self.steps = new, self.steps + 1
        constant = 0 if self.has_init else 1  # nothing is pulled back to the start then
        self.problem.tally.hvps += max(self.steps - constant, 0) * self.rows
        self.problem.tally.cross_products += self.steps * self.rows
        return state[0]

    def segments(self, truncate: int | None, every: int | None) -> tuple[Tensor, list[Segment], bool]:
        """y_N, the segments to pull back through, and whether the first of them begins at the start.

        Args:
            truncate: only the last so many steps.
            every: keep every so-manieth state and recompute the steps between.
        """
        total = self.inner.max_steps
        if every is not None:
            kept: list[State] = []
            last = self.walk(lambda k, state: kept.append(state) if k % every == 0 else None, total)
            between: dict[int, State] = {}

            def one(k: int) -> tuple[State, State, int]:
                if k not in between:
                    between.clear()
                    at, state = k - k % every, kept[k // every]
                    between[at] = state
                    while at < k:
                        following = self.step(state, at, with_graph=False)
                        assert following is not None
                        at, state = at + 1, following
                        between[at] = state
                return self.live(between.pop(k), k, 1)

            return last[0], [lambda k=k: one(k) for k in range(self.steps)], True  # type: ignore[misc]
        if truncate is not None and self.inner.tol:  # how many steps there are is not known before
            recent: deque[State] = deque(maxlen=truncate)
            last = self.walk(lambda _, state: recent.append(state), total)
            begun = self.steps - len(recent)
            return last[0], [lambda: self.live(recent[0], begun, len(recent))] if recent else [], begun == 0
        before = 0 if truncate is None else max(total - truncate, 0)
        state = self.walk(lambda *_: None, before)
        segment = self.live(state, before, total - before)
        self.steps += segment[2]
        return segment[1][0].detach(), [lambda: segment], before == 0

    def reverse(self, segments: list[Segment], from_start: bool, fy: Tensor) -> Tensor:
        """J_N' fy `(p,)`, J_N = dy_N/dx: adjoints pulled back through the segments, and through init(x).

        With a tolerance, what reaches the start, (dy_N/dy_0)' fy, is measured: see `carried`.
        """
        total = torch.zeros_like(self.x)
        adjoint: tuple[Tensor | None, ...] = (fy,)
        for index in reversed(range(len(segments))):
            leaves, end, length = segments[index]()
            through = index > 0 or (from_start and (self.has_init or self.checked))
            in_x, *in_state = self._pull_back(end, adjoint, (self.x, *leaves) if through else (self.x,))
            del end
            total = total if in_x is None else total + in_x
            adjoint = tuple(in_state)
            self.problem.tally.hvps += max(length - (0 if through else 1), 0) * self.rows
            self.problem.tally.cross_products += length * self.rows
        if from_start and self.checked and adjoint[0] is not None:
            whole = torch.linalg.vector_norm(fy)
            self.left = float(torch.linalg.vector_norm(adjoint[0]) / whole) if whole > 0 else 0.0
        if from_start and self.has_init:
            with torch.enable_grad():
                begun = self.inner.begin(self.start)
            in_x = self._pull_back(begun, adjoint, (self.x,))[0]
            total = total if in_x is None else total + in_x
        return total

    @staticmethod
    def _pull_back(
        end: State, adjoint: tuple[Tensor | None, ...], inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        pairs = [(e, a) for e, a in zip(end, adjoint, strict=False) if a is not None and e.requires_grad]
        if not pairs:
            return tuple(None for _ in inputs)
        outputs, weights = zip(*pairs, strict=True)
        with explained():
            return torch.autograd.grad(outputs, inputs, weights, allow_unused=True)

    # Forward mode

    def forward(self) -> tuple[Tensor, Tensor]:
        """y_N and J_N' as `(p, *tasks, q)`: the tangents of the state for each outer variable, carried along."""
        p = self.x.shape[-1]
        units = torch.eye(p, dtype=self.x.dtype, device=self.x.device)
        start = self.start
        tangents = torch.stack([self._init_tangent(start, unit) for unit in units])
        start = start.detach()
        first: float | None = None  # |d2g/dxdy|, that is the size of H Z + G' at Z = 0
        state, moved = self._push(lambda y: self.inner.begin(y), (start,), (tangents,))
        while self.steps < self.inner.max_steps:
            self.problem.tally.gradients += self.rows
            with torch.enable_grad():
                y = state[0].requires_grad_()
                value = self.problem.g(self.x, y)
                gx, gy = self._both(value.sum(), y)
            norm = torch.linalg.vector_norm(gy.detach(), dim=-1)
            if self.first is None:
                self.first = gy.detach(), value.detach()
                refuse_dropped_terms(value.sum(), y)
            moving = self._moving(norm, self.steps)
            ended = bool(self.inner.tol) and not moving.any()
            if ended and not self.checked:
                break
            d_gradient = torch.stack(
                [self._gradient_tangent(gx, gy, y, u, z) for u, z in zip(units, moved[0], strict=True)]
            )
            residual = float(torch.linalg.vector_norm(d_gradient))
            first = residual if first is None else first
            if ended:
                self.left = residual / first if first > 0 else 0.0
                break
            state = tuple(s.detach() for s in state)
            new, new_moved = self._push(
                lambda gradient, *s: self.inner.advance(gradient, s), (gy.detach(), *state), (d_gradient, *moved)
            )
            if self.inner.tol and self.problem.tasks is not None:
                held, shape = moving.unsqueeze(-1), state[0].shape
                new_moved = tuple(
                    torch.where(held, n, m) if s.shape == shape else n
                    for n, m, s in zip(new_moved, moved, state, strict=True)
                )
                new = tuple(torch.where(held, n, s) if n.shape == shape else n for n, s in zip(new, state, strict=True))
            state, moved, self.steps = new, new_moved, self.steps + 1
        return state[0].detach(), moved[0]

    def _both(self, value: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """grad_x and grad_y of g with their graph."""
        with explained():
            gx, gy = torch.autograd.grad(
                value, (self.x, y), create_graph=True, allow_unused=True, materialize_grads=True
            )
        return gx, gy

    def _gradient_tangent(self, gx: Tensor, gy: Tensor, y: Tensor, u: Tensor, z: Tensor) -> Tensor:
        """H z + G'u, the derivative of grad_y g along (u, z): one backward pass, since H is symmetric."""
        self.problem.tally.hvps += self.rows
        self.problem.tally.cross_products += self.rows
        pairs = [(part, w) for part, w in ((gx, u), (gy, z)) if part.requires_grad]
        if not pairs:
            return torch.zeros_like(z)
        outputs, weights = zip(*pairs, strict=True)
        with explained():
            return torch.autograd.grad(
                outputs, y, weights, retain_graph=True, allow_unused=True, materialize_grads=True
            )[0]

    def _init_tangent(self, start: Tensor, unit: Tensor) -> Tensor:
        """The derivative of init(x) along a unit vector, as the derivative of its vector-Jacobian product."""
        if not start.requires_grad:
            return torch.zeros_like(start)
        w = torch.zeros_like(start, requires_grad=True)
        with torch.enable_grad():
            pulled = torch.autograd.grad(start, self.x, w, create_graph=True, allow_unused=True)[0]
            if pulled is None or not pulled.requires_grad:
                return torch.zeros_like(start)
            return torch.autograd.grad(pulled @ unit, w, retain_graph=True)[0]

    @staticmethod
    def _push(
        function: Callable[..., State], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
    ) -> tuple[State, State]:
        """function(primals) and its derivatives along p tangents stacked in front.

        J t is the derivative of w -> J'w along t: two reverse passes over elementwise arithmetic. Torch's own
        forward mode loads its rules with TorchScript, which takes a second and warns of its deprecation.
        """
        with torch.enable_grad():
            leaves = tuple(primal.detach().requires_grad_() for primal in primals)
            value = function(*leaves)
            weights = tuple(torch.zeros_like(v, requires_grad=True) for v in value)
            live = [(v, w) for v, w in zip(value, weights, strict=True) if v.requires_grad]
            outputs, cotangents = zip(*live, strict=True)
            pulled = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True, allow_unused=True)
            along = [(g, t) for g, t in zip(pulled, tangents, strict=True) if g is not None and g.requires_grad]
            sources, directions = zip(*along, strict=True)
            moved = torch.autograd.grad(sources, weights, directions, is_grads_batched=True, allow_unused=True)
        zeros = (tangents[0].new_zeros(len(tangents[0]), *v.shape) for v in value)
        return (
            tuple(v.detach() for v in value),
            tuple(z if m is None else m for m, z in zip(moved, zeros, strict=True)),
        )

    # How it went

    def carried(self) -> Report | None:
        """Whether the steps were enough for the derivative; None where they are not to converge.

        In reverse mode |(dy_N/dy_0)' grad_y f| / |grad_y f| is what they lack, in forward mode |H dy_N/dx + G'| / |G'|.
        """
        if not self.checked:
            return None
        depends = self.left <= _LEFT or inner_gradient_in_x(self.problem, self.x, self.y0) is not None
        status = Status.truncated if self.left > _LEFT and depends else Status.successful
        return Report("unrolled derivative", status, self.left, self.steps)

    def solved(self, y: Tensor) -> Solved:
        """The verdict on y_N: its own gradient norm (one more gradient), and divergence if there was any.

        Where the start depends on x and there is no tolerance, y is not to solve anything (MAML): the gradient before
        the last step, which is at hand, has to do.
        """
        self.problem.tally.inner_steps += self.steps * self.rows
        if self.has_init and not self.inner.tol and self.last is not None:
            gradient, value = self.last
            value = value + 0.0 * y.sum(-1)  # not finite where y is not
        else:
            self.problem.tally.gradients += self.rows
            with torch.enable_grad():
                leaf = y.detach().requires_grad_()
                value = self.problem.g(self.x.detach(), leaf)
                gradient = grad(value.sum(), leaf)
        tol, residual = self.inner.tol or 0.0, torch.linalg.vector_norm(gradient, dim=-1)
        columns, (first_gradient, first_value) = [residual, value.detach()], self.first or (gradient, value)
        if first_gradient is not gradient:
            columns += [torch.linalg.vector_norm(first_gradient, dim=-1), first_value]
        table = torch.stack(columns).reshape(len(columns), -1).tolist()
        r, g, r0, g0 = table if len(table) == 4 else table * 2
        statuses = tuple(_status(*row, tol) for row in zip(r, g, r0, g0, strict=True))
        return Solved(y, statuses, residual, self.steps)


def _status(r: float, g: float, r0: float, g0: float, tol: float) -> Status:
    """How a row ended: from |grad_y g| and g at the end and at the start."""
    if not (math.isfinite(r) and math.isfinite(g)):
        return Status.nonfinite
    if tol and r <= tol:
        return Status.successful
    if r > _GROWTH * r0 and not g <= g0:
        return Status.diverged
    return Status.max_steps if tol else Status.successful
