"""An unrolled hypergradient as one compiled program."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import grad
from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver, AbstractUnrollable
from bilevel._result import Report, Status, first_statuses
from bilevel._validate import demand_types
from bilevel.hypergrad.compiled_programs import Programs
from bilevel.hypergrad.unrolling.at_rest import count_products
from bilevel.hypergrad.unrolling.walk import Walk
from bilevel.inner_problems.kinds import inner_objective
from bilevel.requirements.properties import Property


@final
@dataclass(frozen=True, eq=False)
class CompiledITD(AbstractEstimator):
    """The number that ITD gives, h = d/dx f(x, y_N(x)), by a program that torch compiles for these very shapes.

    The whole computation (the N inner steps, f, and the way back through all of them) is traced once to a list of
    tensor operations, which `torch.compile` fuses. For small networks, whose cost is that of calling operations, it is
    several times faster; for large ones it gains little. The first call at new shapes takes a minute or more.

    What is traced is what is run from then on: f, g and init must be functions of their arguments alone. A tensor that
    they close over is a constant as it was at the first call, and so is the way taken through their `if`s. What in the
    data is no tensor is a constant too: another number, or another object, is another program.

    Cost and error: those of `ITD`, with all N steps kept. Oracle calls are counted as ITD counts them.

    Source: `torch.fx.experimental.proxy_tensor.make_fx` and `torch.compile`.

    Args:
        inner: a fixed number of differentiable steps of fixed length: `Iterate(GradientDescent(step), max_steps=N)`.
        backend: of `torch.compile`.

    Raises:
        ValueError: if the inner solver has a tolerance or (from `estimate`) an open step length.
        TypeError: if it cannot be unrolled.

    Example:
        >>> from bilevel import BilevelProblem, hypergradient
        >>> from bilevel.solvers import GradientDescent, Iterate
        >>> problem = BilevelProblem(
        ...     lambda x, y: y.square().sum() / 2, lambda x, y: (y - x).square().sum() / 2
        ... )
        >>> compiled = CompiledITD(Iterate(GradientDescent(0.5), max_steps=2), backend="eager")
        >>> hypergradient(problem, torch.ones(1), torch.zeros(1), estimator=compiled).grad
        tensor([0.5625])
    """

    inner: AbstractInnerSolver
    backend: str = "inductor"
    _programs: Programs = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.inner, AbstractUnrollable):
            raise TypeError(
                f"`CompiledITD(inner=...)` must be an iteration of differentiable steps."
                f" Got {type(self.inner).__name__}. Use `Iterate(GradientDescent(step), max_steps=N)`."
            )
        object.__setattr__(self, "_programs", Programs("CompiledITD", self.backend))
        demand_types(self)
        if self.inner.tol:
            raise ValueError(
                "`CompiledITD(inner=...)` needs a fixed number of steps. Leave out `tol`, or use `ITD`, which need not"
                " know how many there will be."
            )

    @property
    def requires(self) -> frozenset[Property]:
        return frozenset({Property.steps, Property.smooth, Property.second_derivatives, Property.outer_gradient})

    @property
    def takes_encoding(self) -> bool:
        return True

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        inner = self.inner
        assert isinstance(inner, AbstractUnrollable)
        if inner.tuned(inner_objective(problem, x), problem.spread(start.y)) is not inner:
            raise ValueError(
                "`CompiledITD(inner=...)` needs a step length of the inner solver: `GradientDescent(step)`."
            )
        h, value, y, residual = self._programs.of(self._unrolled, problem, x, start.y)(x, start.y)
        self._count(problem, y)
        statuses = first_statuses((~(y.isfinite().all(-1) & residual.isfinite()), Status.nonfinite))
        found = Report("inner solver", Status.worst(statuses), float(residual.max()), inner.max_steps, statuses)
        return FlatEstimate(h, value, y, (found,))

    def _unrolled(self, problem: FlatProblem, x: Tensor, y0: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """h, Phi, y_N, and the residual before the last step."""
        inner = self.inner
        assert isinstance(inner, AbstractUnrollable)
        leaf = x.detach().requires_grad_()
        start = problem.start(leaf, y0)
        at, fixed = inner_objective(problem, leaf), inner_objective(problem, x)
        walk = Walk(problem, inner, at, fixed, leaf, start, to_converge=False, judged=False)
        y = walk.whole()[0]
        value = problem.f(leaf, y)
        residual = torch.zeros_like(y[..., 0]) if walk.last is None else torch.linalg.vector_norm(walk.last[0], dim=-1)
        return grad(value, leaf), value.detach(), y.detach(), residual.detach()

    def _count(self, problem: FlatProblem, y: Tensor) -> None:
        inner, rows, tally = self.inner, y.shape[:-1].numel(), problem.tally
        assert isinstance(inner, AbstractUnrollable)
        steps = inner.max_steps
        tally.inner_steps += steps * rows
        tally.outer_gradients += rows
        tally.gradients += steps * rows
        count_products(tally, rows, steps, through=problem.problem.init is not None)
