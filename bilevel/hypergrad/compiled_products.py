"""Gradients and second derivatives of g by compiled programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import AbstractProducts, Linearization, grad
from bilevel._flat import FlatProblem
from bilevel._validate import demand_types
from bilevel.hypergrad.compiled_programs import Computation, Programs


@final
@dataclass(frozen=True, eq=False)
class CompiledProducts(AbstractProducts):
    """grad_y g, H v and G v by programs that torch compiles for these very shapes: `AID(products=...)`.

    The numbers are those of `Exact`. Each is one program, from the forward pass on, so that a product costs a gradient
    besides. For small networks, whose cost is that of calling operations, it is several times faster for all that; for
    large ones `Exact`, which keeps the gradient's graph, is the faster one. The first call at new shapes takes a minute
    or more. Inner solvers take their gradients from here; values alone (trials of a line search) and the Hessians that
    `Newton` forms are evaluated as they are.

    What is traced is what is run from then on: f, g and init must be functions of their arguments alone. A tensor that
    they close over is a constant as it was at the first call, and so is the way taken through their `if`s. What in the
    data is no tensor is a constant too: another number, or another object, is another program.

    Source: `torch.fx.experimental.proxy_tensor.make_fx` and `torch.compile`.

    Args:
        backend: of `torch.compile`.

    Raises:
        ValueError: (from an estimate) if f and g have data of their own.

    Example:
        >>> from bilevel import AID, BilevelProblem, hypergradient
        >>> from bilevel.solvers import CG, GradientDescent, Iterate
        >>> problem = BilevelProblem(lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (y - x).square().sum() / 2)
        >>> inner = Iterate(GradientDescent(1.0), max_steps=1)
        >>> aid = AID(inner, CG(rtol=1e-6), products=CompiledProducts(backend="eager"))
        >>> hypergradient(problem, torch.ones(1), torch.zeros(1), estimator=aid).grad
        tensor([-2.])
    """

    backend: str = "inductor"
    _programs: Programs = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_programs", Programs("CompiledProducts", self.backend))
        demand_types(self)

    def oracle(self, problem: FlatProblem, x: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        programs: dict[torch.Size, Computation] = {}  # mostly one: found once for all steps

        def value_and_gradient(y: Tensor) -> tuple[Tensor, Tensor]:
            if y.shape not in programs:
                programs[y.shape] = self._programs.of(_gradient, problem, x, y)
            value, gradient = programs[y.shape](x, y)
            return value, gradient

        return value_and_gradient

    def linearize(self, problem: FlatProblem, x: Tensor, y: Tensor) -> Linearization:
        tally, rows = problem.tally, y.shape[:-1].numel()
        tally.gradients += rows
        (gradient,) = self._programs.of(_gradient, problem, x, y)(x, y)[1:]

        @cache
        def program(computation: Computation) -> Computation:
            return self._programs.of(computation, problem, x, y, y)  # v is of the shape of y

        def mv(v: Tensor) -> Tensor:
            tally.hvps += rows
            return program(_product)(x, y, v)[0]

        def products(v: Tensor) -> tuple[Tensor, Tensor | None]:
            tally.hvps += rows
            tally.cross_products += rows
            hv, gv = program(_products)(x, y, v)
            return hv, gv if gv.numel() else None

        def pull(v: Tensor) -> Tensor | None:
            tally.cross_products += rows
            (gv,) = program(_cross)(x, y, v)
            return gv if gv.numel() else None

        start_in_x = problem.problem.init is not None
        return Linearization(y.detach(), gradient, mv, products, pull, start_in_x=start_in_x)


def _gradient(problem: FlatProblem, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The value of g and grad_y g."""
    y = y.detach().requires_grad_()
    value = problem.g(x, y)
    return value.detach(), grad(value.sum(), y)


def _product(problem: FlatProblem, x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """H v."""
    y = y.detach().requires_grad_()
    gradient = grad(problem.g(x, y).sum(), y, create_graph=True)
    if not gradient.requires_grad:  # g is linear in y
        return (torch.zeros_like(v),)
    return torch.autograd.grad(gradient, y, v, allow_unused=True, materialize_grads=True)


def _products(problem: FlatProblem, x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """H v and G v; the latter of no entries where grad_y g does not depend on x."""
    return _pulled(problem, x, y, v, in_y=True)


def _cross(problem: FlatProblem, x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """G v alone."""
    return _pulled(problem, x, y, v, in_y=False)


def _pulled(problem: FlatProblem, x: Tensor, y: Tensor, v: Tensor, in_y: bool) -> tuple[Tensor, ...]:
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    gradient = grad(problem.g(x, y).sum(), y, create_graph=True)
    leaves = (y, x) if in_y else (x,)
    found: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if gradient.requires_grad:
        found = torch.autograd.grad(gradient, leaves, v, allow_unused=True)
    if in_y and found[0] is None:
        found = torch.zeros_like(v), found[-1]
    return tuple(x.new_zeros(0) if each is None else each for each in found)
