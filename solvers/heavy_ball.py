"""The heavy ball method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._optimizer import AbstractOptimizer, OfX, OptimizerState, Setting, number, settings_of, with_values
from bilevel._validate import demand_type
from bilevel.arguments.ranges import AT_LEAST_0, BELOW_1, demand_range, demand_step


@final
@dataclass(frozen=True, init=False)
class HeavyBall(AbstractOptimizer):
    """y_{k+1} = y_k - step grad g(y_k) + momentum (y_k - y_{k-1}), y_{-1} = y_0.

    Converges linearly on a strongly convex quadratic of largest curvature L if 0 <= momentum < 1 and
    0 < step < 2 (1 + momentum) / L, so that step = 1 / L is safe at any momentum; the best choice has factor
    (sqrt(kappa) - 1) / (sqrt(kappa) + 1). Beyond quadratics the guarantee is local.

    Cost: two elementwise operations a step. Memory n.

    Source: Polyak, "Some methods of speeding up the convergence of iteration methods", USSR Comput. Math. Math.
    Phys. 4 (1964).

    Args:
        step: the step length; None (inside `Iterate` only) is 1 / L with L estimated at the start of each solve;
            and, where that fails, on the whole way. A function of x, or of (x, k) with k the number of the step
            (inside `Iterate` only): a learned one.
        momentum: how much of the last move is repeated, in [0, 1); or such a function.

    Raises:
        ValueError: if the step is not positive and finite, or a tensor of integers or with NaN, or the momentum is
            outside [0, 1).

    Example:
        >>> ball, y = HeavyBall(0.5, momentum=0.5), torch.tensor([1.0])
        >>> y, state = ball.step(torch.tensor([1.0]), y, ball.init(y))
        >>> ball.step(torch.tensor([0.0]), y, state)[0]
        tensor([0.2500])
    """

    step_size: float | Tensor | OfX | None  # given as `step=`; as an attribute that is the method's name
    momentum: float | OfX

    def __init__(self, step: float | Tensor | OfX | None = None, momentum: float | OfX = 0.9) -> None:
        demand_type("HeavyBall", "step", step, float | Tensor | OfX | None)
        demand_type("HeavyBall", "momentum", momentum, float | OfX)
        if step is not None and not callable(step):
            demand_step("HeavyBall", step)
        demand_range("HeavyBall", "momentum", momentum, BELOW_1)
        object.__setattr__(self, "step_size", step)
        object.__setattr__(self, "momentum", momentum)

    def __repr__(self) -> str:
        return f"HeavyBall(step={self.step_size}, momentum={self.momentum})"

    def init(self, point: Tensor) -> OptimizerState:
        return {"move": torch.zeros_like(point)}

    def step(self, grad: Tensor, point: Tensor, state: OptimizerState) -> tuple[Tensor, OptimizerState]:
        assert self.step_size is not None, "call `tuned` first"
        step, momentum = number("HeavyBall", "step", self.step_size), number("HeavyBall", "momentum", self.momentum)
        move = momentum * state["move"] - step * grad
        return point + move, {"move": move}

    @property
    def entry_by_entry(self) -> bool:
        return True

    @property
    def needs_curvature(self) -> bool:
        return self.step_size is None

    def tuned(self, largest_curvature: Tensor) -> HeavyBall:
        return HeavyBall(1.0 / largest_curvature, self.momentum) if self.needs_curvature else self

    def with_step(self, step: float) -> HeavyBall:
        return HeavyBall(step, self.momentum)

    @property
    def settings(self) -> tuple[Setting, ...]:
        return settings_of("HeavyBall", step=(self.step_size, AT_LEAST_0), momentum=(self.momentum, BELOW_1))

    def at(self, value: Callable[[Setting], Tensor]) -> HeavyBall:
        return with_values(self, self.settings, value)
