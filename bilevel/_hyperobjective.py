"""Phi as a differentiable function, for any torch optimizer, scheduler or logger."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from bilevel._apply import apply_estimator, check_chunks
from bilevel._estimate import AbstractEstimator, Estimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._hypergradient import demand_alike, own_start, structured
from bilevel._problem import BilevelProblem, check_signature
from bilevel._result import BilevelError
from bilevel._tree import Tree, ravel
from bilevel._validate import demand_type
from bilevel.named.auto import Auto
from bilevel.named.registry import resolve
from bilevel.requirements.starts import starts_warm


@final
class HyperObjective:
    """x -> Phi(x) = f(x, y*(x)), whose backward is a hypergradient estimate; see :func:`hyperobjective`.

    Attributes:
        last: the estimate of the latest call; None before the first.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        y0: Tree,
        estimator: AbstractEstimator | Auto | str,
        warm_start: bool | None,
        chunk_size: int | None,
        throw: bool,
    ) -> None:
        self.last: Estimate | None = None
        self._problem, self._y0, self._estimator = problem, y0, estimator
        self._warm_start, self._chunk_size, self._throw = warm_start, chunk_size, throw
        self._chosen: AbstractEstimator | None = None
        self._start: FlatStart | None = None

    def __call__(self, x: Tree, data: Any = None) -> Tensor:
        """Phi(x) `()`, differentiable in the leaves of x that require grad.

        Args:
            x: the outer variable.
            data: the third argument of f and g, if they take one.
        """
        check_signature(self._problem, data)
        x_vector, x_structure = ravel(x, "x")
        y0 = own_start("hyperobjective", self._problem, x, data) if self._y0 is None else self._y0
        y_vector, y_structure = ravel(y0, "y0")
        demand_alike("hyperobjective(x, y0)", x_structure, y_structure)
        flat = FlatProblem(self._problem, x_structure, y_structure, data, given=x)
        at, y_vector = x_vector.detach().clone(), y_vector.detach().clone()
        if self._chosen is None:
            self._chosen = resolve(self._estimator, flat, at, y_vector)
        start = self._start if self._start is not None else FlatStart(y_vector)
        found = apply_estimator(self._chosen, flat, at, start, self._chunk_size)
        self.last = structured(flat, at, found, start.count)
        if self._throw and not self.last.status.ok:
            raise BilevelError(f"`hyperobjective` did not succeed. {self.last.message}", self.last.status, self.last)
        count = start.count + 1
        warm = starts_warm(self._warm_start, self._chosen, self._problem)
        self._start = FlatStart(found.y, found.v, count) if warm else FlatStart(y_vector, None, count)
        value: Tensor = _Phi.apply(x_vector, found.value.detach(), found.grad.detach())  # type: ignore[no-untyped-call]
        return value


def hyperobjective(
    problem: BilevelProblem,
    y0: Tree = None,
    *,
    estimator: AbstractEstimator | Auto | str = "implicit",
    warm_start: bool | None = None,
    chunk_size: int | None = None,
    throw: bool = True,
) -> HyperObjective:
    """phi(x) = f(x, y*(x)) as a differentiable function of x, once: phi(x).backward() puts h into x.grad.

    Each call solves the inner problem and estimates the hypergradient at once; `backward` only multiplies. The
    returned object may remember the inner and linear solutions as warm starts for its next call (`warm_start`); make a
    new one for an independent sequence. A second derivative is refused.

    Args:
        problem: f and g.
        y0: where the inner solver starts; its structure is that of y. None where the problem has `init`: init(x).
        estimator: an estimator or a name; a name's defaults are fixed at the first call.
        warm_start: whether a call starts from the solutions of the one before. None: where the estimate forgets its
            start, so that phi is a function of x alone; see `minimize`.
        chunk_size: in task mode, how many tasks to treat at a time; None: all.
        throw: raise if a part of an estimate did not succeed; otherwise see `phi.last.status`.

    Returns:
        phi, with phi.last the latest `Estimate`.

    Raises:
        ValueError: from a call, if there is neither y0 nor `init`.
        BilevelError: from a call, if `throw` and the estimate did not succeed.
        NotImplementedError: where a second derivative is asked for.

    Example:
        >>> problem = BilevelProblem(lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2)
        >>> x = torch.tensor(1.0, requires_grad=True)
        >>> phi = hyperobjective(problem, torch.tensor(0.0))
        >>> phi(x).backward()
        >>> x.grad
        tensor(-2.)
    """
    check_chunks("hyperobjective", problem, chunk_size)
    demand_type("hyperobjective", "warm_start", warm_start, bool | None)
    return HyperObjective(problem, y0, estimator, warm_start, chunk_size, throw)


class _Phi(torch.autograd.Function):
    """x, Phi(x), h -> Phi(x), with derivative h in x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(x, grad)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor, None, None]:
        x, grad = ctx.saved_tensors
        h: Tensor = _Once.apply(weights[0] * grad, x)  # type: ignore[no-untyped-call]
        return h, None, None


class _Once(torch.autograd.Function):
    """h(x) -> h(x), with a derivative that is refused: without this, autograd would take h for a constant."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, x: Tensor) -> Tensor:  # noqa: ARG004
        return h.clone()

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> Any:
        raise NotImplementedError(
            "`hyperobjective` has a first derivative only, and a second one was asked for. Take differences of"
            " hypergradients, or drop `create_graph=True`."
        )
