"""Regression of sinusoids."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch

from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, SEED, SIZE, demand_ranges
from bilevel.tasks._random import generator, normal, uniform
from bilevel.tasks.source import AbstractTasks, Batch, chosen, demand_placement


@final
@dataclass(frozen=True)
class Sinusoid(AbstractTasks):
    """y = A sin(x - phi) + noise N(0, 1), with A, phi and every x uniform; x and y are `(tasks, n, 1)`.

    The defaults are the tasks of Finn, Abbeel and Levine, ICML 2017. A batch also holds `amplitude` and `phase`
    `(tasks,)`.

    Args:
        shots: points of a support set.
        queries: points of a query set.
        amplitude: the interval of A.
        phase: the interval of phi.
        inputs: the interval of x.
        noise: standard deviation of the noise on all targets.
        dtype: of all tensors; None: torch's default.
        device: of all tensors.

    Raises:
        ValueError: if a count is not positive, an interval is empty or the noise is negative.

    Example:
        >>> batch = Sinusoid(shots=5).sample(2, seed=0)
        >>> {name: tuple(tensor.shape) for name, tensor in batch.items() if name.endswith("x")}
        {'support_x': (2, 5, 1), 'query_x': (2, 10, 1)}
    """

    shots: int = 10
    queries: int = 10
    amplitude: tuple[float, float] = (0.1, 5.0)
    phase: tuple[float, float] = (0.0, math.pi)
    inputs: tuple[float, float] = (-5.0, 5.0)
    noise: float = 0.0
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, shots=SIZE, queries=SIZE, noise=AT_LEAST_0)
        for name in ("amplitude", "phase", "inputs"):
            low, high = getattr(self, name)
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise ValueError(f"`Sinusoid({name}=...)` must be a finite interval (low, high). Got {(low, high)}.")
        demand_placement("Sinusoid", self.dtype, self.device)

    @checked(count=SIZE, seed=SEED)
    def sample(self, count: int, seed: int) -> Batch:
        draws, points = generator(seed), self.shots + self.queries
        amplitude = uniform(*self.amplitude, count, generator=draws)
        phase = uniform(*self.phase, count, generator=draws)
        x = uniform(*self.inputs, count, points, 1, generator=draws)
        y = amplitude.view(-1, 1, 1) * (x - phase.view(-1, 1, 1)).sin()
        if self.noise:
            y = y + self.noise * normal(count, points, 1, generator=draws)
        batch = {
            "support_x": x[:, : self.shots],
            "support_y": y[:, : self.shots],
            "query_x": x[:, self.shots :],
            "query_y": y[:, self.shots :],
            "amplitude": amplitude,
            "phase": phase,
        }
        dtype = chosen(self.dtype)
        return {name: tensor.to(self.device, dtype).contiguous() for name, tensor in batch.items()}
