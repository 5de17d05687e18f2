"""The single loop SABA: SOBA with a table of what every block of the data said."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from bilevel._calculus import AbstractProducts, Exact
from bilevel.algorithms.engine.direction import Coupled
from bilevel.algorithms.engine.preset import AbstractPreset
from bilevel.algorithms.engine.saga import Saga
from bilevel.algorithms.engine.single_loop import Schedule, SingleLoop, Step, demand_steps
from bilevel.arguments.fits import demand_types


@final
@dataclass(frozen=True)
class SABA(AbstractPreset):
    """SABA: y <- y - rho d_y, v <- v - rho' d_v, x <- P(x - gamma d_x), each term of d a SAGA estimate.

    With T_k the latest value of a term at block k of N, w_k the block's share of the samples and A = sum_k w_k T_k,

        d = A + (w_k N) (t - T_k),   A <- A + w_k (t - T_k),   T_k <- t,   t the term at the block k that is drawn,

    for the five terms grad_y g, H v, G v of a block of g and grad_y f, grad_x f of one of f. d is unbiased for any
    tables, and its noise vanishes as the iterates come to rest, so that *constant* steps converge to the solution.

    Cost: that of `SOBA`: 3 calls of g and one of f for each sample of a batch. Memory: tables of N_g (2q + p) +
    N_f (q + p) numbers, which is why data must be a `FiniteSum`, whose blocks are known by number.

    Converges: for g strongly convex in y and steps of the order of 1 / (n + m), the mean of E |grad Phi|^2 over T steps
    is O(1/T), and where Phi satisfies a Polyak-Lojasiewicz inequality it converges linearly.

    Source: Dagreou, Ablin, Vaiter, Moreau, NeurIPS 2022, (11a-c), where blocks are of one size.

    Args:
        inner_step: rho, of y, or an optimizer.
        outer_step: gamma, of x, or an optimizer.
        linear_step: rho', of v; None: that of y.
        schedule: step -> the factor of all three; None: constant, as the theory has it.
        outer_schedule: the same of gamma alone, where it is another one.
        products: with second derivatives; `FiniteDifferences()` where operations have no double backward.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a step is not positive; from `minimize`, if data have no blocks, or y is constrained or no
            minimizer of g.

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem, FiniteSum, minimize
        >>> a = torch.tensor([2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
        >>> problem = BilevelProblem(
        ...     lambda x, y, a: (y - a).square().mean() / 2,
        ...     lambda x, y, a: (y - a * x).square().mean() / 2,
        ... )
        >>> x0, data = torch.tensor(0.0, dtype=torch.float64), FiniteSum(a, batch_size=1)
        >>> solution = minimize(
        ...     problem, x0, x0, algorithm=SABA(0.3, 0.02), data=data, max_steps=1500
        ... )
        >>> round(float(solution.x), 6)  # y*(x) = 3.5 x
        1.0
    """

    inner_step: Step
    outer_step: Step
    linear_step: float | None = None
    schedule: Schedule | None = None
    outer_schedule: Schedule | None = None
    products: AbstractProducts = field(default_factory=Exact)

    def __post_init__(self) -> None:
        demand_types(self)
        demand_steps(self, self.inner_step, self.outer_step, self.linear_step)

    def combination(self) -> SingleLoop:
        return SingleLoop(
            self.inner_step,
            self.outer_step,
            self.linear_step,
            Coupled(self.products),
            Saga(),
            self.schedule,
            self.outer_schedule,
        )
