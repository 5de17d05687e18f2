"""Reverse mode through all steps, every one of them kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from bilevel._numerics.second_derivatives import explained
from bilevel.hypergrad.unrolling.at_rest import count_products
from bilevel.hypergrad.unrolling.form import AbstractUnrolling, Unrolled
from bilevel.hypergrad.unrolling.segments import pulled_back

if TYPE_CHECKING:
    from bilevel._flat import FlatProblem
    from bilevel.hypergrad.unrolling.walk import Walk


@final
@dataclass(frozen=True)
class Reverse(AbstractUnrolling):
    """Reverse mode: a_k = (dT_k/dstate)' a_{k+1}, h = df/dx + sum_k (dT_k/dx)' a_{k+1}, with the graphs of all steps.

    The form to begin with: the fewest calls. Where the memory of N graphs is too much, `Checkpointed` gives the same
    number; where x has a few entries only, so does `Forward`.

    Cost for N steps: N + 1 gradients, N - 1 Hessian products (N where the start depends on x) and N cross products;
    with a tolerance a gradient and a product of each kind more, to measure what the derivative lacks. Memory: N times
    that of one gradient's graph, as in a loop by hand; with a tolerance 3 q more, to measure what the derivative lacks.

    Source: Maclaurin, Duvenaud, Adams, "Gradient-based hyperparameter optimization through reversible learning", ICML
    2015; Franceschi et al., "Forward and reverse gradient-based hyperparameter optimization", ICML 2017.

    Example:
        >>> import torch
        >>> from bilevel import ITD, BilevelProblem, hypergradient
        >>> from bilevel.solvers import GradientDescent, Iterate
        >>> problem = BilevelProblem(
        ...     lambda x, y: y.square().sum() / 2, lambda x, y: (y - x).square().sum() / 2
        ... )
        >>> itd = ITD(Iterate(GradientDescent(0.5), max_steps=2), Reverse())
        >>> hypergradient(problem, torch.ones(1), torch.zeros(1), estimator=itd).grad  # 0.75 * 0.75
        tensor([0.5625])
    """

    def differentiate(self, walk: Walk) -> Unrolled:
        if walk.checked:  # what is lacking is to be measured
            with torch.no_grad():
                start = walk.inner.begin(walk.start.detach())
            segment = [walk.from_leaves(start, 0, walk.inner.max_steps)]
            end, walk.steps = segment[0][1:]
            return pulled_back(walk, tuple(s.detach() for s in end), [segment.pop], from_start=True)
        end = walk.whole()  # of which f can be the end: one backward pass through all of it
        if walk.needs_gradient:
            count_products(walk.problem.tally, walk.rows, walk.steps, through=walk.has_init)
        value, h = _outer_derivative(walk.problem, walk.x, end[0])
        return Unrolled(h, value, tuple(s.detach() for s in end))


def _outer_derivative(problem: FlatProblem, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """f(x, y) `()` and its derivative in the leaf x, on which y depends."""
    problem.tally.outer_gradients += y.shape[:-1].numel()
    with torch.enable_grad(), explained():
        value = problem.f(x, y)
        if not value.requires_grad:
            return value, torch.zeros_like(x)
        (h,) = torch.autograd.grad(value, x, allow_unused=True, materialize_grads=True)
    return value.detach(), h
