"""First-order optimizers as values: one `init` and one `step`, for the outer loop and inside `Iterate`."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, final

from torch import Tensor

from bilevel._result import Status
from bilevel._sets import AbstractSet
from bilevel.arguments.fits import demand_types
from bilevel.portable.pickling import AbstractPortable

OptimizerState: TypeAlias = dict[str, Any]  # tensors and numbers: what torch.save(weights_only=True) reads back


class AbstractOptimizer(AbstractPortable, abc.ABC):
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


@final
@dataclass(frozen=True, eq=False)
class Told:
    """What an evaluation at a point has found.

    Attributes:
        value: Phi there.
        grad: its gradient `(p,)`.
        failed: why the evaluation did not succeed; None: it did.
        stationarity: |h|, or with a constraint |x - P(x - h)|.
        value_error: how far the value may be from Phi, beyond rounding; None: that is not known.
    """

    value: float
    grad: Tensor
    failed: Status | None
    stationarity: float
    value_error: float | None = None

    def __post_init__(self) -> None:
        demand_types(self)


@final
@dataclass(frozen=True, eq=False)
class Move:
    """What a minimizer makes of an evaluation.

    Attributes:
        point: where Phi is to be evaluated next `(p,)`.
        state: what it remembers.
        stands: the point that it has accepted `(p,)`, from which it searches.
        rejected: whether what it was told of is worse than that: it goes back.
        ended: why it goes no further; None: it does.
        tol: at which stationarity it has arrived by its own measure; None: it has none.
    """

    point: Tensor
    state: OptimizerState
    stands: Tensor
    rejected: bool
    ended: Status | None
    tol: float | None

    def __post_init__(self) -> None:
        demand_types(self)


class AbstractMinimizer(AbstractPortable, abc.ABC):
    """An outer method that is told values as well as gradients, one evaluation at a time: one with a line search.

    A map (evaluation, state) -> (where to evaluate next, state) that modifies none of its arguments and keeps nothing:
    a run can be stopped after any evaluation, and goes on from its state. Phi must be one function, and the estimates
    accurate: for others there are optimizers.
    """

    @abc.abstractmethod
    def init(self, point: Tensor) -> OptimizerState:
        """The state before the first evaluation, which is at `point`; it has all entries that a later one has."""

    @abc.abstractmethod
    def tell(self, told: Told, point: Tensor, state: OptimizerState, region: AbstractSet | None) -> Move:
        """Take note of an evaluation.

        Args:
            told: what was found.
            point: where `(p,)`.
            state: what was remembered before.
            region: the convex set that x is in; None: all of R^p.
        """


class AbstractOuterDriver(AbstractPortable, abc.ABC):
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
            The last point and why the method stopped: `successful` if the tolerance, or its own, is met there,
            `steps_used_up` if the steps were, and there is no tolerance.
        """
