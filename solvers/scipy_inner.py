"""Minimizers of scipy for the inner problem."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias, final

import torch
from torch import Tensor

from bilevel._inner import AbstractInnerSolver, Objective, unbounded
from bilevel._numerics.rows import safe_row_norms
from bilevel._result import Solved, Status, judged_rows
from bilevel._validate import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, demand_ranges
from bilevel.bounds.iterations import stationary
from bilevel.certificates.certificate import Constants
from bilevel.solvers._scipy import BOUNDED, as_numpy, demand_method, exhausted, options_of, scipy_optimize

if TYPE_CHECKING:
    import numpy as np

Bound: TypeAlias = float | Tensor | None


@final
@dataclass(frozen=True, eq=False)
class Scipy(AbstractInnerSolver):
    """`scipy.optimize.minimize` of g(x, .), with bounds on y: argmin {g(x, y): lower <= y <= upper}.

    The residual is |y - P(y - grad g)|, P the projection onto the bounds: |grad g| where no bound is active. It is
    measured at the returned point in its own dtype, and decides about success, whatever scipy reports.

    The implicit function theorem, which `AID` and `Penalty` rest on, sees no bounds: their hypergradients are right
    only if no bound is active at the solution.

    Cost: one gradient an evaluation (scipy works in float64 on the CPU) and one at the returned point. Rows of a
    batch are minimized jointly, as the one problem of their sum: they are independent, so its solution is theirs.
    Needs `pip install "bilevel[scipy]"`.

    Source: Byrd, Lu, Nocedal, Zhu, "A limited memory algorithm for bound constrained optimization", SIAM J. Sci.
    Comput. 16 (1995), for L-BFGS-B.

    Args:
        method: "L-BFGS-B", "BFGS", "CG", "SLSQP", "TNC" or "trust-constr".
        bounds: (lower, upper), each a number, a flat tensor `(q,)`, or None for no bound.
        tol: stop when the residual is at most this.
        max_steps: at most this many iterations ("TNC": evaluations).

    Raises:
        ValueError: if the method is unknown or takes no bounds, a bound has another size than y or exceeds its
            counterpart, or `tol` or `max_steps` is negative.
        ImportError: from `solve`, without scipy.

    Example:
        >>> objective = Objective(lambda y: (y - 3).square().sum())
        >>> Scipy(bounds=(None, 2.0)).solve(objective, torch.zeros(2)).value
        tensor([2., 2.])
    """

    method: str = "L-BFGS-B"
    bounds: tuple[Bound, Bound] | None = None
    tol: float = 1e-8
    max_steps: int = 1000

    def __post_init__(self) -> None:
        demand_types(self, {"bounds": "a pair (lower, upper) of numbers, flat tensors or None"})
        demand_method("Scipy", self.method)
        if self.bounds is not None and self.method not in BOUNDED:
            raise ValueError(f"`Scipy(bounds=...)` needs one of {', '.join(BOUNDED)}. Got method={self.method!r}.")
        demand_ranges(self, tol=AT_LEAST_0, max_steps=AT_LEAST_0)
        if self.bounds is not None and None not in self.bounds:
            lower, upper = self.bounds
            assert lower is not None and upper is not None
            crossed: bool | Tensor = lower > upper
            if bool(crossed.any()) if isinstance(crossed, Tensor) else crossed:
                raise ValueError("`Scipy(bounds=(lower, upper))` must have lower <= upper everywhere.")

    @property
    def forgets_start(self) -> bool:
        return self.tol > 0

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        lower, upper = self._limits(y0)
        y, steps, spent = y0.detach().clamp(lower, upper).clone(), 0, True
        if self.max_steps > 0:
            y, steps, spent = self._minimize(objective, y, lower, upper)
        gradient = objective.last_gradient(y)
        residual = safe_row_norms(y - (y - gradient).clamp(lower, upper))
        if self.bounds is None:
            residual = safe_row_norms(gradient)
        objective.tally.inner_steps += steps * residual.numel()
        late = Status.stagnated if not spent else Status.max_steps
        statuses = judged_rows(residual, self.tol or math.inf, late)  # 0: as many steps as there may be
        held = ((y <= lower) & (gradient > 0)) | ((y >= upper) & (gradient < 0))
        return Solved(y, statuses, residual, steps, at_bounds=int(held.sum()))

    @property
    def tolerance(self) -> float | None:
        return self.tol or None

    def with_tolerance(self, tol: float) -> Scipy:
        return replace(self, tol=tol)

    def with_steps(self, steps: int) -> Scipy:
        return replace(self, max_steps=steps)

    def solution_bound(self, constants: Constants, distance: float) -> float:
        if not self.tol:
            raise unbounded(self, "bounds.gradient_descent")
        return stationary(constants, self.tol)

    def _minimize(self, objective: Objective, y: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, int, bool]:
        optimize = scipy_optimize("Scipy")

        def function(flat: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
            value, gradient = objective.value_and_gradient(torch.from_numpy(flat).to(y).reshape(y.shape))
            return float(value.double().sum()), as_numpy(gradient)

        bounds = None
        if self.bounds is not None:
            bounds = optimize.Bounds(as_numpy(lower.expand_as(y)), as_numpy(upper.expand_as(y)))
        # scipy stops by the largest entry of the gradient of the sum; the contract is on the norm of each row
        tol = self.tol / math.sqrt(y.shape[-1])
        found = optimize.minimize(
            function,
            as_numpy(y),
            jac=True,
            method=self.method,
            bounds=bounds,
            options=options_of(self.method, tol, self.max_steps),
        )
        steps = int(found.nit)
        return torch.from_numpy(found.x).to(y).reshape(y.shape), steps, exhausted(self.method, found, self.max_steps)

    def _limits(self, y: Tensor) -> tuple[Tensor, Tensor]:
        limits = []
        for bound, default in zip(self.bounds or (None, None), (-torch.inf, torch.inf), strict=True):
            limit = torch.as_tensor(default if bound is None else bound, dtype=y.dtype, device=y.device)
            if limit.dim() and limit.shape != y.shape[-1:]:
                raise ValueError(
                    f"`Scipy(bounds=...)` must be numbers or flat tensors of {y.shape[-1]} entries, as y has."
                    f" Got shape {tuple(limit.shape)}."
                )
            limits.append(limit)
        return limits[0], limits[1]
