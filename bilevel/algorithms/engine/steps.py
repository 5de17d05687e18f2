"""What the loops of the engine share: their state, and how an iterate is stepped by a number or by an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from bilevel._calculus import Exact
from bilevel._numerics.rows import safe_row_norms
from bilevel._optimizer import AbstractOptimizer, OptimizerState, demand_numbers
from bilevel._result import Report
from bilevel.algorithms.algorithm import RowStep as RowStep
from bilevel.algorithms.engine.direction import AbstractDirection, Joint, demand_row_step, residual_report
from bilevel.algorithms.oracle import Oracle
from bilevel.requirements.properties import Property

Schedule: TypeAlias = Callable[[int], float]  # step -> factor
Step: TypeAlias = float | AbstractOptimizer


@final
@dataclass(frozen=True, eq=False)
class LoopState:
    """Everything that the rest of a loop depends on.

    Attributes:
        x: `(p,)`.
        y: `(*tasks, q)`.
        v: like y; None: the loop has no linear iterate.
        memory: of the variance reduction.
        outer: of the optimizer of x; None: x is stepped by a number.
        inner: the same of y.
    """

    x: Tensor
    y: Tensor
    v: Tensor | None
    memory: Any = None
    outer: OptimizerState | None = None
    inner: OptimizerState | None = None


def required(direction: AbstractDirection) -> frozenset[Property]:
    """What a loop along a direction requires of the inner problem."""
    second = {Property.second_derivatives} if isinstance(direction.products, Exact) else set[Property]()
    return frozenset({Property.stationary, Property.smooth, Property.beyond_start} | second)


def demand_steps(
    loop: Any, inner_step: RowStep, outer_step: RowStep, linear_step: float | None, linear: bool = True
) -> None:
    """Refuse steps that are none.

    Args:
        loop: whose they are.
        inner_step: of y.
        outer_step: of x.
        linear_step: of v; None: that of y.
        linear: whether it has one.

    Raises:
        ValueError: naming the one.
    """
    call = type(loop).__name__
    for name, step in (("inner_step", inner_step), ("outer_step", outer_step), ("linear_step", linear_step)):
        if not isinstance(step, AbstractOptimizer):
            demand_row_step(loop, name, step)
            continue
        demand_numbers(call, name, step)
        if step.needs_curvature:
            raise ValueError(f"`{call}({name}={type(step).__name__}())` needs a step size: pass `step=...`.")
    if linear and linear_step is None and isinstance(inner_step, AbstractOptimizer):
        raise ValueError(f"`{call}(inner_step=<an optimizer>)` needs `linear_step=`, a number, for v.")


def are_alike(loop: Any, inner_step: RowStep, outer_step: RowStep) -> bool:
    """Whether steps of several runs may take the place of a loop's own: numbers that of numbers, optimizers of those.

    A preset whose numbers are learning rates of optimizers is a loop with optimizers, in which they are no steps.
    """
    pairs = (loop.inner_step, inner_step), (loop.outer_step, outer_step)
    return all(isinstance(own, AbstractOptimizer) == isinstance(rows, AbstractOptimizer) for own, rows in pairs)


def lengths(inner_step: RowStep, linear_step: float | None) -> float | Tensor:
    """:func:`number`, or a number for each row."""
    length = inner_step if linear_step is None else linear_step
    assert not isinstance(length, AbstractOptimizer)
    return length


def number(inner_step: Step, linear_step: float | None) -> float:
    """The step of v: its own, or that of y; `demand_steps` has refused a loop that has neither."""
    length = inner_step if linear_step is None else linear_step
    assert not isinstance(length, AbstractOptimizer)
    return length


def begun(step: RowStep, point: Tensor) -> OptimizerState | None:
    """The state of what steps an iterate; None: a number has none."""
    return step.init(point) if isinstance(step, AbstractOptimizer) else None


def along(point: Tensor, d: Tensor, factor: float, length: float | Tensor) -> Tensor:
    """point - factor length d, with a length for each row where there are several."""
    if isinstance(length, Tensor):
        return point - factor * length.reshape(-1, *(1 for _ in point.shape[1:])) * d
    return torch.add(point, d, alpha=-factor * length)


def moved(
    step: RowStep, factor: float, d: Tensor, point: Tensor, state: OptimizerState | None
) -> tuple[Tensor, OptimizerState | None]:
    """The point after a step, and the optimizer's state; a schedule scales what an optimizer makes of the direction."""
    if not isinstance(step, AbstractOptimizer):
        return along(point, d, factor, step), None
    assert state is not None
    there, after = step.step(d, point, state)
    there = there.detach()
    return there if factor == 1.0 else torch.lerp(point, there, factor), after


def entry_by_entry(step: Step | RowStep) -> bool:
    """Whether a step of y asks nothing of its other entries."""
    return not isinstance(step, AbstractOptimizer) or step.entry_by_entry


def within(radius: float | None, v: Tensor) -> Tensor:
    """V, projected on |v| <= radius where there is one."""
    if radius is None:
        return v
    return v * (radius / safe_row_norms(v).unsqueeze(-1)).clamp(max=1.0)


def reports(d: Joint) -> tuple[Report, ...]:
    """How far the iterates of y and of v are from where they are going; an iterate has no tolerance to miss."""
    linear = () if d.v is None else (residual_report("linear iterate", d.v),)
    return (residual_report("inner iterate", d.y), *linear)


def size(oracle: Oracle, x: Tensor, d: Joint) -> Tensor:
    """|(d_x, d_y, d_v)| `()`, with the projection's residual for d_x where x is constrained."""
    outer = oracle.residual(x, d.x).reshape(1)
    inner = torch.cat([d.y.reshape(-1), *(() if d.v is None else (d.v.reshape(-1),))])
    if oracle.like.sharded:
        return torch.hypot(outer[0], oracle.like.row_norms(inner))
    norm: Tensor = torch.linalg.vector_norm(torch.cat([outer, inner]))
    return norm
