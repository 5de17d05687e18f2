"""What solvers of fixed points share: the residual y - T(x, y), what it may be, and how a solve has ended."""

from __future__ import annotations

import math
from typing import Protocol, final

import torch
from torch import Tensor

from bilevel._inner import Objective
from bilevel._numerics.arnoldi import arnoldi
from bilevel._numerics.rows import safe_row_norms
from bilevel._numerics.second_derivatives import explained
from bilevel._result import Solved, Status, first_statuses

_PRODUCTS = 16  # for the spectral radius of dT/dy, where plain iteration gets nowhere
_BETTER = 0.999  # of the least residual
_BACKS = 20  # times, and no more
_DIGITS = 1e-3  # of the first residual, which rounding may be
_BLUR = 1e2  # units of rounding of |y|, below which a residual may stay


def demand_map(solver: str, objective: Objective) -> None:
    """Refuse an inner problem that is no fixed point.

    Raises:
        ValueError: naming the solver, and what to use instead.
    """
    if objective.fixed_point is None:
        raise ValueError(
            f"`{solver}` solves y = T(x, y), and this inner problem is no fixed point. Use `LBFGS()` for a smooth g, or"
            f" `BilevelProblem(f, fixed_point=T)`."
        )


def image_of(objective: Objective, y: Tensor) -> Tensor:
    """T(x, y) without a graph; counted as a gradient, in whose place it stands."""
    assert objective.fixed_point is not None
    objective.tally.gradients += y.shape[:-1].numel()
    with torch.no_grad():
        return objective.fixed_point(y)


def allowed(y: Tensor, tol: float, rtol: float) -> Tensor:
    """What the residual may be: max(tol, rtol |y|), `(*batch,)`."""
    return (rtol * safe_row_norms(y)).clamp_min(tol)


def spectral_radius(objective: Objective, y: Tensor) -> Tensor:
    """That of dT/dy at y, estimated by some products: `(*batch,)`; NaN where it is not finite."""
    assert objective.fixed_point is not None
    rows = y.shape[:-1].numel()
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        image = objective.fixed_point(leaf)

    def mv(w: Tensor) -> Tensor:
        objective.tally.hvps += rows
        if not image.requires_grad:
            return torch.zeros_like(w)
        with explained():
            (found,) = torch.autograd.grad(image, leaf, w, retain_graph=True, allow_unused=True)
        return torch.zeros_like(w) if found is None else found

    return arnoldi(mv, leaf.detach(), _PRODUCTS).radius


def ended(residual: Tensor, limit: Tensor, y: Tensor, first: Tensor, start: Tensor) -> tuple[Status, ...]:
    """How each row ended: met, not finite, grown beyond its start, at the floor of rounding, or out of steps.

    Args:
        residual: at y.
        limit: what it was to be.
        y: where the solve ended.
        first: the residual at the start.
        start: |y| at the start. Where y has grown from there until the rounding of y is no small part of `first`, no
            residual tells anything: it has run away.
    """
    eps = torch.finfo(y.dtype).eps
    finite = residual.isfinite() & y.isfinite().all(-1)
    size = safe_row_norms(y)
    away = (eps * size > _DIGITS * first) & (size > start / _DIGITS)
    return first_statuses(
        (~finite, Status.nonfinite),
        (away, Status.diverged),
        (residual <= limit, Status.successful),
        (residual >= first, Status.diverged),
        (residual <= _BLUR * eps * size, Status.stagnated),
        (residual < math.inf, Status.max_steps),
    )


@final
class Safeguard:
    """The iterate, the best one so far, and which rows are to go back to that.

    Args:
        y: the start.
        image: T there.
        damping: the step.
        far: times the least residual: an iterate to be given up.
        patience: steps without a better one, after which a row begins anew.

    Attributes:
        at: the iterate `(*batch, q)`.
        r: T(at) - at.
        y: the iterate of least residual.
        damping: the step of each row, halved where it went back.
    """

    def __init__(self, y: Tensor, image: Tensor, damping: float, far: float, patience: int) -> None:
        self.far, self.patience = far, patience
        self.at, self.r = y, image - y
        self.y, self.best, self.start = y, self.r, safe_row_norms(y)
        self.least = self.first = safe_row_norms(self.r)
        self.damping = torch.full_like(self.least, damping)
        self.idle = torch.zeros_like(self.least)  # steps since the best one
        self.backs = torch.zeros_like(self.least)

    def moving(self, limit: Tensor) -> Tensor:
        """The rows that are to go on."""
        floor = torch.finfo(self.y.dtype).eps * safe_row_norms(self.y)
        done = (self.least <= limit) | ~self.first.isfinite() | (self.backs > _BACKS)
        return ~done & ((self.idle < self.patience) | (self.least > floor)) & (self.least > 0)

    def told(self, at: Tensor, image: Tensor) -> None:
        """Take the next iterate."""
        self.at, self.r = at, image - at
        size = safe_row_norms(self.r)
        better = size < self.least
        self.y, self.best = (torch.where(better.unsqueeze(-1), a, b) for a, b in ((at, self.y), (self.r, self.best)))
        # An idle count starts anew where the best got better by more than rounding.
        self.idle = torch.where(size < _BETTER * self.least, 0.0, self.idle + 1)
        self.least = torch.where(better, size, self.least)

    def back(self) -> Tensor:
        """The rows whose iterate is to be given up."""
        size = safe_row_norms(self.r)
        return ~(size <= self.far * self.least) | ((self.idle > 0) & (self.idle % self.patience == 0))

    def begin_again(self, rows: Tensor) -> None:
        """From the best iterate, with half the step."""
        self.at, self.r = (torch.where(rows.unsqueeze(-1), a, b) for a, b in ((self.y, self.at), (self.best, self.r)))
        self.damping = torch.where(rows, 0.5 * self.damping, self.damping)
        self.backs = self.backs + rows

    def solved(self, objective: Objective, steps: int, tol: float, rtol: float) -> Solved:
        """The best iterate, its residual by one more T, and how it has ended."""
        residual = safe_row_norms(self.y - image_of(objective, self.y))
        statuses = ended(residual, allowed(self.y, tol, rtol), self.y, self.first, self.start)
        return Solved(self.y, statuses, residual, steps)


class Acceleration(Protocol):
    """What a method makes of the iterates that it has seen; the state of one solve."""

    def told(self, y: Tensor, r: Tensor) -> None:
        """Take an iterate and r = T(y) - y there."""
        ...

    def next(self, y: Tensor, r: Tensor, damping: Tensor) -> Tensor:
        """The next iterate, after `told` of this one; `damping` is `(*batch, 1)`."""
        ...

    def forgotten(self, rows: Tensor, y: Tensor, r: Tensor) -> None:
        """Begin anew in some rows, from y and its residual there."""
        ...


def accelerated(
    objective: Objective, guard: Safeguard, method: Acceleration, tol: float, rtol: float, max_steps: int
) -> Solved:
    """Iterate until all rows meet their tolerance, have given up, or the steps end."""
    step = 0
    for step in range(max_steps + 1):
        moving = guard.moving(allowed(guard.y, tol, rtol))
        if step == max_steps or not bool(moving.any()):
            break
        method.told(guard.at, guard.r)
        if step:
            back = guard.back() & moving
            if bool(back.any()):
                guard.begin_again(back)
                method.forgotten(back, guard.at, guard.r)
        new = method.next(guard.at, guard.r, guard.damping.unsqueeze(-1))
        new = torch.where(moving.unsqueeze(-1), new, guard.at)
        objective.tally.inner_steps += int(moving.sum())
        guard.told(new, image_of(objective, new))
    return guard.solved(objective, step, tol, rtol)
