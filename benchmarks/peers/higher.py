"""higher: `innerloop_ctx` over `torch.optim.SGD`; it has no implicit differentiation."""

from __future__ import annotations

import higher
import torch
from _harness import Call, UnavailableError
from _tasks import TaskLoad, one_by_one
from _workloads import Workload
from torch import Tensor


class _Leaves(torch.nn.Module):
    def __init__(self, leaves: tuple[Tensor, ...]) -> None:
        torch.nn.Module.__init__(self)
        self.leaves = torch.nn.ParameterList([torch.nn.Parameter(leaf.clone()) for leaf in leaves])


def implicit(workload: Workload, method: str, products: int, tolerance: float = 0.0) -> Call:  # noqa: ARG001
    """There is none."""
    raise UnavailableError("skipped: no implicit differentiation")


def unrolled(workload: Workload, steps: int) -> dict[str, Call]:
    """Through all the steps of gradient descent."""
    x = workload.x.clone().requires_grad_()
    module = _Leaves(workload.ys)
    optimizer = torch.optim.SGD(module.parameters(), lr=workload.step)

    def call() -> Tensor:
        with higher.innerloop_ctx(module, optimizer, copy_initial_weights=True) as (patched, steps_of):
            for _ in range(steps):
                steps_of.step(workload.g(x, tuple(patched.parameters())))
            return torch.autograd.grad(workload.f(x, tuple(patched.parameters())), x)[0]

    return {"innerloop_ctx": call}


def maml(load: TaskLoad) -> dict[str, Call]:
    """`innerloop_ctx` for one task after the other, differentiated to the initial weights."""
    module = load.module
    optimizer = torch.optim.SGD(module.parameters(), lr=load.step)

    def gradient(_: list[Tensor], k: int) -> tuple[Tensor, ...]:
        with higher.innerloop_ctx(module, optimizer, copy_initial_weights=False) as (patched, steps_of):
            for _step in range(load.steps):
                steps_of.step(torch.nn.functional.mse_loss(patched(load.X[k]), load.t[k]))
            loss = torch.nn.functional.mse_loss(patched(load.U[k]), load.c[k])
            return torch.autograd.grad(loss, list(module.parameters()))

    return {"innerloop_ctx": one_by_one(load, gradient)}


def imaml(load: TaskLoad) -> dict[str, Call]:  # noqa: ARG001
    """There is none."""
    raise UnavailableError("skipped: no implicit differentiation")
