"""The minimal residual method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from bilevel._linear import SYMMETRIC, AbstractLinearSolver, LinearOperator, OperatorProperties, demand, unknown_error
from bilevel._numerics.krylov import check_tolerances, relative, solve_by_runs
from bilevel._numerics.minimal_residual import minimal_residual
from bilevel._result import Solved
from bilevel._validate import demand_types
from bilevel.certificates.certificate import Constants


@final
@dataclass(frozen=True)
class MINRES(AbstractLinearSolver):
    """MINRES: the v of Krylov_k(A, b) with the least |b - A v|, for A symmetric, positive definite or not.

    The residual never grows. Converges for invertible symmetric A: with the eigenvalues in [-b, -a] and [a, b] like
    ((kappa - 1) / (kappa + 1))^(k/2), for A positive definite like CG, and exactly after as many steps as A has
    distinct eigenvalues. If A is singular and b not in its range, it ends with `Status.breakdown` and a v of least
    residual.

    Cost: one product a step, one for the true residual at the end and one for a guess. Memory 7n. When the true
    residual turns out to miss the tolerance that the recurrence met, the iteration is restarted from there.

    Source: Paige, Saunders, "Solution of sparse indefinite systems of linear equations", SIAM J. Numer. Anal. 12
    (1975).

    Args:
        rtol: stop when |b - A v| <= rtol |b|; 0 takes `max_steps` steps, or fewer if it converges exactly.
        max_steps: at most this many steps; None is 10 n.

    Raises:
        ValueError: if `rtol` is negative, or the operator is not declared symmetric.

    Example:
        >>> import torch
        >>> A = LinearOperator(lambda v: v * torch.tensor([1.0, -2.0]), size=2)
        >>> v = MINRES().solve(A, torch.tensor([3.0, 4.0])).value
        >>> bool(torch.allclose(v, torch.tensor([3.0, -2.0])))
        True
    """

    rtol: float = 1e-6
    max_steps: int | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        check_tolerances("MINRES", self.rtol, 0.0, self.max_steps)

    @property
    def demands(self) -> OperatorProperties:
        return SYMMETRIC

    @property
    def tolerates_indefinite(self) -> bool:
        return True

    @property
    def forgets_start(self) -> bool:
        return self.rtol > 0

    def solve(self, operator: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Solved:
        demand(operator, "MINRES", self.demands)
        return solve_by_runs(minimal_residual, operator, b, guess, rtol=self.rtol, max_steps=self.max_steps)

    def with_tolerance(self, tol: float, size: float, trusting: bool = False) -> MINRES:
        return replace(self, rtol=relative(tol, size))

    def relative_error(self, constants: Constants, damping: float) -> float:
        if self.max_steps is not None:
            raise unknown_error(self)
        return self.rtol
