"""Sparse solution of saddle-point systems whose leading block is known by products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._linear import SYMMETRIC, AbstractLinearSolver, LinearOperator, OperatorProperties
from bilevel._numerics.rows import safe_row_norms
from bilevel._result import Solved, Status
from bilevel._validate import demand_types
from bilevel.arguments.ranges import BELOW_1, demand_ranges
from bilevel.certificates.certificate import Constants
from bilevel.solvers._sparse_saddle import SaddleFactor, diagonal_of, products_of, scipy_sparse


@final
@dataclass(frozen=True)
class SparseSaddle(AbstractLinearSolver):
    """(u, s) with [[M, S'], [S, 0]] (u, s) = (r, t) for sparse S and M known by products.

    The matrix with the diagonal of M in the place of M is factored by scipy, and is the preconditioner of conjugate
    gradients, which take as many products with M as M differs from its diagonal, whatever S is. It is the linear solver
    to `SparseInteriorPoint`: `AID(SparseInteriorPoint(), SparseSaddle())`, which `"implicit"` stands for.

    M has to be positive definite on the null space of S. S may have dependent rows: u is unique then, and s one of
    many. Statuses: `max_steps` where the residual of the system misses `rtol`, `not_positive_definite` where a
    curvature is not positive, `singular` where there is no factor.

    Cost: a sparse factorization, a product and a solve with the factor a step. One system, in float64 on the CPU. Needs
    `pip install "bilevel[scipy]"`.

    Source: Gould, Hribar, Nocedal, "On the solution of equality constrained quadratic programming problems arising in
    optimization", SIAM J. Sci. Comput. 23 (2001).

    Args:
        rtol: of the residual.

    Raises:
        ValueError: if `rtol` is not in [0, 1); from `solve`, if the operator has no sparse rows.
        ImportError: from `solve`, without scipy.

    Example:
        >>> from bilevel import AID, BilevelProblem, Polytope, hypergradient
        >>> from bilevel.inner_problems import ManyConstraints
        >>> from bilevel.solvers import SparseInteriorPoint
        >>> at = torch.arange(3)
        >>> G = torch.sparse_coo_tensor(
        ...     torch.stack([at, at]), torch.ones(3).double(), check_invariants=True
        ... )
        >>> problem = BilevelProblem(
        ...     lambda x, y: y.sum(),
        ...     inner=ManyConstraints(
        ...         lambda x, y: (y - x).square().sum(), constraints=lambda x: Polytope(G=G, h=1.0)
        ...     ),
        ... )
        >>> x = torch.tensor([0.0, 2.0, 0.5]).double()
        >>> found = hypergradient(
        ...     problem, x, 0 * x, estimator=AID(SparseInteriorPoint(), SparseSaddle())
        ... )
        >>> found.grad.round(decimals=9)
        tensor([1., 0., 1.], dtype=torch.float64)
    """

    rtol: float = 1e-10

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, rtol=BELOW_1)

    @property
    def demands(self) -> OperatorProperties:
        return SYMMETRIC

    @property
    def tolerates_indefinite(self) -> bool:
        return True

    @property
    def forgets_start(self) -> bool:
        return True

    def solve(self, operator: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Solved:
        """Solve A v = b; `guess` is not needed."""
        import numpy as np

        sparse, blocks = scipy_sparse("SparseSaddle"), operator.sparse
        if blocks is None or b.dim() > 1:
            raise ValueError(
                "`SparseSaddle` needs one system with sparse rows, as `ManyConstraints` has it where its `Polytope` is"
                f" sparse. Got {'several systems' if b.dim() > 1 else 'an operator without them'}. Use `MINRES`."
            )
        q, size = blocks.M.size, float(blocks.size)
        free, on = (part.cpu().numpy() for part in (blocks.free, blocks.on))
        like, right = b[..., :q], b.detach().double().cpu().numpy()
        S = blocks.S.scipy(sparse)[on] @ sparse.diags(free.astype(float))
        H = products_of(blocks.M, like)

        def masked(u: np.ndarray) -> np.ndarray:
            found: np.ndarray = np.where(free, H(np.where(free, u, 0.0)), size * u)
            return found

        diagonal = np.where(free, diagonal_of(H, q), size)
        v = np.concatenate([right[:q] / size, right[q:] / size])
        try:
            factor = SaddleFactor.of(sparse, masked, diagonal, np.zeros(q), S, np.zeros(S.shape[0]))
            given = np.concatenate([right[:q], right[q:][on]])
            found = factor.solve(given, min(self.rtol, 1e-12))
        except RuntimeError:
            return Solved(torch.zeros_like(b), (Status.singular,), safe_row_norms(b), 0)
        v[:q], v[q:][on] = np.where(free, found.value[:q], v[:q]), found.value[q:]
        value = torch.from_numpy(v).to(b)
        residual = safe_row_norms(operator.residual(b, value))
        missed = not float(residual) <= max(self.rtol, 10 * torch.finfo(b.dtype).eps) * float(safe_row_norms(b))
        status = (
            Status.nonfinite
            if not bool(residual.isfinite())
            else Status.not_positive_definite
            if found.concave
            else Status.max_steps
            if missed
            else Status.successful
        )
        return Solved(value, (status,), residual, found.products)

    def relative_error(self, constants: Constants, damping: float) -> float:
        return self.rtol
