"""Anderson acceleration as a solver of linear systems."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import final

import torch
from torch import Tensor

from bilevel._linear import ANY, AbstractLinearSolver, LinearOperator, OperatorProperties, unknown_error
from bilevel._numerics.krylov import (
    CONVERGED,
    NONFINITE,
    OUT_OF_STEPS,
    RESTART,
    STALLED,
    check_tolerances,
    relative,
    solve_by_runs,
)
from bilevel._numerics.mixing import Mixing
from bilevel._numerics.rows import safe_row_norms
from bilevel._result import Solved
from bilevel._validate import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, demand_ranges
from bilevel.certificates.certificate import Constants

_IDLE = 30  # steps without a better one
_BETTER = 0.999  # of the least residual


@final
@dataclass(frozen=True)
class LinearAnderson(AbstractLinearSolver):
    """Anderson acceleration of v <- v + (b - A v): what `Anderson` is for y, for the adjoint system of a fixed point.

    Where the memory is at least the steps that are taken, its residuals are those of `GMRES`; with less, it keeps the
    last directions where `GMRES` starts anew. For a contraction I - A it converges at least as fast as the Neumann
    series, near enough; beyond, where the memory is enough. The v of least residual is returned.

    Cost: one product a step, one for the true residual at the end and one for a guess. Memory (2 m + 4) n.

    Source: Walker, Ni, "Anderson acceleration for fixed-point iterations", SIAM J. Numer. Anal. 49 (2011); Bai, Kolter,
    Koltun, "Deep equilibrium models", NeurIPS 2019, solve both systems of theirs alike.

    Args:
        rtol: stop when |b - A v| <= rtol |b|; 0 takes `max_steps` steps, or fewer if it converges exactly.
        max_steps: at most this many steps; None is 10 n.
        memory: m.

    Raises:
        ValueError: if `rtol` is not in [0, 1), or another number negative.

    Example:
        >>> A = torch.tensor([[0.0, 2.0], [-1.0, 1.0]])
        >>> operator = LinearOperator(lambda v: v @ A.mT, 2, symmetric=False)
        >>> v = LinearAnderson().solve(operator, torch.tensor([2.0, 0.0])).value
        >>> bool(torch.allclose(v, torch.ones(2)))
        True
    """

    rtol: float = 1e-6
    max_steps: int | None = None
    memory: int = 10

    def __post_init__(self) -> None:
        demand_types(self)
        check_tolerances("LinearAnderson", self.rtol, 0.0, self.max_steps)
        demand_ranges(self, {}, memory=AT_LEAST_0)

    @property
    def demands(self) -> OperatorProperties:
        return ANY

    @property
    def tolerates_indefinite(self) -> bool:
        return True

    @property
    def forgets_start(self) -> bool:
        return self.rtol > 0

    def solve(self, operator: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Solved:
        run = partial(_run, memory=self.memory)
        return solve_by_runs(run, operator, b, guess, rtol=self.rtol, max_steps=self.max_steps)

    def with_tolerance(self, tol: float, size: float, trusting: bool = False) -> LinearAnderson:
        return replace(self, rtol=relative(tol, size))

    def relative_error(self, constants: Constants, damping: float) -> float:
        if self.max_steps is not None:
            raise unknown_error(self)
        return self.rtol


def _run(
    operator: LinearOperator, r: Tensor, stop: Tensor, max_steps: int, norm_A: Tensor, memory: int
) -> tuple[Tensor, list[int], int, Tensor]:
    """Steps from zero, whose residuals are carried along; where a row stands still it ends."""
    v = best = torch.zeros_like(r)
    mixing = Mixing(v, memory, 1e-14)
    first = norm = least = safe_row_norms(r)
    idle, steps = torch.zeros_like(norm), 0
    codes = torch.full_like(norm, OUT_OF_STEPS, dtype=torch.int64)
    codes = torch.where(norm <= stop, CONVERGED, codes)
    codes = torch.where(norm.isfinite(), codes, NONFINITE)
    while steps < max_steps and bool((codes == OUT_OF_STEPS).any()):
        going = codes == OUT_OF_STEPS
        mixing.told(v, r)
        d = torch.where(going.unsqueeze(-1), mixing.next(v, r, 1.0) - v, 0.0)
        Ad = operator.mv(d)
        steps += 1
        size = safe_row_norms(d)
        norm_A = torch.maximum(norm_A, safe_row_norms(Ad) / torch.where(size > 0, size, 1.0))
        v, r = v + d, r - Ad
        norm = safe_row_norms(r)
        idle = torch.where(norm < _BETTER * least, 0.0, idle + 1)
        better = norm < least
        best, least = torch.where(better.unsqueeze(-1), v, best), torch.where(better, norm, least)
        codes = torch.where(going & (idle >= _IDLE), torch.where(least < 0.5 * first, RESTART, STALLED), codes)
        codes = torch.where(going & (norm <= stop), CONVERGED, codes)
        codes = torch.where(going & ~norm.isfinite(), NONFINITE, codes)
    return best, codes.reshape(-1).tolist(), steps, norm_A
