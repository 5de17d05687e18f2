"""FedNest: inner rounds, a Neumann series of rounds, an outer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, AT_LEAST_1, POSITIVE, demand_ranges
from bilevel.federated.clients import joint_norm, repeated
from bilevel.federated.local_steps import local_steps
from bilevel.federated.method import AbstractMethod, At
from bilevel.federated.server import Server


@final
@dataclass(frozen=True)
class FedNest(AbstractMethod):
    """T inner steps (each of `local_steps` at the clients, corrected), v by Q + 1 terms of a Neumann series, x along h.

        v = a sum_{k=0}^{Q} (I - a H)^k grad_y f,   h = grad_x f - G v,   averaged after every product with H

    Averaging once, after products at each client by itself, is another series: (I - a H_m)^k has not the mean
    (I - a H)^k. The public code of the paper does that; this is the method of its text, with a series of fixed length
    in the place of a random one, and one outer step between rounds.

    Cost: T (2T with local steps) + 1 + Q + 1 rounds a step, q floats up in each but the last, which has p.

    Source: Tarzanagh, Li, Thrampoulidis, Oymak, "FedNest: federated bilevel, minimax, and compositional optimization",
    ICML 2022.

    Args:
        inner_step: a, of y and of the series.
        outer_step: of x.
        inner_rounds: T.
        terms: Q.
        local_steps: of y at each client in one of the T.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a step is not positive, or a number of steps below its least.

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem
        >>> from bilevel.federated import Clients, federate
        >>> problem = BilevelProblem(
        ...     lambda x, y, a: (y - a).square() / 2, lambda x, y, a: (y - a * x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> clients = Clients(problem, x0, x0, torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
        >>> found = federate(
        ...     clients, x0, x0, method=FedNest(0.5, 0.05, inner_rounds=5, terms=9), steps=60
        ... )
        >>> round(float(found.x), 3), found.traffic.rounds
        (1.0, 960)
    """

    inner_step: float
    outer_step: float
    inner_rounds: int = 5
    terms: int = 10
    local_steps: int = 1

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, inner_step=POSITIVE, outer_step=POSITIVE, inner_rounds=AT_LEAST_1, terms=AT_LEAST_0)
        demand_ranges(self, local_steps=AT_LEAST_1)

    def step(self, server: Server, at: At, number: int) -> At:
        clients, a, x, y = server.clients, self.inner_step, at.x, at.y

        def gradient(who: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            return (clients.inner_gradients(who, x, repeated(y, who)),)

        def outer(who: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            return (clients.outer_gradients(who, x, repeated(y, who))[1],)

        def product(who: Tensor, x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            return (clients.products(who, x, repeated(y, who), repeated(v, who))[1],)

        def last(who: Tensor, x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            ys = repeated(y, who)
            return (clients.outer_gradients(who, x, ys)[0] - clients.products(who, x, ys, repeated(v, who))[2],)

        for k in range(self.inner_rounds):
            (mean,) = server.ask(gradient, x, y, known=1 if k else 0)
            if self.local_steps > 1:
                y = local_steps(server, x, y, step=a, steps=self.local_steps, mean=mean)
            else:
                y = y - a * mean
        (fy,) = server.ask(outer, x, y, known=1)
        v = a * fy
        for _ in range(self.terms):
            (hv,) = server.ask(product, x, y, v, known=2)
            v = v - a * (hv - fy)
        (h,) = server.ask(last, x, y, v, known=2)
        return At(x - self.outer_step * h, y, v, h)

    def arrival(self, at: At, then: At) -> Tensor:
        return joint_norm(then.h, (then.y - at.y) / self.inner_step)
