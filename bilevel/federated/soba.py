"""Federated SOBA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, POSITIVE, demand_ranges
from bilevel.federated.clients import joint_norm, repeated
from bilevel.federated.method import AbstractMethod, At
from bilevel.federated.server import Server


@final
@dataclass(frozen=True)
class FederatedSOBA(AbstractMethod):
    """y <- y - rho D_y, v <- v - rho' D_v, x <- x - gamma D_x, with D the mean of what the clients say of it.

        D_y = sum_m w_m grad_y g_m,   D_v = sum_m w_m (H_m v - grad_y f_m),   D_x = sum_m w_m (grad_x f_m - G_m v)

    Each is linear in f_m and g_m at one point, so that the mean over clients is that of the whole, whatever their data.

    With local steps, several of y and of v at each client between two means, corrected as in `local_steps`:

        z_m <- z_m - rho (grad g_m(z_m) - grad g_m(y) + D_y),   u_m <- u_m - rho' (H_m u_m - H_m v + D_v),   H_m at y

    from y and v, of which the means over the clients are the next y and v.

    Cost: one round a step: 2q + p floats down (x, y and v) and as many up; with local steps one more, of 2q floats
    each way.

    Converges: as `SOBA` on f and g.

    Args:
        inner_step: rho.
        outer_step: gamma.
        linear_step: rho'; None: rho.
        local_steps: of y and v at each client between two rounds; 1: the step above.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a step is not positive or `local_steps` below 1.

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem
        >>> from bilevel.federated import Clients, federate
        >>> problem = BilevelProblem(
        ...     lambda x, y, a: (y - a).square() / 2, lambda x, y, a: (y - a * x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> clients = Clients(problem, x0, x0, torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
        >>> found = federate(clients, x0, x0, method=FederatedSOBA(0.5, 0.02), steps=400)
        >>> round(float(found.x), 4), found.traffic.rounds  # y*(x) = 3 x
        (1.0, 400)
    """

    inner_step: float
    outer_step: float
    linear_step: float | None = None
    local_steps: int = 1

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, inner_step=POSITIVE, outer_step=POSITIVE, linear_step=POSITIVE, local_steps=AT_LEAST_1)

    def step(self, server: Server, at: At, number: int) -> At:
        clients = server.clients

        def work(who: Tensor, x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            ys = repeated(y, who)
            gy, hv, gv = clients.products(who, x, ys, repeated(v, who))
            fx, fy = clients.outer_gradients(who, x, ys)
            return gy, hv - fy, fx - gv

        d_y, d_v, d_x = server.ask(work, at.x, at.y, at.v)
        x, y, v = at.x - self.outer_step * d_x, at.y - self.inner_step * d_y, at.v - self._linear_length * d_v
        if self.local_steps > 1:
            y, v = self._locally(server, at, d_y, d_v)
        return At(x, y, v, d_x)

    def _locally(self, server: Server, at: At, d_y: Tensor, d_v: Tensor) -> tuple[Tensor, Tensor]:
        """Steps of z_m and u_m from y and v, corrected so that y and v stay where the means d_y and d_v are zero."""
        clients, rho, length = server.clients, self.inner_step, self._linear_length

        def work(who: Tensor, x: Tensor, y: Tensor, v: Tensor, d_y: Tensor, d_v: Tensor) -> tuple[Tensor, ...]:
            ys, vs = repeated(y, who), repeated(v, who)
            gy, hv, _ = clients.products(who, x, ys, vs)
            z, u = ys, vs
            for k in range(self.local_steps):
                at_z = clients.inner_gradients(who, x, z) if k else gy
                hu = clients.products(who, x, ys, u)[1] if k else hv
                z, u = z - rho * (at_z - gy + d_y), u - length * (hu - hv + d_v)
            return z - y, u - v  # so that the mean over some of them is one of steps

        moved_y, moved_v = server.ask(work, at.x, at.y, at.v, d_y, d_v, known=3)
        return at.y + moved_y, at.v + moved_v

    @property
    def _linear_length(self) -> float:
        return self.inner_step if self.linear_step is None else self.linear_step

    def arrival(self, at: At, then: At) -> Tensor:
        return joint_norm(then.h, (then.y - at.y) / self.inner_step, (then.v - at.v) / self._linear_length)
