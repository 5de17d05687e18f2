"""First-order optimizers as values: one `init` and one `step`, for the outer loop and inside `Iterate`."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, cast, final

from torch import Tensor

from bilevel._result import Status
from bilevel._sets import AbstractSet
from bilevel.arguments.fits import demand_types, takes
from bilevel.arguments.ranges import Range
from bilevel.portable.pickling import AbstractPortable

OptimizerState: TypeAlias = dict[str, Any]  # tensors and numbers: what torch.save(weights_only=True) reads back
OfX: TypeAlias = Callable[[Any], Any] | Callable[[Any, int], Any]  # a setting of x, or of x and the number of the step
Made = TypeVar("Made")


@final
@dataclass(frozen=True, eq=False)
class Setting:
    """A setting of an optimizer that is a function of x.

    Attributes:
        owner: whose, as one writes it.
        name: of the argument.
        function: x -> a number, or the structure of y, with `by_step` a vector; or (x, k) -> the same for step k alone.
        allowed: the numbers that it may be.
        by_step: whether it has one number for each step.
    """

    owner: str
    name: str
    function: OfX
    allowed: Range
    by_step: bool = False

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def of_step(self) -> bool:
        """Whether it is a function of (x, k), k = 0, 1, ... the number of the step."""
        return not takes(self.function, 1)

    def at(self, step: int) -> Callable[[Any], Any]:
        """The function of x that it is at a step."""
        if not self.of_step:
            return cast("Callable[[Any], Any]", self.function)
        function = cast("Callable[[Any, int], Any]", self.function)
        return lambda x: function(x, step)


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

    @property
    def entry_by_entry(self) -> bool:
        """Whether an entry of a step depends on that entry of gradients and points alone. No, unless said."""
        return False

    @abc.abstractmethod
    def tuned(self, largest_curvature: Tensor) -> AbstractOptimizer:
        """This optimizer with open step sizes derived from L: `()`, or `(*batch, 1)` for rows."""

    def with_step(self, step: float) -> AbstractOptimizer | None:
        """This optimizer with another step length; None: it has none of its own.

        One that says nothing is taken to have none: `bilevel run --step` then asks for `--outer NAME`.
        """
        return None

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Its settings that are functions of x: none unless it says otherwise."""
        return ()

    def at(self, value: Callable[[Setting], Tensor]) -> AbstractOptimizer:
        """This optimizer with each of `settings` replaced by its value: `(*batch, 1)` or `(*batch, n)`, differentiable.

        One that says nothing has none.
        """
        return self

    @property
    def why_iteration(self) -> str:
        """Why y is what its steps make of a start, and not a minimizer of g: a clause; empty: it tends to be one.

        As here where settings are functions of x: how y_N moves with x is then not what grad_y g = 0 says.
        """
        return learned(self.settings)


def learned(settings: tuple[Setting, ...]) -> str:
    """That these settings are functions of x, as a clause; empty: there are none."""
    names = list(dict.fromkeys(setting.name for setting in settings))
    told = " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
    return f"{told} of its optimizer {'are functions' if names[1:] else 'is a function'} of x" if names else ""


def demand_numbers(call: str, argument: str, optimizer: AbstractOptimizer) -> None:
    """Refuse an optimizer with settings that are functions of x, where there is no inner problem to give them x.

    Raises:
        ValueError: naming the call, the setting and where it may be a function.
    """
    for setting in optimizer.settings[:1]:
        raise ValueError(
            f"`{call}({argument}=...)`: the {setting.name} of `{setting.owner}` must be a number. Got a function of x,"
            f" which only inner solvers of unrolled or perturbed solves are given. Pass a number here, and learned"
            f" settings by `ITD(Iterate({setting.owner}({setting.name}=function), max_steps=N))`."
        )


def settings_of(owner: str, **given: tuple[Any, Range]) -> tuple[Setting, ...]:
    """Those of some settings, by name, that are functions of x, for `AbstractOptimizer.settings`."""
    return tuple(Setting(owner, name, value, allowed) for name, (value, allowed) in given.items() if callable(value))


def with_values(optimizer: Made, settings: tuple[Setting, ...], value: Callable[[Setting], Tensor]) -> Made:
    """A copy of an optimizer whose fields, named like its settings, have their values; no ranges are looked at."""
    if not settings:
        return optimizer
    made = object.__new__(type(optimizer))
    vars(made).update(vars(optimizer))
    for setting in settings:
        vars(made)["step_size" if setting.name == "step" else setting.name] = value(setting)
    return made


def number(owner: str, name: str, setting: Any) -> Any:
    """A setting where a step is taken: a number or a tensor.

    Raises:
        ValueError: if it is a function of x still.
    """
    if callable(setting):
        raise ValueError(
            f"`{owner}({name}=...)` is a function of x, which only the steps of an inner problem are given: pass"
            f" `ITD(Iterate({owner}(...), max_steps=N))`, `ESJ` or `FiniteDifference`, or a number."
        )
    return setting


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
