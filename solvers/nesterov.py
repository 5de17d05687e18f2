"""Nesterov's accelerated gradient method."""

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
class Nesterov(AbstractOptimizer):
    """u_k = z_{k-1} - step grad g(z_{k-1}), z_k = u_k + b_k (u_k - u_{k-1}), z_0 = u_0; the points are the z_k.

    b_k is `momentum`, or (k - 1) / (k + 2), with which g(u_k) - g* <= 2 |y_0 - y*|^2 / (step (k + 1)^2) for convex g
    and step <= 1 / L. With b_k = (sqrt(kappa) - 1) / (sqrt(kappa) + 1) and step = 1 / L it converges linearly with
    factor 1 - 1 / sqrt(kappa) in value for strongly convex g. On quadratics step = 1 / L is safe at any momentum.

    Cost: a few elementwise operations a step. Memory n. Not a descent method.

    Source: Nesterov, "A method of solving a convex programming problem with convergence rate O(1/k^2)", Soviet
    Math. Dokl. 27 (1983); the form with (k - 1) / (k + 2) is that of Su, Boyd, Candes, "A differential equation for
    modeling Nesterov's accelerated gradient method", J. Mach. Learn. Res. 17 (2016), equation (1).

    Args:
        step: the step length; None (inside `Iterate` only) is 1 / L with L estimated at the start of each solve;
            and, where that fails, on the whole way. A function of x, or of (x, k) with k the number of the step
            (inside `Iterate` only): a learned one.
        momentum: b_k in [0, 1) for all k; None is (k - 1) / (k + 2). Or such a function.

    Raises:
        ValueError: if the step is not positive and finite, or a tensor of integers or with NaN, or the momentum is
            outside [0, 1).

    Example:
        >>> nesterov, z = Nesterov(0.5, momentum=0.5), torch.tensor([1.0])
        >>> nesterov.step(torch.tensor([1.0]), z, nesterov.init(z))[0]
        tensor([0.2500])
    """

    step_size: float | Tensor | OfX | None  # given as `step=`; as an attribute that is the method's name
    momentum: float | OfX | None

    def __init__(self, step: float | Tensor | OfX | None = None, momentum: float | OfX | None = None) -> None:
        demand_type("Nesterov", "step", step, float | Tensor | OfX | None)
        demand_type("Nesterov", "momentum", momentum, float | OfX | None)
        if step is not None and not callable(step):
            demand_step("Nesterov", step)
        demand_range("Nesterov", "momentum", momentum, BELOW_1)
        object.__setattr__(self, "step_size", step)
        object.__setattr__(self, "momentum", momentum)

    def __repr__(self) -> str:
        return f"Nesterov(step={self.step_size}, momentum={self.momentum})"

    def init(self, point: Tensor) -> OptimizerState:
        return {"u": point, "count": torch.zeros((), dtype=point.dtype, device=point.device)}

    def step(self, grad: Tensor, point: Tensor, state: OptimizerState) -> tuple[Tensor, OptimizerState]:
        assert self.step_size is not None, "call `tuned` first"
        count = state["count"] + 1
        given = number("Nesterov", "momentum", self.momentum)
        momentum = (count - 1) / (count + 2) if given is None else given
        u = point - number("Nesterov", "step", self.step_size) * grad
        return u + momentum * (u - state["u"]), {"u": u, "count": count}

    @property
    def entry_by_entry(self) -> bool:
        return True

    @property
    def needs_curvature(self) -> bool:
        return self.step_size is None

    def tuned(self, largest_curvature: Tensor) -> Nesterov:
        return Nesterov(1.0 / largest_curvature, self.momentum) if self.needs_curvature else self

    def with_step(self, step: float) -> Nesterov:
        return Nesterov(step, self.momentum)

    @property
    def settings(self) -> tuple[Setting, ...]:
        return settings_of("Nesterov", step=(self.step_size, AT_LEAST_0), momentum=(self.momentum, BELOW_1))

    def at(self, value: Callable[[Setting], Tensor]) -> Nesterov:
        return with_values(self, self.settings, value)
