"""The generalized minimal residual method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import final

import torch
from torch import Tensor

from bilevel._linear import ANY, AbstractLinearSolver, LinearOperator, OperatorProperties, unknown_error
from bilevel._numerics.half import widened
from bilevel._numerics.krylov import (
    BREAKDOWN,
    CONVERGED,
    NONFINITE,
    OUT_OF_STEPS,
    RESTART,
    check_tolerances,
    relative,
    solve_by_runs,
)
from bilevel._numerics.rows import divided_rows, safe_row_norms
from bilevel._result import Solved
from bilevel._validate import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, demand_ranges
from bilevel.certificates.certificate import Constants


@final
@dataclass(frozen=True)
class GMRES(AbstractLinearSolver):
    """GMRES: the v of Krylov_k(A, b) with the least |b - A v|, for any invertible A.

    The residual never grows, and is zero after at most n steps without restarts; with restarts, it converges if
    the symmetric part of A is definite, and may stand still otherwise. If A is singular, it may end with
    `Status.breakdown` and a v of least residual.

    Cost: one product a step, one for the true residual at the end and one for a guess, one more for each restart.
    Memory (k + 3) n and 4 k n flops at step k since the last restart: orthogonalization is by classical
    Gram-Schmidt, twice.

    Source: Saad, Schultz, "GMRES: a generalized minimal residual algorithm for solving nonsymmetric linear
    systems", SIAM J. Sci. Stat. Comput. 7 (1986).

    Args:
        rtol: stop when |b - A v| <= rtol |b|; 0 takes `max_steps` steps, or fewer if it converges exactly.
        max_steps: at most this many steps; None is 10 n.
        restart: start anew after this many steps, which bounds the memory; None is n.

    Raises:
        ValueError: if `rtol` is negative or `restart` less than 1.

    Example:
        >>> A = torch.tensor([[0.0, 2.0], [-1.0, 1.0]])
        >>> v = (
        ...     GMRES()
        ...     .solve(
        ...         LinearOperator(lambda v: v @ A.mT, 2, symmetric=False), torch.tensor([2.0, 0.0])
        ...     )
        ...     .value
        ... )
        >>> bool(torch.allclose(v, torch.ones(2)))
        True
    """

    rtol: float = 1e-6
    max_steps: int | None = None
    restart: int | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        check_tolerances("GMRES", self.rtol, 0.0, self.max_steps)
        demand_ranges(self, {"restart": "Pass None for no restarts."}, restart=AT_LEAST_1)

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
        cycle = operator.size if self.restart is None else min(self.restart, operator.size)
        return solve_by_runs(partial(_run, cycle=cycle), operator, b, guess, rtol=self.rtol, max_steps=self.max_steps)

    def with_tolerance(self, tol: float, size: float, trusting: bool = False) -> GMRES:
        return replace(self, rtol=relative(tol, size))

    def relative_error(self, constants: Constants, damping: float) -> float:
        if self.max_steps is not None:
            raise unknown_error(self)
        return self.rtol


def _run(
    operator: LinearOperator, r: Tensor, stop: Tensor, max_steps: int, norm_A: Tensor, cycle: int
) -> tuple[Tensor, list[int], int, Tensor]:
    """One cycle: an orthonormal basis Q of the Krylov space, A Q = Q H, and rotations that triangularize H."""
    rounding = 10 * torch.finfo(r.dtype).eps
    phi = safe_row_norms(r)  # signed; |phi| is the norm of the residual
    zero, one = torch.zeros_like(phi), torch.ones_like(phi)
    codes = torch.full_like(phi, OUT_OF_STEPS, dtype=torch.int64)
    codes = torch.where(phi.isfinite(), codes, NONFINITE)
    codes = torch.where(phi <= stop, CONVERGED, codes)
    q = divided_rows(r, phi, codes == OUT_OF_STEPS)
    basis = q.unsqueeze(-2)  # (*batch, k or more, n); grows by doubling
    rotations = one[..., None, None]  # the product of all so far, (*batch, k + 1, k + 1)
    columns: list[Tensor] = []  # of the triangular factor
    entries: list[Tensor] = []  # of the rotated right-hand side
    steps = 0
    while steps < min(max_steps, cycle):
        active = codes == OUT_OF_STEPS
        if not bool(active.any()):
            break
        k = steps
        w = operator.mv(q)
        steps += 1
        norm_A = torch.maximum(norm_A, safe_row_norms(w))
        Q = basis[..., : k + 1, :]
        h = (Q @ w.unsqueeze(-1)).squeeze(-1)
        w = w - (h.unsqueeze(-2) @ Q).squeeze(-2)
        again = (Q @ w.unsqueeze(-1)).squeeze(-1)  # twice is enough
        w, h = w - (again.unsqueeze(-2) @ Q).squeeze(-2), h + again
        below = safe_row_norms(w)
        below = torch.where(below <= rounding * norm_A, zero, below)  # the Krylov space is exhausted

        column = (rotations @ h.unsqueeze(-1)).squeeze(-1)
        diagonal = torch.hypot(column[..., k], below)
        codes = torch.where(active & (diagonal <= rounding * norm_A), BREAKDOWN, codes)
        codes = torch.where(active & ~diagonal.isfinite(), NONFINITE, codes)
        active = codes == OUT_OF_STEPS
        c = torch.where(active, column[..., k] / diagonal, one)
        s = torch.where(active, below / diagonal, zero)
        column = torch.where(active.unsqueeze(-1), column, torch.zeros_like(column))
        columns.append(torch.cat([column[..., :k], torch.where(active, diagonal, one).unsqueeze(-1)], dim=-1))
        entries.append(torch.where(active, c * phi, zero))
        phi = torch.where(active, -s * phi, phi)
        codes = torch.where(active & (phi.abs() <= stop), CONVERGED, codes)
        if steps == min(max_steps, cycle):
            break
        rotations = _rotate(rotations, c, s)
        q = divided_rows(w, below, codes == OUT_OF_STEPS)
        del w, Q  # not to be held while the next product is formed
        if basis.shape[-2] == steps:
            basis = _longer(basis, min(2 * steps, max_steps, cycle))
        basis[..., steps, :] = q
    if steps == cycle < max_steps:
        codes = torch.where(codes == OUT_OF_STEPS, RESTART, codes)
    return _combine(basis, columns, entries, r), codes.reshape(-1).tolist(), steps, norm_A


def _longer(basis: Tensor, k: int) -> Tensor:
    """The same basis with room for k vectors."""
    longer = basis.new_zeros(*basis.shape[:-2], k, basis.shape[-1])
    longer[..., : basis.shape[-2], :] = basis
    return longer


def _rotate(rotations: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """The accumulated rotations `(*batch, k, k)` after one more, of rows k - 1 and k: `(*batch, k + 1, k + 1)`."""
    rotations = torch.nn.functional.pad(rotations, (0, 1, 0, 1))
    rotations[..., -1, -1] = 1.0
    upper, lower = rotations[..., -2, :].clone(), rotations[..., -1, :].clone()
    c, s = c.unsqueeze(-1), s.unsqueeze(-1)
    rotations[..., -2, :] = c * upper + s * lower
    rotations[..., -1, :] = c * lower - s * upper
    return rotations


def _combine(basis: Tensor, columns: list[Tensor], entries: list[Tensor], r: Tensor) -> Tensor:
    """Q y with R y the rotated right-hand side."""
    if not columns:
        return torch.zeros_like(r)
    size = len(columns)
    R = torch.stack([torch.nn.functional.pad(column, (0, size - column.shape[-1])) for column in columns], dim=-1)
    rotated = widened(torch.stack(entries, dim=-1).unsqueeze(-1))
    y = torch.linalg.solve_triangular(widened(R), rotated, upper=True).to(r.dtype)
    combined: Tensor = y.mT @ basis[..., :size, :]
    return combined.squeeze(-2)
