"""A quasi-Newton search between two evaluations: where it stands, its curvature pairs, the line search going on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from bilevel._numerics.wolfe import strong_wolfe
from bilevel._optimizer import OptimizerState, Told
from bilevel._result import Status

# Differences of Phi that are less than the error of its values are not believed, and slopes decide. Where the estimate
# does not tell that error it is taken for this share of Phi, which is what the tolerances of names leave.
_NOISE = {torch.float64: 1e-8}
_COARSE_NOISE = 1e-4
_GROWTH = 10.0  # of the step along a projected gradient while Phi falls ever more steeply


@final
@dataclass(frozen=True, eq=False)
class SearchState:
    """Where it stands, what it remembers of curvature, and the line search that is going on."""

    x: Tensor
    grad: Tensor
    steps: Tensor
    changes: Tensor
    direction: Tensor
    value: float = 0.0
    begun: bool = False
    good: bool = True
    error: float = 0.0
    scale: float = 0.0
    least_value: float = math.inf
    least_norm: float = math.inf
    idle: int = 0
    slope: float = 0.0
    first: float = 0.0
    t: float = 0.0
    most: float = math.inf
    plain: bool = True
    failures: int = 0
    length: float = 1.0
    edges: int = 0
    reach: float = math.inf
    failed: str = ""
    trials: list[list[float]] = field(default_factory=list)

    @property
    def noise(self) -> float:
        """The error of a difference of two values: each has its own, and that of the next may be larger."""
        return 4 * self.error + 100 * torch.finfo(self.x.dtype).eps * abs(self.value)

    def as_dict(self) -> OptimizerState:
        """Plain data, from which it is made again."""
        return dict(vars(self))

    def but(self, **changes: Any) -> SearchState:
        """The same with some entries changed."""
        return SearchState(**{**vars(self), **changes})

    def accepting(self, told: Told, point: Tensor) -> SearchState:
        """Standing at another point."""
        eps = torch.finfo(point.dtype).eps
        better = told.stationarity < self.least_norm or told.value < self.least_value - eps * abs(self.least_value)
        return self.but(
            x=point,
            grad=told.grad,
            value=told.value,
            begun=True,
            good=told.failed is None,
            error=max(_error(told, point), self.error / 2),
            scale=self.scale if self.begun else told.stationarity,
            idle=0 if better or not self.begun else self.idle + 1,
            least_value=min(self.least_value, told.value),
            least_norm=min(self.least_norm, told.stationarity),
        )

    def at_edge(self, point: Tensor) -> SearchState:
        """Knowing whether estimates failed on the way to a point: the next step is then not much longer."""
        if not self.failures:
            return self.but(edges=0, reach=math.inf)
        return self.but(edges=self.edges + 1, reach=2 * float(torch.linalg.vector_norm(point - self.x)))

    def paired(self, grad: Tensor, point: Tensor, memory: int) -> SearchState:
        """With the step from where it stands to a point remembered, if the curvature along it is positive."""
        s, w = point - self.x, grad - self.grad
        least = torch.finfo(s.dtype).eps * float(torch.linalg.vector_norm(s) * torch.linalg.vector_norm(w))
        if not float(s @ w) > max(least, torch.finfo(s.dtype).tiny):
            return self.but(length=_GROWTH * self.length if self.t >= self.most else self.length)
        return self.but(
            steps=torch.cat([self.steps, s.unsqueeze(0)])[-memory:],
            changes=torch.cat([self.changes, w.unsqueeze(0)])[-memory:],
        )

    def search(self, phi: float, slope: float) -> float | Status:
        """What the line search says to the latest trial: the next one, or how it has ended."""
        search = strong_wolfe(self.value, self.slope, self.first, self.noise, self.most)
        next(search)
        try:
            for _, earlier, at in self.trials:
                search.send((earlier, at))
            return search.send((phi, slope))
        except StopIteration as stop:
            ended: Status = stop.value
            return ended


def _error(told: Told, point: Tensor) -> float:
    if told.value_error is not None and math.isfinite(told.value_error):
        return told.value_error
    return _NOISE.get(point.dtype, _COARSE_NOISE) * abs(told.value)
