"""Loops that one would write by hand: conjugate gradients on lists of tensors, and gradient descent in one variable."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from _harness import Call
from _workloads import Workload
from torch import Tensor


def conjugate_gradients(workload: Workload, products: int) -> Call:
    """The hypergradient by CG on lists, `torch._foreach_*` for all vector operations, and one number a dot product.

    As one writes it who knows torch: the gradient's graph is kept, every operation on vectors is one call for all
    leaves and in place. It trusts the recurrence, does not look at the curvature, and ends where the residual is zero.
    """

    def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
        parts = [torch.dot(s.reshape(-1), t.reshape(-1)) for s, t in zip(a, b, strict=True)]
        return float(parts[0] if len(parts) == 1 else torch.stack(parts).sum())

    def call() -> Tensor:
        x, ys = workload.x.detach().requires_grad_(), [y.detach().requires_grad_() for y in workload.ys]
        found = torch.autograd.grad(workload.f(x, ys), [x, *ys], allow_unused=True, materialize_grads=True)
        fx, b = found[0], list(found[1:])
        gy = torch.autograd.grad(workload.g(x, ys), ys, create_graph=True)
        v, r, p = [torch.zeros_like(t) for t in b], [t.clone() for t in b], [t.clone() for t in b]
        rr = dot(r, r)
        for _ in range(products):
            if rr == 0:
                break
            Hp = torch.autograd.grad(gy, ys, p, retain_graph=True)
            alpha = rr / dot(p, Hp)
            torch._foreach_add_(v, p, alpha=alpha)
            torch._foreach_add_(r, list(Hp), alpha=-alpha)
            before, rr = rr, dot(r, r)
            torch._foreach_mul_(p, rr / before)
            torch._foreach_add_(p, r)
        return fx - torch.autograd.grad(gy, x, v)[0]

    return call


Objective = Callable[[Tensor, Tensor], Tensor]


def hypergradient_of(f: Objective, g: Objective, step: float, steps: int, products: int) -> Callable[..., Tensor]:
    """(x, y) -> the hypergradient: so many steps of gradient descent from y, and so many of CG; one tensor y."""

    def call(x: Tensor, y: Tensor) -> Tensor:
        for _ in range(steps):
            leaf = y.detach().requires_grad_()
            y = leaf.detach() - step * torch.autograd.grad(g(x, leaf), leaf)[0]
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        fx, b = torch.autograd.grad(f(x, y), (x, y), allow_unused=True, materialize_grads=True)
        gy = torch.autograd.grad(g(x, y), y, create_graph=True)[0]
        v, r, p = torch.zeros_like(b), b.clone(), b.clone()
        rr = float(r @ r)
        for _ in range(products):
            Hp = torch.autograd.grad(gy, y, p, retain_graph=True)[0]
            alpha = rr / float(p @ Hp)
            v.add_(p, alpha=alpha)
            r.sub_(Hp, alpha=alpha)
            before, rr = rr, float(r @ r)
            p.mul_(rr / before).add_(r)
        return fx - torch.autograd.grad(gy, x, v)[0]

    return call
