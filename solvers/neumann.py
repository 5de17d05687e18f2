"""The Neumann series, which is Richardson's iteration."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._linear import (
    ANY,
    POSITIVE_DEFINITE,
    SYMMETRIC,
    AbstractLinearSolver,
    LinearOperator,
    OperatorProperties,
    demand,
    unknown_error,
)
from bilevel._numerics.rows import safe_row_norms
from bilevel._numerics.spectrum import largest_eigenvalue
from bilevel._result import Solved, Status
from bilevel._validate import demand_types
from bilevel.bounds.iterations import neumann
from bilevel.certificates.certificate import Constants

_GROWTH = 10.0  # a residual that grew so much where it cannot grow is a divergence


@final
@dataclass(frozen=True)
class Neumann(AbstractLinearSolver):
    """Neumann: step sum_{k < terms} (I - step A)^k b, the iterates v <- v + step (b - A v) from zero or a guess.

    Exactly, A^-1 b - v = (I - step A)^terms (A^-1 b - guess), and the residual is (I - step A)^terms times that of
    the guess. Converges if the eigenvalues of I - step A are less than 1 in modulus: for A symmetric positive
    definite, if 0 < step < 2 / L with L its largest eigenvalue.

    Cost: `terms` - 1 products from zero, `terms` from a guess, and one for the true residual; `step=None` adds
    those of an estimate of L, about 14. Memory 5n.

    A residual that grows, which those of a symmetric A cannot for a safe step, is reported as `Status.diverged`,
    with the iterate of least residual.

    Source: Lorraine, Vicol, Duvenaud, "Optimizing millions of hyperparameters by implicit differentiation",
    AISTATS 2020, algorithm 3.

    Args:
        step: the step length; None is 1 / L with an upper bound of L that is estimated for each system.
        terms: the number of terms.
        rtol: stop earlier when |b - A v| <= rtol |b|; 0 takes all the terms.

    Raises:
        ValueError: if the step is not positive, `terms` less than 1 or `rtol` negative, or if there is no step and
            the operator is not declared symmetric.

    Example:
        >>> A = LinearOperator(lambda v: 0.5 * v, size=1, positive_definite=True)
        >>> Neumann(step=1.0, terms=3).solve(A, torch.ones(1)).value
        tensor([1.7500])
    """

    step: float | None
    terms: int
    rtol: float = 0.0

    def __post_init__(self) -> None:
        demand_types(self)
        if self.step is not None and not 0 < self.step < math.inf:
            raise ValueError(
                f"`Neumann(step=...)` must be positive and finite. Got {self.step}. Pass None to have it estimated."
            )
        if self.terms < 1:
            raise ValueError(f"`Neumann(terms=...)` must be at least 1. Got {self.terms}.")
        if not self.rtol >= 0:
            raise ValueError(f"`Neumann(rtol=...)` must be at least 0. Got {self.rtol}. Pass 0 to take all the terms.")

    @property
    def demands(self) -> OperatorProperties:
        return ANY if self.step is not None else POSITIVE_DEFINITE

    def solve(self, operator: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Solved:
        norm_b = safe_row_norms(b)
        zero = norm_b == 0
        step, refusals = self._steps(operator, b, zero)
        target = self.rtol * norm_b
        v, r = torch.zeros_like(b), b
        if guess is not None:
            v = torch.where(zero.unsqueeze(-1), v, guess)
            r = torch.where(zero.unsqueeze(-1), b, b - operator.mv(v))
        norm = safe_row_norms(r)
        # Growth below the floor is rounding. Where A is not symmetric, a residual may grow for a while.
        symmetric = operator.symmetric or operator.positive_definite
        floor = torch.maximum(norm, norm_b) * (math.sqrt(torch.finfo(b.dtype).eps) if symmetric else 1e3)
        limit = torch.maximum(norm, floor)
        run = _run_one if b.dim() == 1 else _run_batch
        v, best, diverged, steps = run(operator, b, v, r, norm, step, target, floor, self.terms)

        v = torch.where(diverged.unsqueeze(-1), best, v)
        residual = safe_row_norms(operator.residual(b, v))
        late = ~diverged & (residual > 1.01 * limit)
        if bool(late.any()):  # the last step took it above where it began
            v, diverged = torch.where(late.unsqueeze(-1), best, v), diverged | late
            residual = safe_row_norms(operator.residual(b, v))
        ends = zip(refusals, residual.reshape(-1).tolist(), target.reshape(-1).tolist(), strict=True)
        statuses = tuple(
            _status(refusal, residual, target, lost)
            for (refusal, residual, target), lost in zip(ends, diverged.reshape(-1).tolist(), strict=True)
        )
        return Solved(v, statuses, residual, steps)

    def with_tolerance(self, tol: float, size: float, trusting: bool = False) -> Neumann:
        return replace(self, rtol=tol / size if size > 0 else 0.0)

    def relative_error(self, constants: Constants, damping: float) -> float:
        if self.step is None:
            raise unknown_error(self)
        return max(self.rtol, neumann(constants, step=self.step, terms=self.terms, damping=damping))

    def _steps(self, operator: LinearOperator, b: Tensor, zero: Tensor) -> tuple[Tensor, list[Status]]:
        """The step of each row, zero where there is none, and why."""
        if self.step is not None:
            return torch.full_like(zero, self.step, dtype=b.dtype), [Status.successful] * zero.numel()
        demand(operator, "Neumann(step=None)", SYMMETRIC)
        largest = largest_eigenvalue(operator, b)
        refusals = [
            Status.successful
            if none or top > 0
            else Status.breakdown
            if top == 0
            else Status.negative_curvature
            if top < 0
            else Status.nonfinite
            for top, none in zip(largest.reshape(-1).tolist(), zero.reshape(-1).tolist(), strict=True)
        ]
        return torch.where(largest > 0, 1 / largest, torch.zeros_like(largest)), refusals


def _run_one(
    operator: LinearOperator,
    b: Tensor,
    v: Tensor,
    r: Tensor,
    norm: Tensor,
    step: Tensor,
    target: Tensor,
    floor: Tensor,
    terms: int,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """One system: Python floats, so that little beside the products costs time."""
    alpha, stop, least_limit, size = float(step), float(target), float(floor), float(norm)
    least, best, steps, diverged = size, v, 0, False
    while steps < terms and alpha > 0:
        if steps:
            r = b - operator.mv(v)
            size = float(safe_row_norms(r))  # which scales, and neither overflows nor underflows
            diverged = size > _GROWTH * max(least, least_limit)
            if size < least:
                least, best = size, v
        if diverged or not stop < size < math.inf:
            break
        v = torch.add(v, r, alpha=alpha)
        steps += 1
    return v, best, torch.full_like(norm, diverged, dtype=torch.bool), steps


def _run_batch(
    operator: LinearOperator,
    b: Tensor,
    v: Tensor,
    r: Tensor,
    norm: Tensor,
    step: Tensor,
    target: Tensor,
    floor: Tensor,
    terms: int,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Independent systems side by side: rows that ended stand still."""
    least, best = norm, v
    active = (norm > target) & (step > 0) & norm.isfinite()
    diverged, steps = torch.zeros_like(active), 0
    while steps < terms and bool(active.any()):
        if steps:
            r = b - operator.mv(v)
            norm = safe_row_norms(r)
            diverged |= active & (norm > _GROWTH * torch.maximum(least, floor))
            better = active & (norm < least)
            least, best = torch.where(better, norm, least), torch.where(better.unsqueeze(-1), v, best)
            # A residual of zero stays zero: without a tolerance only the steps end the iteration.
            active = active & ~diverged & (norm > target) & norm.isfinite()
            if not bool(active.any()):
                break
        v = torch.where(active.unsqueeze(-1), v + step.unsqueeze(-1) * r, v)
        steps += 1
    return v, best, diverged, steps


def _status(refusal: Status, residual: float, target: float, diverged: bool) -> Status:
    if not math.isfinite(residual):
        return Status.nonfinite
    if diverged:
        return Status.diverged
    return Status.max_steps if refusal.ok and residual > target > 0 else refusal
