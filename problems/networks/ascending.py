"""An outer optimizer for saddle points: the last entries have a step of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._optimizer import AbstractOptimizer, OptimizerState
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import POSITIVE, SIZE, demand_ranges


@final
@dataclass(frozen=True)
class Ascending(AbstractOptimizer):
    """x_i - dual_step h_i for the last `duals` entries, and the steps of `primal` for the others.

    For outer variables of which the last are multipliers, whose derivative f offers with the sign turned.

    Args:
        primal: of the others.
        dual_step: of the multipliers.
        duals: how many there are.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> from bilevel.solvers import GradientDescent
        >>> optimizer = Ascending(GradientDescent(0.1), 0.5)
        >>> optimizer.step(
        ...     torch.tensor([1.0, -1.0]), torch.zeros(2), optimizer.init(torch.zeros(2))
        ... )[0]
        tensor([-0.1000,  0.5000])
    """

    primal: AbstractOptimizer
    dual_step: float
    duals: int = 1

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, dual_step=POSITIVE, duals=SIZE)

    def init(self, point: Tensor) -> OptimizerState:
        return self.primal.init(point[..., : -self.duals])

    def step(self, grad: Tensor, point: Tensor, state: OptimizerState) -> tuple[Tensor, OptimizerState]:
        end = -self.duals
        moved, state = self.primal.step(grad[..., :end], point[..., :end], state)
        return torch.cat([moved, point[..., end:] - self.dual_step * grad[..., end:]], -1), state

    @property
    def needs_curvature(self) -> bool:
        return self.primal.needs_curvature

    def tuned(self, largest_curvature: Tensor) -> AbstractOptimizer:
        return Ascending(self.primal.tuned(largest_curvature), self.dual_step, self.duals)

    def with_step(self, step: float) -> AbstractOptimizer | None:
        primal = self.primal.with_step(step)
        return None if primal is None else Ascending(primal, self.dual_step, self.duals)
