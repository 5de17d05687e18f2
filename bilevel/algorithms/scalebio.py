"""ScaleBiO: F2SA as it is run on large models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from bilevel.algorithms.algorithm import AbstractAlgorithm, RowStep
from bilevel.algorithms.engine.each_run import EachRun
from bilevel.algorithms.engine.preset import AbstractPreset
from bilevel.algorithms.engine.steps import Schedule
from bilevel.algorithms.f2sa import F2SA
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, POSITIVE, demand_ranges
from bilevel.solvers.torch_optim import TorchOptim


@final
@dataclass(frozen=True)
class ScaleBiO(AbstractPreset):
    """ScaleBiO: `F2SA` of order 1 with one inner step, a fixed weight, and AdamW for x and both copies of y.

        u <- u - AdamW(grad_y g(x, u)),   w <- w - AdamW(grad_y g(x, w) + grad_y f(x, w) / weight)
        x <- P(x - AdamW(grad_x f(x, w) + weight [grad_x g(x, w) - grad_x g(x, u)]))

    all on the same batch of g and the same one of f. The paper ascends u on -weight g and descends w on f + weight g:
    AdamW does not see such factors (but in eps), so that the weight only sets the size of f against g in w. Its x are
    logits of the shares of the sources of training data, x -> softmax(x).

    Order 2 keeps the memory and removes the bias of the order of 1 / weight, for one gradient of f more: u then
    descends on g - f / weight. It needs that to be strongly convex, which the training loss of a network is not.

    Cost: 6 calls for each sample of a batch (order 2: 8). Memory: two y and the moments of three AdamW, 6 (q + ...).

    Converges: AdamW's steps do not vanish: pass a `schedule`, such as a cosine. For rates see `F2SA`.

    Source: Pan, Zhang, Zhang, Pi, et al., "ScaleBiO: scalable bilevel optimization for LLM data reweighting", ACL 2025,
    and its code.

    Args:
        inner_step: the learning rate of u and w.
        outer_step: the learning rate of x.
        weight: of g against f.
        weight_decay: of u and w, decoupled.
        order: 1 or 2.
        schedule: step -> the factor of all three learning rates; None: constant.
        outer_schedule: the same of that of x alone, where it is another one.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a learning rate or the weight is not positive, `weight_decay` is negative, or there is no such
            order; from `minimize`, if order=2 does not apply, or y is constrained or no minimizer of g.

    Example:
        >>> from bilevel import BilevelProblem, minimize
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> solution = minimize(problem, x0, x0, algorithm=ScaleBiO(0.1, 0.05), max_steps=150)
        >>> abs(float(solution.x) - 3) < 0.5
        True
    """

    inner_step: float
    outer_step: float
    weight: float = 10.0
    weight_decay: float = 5e-4
    order: Literal[1, 2] = 1
    schedule: Schedule | None = None
    outer_schedule: Schedule | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, inner_step=POSITIVE, outer_step=POSITIVE, weight=POSITIVE, weight_decay=AT_LEAST_0)

    def combination(self) -> F2SA:
        return F2SA(
            TorchOptim(AdamW(self.inner_step, self.weight_decay)),
            TorchOptim(AdamW(self.outer_step, 0.0)),
            self.weight,
            order=self.order,
            schedule=self.schedule,
            outer_schedule=self.outer_schedule,
            shared=True,
        )

    def beside(self, inner_step: RowStep, outer_step: RowStep) -> AbstractAlgorithm[Any] | None:
        return self.loop.beside(self._adams(inner_step, self.weight_decay), self._adams(outer_step, 0.0))

    @staticmethod
    def _adams(rates: RowStep, decay: float) -> EachRun:
        """AdamW with a learning rate for each of several runs."""
        assert isinstance(rates, Tensor)
        return EachRun(tuple(TorchOptim(AdamW(rate, decay)) for rate in rates.tolist()))


@final
@dataclass(frozen=True)
class AdamW:
    """params -> `torch.optim.AdamW` of them, as a value.

    Args:
        lr: its learning rate.
        weight_decay: its weight decay.
    """

    lr: float
    weight_decay: float

    def __call__(self, params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=self.lr, weight_decay=self.weight_decay)
