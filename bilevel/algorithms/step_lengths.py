"""Safe step lengths for single loops, from the problem where it is first met."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bilevel._calculus import Exact, outer_gradients
from bilevel._flat import FlatProblem
from bilevel._inner import Objective
from bilevel._linear import LinearOperator
from bilevel._numerics.spectrum import largest_eigenvalue
from bilevel._result import Tally
from bilevel.inner_problems.kinds import inner_objective
from bilevel.named.setting import Setting

# Each of 48 random quadratics, with condition numbers from 1.5 to 1000, was stable up to 0.8 / (sqrt(kappa) L_Phi).
_SAFETY = 4.0
# Of 1 / L of the worst block, for methods that correct one block by what others said before: at 1 / L a block a hundred
# times as curved as the others drives them apart, at half of it it does not; theory has 1/3 (SAGA), 1/2 (SARAH).
REDUCED = 0.5
_OVERSHOOT = 0.1  # of bounds by Lanczos steps, which an estimate of what is below them takes back
_LOOKED = 20  # of the power iteration for the sign of the least curvature of g
_TURNS = 4  # of the power iteration for the curvature of Phi; its size matters, not its digits


def inner_step(s: Setting) -> float:
    """The step rho = 1 / L of y, L the largest eigenvalue of d2g/dy2 at y0, of the batches that are known.

    At the first x, and where x is bounded by boxes at two corners of these: penalties that grow with x make g ever more
    curved. Half of what would diverge on the worst of them.
    """
    largest = 0.0
    for problem in (s.problem, *s.others):
        quiet = problem.with_tally(Tally())
        for x in (s.x, *s.corners):
            found = float(inner_objective(quiet, x).largest_curvature(quiet.start(x, s.y0).detach()).abs().max())
            largest = max(largest, found if math.isfinite(found) else 0.0)
    return 1 / largest if largest > 0 and math.isfinite(largest) else 1.0


def outer_curvature(s: Setting) -> float:
    """The largest curvature of f in y at y0, in absolute value, of the first batch; 0 where it is no number."""
    quiet = s.problem.with_tally(Tally())
    y = quiet.start(s.x, s.y0).detach()
    found = float(Objective(lambda y: quiet.f_each(s.x, y), quiet.tally).largest_curvature(y).abs().max())
    return found if math.isfinite(found) else 0.0


def outer_step(s: Setting, rho: float) -> float:
    """The step gamma = sqrt(rho mu) / (4 L_Phi) of x: y, whose slowest mode loses rho mu a step, can follow.

    mu is the smallest eigenvalue of d2g/dy2 at y*(x0), L_Phi the largest of d2Phi/dx2 in absolute value, by a power
    iteration on differences of hypergradients. A rule of thumb, from quadratics: the theory is content with rho mu in
    the place of its root; and elsewhere the curvatures are those of the start only.

    Cost: an inner and a linear solve and two Lanczos iterations at the start, then four pairs of solves near it.
    """
    quiet = s.problem.with_tally(Tally())
    y0 = quiet.start(s.x, s.y0).detach()
    y, h = hypergradient_at(s, quiet, s.x, y0)
    curvature = 0.0
    length = torch.finfo(s.x.dtype).eps ** 0.25 * float(s.x.abs().max().clamp_min(1.0))
    direction = h if float(torch.linalg.vector_norm(h)) > 0 else torch.ones_like(s.x)
    for _ in range(_TURNS):
        direction = direction / torch.linalg.vector_norm(direction)
        change = (hypergradient_at(s, quiet, s.x + length * direction, y)[1] - h) / length
        size = float(torch.linalg.vector_norm(change))
        if not (math.isfinite(size) and size > 0):
            break
        curvature, direction = max(curvature, size), change
    rate = min(1.0, rho * _smallest(quiet, s.x, y)) ** 0.5
    step: float = rate / (_SAFETY * (curvature if curvature > 0 else 1.0))
    return step


def least_curvature(s: Setting) -> float:
    """mu, an estimate of the smallest eigenvalue of d2g/dy2 at y*(x0); at least a thousandth of the largest."""
    quiet = s.problem.with_tally(Tally())
    y = s.inner().solve(inner_objective(quiet, s.x), quiet.start(s.x, s.y0).detach()).value
    return _smallest(quiet, s.x, y)


def is_convex(s: Setting) -> bool:
    """Whether no negative eigenvalue of H at the start is found, beyond what rounding and the search leave."""
    quiet = s.problem.with_tally(Tally())
    y = quiet.start(s.x, s.y0).detach()
    hessian = inner_objective(quiet, s.x).hessian(y)[2]
    generator = torch.Generator("cpu").manual_seed(0)
    v = torch.randn(y.shape, generator=generator, device="cpu").to(y)
    top = float(inner_objective(quiet, s.x).largest_curvature(y).abs().max())
    if not top > 0:
        return True
    for _ in range(_LOOKED):  # a power iteration on 2 top I - H, positive definite: towards the least eigenvalue
        v = 2 * top * v - hessian.mv(v)
        v = v / torch.linalg.vector_norm(v)
    least = float((v * hessian.mv(v)).sum())
    return least > -1e-3 * top


def hypergradient_at(s: Setting, problem: FlatProblem, x: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
    """y*(x) and grad_x f - G v, accurately: `(*tasks, q)` and `(p,)`."""
    y = s.inner().solve(inner_objective(problem, x), y0).value
    at = Exact().linearize(problem, x, y)
    _, fx, fy = outer_gradients(problem, x, y)
    cross = at.cross(s.linear().solve(at.operator, fy).value)
    return y, fx if cross is None else fx - cross


def _smallest(problem: FlatProblem, x: Tensor, y: Tensor) -> float:
    """An estimate of the smallest eigenvalue of d2g/dy2, of all tasks; at least a thousandth of the largest."""
    hessian = inner_objective(problem, x).hessian(y)[2]
    top = float(largest_eigenvalue(hessian, y).max())
    if not (math.isfinite(top) and top > 0):
        return 1.0
    reflected = LinearOperator(lambda v: top * v - hessian.mv(v), y.shape[-1])
    below = top - (1 - _OVERSHOOT) * largest_eigenvalue(reflected, y, overshoot=_OVERSHOOT)
    return max(float(below.min()), 1e-3 * top)
