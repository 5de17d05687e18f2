"""The outer objective within a program."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from bilevel._calculus import total
from bilevel._flat import FlatProblem

Found: TypeAlias = tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor], list[Tensor]]  # h, y, v, numbers, rows


def outer(problem: FlatProblem, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f(x, y) `()`, grad_x f and grad_y f; of several runs side by side each its own."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    value = problem.f(x, y)
    if not value.requires_grad:
        return value.detach().clone(), torch.zeros_like(x), torch.zeros_like(y)
    fx, fy = torch.autograd.grad(total(value), (x, y), allow_unused=True, materialize_grads=True)
    return value.detach().clone(), fx, fy
