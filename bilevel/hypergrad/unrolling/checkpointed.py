"""Reverse mode that recomputes instead of keeping every step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from bilevel.hypergrad.unrolling.form import AbstractUnrolling, Unrolled
from bilevel.hypergrad.unrolling.segments import pulled_back

if TYPE_CHECKING:
    from bilevel._inner import State
    from bilevel.hypergrad.unrolling.walk import Walk


@final
@dataclass(frozen=True)
class Checkpointed(AbstractUnrolling):
    """Reverse mode from the states before every s-th step, s = ceil(sqrt(N)): the number of `Reverse` in less memory.

    The states between two kept ones are computed again on the way back, and the graph of one step at a time is built.
    For many steps, or large networks, where N graphs do not fit.

    Cost for N steps: less than 2N gradients more than `Reverse`, and the same products. Memory: that of one gradient's
    graph and of 2 sqrt(N) states.

    Source: Griewank, "Achieving logarithmic growth of temporal and spatial complexity in reverse automatic
    differentiation", Optimization Methods and Software 1 (1992), with one level of checkpoints.

    Example:
        >>> import torch
        >>> from bilevel import ITD, BilevelProblem, hypergradient
        >>> from bilevel.solvers import GradientDescent, Iterate
        >>> problem = BilevelProblem(
        ...     lambda x, y: y.square().sum() / 2, lambda x, y: (y - x).square().sum() / 2
        ... )
        >>> itd = ITD(Iterate(GradientDescent(0.5), max_steps=2), Checkpointed())
        >>> hypergradient(problem, torch.ones(1), torch.zeros(1), estimator=itd).grad  # 0.75 * 0.75
        tensor([0.5625])
    """

    def differentiate(self, walk: Walk) -> Unrolled:
        total = walk.inner.max_steps
        every = math.isqrt(max(total - 1, 0)) + 1
        kept: list[State] = []
        end = walk.without_graph(lambda k, state: kept.append(state) if k % every == 0 else None, total)
        between: dict[int, State] = {}  # the states after one kept one, by step

        def step(k: int) -> tuple[State, State, int]:
            if k not in between:
                between.clear()
                at, state = k - k % every, kept.pop()  # the last one that has not been needed yet
                between[at] = state
                while at < k:
                    following = walk.step(state, at, with_graph=False)
                    assert following is not None  # a step that is taken again
                    at, state = at + 1, following
                    between[at] = state
            return walk.from_leaves(between.pop(k), k, 1)

        return pulled_back(walk, end, [lambda k=k: step(k) for k in range(walk.steps)], from_start=True)  # type: ignore[misc]
