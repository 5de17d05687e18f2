"""Conjugate gradients on the normal equations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._linear import (
    TRANSPOSED,
    AbstractLinearSolver,
    LinearOperator,
    OperatorProperties,
    demand,
    unknown_error,
)
from bilevel._numerics.krylov import (
    BREAKDOWN,
    CONVERGED,
    NONFINITE,
    OUT_OF_STEPS,
    check_tolerances,
    relative,
    solve_by_runs,
)
from bilevel._numerics.rows import row_dots, safe_row_norms
from bilevel._result import Solved
from bilevel._validate import demand_types
from bilevel.certificates.certificate import Constants


@final
@dataclass(frozen=True)
class NormalCG(AbstractLinearSolver):
    """CGLS: conjugate gradients on A'A v = A'b without A'A: the v of Krylov_k(A'A, A'b) with the least |b - A v|.

    The residual never grows, for any A, and converges like ((kappa - 1) / (kappa + 1))^k, kappa the condition number of
    A itself, that of A'A its square: for A of condition number above some hundred `GMRES` is faster. If A is singular
    and b not in its range, it ends with `Status.breakdown` and a v of least residual.

    Cost: one product with A and one with A' a step, one of each more, and one for the true residual at the end. Memory
    6n.

    Source: Hestenes, Stiefel, "Methods of conjugate gradients for solving linear systems", J. Res. NBS 49 (1952),
    section 10; Bjorck, "Numerical methods for least squares problems" (1996), algorithm 7.4.1.

    Args:
        rtol: stop when |b - A v| <= rtol |b|; 0 takes `max_steps` steps, or fewer if it converges exactly.
        max_steps: at most this many steps; None is 10 n.

    Raises:
        ValueError: if `rtol` is not in [0, 1) or `max_steps` negative; from `solve`, if the operator is neither
            symmetric nor has products with its transpose.

    Example:
        >>> A = torch.tensor([[0.0, 2.0], [-1.0, 1.0]])
        >>> operator = LinearOperator(
        ...     lambda v: v @ A.mT, 2, symmetric=False, transposed_mv=lambda v: v @ A
        ... )
        >>> bool(
        ...     torch.allclose(
        ...         NormalCG().solve(operator, torch.tensor([2.0, 0.0])).value, torch.ones(2)
        ...     )
        ... )
        True
    """

    rtol: float = 1e-6
    max_steps: int | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        check_tolerances("NormalCG", self.rtol, 0.0, self.max_steps)

    @property
    def demands(self) -> OperatorProperties:
        return TRANSPOSED

    @property
    def tolerates_indefinite(self) -> bool:
        return True

    @property
    def forgets_start(self) -> bool:
        return self.rtol > 0

    def solve(self, operator: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Solved:
        demand(operator, "NormalCG", self.demands)
        return solve_by_runs(_run, operator, b, guess, rtol=self.rtol, max_steps=self.max_steps)

    def with_tolerance(self, tol: float, size: float, trusting: bool = False) -> NormalCG:
        return replace(self, rtol=relative(tol, size))

    def relative_error(self, constants: Constants, damping: float) -> float:
        if self.max_steps is not None:
            raise unknown_error(self)
        return self.rtol


def _run(
    operator: LinearOperator, r: Tensor, stop: Tensor, max_steps: int, norm_A: Tensor
) -> tuple[Tensor, list[int], int, Tensor]:
    """d <- d + alpha p, r <- r - alpha A p, p <- A'r + beta p, with alpha = |A'r|^2 / |A p|^2."""
    eps, transposed = torch.finfo(r.dtype).eps, operator.transposed
    d, norm = torch.zeros_like(r), safe_row_norms(r)
    codes = torch.full_like(norm, OUT_OF_STEPS, dtype=torch.int64)
    codes = torch.where(norm <= stop, CONVERGED, codes)
    codes = torch.where(norm.isfinite(), codes, NONFINITE)
    steps = 0
    p = s = transposed(r)
    gamma = row_dots(s, s)
    while steps < max_steps:
        going = codes == OUT_OF_STEPS
        if not bool(going.any()):
            break
        q = operator.mv(p)
        steps += 1
        delta, length = row_dots(q, q), row_dots(p, p)
        norm_A = torch.maximum(
            norm_A, torch.where(length > 0, delta / torch.where(length > 0, length, 1.0), 0.0).sqrt()
        )
        # Where A'r is of the size of rounding, r is orthogonal to the range of A: nothing is left to be gained.
        flat = going & ~(gamma.sqrt() > 10 * eps * norm_A * norm)
        moves = going & ~flat & (delta > 0)
        alpha = torch.where(moves, gamma / torch.where(delta > 0, delta, 1.0), 0.0).unsqueeze(-1)
        d, r = d + alpha * p, r - alpha * q
        s = transposed(r)
        new = row_dots(s, s)
        beta = torch.where(moves, new / torch.where(gamma > 0, gamma, 1.0), 0.0).unsqueeze(-1)
        p, gamma, norm = s + beta * p, new, safe_row_norms(r)
        codes = torch.where(flat | (going & ~(delta > 0)), BREAKDOWN, codes)
        codes = torch.where(going & (norm <= stop), CONVERGED, codes)
        codes = torch.where(going & ~norm.isfinite(), NONFINITE, codes)
    return d, codes.reshape(-1).tolist(), steps, norm_A
