"""Gradient descent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from torch import Tensor

from bilevel._optimizer import AbstractOptimizer, OfX, OptimizerState, Setting, number, settings_of, with_values
from bilevel._validate import demand_type
from bilevel.arguments.ranges import AT_LEAST_0, demand_step


@final
@dataclass(frozen=True, init=False)
class GradientDescent(AbstractOptimizer):
    """y <- y - step grad g(y).

    Converges linearly, with factor max(|1 - step mu|, |1 - step L|), on a mu-strongly convex L-smooth objective
    if 0 < step < 2 / L; diverges in general if step > 2 / L. No state.

    Args:
        step: the step length; None (inside `Iterate` only) is 1 / L with L estimated at the start of each solve;
            and, where that fails, on the whole way. A function of x, or of (x, k) with k the number of the step
            (inside `Iterate` only): a learned one.

    Raises:
        ValueError: if the step is not positive and finite, or a tensor of integers or with NaN.

    Example:
        >>> import torch
        >>> y, _ = GradientDescent(0.5).step(torch.tensor([2.0]), torch.tensor([1.0]), {})
        >>> y
        tensor([0.])
    """

    step_size: float | Tensor | OfX | None  # given as `step=`; as an attribute that is the method's name

    def __init__(self, step: float | Tensor | OfX | None = None) -> None:
        demand_type("GradientDescent", "step", step, float | Tensor | OfX | None)
        if step is not None and not callable(step):
            demand_step("GradientDescent", step)
        object.__setattr__(self, "step_size", step)

    def __repr__(self) -> str:
        return f"GradientDescent(step={self.step_size})"

    def init(self, point: Tensor) -> OptimizerState:
        return {}

    def step(self, grad: Tensor, point: Tensor, state: OptimizerState) -> tuple[Tensor, OptimizerState]:
        assert self.step_size is not None, "call `tuned` first"
        step = (
            self.step_size if isinstance(self.step_size, float) else number("GradientDescent", "step", self.step_size)
        )
        return point - step * grad, state

    @property
    def entry_by_entry(self) -> bool:
        return True

    @property
    def needs_curvature(self) -> bool:
        return self.step_size is None

    def tuned(self, largest_curvature: Tensor) -> GradientDescent:
        return GradientDescent(1.0 / largest_curvature) if self.needs_curvature else self

    def with_step(self, step: float) -> GradientDescent:
        return GradientDescent(step)

    @property
    def settings(self) -> tuple[Setting, ...]:
        return settings_of("GradientDescent", step=(self.step_size, AT_LEAST_0)) if callable(self.step_size) else ()

    def at(self, value: Callable[[Setting], Tensor]) -> GradientDescent:
        return with_values(self, self.settings, value)
