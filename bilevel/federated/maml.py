"""Meta-learning on devices: each of them a task, whose data stay with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import POSITIVE, demand_ranges
from bilevel.federated.clients import joint_norm, repeated
from bilevel.federated.method import AbstractMethod, At
from bilevel.federated.server import Server


@final
@dataclass(frozen=True)
class FederatedMAML(AbstractMethod):
    """min_x sum_m w_m f_m(y_m),  y_m = x - a grad g_m(x): every client adapts x to its own data, and y_m stays there.

        h_m = (I - a H_m(x)) grad f_m(y_m),   x <- x - gamma sum_m w_m h_m

    f_m and g_m are functions of y alone, of the structure of x: g_m the loss on a client's support samples, f_m on its
    query samples. The mean of the h_m *is* the gradient, since every client solves its own inner problem: this is the
    one case where hypergradients of clients may be averaged.

    Cost: one round a step, p floats down and p up; of each client two gradients of g_m (one with a product) and one of
    f_m. y of `federate` is where adaptation starts, x, and v stays where it is.

    Converges: as gradient descent on a smooth function; with few participants as stochastic gradient descent.

    Source: Finn, Abbeel, Levine, ICML 2017, equation (1); on devices Fallah, Mokhtari, Ozdaglar, "Personalized
    federated learning with theoretical guarantees: a model-agnostic meta-learning approach", NeurIPS 2020, with one
    local step.

    Args:
        inner_step: a, of the adaptation.
        outer_step: gamma.
        first_order: h_m = grad f_m(y_m), without the product.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a step is not positive, or from `federate`, if x and y differ in size.

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem
        >>> from bilevel.federated import Clients, federate
        >>> problem = BilevelProblem(
        ...     lambda x, y, a: (y - a).square() / 2, lambda x, y, a: (y - a).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> clients = Clients(problem, x0, x0, torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
        >>> found = federate(clients, x0, x0, method=FederatedMAML(0.5, 1.0), steps=200)
        >>> round(float(found.x), 4)  # the start from which all of them get equally far
        3.0
    """

    inner_step: float
    outer_step: float
    first_order: bool = False

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, inner_step=POSITIVE, outer_step=POSITIVE)

    def step(self, server: Server, at: At, number: int) -> At:
        if at.x.shape != at.y.shape:
            raise ValueError(
                f"`FederatedMAML(...)` adapts x itself: y0 must have as many entries as x0. Got {len(at.y)} and"
                f" {len(at.x)}. Pass `x0` for both."
            )
        clients = server.clients

        def work(who: Tensor, x: Tensor) -> tuple[Tensor, ...]:
            start = repeated(x, who)
            adapted = start - self.inner_step * clients.inner_gradients(who, x, start)
            _, fy = clients.outer_gradients(who, x, adapted)
            if self.first_order:
                return (fy,)
            _, hv, _ = clients.products(who, x, start, fy)
            return (fy - self.inner_step * hv,)

        (h,) = server.ask(work, at.x)
        x = at.x - self.outer_step * h
        return At(x, x, at.v, h)  # where adaptation starts

    def arrival(self, at: At, then: At) -> Tensor:
        return joint_norm(then.h)
