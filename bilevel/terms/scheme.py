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
from bilevel.terms.expression import SumOfTerms, Term, demand_signs
from bilevel.terms.least_squares import spread

State = dict[str, Any]  # "y", and lists of tensors


class AbstractAlgorithm(AbstractPortable, abc.ABC):
    """Settings of an algorithm, which may be learned."""

    @abc.abstractmethod
    def on(self, objective: SumOfTerms | Term) -> Scheme:
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
        residual: how far y is from a minimizer, as `Scheme.solve` says: the largest of a batch.
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
        gap: z_k, z_{k+1}, k -> how far y_{k+1} is from a minimizer, for each of a batch; None: |z_{k+1} - z_k| / (1 +
            |z_{k+1}|) of all of it, which is small as well where steps are short.
    """

    @checked()
    def __init__(
        self,
        begin: Callable[[Tensor], State],
        advance: Callable[[State, int], State],
        gap: Callable[[State, State, int], Tensor] | None = None,
    ) -> None:
        self._begin, self._advance, self._gap = begin, advance, gap

    def start(self, y0: Tensor) -> State:
        """z_0 of a first image, or of a batch of them.

        Raises:
            ValueError: if it is not of the shape of the variable, or not of floating-point numbers.
        """
        return self._begin(y0)

    def step(self, state: State, k: int = 0) -> State:
        """T(z), with the settings of step k."""
        return self._advance(state, k)

    def residual(self, state: State, k: int = 0) -> Tensor:
        """How far the image after one more step is from a minimizer, `(*batch,)`; see `solve`.

        `residual(estimate.y)` tells whether a fixed point that another solver has found is one: solvers of fixed points
        look at |T(z) - z|, which short steps make small anywhere.
        """
        with torch.no_grad():
            return self._measured(state, self._advance(state, k), k)

    def _measured(self, before: State, after: State, k: int) -> Tensor:
        return _moved(before, after) if self._gap is None else self._gap(before, after, k)

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

    @checked("Scheme.solve", tol=POSITIVE, max_steps=AT_LEAST_1, every=AT_LEAST_1)
    def solve(self, y0: Tensor, *, tol: float = 1e-6, max_steps: int = 10_000, every: int = 10) -> Minimized:
        """Steps until y is within a relative tolerance of a minimizer in each array of a batch, without a graph.

        What is at most `tol` are the residuals of the conditions of a minimizer, |K_j y - c_j - v_j| and |grad q(y) +
        sum_j K_j' s_j| with s_j a slope of block j at v_j, each relative to the largest of its parts. They are those of
        the objective: short steps, a large rho, a small unit do not make them small.

        Args:
            y0: where to begin.
            tol: see there.
            max_steps: at most so many.
            every: look at the residual after each so many steps.

        Raises:
            ValueError: if y0 does not fit, or a schedule has fewer steps.
        """
        with torch.no_grad():
            state, residual, k = self._begin(y0), float("inf"), 0
            for k in range(1, max_steps + 1):
                before, state = state, self._advance(state, k - 1)
                if k % every and k < max_steps:
                    continue
                residual = float(self._measured(before, state, k - 1).max())  # NaN if any is
                if not residual > tol or residual == float("inf"):
                    break
        status = Status.successful if residual <= tol else Status.max_steps
        if not residual < float("inf"):
            status = Status.nonfinite
        return Minimized(state["y"], state, status, residual, k)


def _moved(before: State, after: State) -> Tensor:
    apart = torch.stack([(a - b).square().sum() for a, b in zip(tree_leaves(before), tree_leaves(after), strict=True)])
    size = torch.stack([leaf.square().sum() for leaf in tree_leaves(after)])
    return apart.sum().sqrt() / (1 + size.sum().sqrt())


def at_step(setting: Any, k: int) -> Any:
    """A setting at step k: of a schedule its entry, else the setting.

    Raises:
        ValueError: if a schedule has no such step.
    """
    if not isinstance(setting, Tensor) or not setting.dim():
        return setting
    if k >= len(setting):
        raise ValueError(
            f"a schedule of {len(setting)} steps has no step {k + 1}. Take at most {len(setting)}: `run(y0,"
            f" {len(setting)})`, `proximal_problem(..., steps={len(setting)})`; or give it more."
        )
    return setting[k]


def proximal_step(term: Term, rho: Any, thresholds: Tensor | None, k: int, number: int) -> Any:
    """w / rho, the step of the proximal map of a term; or the raw threshold, where a schedule of them is given."""
    if thresholds is None:
        return spread(term.weight / rho, term.axes)
    raw = at_step(thresholds, k)
    if raw.dim() and number >= len(raw):
        raise ValueError(
            f"`thresholds` must have a column for each block, or be a schedule `(N,)` for all. Got {len(raw)} columns,"
            f" and a block number {number + 1}."
        )
    return raw[number] if raw.dim() else raw


def demand_settings(call: str, rho: float | Tensor, thresholds: Tensor | None) -> None:
    """Refuse a rho that is no positive number, and schedules of other axes than there are."""
    demand_setting(call, "rho", rho)
    if thresholds is not None and not 1 <= thresholds.dim() <= 2:
        shape = tuple(thresholds.shape)
        raise ValueError(f"`{call}(thresholds=...)` must be a schedule `(N,)` or `(N, blocks)`. Got axes {shape}.")


def demand_setting(call: str, name: str, setting: float | Tensor) -> None:
    """Refuse what is neither a positive number nor a schedule `(N,)` of such; NaN in a tensor is for runs to tell."""
    if not isinstance(setting, Tensor):
        demand_range(call, name, setting, POSITIVE)
    elif setting.dim() > 1:
        raise ValueError(
            f"`{call}({name}=...)` must be a number or a schedule `(N,)`. Got axes {tuple(setting.shape)}."
        )
    else:
        demand_signs(call, name, setting, positive=True)
