"""AggITD: the derivative of the inner steps in the rounds of these steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, COUNT, POSITIVE, demand_ranges
from bilevel.federated.clients import joint_norm, repeated
from bilevel.federated.method import AbstractMethod, At
from bilevel.federated.server import Server


@final
@dataclass(frozen=True)
class AggITD(AbstractMethod):
    """N inner steps and the vector r in the same rounds, then h; N + 1 rounds.

    With y_{t+1} = mean(y_t - a grad_y g_m(y_t)), derandomized (the default) r_0 = 0 and

        r <- mean(r - a H_m(y_t) r + grad_y f_m(y_t)),   h = mean(grad_x f_m - a G_m r)  at y_N;

    as published Q is drawn from {0, ..., N-1}, r = mean(grad_y f_m(y_Q)) in round Q, r <- mean(r - a H_m(y_t) r) in
    those after it, and h = mean(grad_x f_m - a N G_m r). Its mean over Q is the former,

        h = grad_x f - a G sum_k prod_{t > k} (I - a H(y_t)) grad_y f(y_k),

    whose standard deviation beside it is of the order of sqrt(N) times h.

    Cost: N + 1 rounds a step: 2q floats up in each of the first N (q before round Q), p in the last; AID with N steps
    of y and of its linear system takes 2N + 2.

    Source: Xiao, Ji, "Communication-efficient federated hypergradient computation via aggregated iterative
    differentiation", ICML 2023; the recursion is recalled, its text was not at hand. Derandomized: derived here.

    Args:
        inner_step: a.
        outer_step: of x.
        rounds: N.
        derandomized: whether r is its mean over Q.
        seed: of Q, a function of it and the number of the step.
        draw: Q itself; None: it is drawn.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a step is not positive, `rounds` below 1, or `draw` no number below `rounds`.

    Example:
        >>> from bilevel import BilevelProblem
        >>> from bilevel.federated import Clients, federate
        >>> problem = BilevelProblem(
        ...     lambda x, y, a: (y - a).square() / 2, lambda x, y, a: (y - a * x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> clients = Clients(problem, x0, x0, torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
        >>> found = federate(clients, x0, x0, method=AggITD(0.5, 0.05, rounds=10), steps=60)
        >>> round(float(found.x), 4), found.traffic.rounds
        (1.0, 660)
    """

    inner_step: float
    outer_step: float
    rounds: int = 10
    derandomized: bool = True
    seed: int = 0
    draw: int | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, inner_step=POSITIVE, outer_step=POSITIVE, rounds=AT_LEAST_1, seed=COUNT, draw=COUNT)
        if self.draw is not None and self.draw >= self.rounds:
            raise ValueError(f"`AggITD(draw=...)` must be below rounds={self.rounds}. Got {self.draw}.")

    def step(self, server: Server, at: At, number: int) -> At:
        clients, a, drawn = server.clients, self.inner_step, self._drawn(number)

        def first(who: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            return (clients.inner_gradients(who, x, repeated(y, who)),)

        def begun(who: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            ys = repeated(y, who)
            return clients.inner_gradients(who, x, ys), clients.outer_gradients(who, x, ys)[1]

        def products(who: Tensor, x: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, ...]:
            ys = repeated(y, who)
            gy, hr, _ = clients.products(who, x, ys, repeated(r, who))
            if self.derandomized:
                hr = hr - clients.outer_gradients(who, x, ys)[1] / a
            return gy, hr

        def last(who: Tensor, x: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, ...]:
            ys, scale = repeated(y, who), a if self.derandomized else a * self.rounds
            _, _, gr = clients.products(who, x, ys, repeated(r, who))
            return (clients.outer_gradients(who, x, ys)[0] - scale * gr,)

        y, r = at.y, torch.zeros_like(at.y)
        for t in range(self.rounds):
            known = 1 if t else 0  # x
            if t == (0 if self.derandomized else drawn):
                gy, r = server.ask(begun, at.x, y, known=known)
            elif self.derandomized or t > drawn:
                gy, hr = server.ask(products, at.x, y, r, known=known)
                r = r - a * hr
            else:
                (gy,) = server.ask(first, at.x, y, known=known)
            y = y - a * gy
        (h,) = server.ask(last, at.x, y, r, known=1)
        return At(at.x - self.outer_step * h, y, r, h)

    def _drawn(self, number: int) -> int:
        if self.draw is not None:
            return self.draw
        generator = torch.Generator("cpu")
        generator.manual_seed(self.seed * 1_000_003 + number)
        return int(torch.randint(self.rounds, (), generator=generator))

    @property
    def is_random(self) -> bool:
        return not self.derandomized and self.draw is None

    def arrival(self, at: At, then: At) -> Tensor:
        return joint_norm(then.h, (then.y - at.y) / self.inner_step)
