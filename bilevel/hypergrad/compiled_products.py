"""Gradients and second derivatives of g by compiled programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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

    The numbers are those of `Exact`. The gradient is a program that gives what a product takes of it as well, and a
    product is another, which does not compute the gradient again. Where the cost is that of calling operations, it is
    about twice as fast as `Exact`; where it is that of a few large matrix products, no faster (`docs/compiled.md` has a
    table). The first call at new shapes takes a minute or more. Inner solvers take their gradients from here; values
    alone (trials of a line search) and the Hessians that `Newton` forms are evaluated as they are.

    What is traced is what is run from then on: f, g and init must be functions of their arguments alone. A tensor that
    they close over is the one of the first call, and the way taken through their `if`s is that of the first call. What
    in the data is no tensor is a constant too: another number, or another object, is another program.

    Source: `torch.fx.experimental.proxy_tensor.make_fx` and `torch.compile`.

    Args:
        backend: of `torch.compile`.

    Raises:
        ValueError: (from an estimate) if f and g have data of their own.

    Example:
        >>> from bilevel import AID, BilevelProblem, hypergradient
        >>> from bilevel.solvers import CG, GradientDescent, Iterate
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (y - x).square().sum() / 2
        ... )
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
        begin, product, both = self._programs.parts(_linearized, 1, problem, x, y, y)  # v is of the shape of y
        gradient, *kept = begin(x, y)

        def mv(v: Tensor) -> Tensor:
            tally.hvps += rows
            return product(v, *kept)[0]

        def products(v: Tensor) -> tuple[Tensor, Tensor | None]:
            tally.hvps += rows
            tally.cross_products += rows
            hv, gv = both(v, *kept)
            return hv, gv if gv.numel() else None

        def pull(v: Tensor) -> Tensor | None:
            tally.cross_products += rows
            gv = both(v, *kept)[1]
            return gv if gv.numel() else None

        start_in_x = problem.problem.init is not None
        return Linearization(y.detach(), gradient, mv, products, pull, start_in_x=start_in_x)


def _gradient(problem: FlatProblem, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The value of g and grad_y g."""
    y = y.detach().requires_grad_()
    value = problem.g(x, y)
    return value.detach(), grad(value.sum(), y)


def _linearized(problem: FlatProblem, x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """grad_y g; H v and G v, the latter of no entries where grad_y g does not depend on x."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    gradient = grad(problem.g(x, y).sum(), y, create_graph=True)
    found: tuple[Tensor | None, ...] = (None, None)
    if gradient.requires_grad:
        found = torch.autograd.grad(gradient, (y, x), v, allow_unused=True)
    hv, gv = found
    return gradient.detach().clone(), torch.zeros_like(v) if hv is None else hv, x.new_zeros(0) if gv is None else gv
