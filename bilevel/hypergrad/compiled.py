"""An unrolled hypergradient as one compiled program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from bilevel._demand import demand_types
from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver, AbstractUnrollable
from bilevel._objective import inner_objective
from bilevel._problem import Split
from bilevel._result import Report, Status
from bilevel._tree import tree_parts

Program: TypeAlias = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


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
        >>> problem = BilevelProblem(lambda x, y: y.square().sum() / 2, lambda x, y: (y - x).square().sum() / 2)
        >>> compiled = CompiledITD(Iterate(GradientDescent(0.5), max_steps=2), backend="eager")
        >>> hypergradient(problem, torch.ones(1), torch.zeros(1), estimator=compiled).grad
        tensor([0.5625])
    """

    inner: AbstractInnerSolver
    backend: str = "inductor"
    _programs: dict[Any, tuple[tuple[Any, ...], Program]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.inner, AbstractUnrollable):
            raise TypeError(
                f"`CompiledITD(inner=...)` must be an iteration of differentiable steps."
                f" Got {type(self.inner).__name__}. Use `Iterate(GradientDescent(step), max_steps=N)`."
            )
        demand_types(self)
        if self.inner.tol:
            raise ValueError(
                "`CompiledITD(inner=...)` needs a fixed number of steps. Leave out `tol`, or use `ITD`, which need not"
                " know how many there will be."
            )

    @property
    def takes_encoding(self) -> bool:
        return True

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        leaves, build = tree_parts(self._data(problem))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        inner = self.inner
        assert isinstance(inner, AbstractUnrollable)
        if inner.tuned(inner_objective(problem, x), problem.spread(start.y)) is not inner:
            raise ValueError(
                "`CompiledITD(inner=...)` needs a step length of the inner solver: `GradientDescent(step)`."
            )
        nestings = (problem.x.describe(), problem.y.describe(), str(build([isinstance(t, Tensor) for t in leaves])))
        shapes = tuple((tuple(t.shape), t.dtype, t.device) for t in (x, start.y, *tensors))
        others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        key = (id(problem.problem), problem.is_encoded, nestings, shapes, tuple(map(_constant, others)))
        if key not in self._programs:
            from torch.fx.experimental.proxy_tensor import make_fx  # takes a second to import

            def program(x: Tensor, y0: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
                given = iter(tensors)
                made = build([next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves])
                data = None if problem.data is None else made
                at = FlatProblem(problem.problem, problem.x, problem.y, data, is_encoded=problem.is_encoded)
                return _unrolled(at, inner, x, y0)

            arguments = (x.detach(), start.y.detach(), *tensors)
            with torch.enable_grad():
                traced = make_fx(program)(*arguments)
            # The problem and the constants are kept, so that their ids are not another's.
            kept = (problem.problem, *others)
            self._programs[key] = kept, torch.compile(traced, backend=self.backend, dynamic=False)
        with torch.no_grad():
            h, value, y, residual = self._programs[key][1](x.detach(), start.y.detach(), *tensors)
        self._count(problem, y)
        finite = (y.isfinite().all(-1) & residual.isfinite()).reshape(-1).tolist()
        statuses = tuple(Status.successful if ok else Status.nonfinite for ok in finite)
        found = Report("inner solver", Status.worst(statuses), float(residual.max()), inner.max_steps, statuses)
        return FlatEstimate(h, value, y, (found,))

    @staticmethod
    def _data(problem: FlatProblem) -> Any:
        if isinstance(problem.data, Split):
            raise ValueError("`CompiledITD` needs one batch of data for f and g. Got a Split. Put both into one dict.")
        return {} if problem.data is None else problem.data

    def _count(self, problem: FlatProblem, y: Tensor) -> None:
        inner, rows = self.inner, y.shape[:-1].numel()
        assert isinstance(inner, AbstractUnrollable)
        steps, has_init = inner.max_steps, problem.problem.init is not None
        problem.tally.gradients += steps * rows
        problem.tally.inner_steps += steps * rows
        problem.tally.cross_products += steps * rows
        problem.tally.hvps += max(steps - (0 if has_init else 1), 0) * rows
        problem.tally.outer_gradients += rows


def _constant(leaf: Any) -> Any:
    """What tells a leaf of the data that is no tensor from others: its value, or for other objects which it is."""
    return (type(leaf), leaf) if isinstance(leaf, int | float | complex | str | bytes | None) else id(leaf)


def _unrolled(
    problem: FlatProblem, inner: AbstractUnrollable, x: Tensor, y0: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, Phi, y_N, and |grad_y g| before the last step."""
    x = x.detach().requires_grad_()
    y = problem.start(x, y0)
    y = y if y.requires_grad else y.detach().requires_grad_()
    state, residual = inner.begin(y), torch.zeros_like(y[..., 0])
    for _ in range(inner.max_steps):
        at = state[0]
        gradient = torch.autograd.grad(problem.g(x, at).sum(), at, create_graph=True)[0]
        residual = torch.linalg.vector_norm(gradient, dim=-1)
        state = inner.advance(gradient, state)
    value = problem.f(x, state[0])
    (h,) = torch.autograd.grad(value, x, allow_unused=True, materialize_grads=True)
    return h, value.detach(), state[0].detach(), residual.detach()
