"""An algorithm on an objective: its start, its steps, and runs of them."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bilevel._result import Status
from bilevel._tree import tree_leaves
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, AT_LEAST_1, COUNT, POSITIVE, demand_range
from bilevel.portable.pickling import AbstractPortable
from bilevel.terms.expression import SumOfTerms, Term
from bilevel.terms.least_squares import spread

State = dict[str, Any]  # "y", and lists of tensors


class AbstractAlgorithm(AbstractPortable, abc.ABC):
    """Settings of an algorithm, which may be learned."""

    @abc.abstractmethod
    def on(self, objective: SumOfTerms) -> Scheme:
        """The algorithm for this objective.

        Raises:
            ValueError: if the objective is of a form that the algorithm does not minimize.
        """


@final
@dataclass(frozen=True, eq=False)
class Minimized:
    """Where a run has ended.

    Attributes:
        y: the minimizer, or what the steps have led to.
        state: all of the state.
        status: `successful`, `max_steps` or `nonfinite`.
        residual: |T(z) - z| / (1 + |z|) of the state z: the largest of a batch.
        steps: how many.
    """

    y: Tensor
    state: State
    status: Status
    residual: float
    steps: int

    def __post_init__(self) -> None:
        demand_types(self)


@final
class Scheme:
    """T, z_{k+1} = T(z_k), of an algorithm on an objective; z holds the image y and what else the algorithm keeps.

    Where settings change with k, it is a schedule of so many steps; else y* is that of the fixed point z* = T(z*).

    Args:
        begin: y_0 -> z_0.
        advance: z_k, k -> z_{k+1}.
    """

    @checked()
    def __init__(self, begin: Callable[[Tensor], State], advance: Callable[[State, int], State]) -> None:
        self._begin, self._advance = begin, advance

    def start(self, y0: Tensor) -> State:
        """z_0 of a first image, or of a batch of them."""
        return self._begin(y0)

    def step(self, state: State, k: int = 0) -> State:
        """T(z), with the settings of step k."""
        return self._advance(state, k)

    @checked("Scheme.run", steps=COUNT, segment=AT_LEAST_0)
    def run(self, y0: Tensor, steps: int, *, segment: int = 0) -> Tensor:
        """y after so many steps, with the graph of all of them.

        Args:
            y0: where to begin.
            steps: how many.
            segment: keep the state after each so many steps only, and compute the rest again in the backward pass; 0:
                keep everything. About sqrt(steps) takes the least memory.
        """
        state = self._begin(y0)

        def through(state: State, first: int, last: int) -> State:
            for k in range(first, last):
                state = self._advance(state, k)
            return state

        size = segment or steps
        for first in range(0, steps, max(size, 1)):
            last = min(first + size, steps)
            if segment and torch.is_grad_enabled():
                state = checkpoint(through, state, first, last, use_reentrant=False)
            else:
                state = through(state, first, last)
        found: Tensor = state["y"]
        return found

    @checked("Scheme.solve", tol=POSITIVE, max_steps=AT_LEAST_1)
    def solve(self, y0: Tensor, *, tol: float = 1e-6, max_steps: int = 10_000, every: int = 10) -> Minimized:
        """Steps until |T(z) - z| <= tol (1 + |z|), without a graph.

        Args:
            y0: where to begin.
            tol: see there.
            max_steps: at most so many.
            every: look at the residual after each so many steps.
        """
        with torch.no_grad():
            state, residual, k = self._begin(y0), float("inf"), 0
            for k in range(1, max_steps + 1):
                before, state = state, self._advance(state, k - 1)
                if k % max(every, 1) and k < max_steps:
                    continue
                residual = _moved(before, state)
                if not residual > tol or residual == float("inf"):
                    break
        status = Status.successful if residual <= tol else Status.max_steps
        if not residual < float("inf"):
            status = Status.nonfinite
        return Minimized(state["y"], state, status, residual, k)


def _moved(before: State, after: State) -> float:
    pairs = list(zip(tree_leaves(before), tree_leaves(after), strict=True))
    apart = sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5
    size = sum(float(b.square().sum()) for _, b in pairs) ** 0.5
    return float(apart / (1 + size))


def at_step(setting: Any, k: int) -> Any:
    """A setting at step k: of a schedule its entry, else the setting."""
    return setting[k] if isinstance(setting, Tensor) and setting.dim() else setting


def proximal_step(term: Term, rho: Any, thresholds: Tensor | None, k: int, number: int) -> Any:
    """w / rho, the step of the proximal map of a term; or the raw threshold, where a schedule of them is given."""
    if thresholds is None:
        return spread(term.weight / rho, term.axes)
    raw = thresholds[k]
    return raw[number] if raw.dim() else raw


def demand_settings(call: str, rho: float | Tensor, thresholds: Tensor | None) -> None:
    """Refuse a rho that is no positive number, and schedules of other axes than there are."""
    if not isinstance(rho, Tensor):
        demand_range(call, "rho", rho, POSITIVE)
    elif rho.dim() > 1:
        raise ValueError(f"`{call}(rho=...)` must be a number or a schedule `(N,)`. Got axes {tuple(rho.shape)}.")
    if thresholds is not None and not 1 <= thresholds.dim() <= 2:
        shape = tuple(thresholds.shape)
        raise ValueError(f"`{call}(thresholds=...)` must be a schedule `(N,)` or `(N, blocks)`. Got axes {shape}.")
