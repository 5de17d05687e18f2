"""A bilevel problem seen as functions of vectors: ravelled once, evaluated in batches, its calls counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from bilevel._problem import BilevelProblem, Split
from bilevel._result import Tally
from bilevel._tree import Structure, Tree, tree_leaves


@final
class FlatProblem:
    """f(x, y) and g(x, y) for vectors x `(p,)` and y `(q,)`, at fixed data.

    Leading axes stand for independent problems evaluated in one batch, outermost first: *directions* (several
    x, each with its own y: x `(k, p)`, y `(k, q)`) and *tasks* (one x, several y, each with its own data: y
    `(tasks, q)`); both together are x `(k, p)`, y `(k, tasks, q)`. Values have the leading shape of y. Only the
    evaluation is vectorized (`torch.vmap` of the forward pass); derivatives are taken outside by
    `torch.autograd.grad` of the sum, because `grad` inside `vmap` is wrong through affine BatchNorm.

    Args:
        problem: the problem in the user's structures.
        x: the structure of x.
        y: the structure of y (of one task).
        data: what f and g take as their third argument; None if they take two.
        tally: where oracle calls are counted.
    """

    def __init__(
        self, problem: BilevelProblem, x: Structure, y: Structure, data: Any = None, tally: Tally | None = None
    ) -> None:
        self.problem, self.x, self.y, self.data = problem, x, y, data
        self.tally = Tally() if tally is None else tally
        self.tasks = _task_count(data) if problem.tasks else None

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        """Phi's integrand: f(x, y) `(directions,)`, the mean over tasks; a scalar without leading axes."""
        values = self._evaluate("f", x, y)
        return values.mean(-1) if self.tasks is not None else values

    def f_each(self, x: Tensor, y: Tensor) -> Tensor:
        """The outer objective of each problem in the batch, with the leading shape of y: no mean over tasks."""
        return self._evaluate("f", x, y)

    def g(self, x: Tensor, y: Tensor) -> Tensor:
        """The inner objective of each problem in the batch, with the leading shape of y."""
        return self._evaluate("g", x, y)

    def start(self, x: Tensor, y0: Tensor) -> Tensor:
        """The start of the inner iteration: init(x) where the problem has it, else `y0`; one row for each task."""
        if self.problem.init is not None:
            return self._init(x)
        return self.spread(y0)

    def spread(self, y: Tensor) -> Tensor:
        """One task's vector `(q,)` for every task `(tasks, q)`; as it is where there are none or it has been."""
        return y.expand(self.tasks, -1).clone() if self.tasks is not None and y.dim() == 1 else y

    def data_of(self, level: str) -> Any:
        """The third argument of "f" or of "g"."""
        return getattr(self.data, level) if isinstance(self.data, Split) else self.data

    def _init(self, x: Tensor) -> Tensor:
        init = self.problem.init
        assert init is not None

        def one(x: Tensor, *data: Any) -> Tensor:
            return self.y.ravel(init(self.x.unravel(x), *data), "init(x)")

        data = () if self.data is None else (self.data_of("g"),)
        function: Callable[..., Tensor] = one
        if self.tasks is not None:
            function = torch.vmap(one, in_dims=(None, 0), randomness="same")
        if x.dim() > 1:
            function = torch.vmap(function, in_dims=(0,) + (None,) * len(data), randomness="same")
        return function(x, *data)

    def _evaluate(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        method: Callable[..., Tensor] = getattr(self.problem, name)

        def one(x: Tensor, y: Tensor, *data: Any) -> Tensor:
            return _scalar(name, method(self.x.unravel(x), self.y.unravel(y), *data))

        data = () if self.data is None else (self.data_of(name),)
        function: Callable[..., Tensor] = one
        if self.tasks is not None:
            function = torch.vmap(one, in_dims=(None, 0, 0), randomness="same")
        if x.dim() > 1:
            function = torch.vmap(function, in_dims=(0, 0) + (None,) * len(data), randomness="same")
        return function(x, y, *data)

    def with_tally(self, tally: Tally) -> FlatProblem:
        """The same problem counting elsewhere."""
        return FlatProblem(self.problem, self.x, self.y, self.data, tally)


def _task_count(data: Any) -> int:
    both = (data.f, data.g) if isinstance(data, Split) else data
    leaves = [leaf for leaf in tree_leaves(both) if isinstance(leaf, Tensor)]
    counts = {leaf.shape[0] if leaf.dim() else None for leaf in leaves}
    if len(counts) != 1 or None in counts:
        raise ValueError(
            f"`BilevelProblem(tasks=True)` needs `data=` whose tensors all have one leading axis of tasks."
            f" Got leading sizes {sorted(map(str, counts))}. Stack the tasks with `torch.stack`."
        )
    return next(iter(counts))  # type: ignore[return-value]


def _scalar(name: str, value: Tree) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"`problem.{name}` must return a scalar tensor. Got {got}. Reduce it with `.mean()` or `.sum()`."
        )
    return value.reshape(()) if value.dim() else value


def ravel_rows(problem: FlatProblem, tree: Tree, name: str) -> Tensor:
    """A structure of y as a vector `(q,)`; stacked ones, in task mode, as `(tasks, q)`. A copy."""
    if problem.tasks is None:
        return problem.y.ravel(tree, name).detach().clone()
    stacked = Structure(
        problem.y.spec,
        tuple(torch.Size((problem.tasks, *shape)) for shape in problem.y.shapes),
        problem.y.dtype,
        problem.y.device,
    )
    stacked.ravel(tree, name)  # for its checks
    leaves = [leaf.reshape(leaf.shape[0], -1) for leaf in tree_leaves(tree)]
    return torch.cat(leaves, dim=-1).detach().clone()
