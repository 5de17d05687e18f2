"""Conjugate gradients for matrices that need not be definite."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from bilevel._linear import POSITIVE_DEFINITE, AbstractLinearSolver, LinearOperator, OperatorProperties
from bilevel._result import Solved, Status
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, BELOW_1, demand_ranges
from bilevel.solvers.cg import CG

# What ends it by design: so many steps, the curvature, and rounding where fewer would have done as well.
_BY_DESIGN = frozenset({Status.max_steps, Status.negative_curvature, Status.stagnated})


@final
@dataclass(frozen=True)
class TruncatedCG(AbstractLinearSolver):
    """v in Krylov_k(A, b), by conjugate gradients that end where A stops being positive definite, or after k steps.

    Until a direction of curvature at most zero is met, A is positive definite on all directions that were taken, and
    the iterates are those of `CG`; then the one of least residual is returned, and `Solved.concave` says so. So v
    solves A v = b on a subspace: a bias by design (`is_approximate`), whose size is the residual |b - A v|. The large
    curvatures come first, so that few steps leave out directions along which A is nearly flat, as damping does. It
    starts at zero, whatever the guess: a v from elsewhere may lie along directions that are left out, and would stay.

    Neither the steps that run out nor negative curvature nor the rounding floor are failures, and nothing is promised
    but the residual, which is reported. For Hessians of networks in training, which are indefinite.

    Cost: one product a step, and one for the true residual. Memory 4n.

    Source: Steihaug, "The conjugate gradient method and trust regions in large scale optimization", SIAM J. Numer.
    Anal. 20 (1983), without the trust region; Martens, "Deep learning via Hessian-free optimization", ICML 2010.

    Args:
        max_steps: k.
        rtol: fewer steps where |b - A v| <= rtol |b| before.

    Raises:
        ValueError: if `max_steps` is less than 1 or `rtol` not in [0, 1).

    Example:
        >>> import torch
        >>> A = LinearOperator(
        ...     lambda v: v * torch.tensor([2.0, -1.0]), size=2, positive_definite=True
        ... )
        >>> found = TruncatedCG(max_steps=10).solve(A, torch.tensor([1.0, 0.1]))
        >>> found.concave, found.status.name, found.value.round(decimals=3)
        (True, 'successful', tensor([0.5080, 0.0510]))
    """

    max_steps: int
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, max_steps=AT_LEAST_1, rtol=BELOW_1)

    @property
    def demands(self) -> OperatorProperties:
        return POSITIVE_DEFINITE

    @property
    def tolerates_indefinite(self) -> bool:
        return True

    @property
    def forgets_start(self) -> bool:
        return True

    @property
    def is_approximate(self) -> bool:
        return True

    def solve(self, operator: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Solved:
        found = CG(rtol=self.rtol, max_steps=self.max_steps).solve(operator, b)
        ends = tuple(Status.successful if status in _BY_DESIGN else status for status in found.statuses)
        return replace(found, statuses=ends, concave=Status.negative_curvature in found.statuses)
