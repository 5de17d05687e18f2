"""Adam."""

from __future__ import annotations

import math
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
class Adam(AbstractOptimizer):
    """y <- y - step mhat / (sqrt(vhat + eps_root) + eps), with running means m of g and v of g^2, g = grad g(y).

    m <- beta1 m + (1 - beta1) g, v <- beta2 v + (1 - beta2) g^2, mhat = m / (1 - beta1^k), vhat = v / (1 - beta2^k)
    after k steps: `torch.optim.Adam` and, for |g| well above sqrt(eps_root), equal to it to rounding.

    eps_root is there for derivatives of the step: where a gradient coordinate is exactly zero, sqrt(v) has none,
    and the derivative of the iteration would be NaN. With the default it is 1 / eps there, large but finite, and
    values change by less than their rounding unless |g| is below 1e-6.

    Cost: a few elementwise operations a step. Memory 2n. Converges to a neighbourhood of a minimizer whose size
    shrinks with the step; not a descent method.

    Source: Kingma, Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1.

    Inside `Iterate` the step and the decays may be functions of x, or of (x, k) with k the number of the step: learned.

    Args:
        step: the step length.
        beta1: the decay of the mean of gradients, in [0, 1).
        beta2: the decay of the mean of squared gradients, in [0, 1).
        eps: added to the root.
        eps_root: added under the root.

    Raises:
        ValueError: if the step is not positive and finite, or a tensor of integers or with NaN, a decay is outside
            [0, 1), or an epsilon is negative.

    Example:
        >>> adam = Adam(0.1)
        >>> y = torch.tensor([2.0, -3.0])
        >>> adam.step(torch.tensor([5.0, -0.1]), y, adam.init(y))[0]
        tensor([ 1.9000, -2.9000])
    """

    step_size: float | Tensor | OfX  # given as `step=`; as an attribute that is the method's name
    beta1: float | OfX
    beta2: float | OfX
    eps: float
    eps_root: float

    def __init__(
        self,
        step: float | Tensor | OfX,
        beta1: float | OfX = 0.9,
        beta2: float | OfX = 0.999,
        eps: float = 1e-8,
        eps_root: float = 1e-24,
    ) -> None:
        demand_type("Adam", "step", step, float | Tensor | OfX)
        if not callable(step):
            demand_step("Adam", step)
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            demand_type("Adam", name, value, float | OfX)
        for name, value in (("eps", eps), ("eps_root", eps_root)):
            demand_type("Adam", name, value, float)
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            demand_range("Adam", name, value, BELOW_1)
        for name, value in (("eps", eps), ("eps_root", eps_root)):
            demand_range("Adam", name, value, AT_LEAST_0)
        for name, field in (
            ("step_size", step), ("beta1", beta1), ("beta2", beta2), ("eps", eps), ("eps_root", eps_root)
        ):  # fmt: skip
            object.__setattr__(self, name, field)

    def __repr__(self) -> str:
        return (
            f"Adam(step={self.step_size}, beta1={self.beta1}, beta2={self.beta2}, eps={self.eps},"
            f" eps_root={self.eps_root})"
        )

    def init(self, point: Tensor) -> OptimizerState:
        zero = torch.zeros_like(point)
        return {"m": zero, "v": zero, "count": torch.zeros((), dtype=point.dtype, device=point.device)}

    def step(self, grad: Tensor, point: Tensor, state: OptimizerState) -> tuple[Tensor, OptimizerState]:
        step, beta1, beta2 = (
            number("Adam", name, value)
            for name, value in (("step", self.step_size), ("beta1", self.beta1), ("beta2", self.beta2))
        )
        count = state["count"] + 1
        m = beta1 * state["m"] + (1 - beta1) * grad
        v = beta2 * state["v"] + (1 - beta2) * grad.square()
        mhat, vhat = m / _one_minus_power(beta1, count), v / _one_minus_power(beta2, count)
        moved = point - step * mhat / ((vhat + self.eps_root).sqrt() + self.eps)
        return moved, {"m": m, "v": v, "count": count}

    @property
    def entry_by_entry(self) -> bool:
        return True

    @property
    def needs_curvature(self) -> bool:
        return False

    def tuned(self, largest_curvature: Tensor) -> Adam:
        return self

    def with_step(self, step: float) -> Adam:
        return Adam(step, self.beta1, self.beta2, self.eps, self.eps_root)

    @property
    def settings(self) -> tuple[Setting, ...]:
        decays = {"beta1": (self.beta1, BELOW_1), "beta2": (self.beta2, BELOW_1)}
        return settings_of("Adam", step=(self.step_size, AT_LEAST_0), **decays)

    def at(self, value: Callable[[Setting], Tensor]) -> Adam:
        return with_values(self, self.settings, value)


def _one_minus_power(beta: float | Tensor, count: Tensor) -> Tensor:
    """1 - beta^k without the cancellation that costs float32 four digits at beta = 0.999, k = 1."""
    if isinstance(beta, Tensor):  # by powers, which have a derivative at beta = 0 as well
        return (1 - beta.double() ** count.double()).to(beta.dtype)
    return -torch.expm1(count * (math.log(beta) if beta else -math.inf))
