"""torchopt: `custom_root` with `solve_cg` or `solve_inv(ns=True)`, and `FuncOptimizer(sgd)` unrolled.

Settings: `rtol=atol=0` by default, so that CG takes all the steps; the optimality condition is `torch.func.grad`
of g. Its deprecation warnings, which come at every call, are silenced.
"""

from __future__ import annotations

import warnings

import torch
import torchopt
from _harness import Call
from _tasks import TaskLoad, one_by_one
from _workloads import Workload
from torch import Tensor

warnings.filterwarnings("ignore", category=FutureWarning, message=".*functorch.*")


def implicit(workload: Workload, method: str, products: int, tolerance: float = 0.0) -> Call:
    """CG or Neumann at the given inner solution."""
    if method == "cg":
        solve = torchopt.linear_solve.solve_cg(maxiter=products, rtol=tolerance, atol=0.0)
    else:
        solve = torchopt.linear_solve.solve_inv(ns=True, maxiter=products, alpha=workload.step)
    optimality = torch.func.grad(lambda ys, x: workload.g(x, ys))

    @torchopt.diff.implicit.custom_root(lambda ys, x: optimality(ys, x), argnums=1, solve=solve)
    def solution(init: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG001
        return init

    x = workload.x.clone().requires_grad_()

    def call() -> Tensor:
        return torch.autograd.grad(workload.f(x, solution(workload.ys, x)), x)[0]

    return call


def unrolled(workload: Workload, steps: int) -> dict[str, Call]:
    """Through all the steps of gradient descent."""
    x = workload.x.clone().requires_grad_()

    def call() -> Tensor:
        optimizer = torchopt.FuncOptimizer(torchopt.sgd(lr=workload.step))
        ys: tuple[Tensor, ...] = tuple(y.clone().requires_grad_() for y in workload.ys)
        for _ in range(steps):
            ys = optimizer.step(workload.g(x, ys), ys)
        return torch.autograd.grad(workload.f(x, ys), x)[0]

    return {"FuncOptimizer": call}


def maml(load: TaskLoad) -> dict[str, Call]:
    """`MetaSGD` for one task after the other, the module's state put back between."""
    module = load.module

    def gradient(_: list[Tensor], k: int) -> tuple[Tensor, ...]:
        weights = list(module.parameters())
        optimizer = torchopt.MetaSGD(module, lr=load.step)
        before = torchopt.extract_state_dict(module, by="reference", detach_buffers=True)
        for _step in range(load.steps):
            optimizer.step(torch.nn.functional.mse_loss(module(load.X[k]), load.t[k]))
        found = torch.autograd.grad(torch.nn.functional.mse_loss(module(load.U[k]), load.c[k]), weights)
        torchopt.recover_state_dict(module, before)
        return found

    return {"MetaSGD": one_by_one(load, gradient)}


def imaml(load: TaskLoad) -> dict[str, Call]:
    """`custom_root` with `solve_cg` for one task after the other."""
    solve = torchopt.linear_solve.solve_cg(maxiter=load.products, rtol=0.0, atol=0.0)

    def gradient(x: list[Tensor], k: int) -> tuple[Tensor, ...]:
        optimality = torch.func.grad(lambda ys, x: load.g(x, ys, k))

        @torchopt.diff.implicit.custom_root(lambda ys, x: optimality(ys, x), argnums=1, solve=solve)
        def solution(init: tuple[Tensor, ...], x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            fixed, ys = [leaf.detach() for leaf in x], [leaf.detach().requires_grad_() for leaf in init]
            for _step in range(load.steps):
                with torch.enable_grad():
                    grads = torch.autograd.grad(load.g(fixed, ys, k), ys)
                ys = [(y - load.step * g).detach().requires_grad_() for y, g in zip(ys, grads, strict=True)]
            return tuple(ys)

        found = solution(tuple(leaf.detach().clone() for leaf in x), tuple(x))
        return torch.autograd.grad(load.f(found, k), x)

    return {"custom_root, CG": one_by_one(load, gradient)}
