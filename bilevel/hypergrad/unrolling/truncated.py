"""Reverse mode through the last steps only: biased, and cheap."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from bilevel._validate import demand_types
from bilevel.hypergrad.unrolling.form import AbstractUnrolling, Unrolled
from bilevel.hypergrad.unrolling.segments import pulled_back

if TYPE_CHECKING:
    from bilevel._inner import State
    from bilevel.hypergrad.unrolling.walk import Walk


@final
@dataclass(frozen=True)
class Truncated(AbstractUnrolling):
    """Reverse mode through the last K of N steps: h = df/dx + sum_{k >= N-K} (dT_k/dx)' a_{k+1}, another number.

    K = 1 is the one-step or Jacobian-free gradient. For where N is large and the early steps are forgotten: with
    gradient descent of step a on a mu-strongly convex g what is left out is of order (1 - a mu)^K, a bias that does not
    vanish as N grows. Of the start, even where it depends on x, nothing is differentiated unless K >= N.

    Cost for N steps: N + 1 gradients, K - 1 Hessian products and K cross products. Memory: K times that of one
    gradient's graph; with a tolerance also K states.

    Source: Shaban et al., "Truncated back-propagation for bilevel optimization", AISTATS 2019; Bolte, Pauwels, Vaiter,
    "One-step differentiation of iterative algorithms", NeurIPS 2023.

    Args:
        steps: K, at least 1; more than N is N.

    Raises:
        ValueError: if `steps` is less than 1.

    Example:
        >>> import torch
        >>> from bilevel import ITD, BilevelProblem, hypergradient
        >>> from bilevel.solvers import GradientDescent, Iterate
        >>> problem = BilevelProblem(
        ...     lambda x, y: y.square().sum() / 2, lambda x, y: (y - x).square().sum() / 2
        ... )
        >>> itd = ITD(Iterate(GradientDescent(0.5), max_steps=2), Truncated(1))
        >>> hypergradient(problem, torch.ones(1), torch.zeros(1), estimator=itd).grad  # 0.5 * 0.75
        tensor([0.3750])
    """

    steps: int

    def __post_init__(self) -> None:
        demand_types(self)
        if self.steps < 1:
            raise ValueError(f"`Truncated(steps=...)` must be at least 1. Got {self.steps}.")

    def differentiate(self, walk: Walk) -> Unrolled:
        total = walk.inner.max_steps
        if walk.inner.tol:  # how many steps there are is not known before
            recent: deque[State] = deque(maxlen=self.steps)
            end = walk.without_graph(lambda _, state: recent.append(state), total)
            begun = walk.steps - len(recent)
            length = len(recent)
            oldest = [recent[0]] if recent else []
            recent.clear()  # the others are made again
            segments = [lambda: walk.from_leaves(oldest.pop(), begun, length)] if oldest else []
        else:
            begun = max(total - self.steps, 0)
            state = walk.without_graph(lambda *_: None, begun)
            segment = [walk.from_leaves(state, begun, total - begun)]
            del state
            end, walk.steps = tuple(s.detach() for s in segment[0][1]), walk.steps + segment[0][2]
            segments = [segment.pop]
        # Whether the steps were enough is not asked of a number that leaves most of them out.
        return pulled_back(walk, end, segments, from_start=begun == 0, measured=False)
