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
from bilevel._numerics.krylov import relative
from bilevel._numerics.rows import safe_row_norms
from bilevel._numerics.side_by_side import systems_of
from bilevel._numerics.spectrum import largest_eigenvalue
from bilevel._result import Solved, Status, first_statuses
from bilevel._validate import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, BELOW_1, POSITIVE, demand_ranges
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
    those of an estimate of L, about 14. Memory 4n.

    Where the owner of A has estimated that the spectral radius of I - A is not below 1 (`LinearOperator.contraction`),
    with `step=1.0` the series diverges: no term is taken, v stays where it was, and the status is `Status.expanding`.

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
        hints = {"step": "Pass None to have it estimated.", "rtol": "Pass 0 to take all the terms."}
        demand_ranges(self, hints, step=POSITIVE, terms=AT_LEAST_1, rtol=BELOW_1)

    @property
    def demands(self) -> OperatorProperties:
        return ANY if self.step is not None else POSITIVE_DEFINITE

    @property
    def forgets_start(self) -> bool:
        return self.rtol > 0

    def solve(self, operator: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Solved:
        norm_b = safe_row_norms(b)
        zero = norm_b == 0
        step, refusals = self._steps(operator, b, zero)
        target = self.rtol * norm_b
        v, best, diverged, limit, steps = _run(operator, b, guess, _Limits(norm_b, step, target), self.terms)
        v = torch.where(diverged.unsqueeze(-1), best, v)
        residual = safe_row_norms(operator.residual(b, v))
        late = ~diverged & (residual > 1.01 * limit)
        if bool(late.any()):  # the last step took it above where it began
            v, diverged = torch.where(late.unsqueeze(-1), best, v), diverged | late
            residual = safe_row_norms(operator.residual(b, v))
        ended = first_statuses(
            (~residual.isfinite(), Status.nonfinite),
            (diverged, Status.diverged),
            ((residual > target) & (target > 0), Status.max_steps),  # without a tolerance all the terms are success
        )
        # Where there was no step to take, that is the reason, unless NaN was met.
        statuses = [
            end if refusal.ok or end is Status.nonfinite else refusal
            for end, refusal in zip(ended, refusals, strict=True)
        ]
        return Solved(v, tuple(statuses), residual, steps)

    def with_tolerance(self, tol: float, size: float, trusting: bool = False) -> Neumann:
        return replace(self, rtol=relative(tol, size))

    def relative_error(self, constants: Constants, damping: float) -> float:
        if self.step is None:
            raise unknown_error(self)
        return max(self.rtol, neumann(constants, step=self.step, terms=self.terms, damping=damping))

    def _steps(self, operator: LinearOperator, b: Tensor, zero: Tensor) -> tuple[Tensor, tuple[Status, ...]]:
        """The step of each row, zero where there is none, and why."""
        if self.step is not None:
            step = torch.full_like(zero, self.step, dtype=b.dtype)
            if operator.contraction is None or self.step != 1.0:
                return step, (Status.successful,) * zero.numel()
            apart = (operator.contraction >= 1) & ~zero  # the series of I - A diverges: none of its terms is taken
            return torch.where(apart, 0.0, step), first_statuses((apart, Status.expanding))
        demand(operator, "Neumann(step=None)", SYMMETRIC)
        largest = largest_eigenvalue(operator, b)
        refusals = first_statuses(
            (zero | (largest > 0), Status.successful),
            (largest == 0, Status.breakdown),
            (largest < 0, Status.negative_curvature),
            (largest.isnan(), Status.nonfinite),
        )
        return torch.where(largest > 0, 1 / largest, torch.zeros_like(largest)), refusals


@final
@dataclass(frozen=True, eq=False)
class _Limits:
    """Numbers of each system: |b|, the step, and the residual to stop at."""

    norm_b: Tensor
    step: Tensor
    target: Tensor


def _run(
    operator: LinearOperator, b: Tensor, guess: Tensor | None, limits: _Limits, terms: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """The iterates v, those of least residual, which systems diverged, the residual that is none, and the steps."""
    v, r = torch.zeros_like(b), b
    if guess is not None:
        zero = (limits.norm_b == 0).unsqueeze(-1)
        v = torch.where(zero, v, guess)
        r = torch.where(zero, b, b - operator.mv(v))
    first = safe_row_norms(r)
    # Growth below the floor is rounding. Where A is not symmetric, a residual may grow for a while.
    symmetric = operator.symmetric or operator.positive_definite
    floors = torch.maximum(first, limits.norm_b) * (math.sqrt(torch.finfo(b.dtype).eps) if symmetric else 1e3)
    at = systems_of(b)
    norm, step, target, floor = (at.numbers(each) for each in (first, limits.step, limits.target, floors))
    best, least, steps = v.clone(), norm, 0
    going = (norm > target) & (norm < math.inf) & (step > 0)  # NaN compares false
    diverged = norm < 0
    while steps < terms and at.any(going):
        if steps:
            r = b - operator.mv(v)
            norm = at.norm(r)
            most = _GROWTH * at.either(least > floor, least, floor)
            diverged = diverged | going & (norm > most)
            better = going & (norm < least)
            best, least = at.kept(better, v, best), at.either(better, norm, least)
            # A residual of zero stays zero: without a tolerance only the steps end the iteration.
            going = going & (norm <= most) & (norm > target) & (norm < math.inf)
            if not at.any(going):
                break
        v = at.add(going, v, step, r)
        r = b  # the last one is not to be held while the next product is formed
        steps += 1
    diverged = torch.zeros_like(limits.norm_b, dtype=torch.bool) | diverged
    return v, best, diverged, torch.maximum(first, floors), steps
