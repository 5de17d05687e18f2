"""Safe defaults: solvers and their tolerances, from the problem where it is first met."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import outer_gradients
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver, Objective
from bilevel._result import Tally
from bilevel.inner_problems.kinds import inner_objective

MOST_STEPS = 5000  # of an unrolled iteration


@final
@dataclass(frozen=True, eq=False)
class Setting:
    """What safe defaults are derived from: the problem at the point where it is first met."""

    problem: FlatProblem
    x: Tensor
    y0: Tensor

    @property
    def double(self) -> bool:
        """Whether the computation is in float64."""
        return self.y0.dtype == torch.float64

    def inner_tol(self) -> float:
        """A gradient norm that counts as zero: relative to the gradient at y0, or to L |y0| if that is larger.

        A warm start makes the first gradient of later solves small, so that this is fixed where the problem is
        first met. It is 1e-9 of the scale in float64 and 1e-4 of it in float32. Where y0 = 0 happens to be the
        solution, the scale is what the gradient becomes as x moves.
        """
        quiet = self.problem.with_tally(Tally())
        objective = inner_objective(quiet, self.x)
        y0 = self.problem.start(self.x, self.y0).detach()
        gradient = objective.gradient(y0)
        scale = torch.linalg.vector_norm(gradient, dim=-1)
        if bool((y0 != 0).any()):
            scale = scale.maximum(objective.largest_curvature(y0).abs() * torch.linalg.vector_norm(y0, dim=-1))
        root = torch.finfo(y0.dtype).eps ** 0.5
        signs = torch.randint(0, 2, self.x.shape, generator=torch.Generator().manual_seed(0)).to(self.x) * 2 - 1
        reach = self.x.abs().max().clamp_min(1.0)
        moved = inner_objective(quiet, self.x + root * reach * signs).gradient(y0)
        response = torch.linalg.vector_norm(moved - gradient, dim=-1).max() / root
        largest = response if bool(scale.max() <= root * response) else scale.max()
        tol = (1e-9 if self.double else 1e-4) * float(largest)
        tiny = torch.finfo(self.y0.dtype).tiny
        return max(tol, tiny) if math.isfinite(tol) else tiny  # what is not finite is reported by the solver

    def derivative_steps(self) -> int:
        """How many steps of gradient descent the derivative of its iterates needs, wherever y starts.

        That is the k with |(I - H / L)^k grad_y f| <= 1e-7 |grad_y f| (float32: 1e-3), found by taking them at y*(x).
        """
        quiet = self.problem.with_tally(Tally())
        objective = inner_objective(quiet, self.x)
        y0 = self.problem.start(self.x, self.y0).detach()
        if self.problem.problem.init is not None:
            return 0
        y = default_inner(self).solve(objective, y0).value
        left = outer_gradients(quiet, self.x, y)[2]
        hessian = objective.hessian(y)[2]
        step = 1 / objective.largest_curvature(y).clamp_min(torch.finfo(y.dtype).tiny).unsqueeze(-1)
        target = (1e-7 if self.double else 1e-3) * torch.linalg.vector_norm(left)
        for k in range(MOST_STEPS):
            if not torch.linalg.vector_norm(left) > target:
                return k
            left = left - step * hessian.mv(left)
        return MOST_STEPS

    def penalty_weight(self) -> float:
        """A weight that makes g dominate f: a multiple of the ratio of their largest curvatures in y."""
        quiet = self.problem.with_tally(Tally())
        y0 = self.problem.start(self.x, self.y0).detach()
        objectives = (Objective(lambda y: quiet.g(self.x, y)), Objective(lambda y: quiet.f_each(self.x, y)))
        top_g, top_f = (float(objective.largest_curvature(y0).abs().max()) for objective in objectives)
        ratio = top_f / top_g if top_f > 0 and top_g > 0 else 1.0
        if top_f == 0:  # f is linear in y: the shift of y is |grad f| / (weight mu), compared with |y| or 1
            _, _, fy = outer_gradients(quiet, self.x, y0)
            ratio = float(torch.linalg.vector_norm(fy)) / (top_g or 1.0)
        ratio = ratio if math.isfinite(ratio) else 1.0
        return (1e4 if self.double else 1e2) * max(ratio, torch.finfo(self.y0.dtype).tiny)


def default_inner(s: Setting) -> AbstractInnerSolver:
    """The inner solver behind names whose estimator takes any: accurate L-BFGS; one that heeds constraints on y."""
    from bilevel.solvers.lbfgs import LBFGS
    from bilevel.solvers.quadratic_program import QuadraticProgram

    if s.problem.problem.constraints is not None:
        return QuadraticProgram()
    return LBFGS(tol=s.inner_tol(), max_steps=1000)


def default_unrolled(s: Setting, min_steps: int = 0) -> AbstractInnerSolver:
    """Gradient descent until y is as accurate as an unrolled derivative needs it, for names that differentiate it."""
    from bilevel.solvers.gradient_descent import GradientDescent
    from bilevel.solvers.iterate import Iterate

    if s.problem.problem.constraints is not None:
        return default_inner(s)
    if s.problem.problem.init is not None:  # the number of steps is part of the problem: adaptation, not convergence
        return Iterate(GradientDescent(), max_steps=10)
    tol = s.inner_tol() * (1e2 if s.double else 10)
    return Iterate(GradientDescent(), max_steps=MOST_STEPS, tol=tol, min_steps=min_steps)
