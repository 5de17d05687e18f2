"""Any optimizer of torch.optim."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._optimizer import AbstractOptimizer, OptimizerState


@final
@dataclass(frozen=True)
class TorchOptim(AbstractOptimizer):
    """y <- one step of a `torch.optim` optimizer, then one of its scheduler; bit for bit the plain torch loop.

    The state is that of `state_dict()`, so it is saved and read back as any checkpoint of torch; at each step the
    optimizer is built anew from it on a copy of the point, hence nothing is modified: not the arguments, and no
    `.grad` that is anybody's. Building costs some 0.1 ms a step.

    Rows of a batch are independent problems only if the optimizer acts entry by entry, as SGD, Adam, AdamW and
    RMSprop do; those that normalize by the whole tensor do not. `ITD` cannot differentiate through it.

    Args:
        factory: params -> optimizer: `lambda params: torch.optim.AdamW(params, lr=0.1)`.
        scheduler: optimizer -> scheduler, stepped once a step: `lambda opt: torch.optim.lr_scheduler.StepLR(opt, 10)`.

    Raises:
        TypeError: if `factory` or `scheduler` is not callable.
        ValueError: at the first use, for `torch.optim.LBFGS`, which calls the objective itself (use the inner solver
            `LBFGS` instead), for an optimizer that is not on the parameters it was given, and for a scheduler that
            needs a metric.

    Example:
        >>> sgd, y = TorchOptim(lambda params: torch.optim.SGD(params, lr=0.5)), torch.tensor([1.0])
        >>> sgd.step(torch.tensor([1.0]), y, sgd.init(y))[0]
        tensor([0.5000])
    """

    factory: Callable[[list[Tensor]], torch.optim.Optimizer]
    scheduler: Callable[[Any], torch.optim.lr_scheduler.LRScheduler] | None = None

    def __post_init__(self) -> None:
        for name, function in (("factory", self.factory), ("scheduler", self.scheduler)):
            if not callable(function) and not (name == "scheduler" and function is None):
                raise TypeError(
                    f"`TorchOptim({name}=...)` must be a callable. Got {type(function).__name__}."
                    f" Write `TorchOptim(lambda params: torch.optim.SGD(params, lr=0.1))`."
                )

    def init(self, point: Tensor) -> OptimizerState:
        return _state(*self._build(point)[1:])

    def step(self, grad: Tensor, point: Tensor, state: OptimizerState) -> tuple[Tensor, OptimizerState]:
        parameter, optimizer, scheduler = self._build(point)
        state = copy.deepcopy(state)  # torch loads tensors without copying them, and then updates them in place
        optimizer.load_state_dict(state["optimizer"])
        parameter.grad = grad.detach().clone()
        optimizer.step()
        if scheduler is not None:
            scheduler.load_state_dict(state["scheduler"])
            scheduler.step()
        return parameter.detach(), _state(optimizer, scheduler)

    @property
    def entry_by_entry(self) -> bool:
        names = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adamax", "NAdam", "RAdam")
        return type(self._build(torch.zeros(1))[1]) in {getattr(torch.optim, name) for name in names}

    @property
    def needs_curvature(self) -> bool:
        return False

    def tuned(self, largest_curvature: Tensor) -> TorchOptim:
        return self

    def _build(self, point: Tensor) -> tuple[Tensor, torch.optim.Optimizer, Any]:
        parameter = point.detach().clone().requires_grad_()
        optimizer = self.factory([parameter])
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "`TorchOptim` cannot run torch.optim.LBFGS, which calls the objective itself. Use `LBFGS` of"
                " bilevel.solvers as the inner solver, or `ScipyMinimize()` as the outer method."
            )
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if len(held) != 1 or held[0] is not parameter:
            raise ValueError(
                f"`TorchOptim(factory=...)` must build an optimizer of the parameters it is given. Got one of"
                f" {len(held)} others. Write `lambda params: torch.optim.SGD(params, lr=0.1)`."
            )
        scheduler = None if self.scheduler is None else self.scheduler(optimizer)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ValueError(
                "`TorchOptim(scheduler=...)` must be a schedule in the number of steps. Got ReduceLROnPlateau, which"
                " needs a metric. Use `StepLR`, `CosineAnnealingLR` or `LambdaLR`."
            )
        return parameter, optimizer, scheduler


def _state(optimizer: torch.optim.Optimizer, scheduler: Any) -> OptimizerState:
    state: OptimizerState = {"optimizer": optimizer.state_dict()}
    if scheduler is not None:
        state["scheduler"] = copy.deepcopy(scheduler.state_dict())
    return state
