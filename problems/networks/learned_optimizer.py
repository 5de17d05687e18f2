"""Learning to optimize: x are the parameters of an optimizer, y what its steps make of a start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from bilevel._problem import BilevelProblem
from bilevel._tree import Tree
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import COUNT, SIZE, demand_ranges
from bilevel.inner_problems.iteration import Iteration
from bilevel.problems.networks.update_rules import AbstractRule, Point

Loss: TypeAlias = Callable[[Point, Any, Tensor], Tensor]  # (point, task, number of the step) -> ()


@final
@dataclass(frozen=True, eq=False)
class LearnedOptimizer:
    """min_x mean_t f_t(u_N),  (u_{k+1}, m_{k+1}) = rule(x, u_k, grad l_t(u_k; k), m_k, k): learning to optimize.

    The inner problem is an iteration, whose steps x changes: no argmin, and no condition that y solves. y is
    {"point": u, "memory": m, "number": k, "sum": s}, and what is differentiated are its steps: `ITD(OwnSteps())`, or
    through the last K steps alone `ITD(OwnSteps(), Truncated(K))`.

    The outer objective is the loss where the steps end, or with `coefficients` c_1, ..., c_N the sum over k of
    c_k l_t(u_k), which the steps gather as they go; of either the logarithm with `logarithm`, which counts every factor
    alike: without it tasks, and steps, whose loss is small to begin with have no say. Below the square of the rounding
    unit a loss is taken for that, and not followed further.

    A task is a dict of tensors with `start`, a dict of tensors, u_0; the loss reads what it wants of the others. It is
    given the number of the step, `()`, for a batch of its own at each (`task["inputs"][number]`), and -1 for f.

    Cost of a hypergradient: T tasks, N steps: T N gradients of l and as many products with its Hessian (none with
    `first_order`), and memory of the graphs of N steps (`Checkpointed()`: of one, and of 2 sqrt(N) states).

    Source: Andrychowicz et al., "Learning to learn by gradient descent by gradient descent", NeurIPS 2016.

    Args:
        rule: what a step does with a gradient.
        loss: l: (point, task, number) -> `()`.
        steps: N, of which there are learned settings, and after which f is taken.
        coefficients: c_k, or None: the loss at the end.
        logarithm: log f in the place of f.
        first_order: leave out how gradients depend on x through the point they are taken at, as published.

    Raises:
        ValueError: if N is negative, or there are not N coefficients.

    Example:
        >>> from bilevel import ITD, hypergradient
        >>> from bilevel.problems.networks.update_rules import LearnedSteps
        >>> from bilevel.solvers import OwnSteps
        >>> own = LearnedOptimizer(
        ...     LearnedSteps(2), lambda point, task, number: point["u"].square().sum() / 2, steps=2
        ... )
        >>> tasks = {"start": {"u": torch.ones(1, 1)}}
        >>> x0, y0 = own.start(tasks)
        >>> found = hypergradient(
        ...     own.problem, x0, y0, estimator=ITD(OwnSteps()), data=tasks
        ... )  # (1 - 0.1)^4 / 2
        >>> round(found.value, 3)
        0.328
    """

    rule: AbstractRule
    loss: Loss
    steps: int = 20
    coefficients: tuple[float, ...] | None = None
    logarithm: bool = False
    first_order: bool = False

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, steps=COUNT)
        if self.coefficients is not None and len(self.coefficients) != self.steps:
            raise ValueError(
                f"`LearnedOptimizer(coefficients=...)` must have one for each of the {self.steps} steps."
                f" Got {len(self.coefficients)}."
            )

    @property
    def problem(self) -> BilevelProblem:
        """The problem over tasks."""
        inner = Iteration(self.step, steps=self.steps, objective_function=self.g)
        return BilevelProblem(self.f, inner=inner, init=self.init, tasks=True)

    @checked()
    def start(self, tasks: Any) -> tuple[Tree, Tree]:
        """x0, and y0 of one task, for `minimize`: made from a batch of tasks."""
        point = {name: leaf[0] for name, leaf in tasks["start"].items()}
        return self.rule.parameters(point), self._begun(point)

    def f(self, x: Tree, y: Tree, task: Any) -> Tensor:
        if self.coefficients is None:
            value = self.loss(y["point"], task, torch.full_like(y["number"], -1.0).long())
        else:
            value = y["sum"]
        return value.clamp_min(torch.finfo(value.dtype).eps ** 2).log() if self.logarithm else value

    def g(self, x: Tree, y: Tree, task: Any) -> Tensor:
        return self.loss(y["point"], task, y["number"].detach().long())

    def init(self, x: Tree, task: Any) -> Tree:
        return self._begun(task["start"])

    def step(self, x: Tree, y: Tree, gradient: Tree, k: int, task: Any) -> Tree:
        slopes = {name: d.detach() if self.first_order else d for name, d in gradient["point"].items()}
        point, memory = self.rule.step(x, y["point"], slopes, y["memory"], k)
        number, gathered = y["number"] + 1, y["sum"]
        if self.coefficients is not None and k < self.steps and self.coefficients[k]:
            gathered = gathered + self.coefficients[k] * self.loss(point, task, torch.full_like(number, -1.0).long())
        return {"point": point, "memory": memory, "number": number, "sum": gathered}

    def _begun(self, point: Point) -> Tree:
        like = next(iter(point.values()))
        zero = like.new_zeros(())
        return {"point": dict(point), "memory": self.rule.memory(point), "number": zero, "sum": zero.clone()}

    @checked(steps=SIZE)
    def trajectory(self, x: Tree, tasks: Any, steps: int) -> Tensor:
        """The losses of each task after 0, 1, ..., `steps` steps, as f sees them: `(tasks, steps + 1)`.

        More steps than were trained with are what a learned optimizer is for; rules say what they do beyond.
        """

        def loss(point: Point, task: Any, number: Tensor) -> Tensor:
            return self.loss(point, task, number)

        def one(y: Tree, gradient: Point, task: Any, k: int) -> Tree:
            return self.step(x, y, {"point": gradient}, k, task)

        outer = torch.full((), -1, device="cpu")
        y = torch.vmap(lambda task: self._begun(task["start"]))(tasks)
        found = [torch.vmap(loss, (0, 0, None))(y["point"], tasks, outer)]
        for k in range(steps):
            with torch.enable_grad():
                point = {name: leaf.detach().requires_grad_() for name, leaf in y["point"].items()}
                total = torch.vmap(loss, (0, 0, None))(point, tasks, torch.full((), k, device="cpu")).sum()
                gradient = dict(zip(point, torch.autograd.grad(total, list(point.values())), strict=True))
            with torch.no_grad():
                y = torch.vmap(one, (0, 0, 0, None))(y, gradient, tasks, k)
                found.append(torch.vmap(loss, (0, 0, None))(y["point"], tasks, outer))
        return torch.stack(found, 1).detach()
