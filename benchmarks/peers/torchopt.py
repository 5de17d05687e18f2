"""torchopt: `custom_root` with `solve_cg` or `solve_inv(ns=True)`, and `FuncOptimizer(sgd)` unrolled.

Settings: `rtol=atol=0` by default, so that CG takes all the steps; the optimality condition is `torch.func.grad`
of g. Its deprecation warnings, which come at every call, are silenced.
"""

from __future__ import annotations

import warnings

import torch
import torchopt
from _harness import Call
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
