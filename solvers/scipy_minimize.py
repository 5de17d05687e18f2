"""Minimizers of scipy for the outer problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from bilevel._optimizer import AbstractOuterDriver
from bilevel._result import Status
from bilevel._validate import demand_types
from bilevel.solvers._scipy import BOUNDED, as_numpy, demand_method, exhausted, options_of, scipy_optimize

if TYPE_CHECKING:
    import numpy as np


@final
class _ReachedError(Exception):
    """Ends scipy's loop at a step whose gradient is small enough."""


@final
@dataclass(frozen=True)
class ScipyMinimize(AbstractOuterDriver):
    """`scipy.optimize.minimize` of Phi over x, with bounds, for deterministic problems.

    It takes far fewer steps than a first-order method, and believes what it is told: the hypergradient must be that
    of the value, so the inner and linear tolerances must be tight. One whose error matters ends as
    `Status.line_search_failed`. scipy works in float64 on the CPU; x goes to the estimator in its own dtype.

    Cost: one estimate an evaluation, 1.1 to 1.5 an iteration as a rule. Needs `pip install "bilevel[scipy]"`.

    Args:
        method: "L-BFGS-B", "BFGS", "CG", "SLSQP", "TNC" or "trust-constr"; all but BFGS and CG take bounds.
            `minimize(max_steps=...)` limits the iterations ("TNC": the evaluations).
        options: passed to scipy as they are, over what follows from `max_steps` and `tol`.

    Raises:
        ValueError: if the method is unknown, or there are bounds and it takes none.
        ImportError: at its use, without scipy.

    Example:
        >>> from bilevel import BilevelProblem, minimize
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> round(float(minimize(problem, x0, x0, outer=ScipyMinimize()).x), 6)
        3.0
    """

    method: str = "L-BFGS-B"
    options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        demand_types(self, {"options": "a dict of options of scipy, or None"})
        demand_method("ScipyMinimize", self.method)

    def drive(
        self,
        evaluate: Callable[[Tensor], tuple[float, Tensor]],
        x0: Tensor,
        *,
        bounds: tuple[Tensor, Tensor] | None,
        max_steps: int,
        tol: float | None,
    ) -> tuple[Tensor, Status]:
        optimize = scipy_optimize("ScipyMinimize")
        if bounds is not None and self.method not in BOUNDED:
            raise ValueError(
                f"`ScipyMinimize(method={self.method!r})` takes no bounds. Use one of {', '.join(BOUNDED)}."
            )
        if max_steps == 0:
            return x0.detach().clone(), Status.steps_used_up if tol is None else Status.max_steps
        seen: list[tuple[Tensor, float, Tensor]] = []

        def function(flat: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
            x = torch.from_numpy(flat.copy()).to(x0)
            value, gradient = evaluate(x)
            seen[:] = [(x, value, gradient)]
            return value, as_numpy(gradient)

        def norm_at(x: Tensor, gradient: Tensor) -> float:
            residual = gradient if bounds is None else x - (x - gradient).clamp(*bounds)
            return float(torch.linalg.vector_norm(residual))

        def stop_if_reached(flat: np.ndarray[Any, Any], *_: object) -> None:  # trust-constr tells more than the point
            x, gradient = seen[0][0], seen[0][2]
            if tol is not None and norm_at(x, gradient) <= tol and torch.equal(torch.from_numpy(flat).to(x), x):
                raise _ReachedError

        # scipy stops by the largest entry of the gradient, the contract is on the norm of the whole. With the bound on
        # an entry that implies it scipy never stops too early; the steps are watched, so that it does not stop too late
        # either, where the gradient is as small as its error and the next line search would fail.
        entry_tol = None if tol is None else tol / math.sqrt(max(x0.numel(), 1))
        settings: dict[str, Any] = dict(
            jac=True,
            method=self.method,
            bounds=None if bounds is None else optimize.Bounds(*(as_numpy(bound) for bound in bounds)),
            options={**options_of(self.method, entry_tol, max_steps), **(self.options or {})},
            callback=stop_if_reached,
        )
        try:
            found = optimize.minimize(function, as_numpy(x0), **settings)
        except _ReachedError:
            return seen[0][0], Status.successful
        x = torch.from_numpy(found.x.copy()).to(x0)
        if not torch.equal(seen[0][0], x):
            function(found.x)
        _, value, gradient = seen[0]
        return x, _status(found, value, norm_at(x, gradient), tol, exhausted(self.method, found, max_steps))


def _status(found: Any, value: float, norm: float, tol: float | None, spent: bool) -> Status:
    if not (math.isfinite(value) and math.isfinite(norm)):
        return Status.nonfinite
    if tol is not None and norm <= tol:
        return Status.successful
    if spent:
        return Status.max_steps if tol is not None else Status.steps_used_up
    if found.success:  # by a test of its own, on the change of value or of x
        return Status.successful if tol is None else Status.stagnated
    return Status.line_search_failed
