"""Gradient clipping around an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._optimizer import AbstractOptimizer, OptimizerState, Setting
from bilevel._validate import demand_types
from bilevel.arguments.ranges import Range, demand_ranges

_ANY = Range(open=True, infinite=True)  # infinity clips nothing


@final
@dataclass(frozen=True)
class Clipped(AbstractOptimizer):
    """The wrapped optimizer, given g min(1, max_norm / |g|), or each entry of g cut to [-max_value, max_value].

    With both, the entries are cut first. What is not finite stays so: NaN is never hidden. Rows of a batch are clipped
    each by its own norm.

    Cost: a norm and a product a step.

    Args:
        optimizer: what takes the steps.
        max_norm: the largest Euclidean norm of the gradient; None: any.
        max_value: the largest absolute value of its entries; None: any.

    Raises:
        TypeError: if the optimizer is none.
        ValueError: if a bound is not positive, or there is none.

    Example:
        >>> from bilevel.solvers import GradientDescent
        >>> clipped = Clipped(GradientDescent(1.0), max_norm=1.0)
        >>> clipped.step(torch.tensor([3.0, 4.0]), torch.zeros(2), clipped.init(torch.zeros(2)))[0]
        tensor([-0.6000, -0.8000])
    """

    optimizer: AbstractOptimizer
    max_norm: float | None = None
    max_value: float | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        if not isinstance(self.optimizer, AbstractOptimizer):
            raise TypeError(
                f"`Clipped(optimizer=...)` must be an optimizer such as `Adam(1e-3)`. Got"
                f" {type(self.optimizer).__name__}."
            )
        if self.max_norm is None and self.max_value is None:
            raise ValueError("`Clipped` needs `max_norm=` or `max_value=`.")
        demand_ranges(self, max_norm=_ANY, max_value=_ANY)

    def init(self, point: Tensor) -> OptimizerState:
        return self.optimizer.init(point)

    def step(self, grad: Tensor, point: Tensor, state: OptimizerState) -> tuple[Tensor, OptimizerState]:
        if self.max_value is not None:
            grad = torch.where(grad.isfinite(), grad.clamp(-self.max_value, self.max_value), grad)
        if self.max_norm is not None:
            norm = torch.linalg.vector_norm(grad, dim=-1, keepdim=True)
            grad = torch.where(norm > self.max_norm, grad * (self.max_norm / norm), grad)
        return self.optimizer.step(grad, point, state)

    @property
    def needs_curvature(self) -> bool:
        return self.optimizer.needs_curvature

    def tuned(self, largest_curvature: Tensor) -> Clipped:
        return Clipped(self.optimizer.tuned(largest_curvature), self.max_norm, self.max_value)

    def with_step(self, step: float) -> Clipped | None:
        moved = self.optimizer.with_step(step)
        return None if moved is None else Clipped(moved, self.max_norm, self.max_value)

    @property
    def settings(self) -> tuple[Setting, ...]:
        return self.optimizer.settings

    def at(self, value: Callable[[Setting], Tensor]) -> Clipped:
        return Clipped(self.optimizer.at(value), self.max_norm, self.max_value)

    @property
    def why_iteration(self) -> str:
        return self.optimizer.why_iteration
