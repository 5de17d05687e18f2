"""Weight decay around an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from bilevel._optimizer import (
    AbstractOptimizer,
    OfX,
    OptimizerState,
    Setting,
    learned,
    number,
    settings_of,
    with_values,
)
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import SHARE, demand_ranges


@final
@dataclass(frozen=True)
class WeightDecay(AbstractOptimizer):
    """y_{k+1} = y_k + d_k - decay y_k, where d_k is the move of the wrapped optimizer: decoupled weight decay.

    In `torch.optim.AdamW` the decay of a step is lr times its `weight_decay`. With `Scheduled` around it both fall. The
    wrapped optimizer does not see it: its momentum and means are those of g.

    What it tends to is no minimizer of g (of gradient descent it is that of g + decay / (2 step) |y|^2). As an inner
    solver it makes of the inner problem an iteration, which `ITD`, `ESJ` and `FiniteDifference` differentiate;
    implicit estimators refuse. For those add the term to g.

    Cost: one elementwise operation beside the wrapped optimizer's. No state.

    Source: Loshchilov, Hutter, "Decoupled weight decay regularization", ICLR 2019, algorithms 1 and 2.

    Args:
        optimizer: what takes the steps.
        decay: the part of y that a step takes away, in [0, 1]; or a function of x, or of (x, k) with k the number of
            the step (inside `Iterate` only).

    Raises:
        TypeError: if the optimizer is none.
        ValueError: if the decay is out of range.

    Example:
        >>> import torch
        >>> from bilevel.solvers import GradientDescent
        >>> decayed, y = WeightDecay(GradientDescent(0.5), decay=0.25), torch.tensor([2.0])
        >>> decayed.step(torch.tensor([1.0]), y, decayed.init(y))[0]  # 2 - 0.5 - 0.5
        tensor([1.])
    """

    optimizer: AbstractOptimizer
    decay: float | OfX

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, decay=SHARE)

    def init(self, point: Tensor) -> OptimizerState:
        return self.optimizer.init(point)

    def step(self, grad: Tensor, point: Tensor, state: OptimizerState) -> tuple[Tensor, OptimizerState]:
        moved, state = self.optimizer.step(grad, point, state)
        return moved - number("WeightDecay", "decay", self.decay) * point, state

    @property
    def entry_by_entry(self) -> bool:
        return self.optimizer.entry_by_entry

    @property
    def needs_curvature(self) -> bool:
        return self.optimizer.needs_curvature

    def tuned(self, largest_curvature: Tensor) -> WeightDecay:
        return replace(self, optimizer=self.optimizer.tuned(largest_curvature))

    def with_step(self, step: float) -> WeightDecay | None:
        moved = self.optimizer.with_step(step)
        return None if moved is None else replace(self, optimizer=moved)

    @property
    def settings(self) -> tuple[Setting, ...]:
        return self._own + self.optimizer.settings

    @property
    def _own(self) -> tuple[Setting, ...]:
        return settings_of("WeightDecay", decay=(self.decay, SHARE))

    def at(self, value: Callable[[Setting], Tensor]) -> WeightDecay:
        return with_values(replace(self, optimizer=self.optimizer.at(value)), self._own, value)

    @property
    def why_iteration(self) -> str:
        return learned(self.settings) or "the weight decay of its optimizer is no part of g"
