"""hypertorch: `CG`, `neumann`, `reverse_unroll`, `reverse`.

Settings: `tol=0` by default, so that it takes all the steps; `set_grad=False`. For CG the fixed-point map is y - grad
g, which saves a multiplication and does not change CG; for Neumann it is gradient descent with the workload's step.
"""

from __future__ import annotations

import torch
from _harness import Call
from _tasks import TaskLoad, one_by_one
from _workloads import Workload
from hypergrad import hypergradients
from hypergrad.diff_optimizers import GradientDescent
from torch import Tensor


def implicit(workload: Workload, method: str, products: int, tolerance: float = 0.0) -> Call:
    """CG or Neumann at the given inner solution."""

    def gradients(params: list[Tensor], hparams: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(workload.g(hparams[0], params), params, create_graph=True)

    def plain(params: list[Tensor], hparams: list[Tensor]) -> list[Tensor]:
        return [w - g for w, g in zip(params, gradients(params, hparams), strict=True)]

    def descent(params: list[Tensor], hparams: list[Tensor]) -> list[Tensor]:
        return [w - workload.step * g for w, g in zip(params, gradients(params, hparams), strict=True)]

    def outer(params: list[Tensor], hparams: list[Tensor]) -> Tensor:
        return workload.f(hparams[0], params)

    x = workload.x.clone().requires_grad_()
    solver, fp_map = (hypergradients.CG, plain) if method == "cg" else (hypergradients.neumann, descent)

    def call() -> Tensor:
        return solver(list(workload.ys), [x], products, fp_map, outer, tol=tolerance, set_grad=False)[0]

    return call


def unrolled(workload: Workload, steps: int) -> dict[str, Call]:
    """Through all the steps of gradient descent: with one graph, and from kept iterates."""

    def inner(params: list[Tensor], hparams: list[Tensor]) -> Tensor:
        return workload.g(hparams[0], params)

    def outer(params: list[Tensor], hparams: list[Tensor]) -> Tensor:
        return workload.f(hparams[0], params)

    x = workload.x.clone().requires_grad_()

    def unroll() -> Tensor:
        descent = GradientDescent(loss_f=inner, step_size=workload.step)
        params = [y.clone().requires_grad_() for y in workload.ys]
        for _ in range(steps):
            params = descent(params, [x], create_graph=True)
        return hypergradients.reverse_unroll(params, [x], outer, set_grad=False)[0]

    def iterates() -> Tensor:
        descent = GradientDescent(loss_f=inner, step_size=workload.step)
        history = [[y.clone().requires_grad_() for y in workload.ys]]
        for _ in range(steps):
            new = descent(history[-1], [x], create_graph=False)
            history.append([w.detach().requires_grad_() for w in new])

        def update(params: list[Tensor], hparams: list[Tensor]) -> list[Tensor]:
            return descent(params, hparams, create_graph=True)

        return hypergradients.reverse(history, [x], [update] * steps, outer, set_grad=False)[0]

    return {"reverse_unroll": unroll, "reverse": iterates}


def maml(load: TaskLoad) -> dict[str, Call]:
    """`reverse_unroll` for one task after the other, from a start that is a clone of the weights."""

    def gradient(x: list[Tensor], k: int) -> list[Tensor]:
        descent = GradientDescent(loss_f=lambda params, hparams: load.g(hparams, params, k), step_size=load.step)
        params = [leaf.clone() for leaf in x]
        for _ in range(load.steps):
            params = descent(params, x, create_graph=True)
        return hypergradients.reverse_unroll(params, x, lambda params, _: load.f(params, k), set_grad=False)

    return {"reverse_unroll": one_by_one(load, gradient)}


def imaml(load: TaskLoad) -> dict[str, Call]:
    """`CG` for one task after the other, as in its own example of iMAML."""

    def gradient(x: list[Tensor], k: int) -> list[Tensor]:
        def inner(params: list[Tensor], hparams: list[Tensor]) -> Tensor:
            return load.g(hparams, params, k)

        descent = GradientDescent(loss_f=inner, step_size=load.step)
        params = [leaf.detach().clone().requires_grad_() for leaf in x]
        for _ in range(load.steps):
            params = [w.detach().requires_grad_() for w in descent(params, x, create_graph=False)]
        fp_map = GradientDescent(loss_f=inner, step_size=1.0)
        return hypergradients.CG(
            params, x, load.products, fp_map, lambda params, _: load.f(params, k), tol=0.0, set_grad=False
        )

    return {"CG": one_by_one(load, gradient)}
