"""Several steps of each client by itself between two rounds, and the correction without which they go elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_1, POSITIVE
from bilevel.arguments.shapes import Shape
from bilevel.federated.clients import repeated
from bilevel.federated.server import Server


@checked(x=Shape("p"), y=Shape("q"), step=POSITIVE, steps=AT_LEAST_1, mean=Shape("q"))
def local_steps(
    server: Server,
    x: Tensor,
    y: Tensor,
    *,
    step: float,
    steps: int,
    mean: Tensor | None = None,
    corrected: bool = True,
) -> Tensor:
    """The mean of where the clients come to from y by so many steps on their own g_m.

        z_m <- z_m - a (grad g_m(z_m) - grad g_m(y) + grad g(y)),   z_m = y at first,   y <- sum_m w_m z_m

    so that y* stays where it is: there grad g(y*) = 0, and z_m = y* at every step. Without the correction each client
    goes towards its own minimum, and their mean towards none of g's.

    Cost: a round for grad g(y), unless it is known, and one for the z_m; q floats each way in both.

    Source: Tarzanagh, Li, Thrampoulidis, Oymak, "FedNest: federated bilevel, minimax, and compositional optimization",
    ICML 2022 (FedSVRG); the correction is that of SVRG.

    Args:
        server: of the clients.
        x: `(p,)`.
        y: `(q,)`.
        step: a.
        steps: of each client.
        mean: grad g(y) of all clients, where it is known.
        corrected: whether the correction is there; without it no mean is asked for.
    """
    if corrected and mean is None:
        (mean,) = server.ask(lambda who, x, y: (server.clients.inner_gradients(who, x, repeated(y, who)),), x, y)
    shift = torch.zeros_like(y) if mean is None or not corrected else mean

    def work(who: Tensor, x: Tensor, y: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        z = repeated(y, who)
        own = server.clients.inner_gradients(who, x, z) if corrected else torch.zeros_like(z)
        for _ in range(steps):
            z = z - step * (server.clients.inner_gradients(who, x, z) - own + shift)
        return (z - y,)  # so that the mean over some of them is one of steps

    (moved,) = server.ask(work, x, y, shift, known=2 if corrected else 0)
    return y + moved
