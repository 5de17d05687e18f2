"""Steps of several runs side by side, by an optimizer each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor

from bilevel._optimizer import AbstractOptimizer, OptimizerState
from bilevel.algorithms.engine.rows import AbstractRows


@final
@dataclass(frozen=True, eq=False)
class EachState(AbstractRows):
    """The states of the optimizers of several runs."""

    states: tuple[OptimizerState, ...]

    def of_run(self, k: int) -> OptimizerState:
        return self.states[k]


@final
@dataclass(frozen=True)
class EachRun(AbstractOptimizer, AbstractRows):
    """Row k of `(runs, ...)` is stepped by optimizer k, as it would be alone: any optimizer, whatever it looks at.

    Cost: a step of an optimizer for each run; derivatives, which cost more, are those of all runs at once.

    Args:
        optimizers: one for each run.
    """

    optimizers: tuple[AbstractOptimizer, ...]

    def init(self, point: Tensor) -> OptimizerState:
        states = tuple(each.init(row) for each, row in zip(self.optimizers, point, strict=True))
        return cast("OptimizerState", EachState(states))

    def step(self, grad: Tensor, point: Tensor, state: OptimizerState) -> tuple[Tensor, OptimizerState]:
        before: Any = state
        rows = zip(self.optimizers, grad, point, before.states, strict=True)
        moved = [each.step(d, row, own) for each, d, row, own in rows]
        points, states = zip(*moved, strict=True)
        return torch.stack(points), cast("OptimizerState", EachState(states))

    def of_run(self, k: int) -> AbstractOptimizer:
        return self.optimizers[k]

    @property
    def needs_curvature(self) -> bool:
        return any(each.needs_curvature for each in self.optimizers)

    def tuned(self, largest_curvature: Tensor) -> EachRun:
        rows = zip(self.optimizers, largest_curvature, strict=True)
        return EachRun(tuple(each.tuned(row) for each, row in rows))


def beside_steps(steps: Sequence[Any], like: Tensor) -> Tensor | EachRun | None:
    """The steps of several runs as one value: numbers as a tensor `(runs,)`; None where some are none.

    Args:
        steps: one for each run: numbers, or optimizers.
        like: a tensor of the dtype and on the device of x.
    """
    if all(isinstance(step, int | float) for step in steps):
        return torch.tensor(steps, dtype=like.dtype, device=like.device)
    if all(isinstance(step, AbstractOptimizer) for step in steps):
        return EachRun(tuple(steps))
    return None
