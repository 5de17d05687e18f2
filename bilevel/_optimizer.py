"""First-order optimizers as values: one `init` and one `step`, for the outer loop and inside `Iterate`."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from bilevel._result import Status

OptimizerState: TypeAlias = dict[str, Any]  # tensors and numbers: what torch.save(weights_only=True) reads back


class AbstractOptimizer(abc.ABC):
    """A map (gradient, point, state) -> (point, state) that modifies none of its arguments.

    Points and gradients are `(n,)` or `(*batch, n)`; every operation is elementwise, so that a batch is
    optimized row by row, and differentiable, so that ITD can differentiate through it.
    """

    @abc.abstractmethod
    def init(self, point: Tensor) -> OptimizerState:
        """The state before the first step."""

    @abc.abstractmethod
    def step(self, grad: Tensor, point: Tensor, state: OptimizerState) -> tuple[Tensor, OptimizerState]:
        """One step."""

    @property
    @abc.abstractmethod
    def needs_curvature(self) -> bool:
        """Whether a step size was left open, to be derived from the largest curvature L."""

    @abc.abstractmethod
    def tuned(self, largest_curvature: Tensor) -> AbstractOptimizer:
        """This optimizer with open step sizes derived from L: `()`, or `(*batch, 1)` for rows."""

    def with_step(self, step: float) -> AbstractOptimizer | None:
        """This optimizer with another step length; None: it has none of its own.

        One that says nothing is taken to have none: `bilevel run --step` then asks for `--outer NAME`.
        """
        return None


class AbstractOuterDriver(abc.ABC):
    """An outer method that runs its own loop (a library's minimizer), for deterministic problems."""

    @abc.abstractmethod
    def drive(
        self,
        evaluate: Callable[[Tensor], tuple[float, Tensor]],
        x0: Tensor,
        *,
        bounds: tuple[Tensor, Tensor] | None,
        max_steps: int,
        tol: float | None,
    ) -> tuple[Tensor, Status]:
        """Minimize Phi from x0.

        Args:
            evaluate: x `(p,)` -> (Phi(x), its gradient `(p,)`); each call is recorded by the caller.
            x0: the start `(p,)`.
            bounds: lower and upper bounds `(p,)` each, with infinities; None if there are none.
            max_steps: at most this many iterations.
            tol: stop when the (projected) gradient is at most this; None: the method's own default.

        Returns:
            The last point and why the method stopped.
        """
