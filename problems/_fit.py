"""A reference minimizer for baselines: L-BFGS, then Newton steps to the rounding floor."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bilevel._linear import LinearOperator
from bilevel._numerics.conjugate_gradients import conjugate_gradients


def fit(loss: Callable[[Tensor], Tensor], y0: Tensor, *, tol: float) -> Tensor:
    """Minimize a smooth function from y0, to |gradient| <= tol.

    Raises:
        RuntimeError: if the tolerance is not reached: a baseline that is not solved is no baseline.
    """
    y = y0.detach().clone().requires_grad_()
    if not bool(loss(y).isfinite()):
        raise RuntimeError("the objective is not finite where its minimization starts")
    optimizer = torch.optim.LBFGS(
        [y],
        max_iter=5000,
        max_eval=10000,
        tolerance_grad=tol / max(1.0, y.numel() ** 0.5),
        tolerance_change=0.0,
        history_size=30,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        value = loss(y)
        (y.grad,) = torch.autograd.grad(value, y)
        return value.detach()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    point, residual, before = y.detach().clone(), math.inf, math.inf
    for _ in range(20):  # the line search stalls where differences of values are rounding; Newton's method goes on
        leaf = point.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        before, residual = residual, float(gradient.detach().norm())
        if residual <= tol:
            return leaf.detach()
        if not residual < before:
            break
        point = leaf.detach() - _newton_step(gradient, leaf)
    raise RuntimeError(
        f"a baseline did not converge: |gradient| is {min(before, residual):.3g}, and {tol:.3g} was asked for."
        f" Use float64, or a larger regularization."
    )


def _newton_step(gradient: Tensor, y: Tensor) -> Tensor:
    """H^-1 gradient, to a tenth of a percent; less where H is not positive definite."""

    def product(v: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(gradient, y, v.reshape(y.shape), retain_graph=True)
        return found.reshape(-1)

    size: Tensor = torch.linalg.vector_norm(gradient.detach())
    unit = gradient.detach().reshape(-1) / size
    stop, unseen = torch.full_like(size, 1e-3), torch.zeros_like(size)
    step, *_ = conjugate_gradients(LinearOperator(product, y.numel()), unit, stop, 500, unseen)
    return step.mul_(size).reshape(y.shape)
