"""The implicit estimate as one computation: inner steps, linear solve, cross product."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from bilevel._calculus import grad, total
from bilevel._flat import FlatProblem
from bilevel._numerics.krylov import _STATUS as OF_RUNS
from bilevel._result import Status
from bilevel.compiled import inner, neumann as series
from bilevel.compiled.conjugate import System, conjugate
from bilevel.compiled.inner import Iteration
from bilevel.compiled.norms import row_norm
from bilevel.compiled.outer import Found, outer
from bilevel.compiled.packed import Legend
from bilevel.compiled.tracing import Tracing
from bilevel.hypergrad.aid import AID
from bilevel.requirements.properties import START_ONLY, DoesNotApply
from bilevel.solvers.cg import CG
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.neumann import Neumann


@final
class Implicit:
    """AID with `Iterate`, and CG or the Neumann series.

    Args:
        tracing: the computation.
        estimator: which.
        x: an example.
        y: an example `(*tasks, q)`, one row for each task.
    """

    def __init__(self, tracing: Tracing, estimator: AID, x: Tensor, y: Tensor) -> None:
        assert isinstance(estimator.inner, Iterate)
        self.tracing, self.estimator, self.inner = tracing, estimator, estimator.inner
        self.y = y
        damping = estimator.damping

        def joint(problem: FlatProblem, x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            """g, grad_y g; (H + damping) v and G v."""
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            value = problem.g(x, y)
            gradient = grad(total(value), y, create_graph=True)
            hv: Tensor | None = None
            gv: Tensor | None = None
            if gradient.requires_grad:
                hv, gv = torch.autograd.grad(gradient, (y, x), v, allow_unused=True)
            if gv is None and problem.problem.init is not None:
                raise DoesNotApply(START_ONLY)
            hv = torch.zeros_like(v) if hv is None else hv
            gv = torch.zeros_like(x) if gv is None else gv
            return value.detach().clone(), gradient.detach().clone(), hv + damping * v, gv

        self.linearize, self.mv, self.both = tracing.split(joint, 2, x, y, y)
        self.iteration = Iteration(tracing, estimator.inner, x, y)
        self.begin, self.f = tracing.piece(inner.start, x, y), tracing.piece(outer, x, y)

    @property
    def legend(self) -> Legend:
        """How the numbers are read."""
        linear = OF_RUNS if isinstance(self.estimator.linear, CG) else tuple(Status[name] for name in series.ENDS)
        parts = (("inner solver", tuple(Status[name] for name in inner.ENDS)), ("linear solver", linear))
        damping = self.estimator.damping
        other = f"damping {damping:.3g}" if damping else ""
        return Legend(parts, self.y.shape[:-1].numel(), self.y.dim() > 1, other)

    def compute(self, x: Tensor, y0: Tensor, guess: Tensor | None) -> Found:
        """h `(p,)`, y, v, and the numbers about them."""
        estimator, solver = self.estimator, self.inner
        found = self.iteration.run(x, self.begin(x, y0)[0])
        y = found.y
        value_of_g, gradient, *kept = self.linearize(x, y)
        residual = row_norm(gradient)
        ends = inner.codes(found, residual, value_of_g, solver.tol or 0.0, solver.max_steps)
        value, fx, fy = self.f(x, y)
        system = System(self.mv, self.both, tuple(kept), fy, guess, torch.zeros_like(x))
        linear = estimator.linear
        if isinstance(linear, CG):
            solved = conjugate(self.tracing, linear, system)
        else:
            assert isinstance(linear, Neumann)
            solved = series.neumann(self.tracing, linear, system)
        v, size = solved.v, row_norm(fy)
        left = solved.residual + estimator.damping * row_norm(v)
        share = torch.where((left == 0) & (size == 0), torch.zeros_like(left), left / size)
        numbers = {
            "value": value,
            "value_error": (row_norm(v) * residual).sum(),
            "share": share.max(),
            "inner_steps": found.steps,
            "linear_steps": solved.steps,
            "gradients": found.gradients + 1,
            "hvps": solved.products,
            "cross_products": solved.crosses,
            "inner_taken": found.taken,
        }
        return fx - solved.cross, y, v, numbers, [residual, ends, solved.residual, solved.code]
