"""Whether g has a kink at the inner solution, where derivatives of g say nothing of y*(x)."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel._calculus import Exact, grad, total
from bilevel._estimate import AbstractRequiring
from bilevel._flat import FlatProblem
from bilevel._inner import Objective
from bilevel._numerics.graphs import rounding_unit
from bilevel._result import Report, Status, Tally
from bilevel.inner_problems.fixed_point import FixedPoint
from bilevel.inner_problems.kinds import inner_objective, inner_problem
from bilevel.requirements.properties import Property
from bilevel.solvers.lbfgs import LBFGS
from bilevel.solvers.minres import MINRES

SEEN_BY = frozenset(
    {Property.second_derivatives, Property.minimum, Property.valued}
)  # who requires one of them relies on a smooth g

_PART = 0.1  # between one probe and the next nearer one
_UNEVEN = 0.01  # of two slopes: what smooth functions stay below by orders of magnitude, so near to y
_JUMP, _ALIKE = 0.5, 0.9  # a jump keeps its size and its direction as the probes come nearer
_LINEAR = (1 / 3, 3.0)  # what a difference may be of what its share of the span says, where it is a slope after all
_BEND = 0.02  # of the curvature, from one side to the other
_PRODUCTS = 500  # at most, for where y* is predicted to go: what takes more is a network, and the answer no better
_NOISE = 30.0  # times what rounding was seen to do
_OFF = 0.02  # between the derivative of y* and a difference of solutions


def kink_reports(
    estimator: AbstractRequiring, problem: FlatProblem, x: Tensor, y: Tensor, chunk_size: int | None = None
) -> tuple[Report, ...]:
    """A report where g, or the map T of a fixed point, has a kink at the inner solution y that the estimator relies on.

    None is made where all is well, nor where y is what so many steps make of a start and no solution.

    Cost: three gradients of g, for as many tasks at a time as `chunk_size` says; where they raise doubts some more,
    two linear and three inner solves. Nothing is counted: it is asked once, at the first estimate of a run.
    """
    kind = inner_problem(problem.problem)
    if Property.stationary not in kind.offers:
        return ()
    if isinstance(kind, FixedPoint):
        return _kink_of_the_map(problem, x, y) if Property.stationary in estimator.requires else ()
    if not estimator.requires & SEEN_BY or kind.g is None:
        return ()
    if problem.problem.init is not None and Property.stationary not in estimator.requires:
        return ()  # it differentiates steps from a start that is part of the problem
    if problem.tasks is None or chunk_size is None:
        found = kinked(problem, x, y)
    else:
        starts = range(0, problem.tasks, chunk_size)
        parts = [slice(begin, min(begin + chunk_size, problem.tasks)) for begin in starts]
        found = torch.cat([kinked(problem.part(rows), x, y[rows]) for rows in parts])
    if not bool(found.any()):
        return ()
    statuses = tuple(Status.kink if at_kink else Status.successful for at_kink in found.reshape(-1).tolist())
    gradient = inner_objective(problem.with_tally(Tally()), x).gradient(y)
    residual = float(torch.linalg.vector_norm(gradient, dim=-1).max())
    return (Report("smoothness of g", Status.kink, residual, 0, statuses if found.dim() else ()),)


def _kink_of_the_map(problem: FlatProblem, x: Tensor, y: Tensor) -> tuple[Report, ...]:
    """The same of T(x, .): its second difference across y is of order t where a slope jumps there, else of order t^2.

    Cost: five evaluations of T. In float32 nothing is said.
    """
    with torch.no_grad():
        x, problem = problem.with_tally(Tally()).encode(x)
    x, y = x.detach(), y.detach()
    T = inner_objective(problem, x).fixed_point
    if T is None or torch.finfo(y.dtype).eps > 1e-10:
        return ()
    d, length = _direction(y), torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    t = torch.finfo(y.dtype).eps ** 0.4 * (1 + length)
    with torch.no_grad():
        middle = T(y)

        def around(t: Tensor) -> tuple[Tensor, Tensor]:
            right, left = T(y + t * d), T(y - t * d)
            return right - left, right - 2 * middle + left

        (slope, bend), (_, near) = around(t), around(_PART * t)
        doubt = (_norm(bend) > _BEND * _norm(slope)) & (_norm(near) > _JUMP * _PART * _norm(bend)) & _alike(bend, near)
    if not bool(doubt.any()):
        return ()
    statuses = tuple(Status.kink if one else Status.successful for one in doubt.reshape(-1).tolist())
    residual = float(torch.linalg.vector_norm(middle - y, dim=-1).max())
    return (Report("smoothness of T", Status.kink, residual, 0, statuses if doubt.dim() else ()),)


def kinked(problem: FlatProblem, x: Tensor, y: Tensor) -> Tensor:
    """Which of the inner problems have a kink at y that the implicit function theorem does not survive: `(*tasks,)`.

    With G(t) = grad_y g(x, y + t d) along a random direction d, a smooth g has G(t) - G(-t) of order t, and G(t) -
    2 G(0) + G(-t) of order t^2. A kink at y itself (an absolute value, a maximum) keeps the former from vanishing, one
    of the Hessian (a squared hinge, a Huber function at its edge) makes the latter of order t. Kinks elsewhere, however
    near, are passed by as t falls. Where y moves with x along the kink as derivatives say (g of y - x alone), as a
    difference of accurate inner solutions tells, there is nothing wrong with it.

    In float32 only jumps of the gradient are looked for: kinks within reach of its coarse steps may be many and small.

    Under `torch.autocast` steps are those for the coarsest dtype that g is computed in, whatever that of y.

    Cost: a value and three gradients of g, and no more unless these are uneven.
    """
    with torch.no_grad():
        x, problem = problem.with_tally(Tally()).encode(x)
    x, y = x.detach(), y.detach()
    objective, d = inner_objective(problem, x), _direction(y)
    length = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    eps = _unit(objective, y)
    t = eps**0.45 * (1 + length)
    middle, right, left = objective.gradient(y), objective.gradient(y + t * d), objective.gradient(y - _PART * t * d)
    ahead, behind = right - middle, (middle - left) / _PART
    doubt = _norm(ahead - behind) * _PART > _UNEVEN * (_norm(ahead) + _PART * _norm(behind))
    if not bool(doubt.any()):
        return doubt
    nearest = torch.maximum(_PART * t * length / (1 + length), torch.full_like(t, eps**0.8))
    jumps, bends = _probed(objective, y, d, middle, t, nearest)
    smooth = Property.smooth in inner_problem(problem.problem).offers
    suspect = doubt & ((jumps | bends) if smooth and eps < 1e-10 else jumps)
    if smooth and bool(suspect.any()):
        suspect = suspect & ~_moves_as_derivatives_say(problem, x, y, jumps)
    return suspect


def _probed(
    objective: Objective, y: Tensor, d: Tensor, middle: Tensor, t: Tensor, nearest: Tensor
) -> tuple[Tensor, Tensor]:
    """Where the gradient jumps at y, and where the Hessian does."""

    def around(t: Tensor) -> tuple[Tensor, Tensor]:
        right, left = objective.gradient(y + t * d), objective.gradient(y - t * d)
        return right - left, right - 2 * middle + left

    (wide, bend), (near, near_bend), (nearer, _) = around(t), around(_PART * t), around(nearest)
    # Rounding, off any kink at y: a second difference over a span too short for anything else to show.
    off = [objective.gradient(y + (1 + shift) * t * d) for shift in (0.0, 1e-3, 2e-3)]
    noise = _NOISE * _norm(off[0] - 2 * off[1] + off[2])
    (resolved, _) = around(_PART * nearest)
    smooth = (_norm(resolved) > noise) & _alike(resolved, nearer)
    smooth = smooth & _within(_norm(resolved) / (_PART * _norm(nearer)), _LINEAR)
    jumps = ~smooth & (_norm(near) > _JUMP * _norm(wide)) & (_norm(nearer) > _JUMP * _norm(wide)) & _alike(wide, nearer)
    halves = (_norm(near_bend) > _JUMP * _PART * _norm(bend)) & (_norm(bend) > _BEND * _norm(wide))
    halves = halves & (_norm(near_bend) > _BEND * _norm(near)) & _alike(bend, near_bend)
    return jumps & (_norm(nearer) > noise), halves & (_norm(near_bend) > noise)


def _moves_as_derivatives_say(problem: FlatProblem, x: Tensor, y: Tensor, jumps: Tensor) -> Tensor:
    """Whether dy*/dx along a random direction, by derivatives of g, is that of inner solutions on both sides."""
    e = _direction(x)
    eps = torch.finfo(y.dtype).eps
    t = eps**0.25 * (1 + float(torch.linalg.vector_norm(x)))
    try:
        hessian = Exact().linearize(problem, x, y).operator
        with torch.enable_grad():
            leaf, at = x.detach().requires_grad_(), y.detach().requires_grad_()
            along = grad(total(problem.g(leaf, at)), leaf, create_graph=True) @ e
            cross = grad(along, at) if along.requires_grad else torch.zeros_like(y)
    except NotImplementedError:  # no second derivative to say anything: a jump of the gradient is one all the same
        return ~jumps
    most = min(10 * y.shape[-1], _PRODUCTS)
    predicted = -MINRES(rtol=1e-8 if eps < 1e-10 else 1e-4, max_steps=most).solve(hessian, cross).value
    solver = LBFGS(tol=0.0, max_steps=100)
    here = solver.solve(inner_objective(problem, x), y).value
    said = torch.ones_like(jumps)
    for sign in (1.0, -1.0):
        moved = solver.solve(inner_objective(problem, x + sign * t * e), here + sign * t * predicted).value
        measured = (moved - here) / (sign * t)
        size = torch.maximum(_norm(predicted), _norm(measured)) + eps**0.25 * (1 + _norm(y))
        said = said & (_norm(measured - predicted) <= _OFF * size)
    return said


def _direction(like: Tensor) -> Tensor:
    """A unit vector for each row, the same on every device and in every call."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    d = torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu").to(like)
    unit: Tensor = d / torch.linalg.vector_norm(d, dim=-1, keepdim=True)
    return unit


def _unit(objective: Objective, y: Tensor) -> float:
    """The rounding unit of what g is really computed in."""
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        value = total(objective.function(leaf))
    return rounding_unit(value, leaf) if value.requires_grad else torch.finfo(y.dtype).eps


def _within(a: Tensor, ends: tuple[float, float]) -> Tensor:
    found: Tensor = (a > ends[0]) & (a < ends[1])
    return found


def _norm(a: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(a, dim=-1)
    return found


def _alike(a: Tensor, b: Tensor) -> Tensor:
    """Whether two vectors point the same way."""
    found: Tensor = (a * b).sum(-1) >= _ALIKE * _norm(a) * _norm(b)
    return found
