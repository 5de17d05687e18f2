"""Clients that are processes: every rank of a group has some, and nothing but sums of their answers is sent."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import POSITIVE
from bilevel.federated.clients import AbstractClients
from bilevel.ranks.ranks import demand_ranks


@final
class ClientsOnRanks(AbstractClients):
    """The clients of all ranks of a group, each of which has its own and their data.

    Every rank calls `federate` alike and goes through the same rounds; of those that are asked each works for its own,
    and what is sent is the weighted sum of their answers, one all-reduce a round. So x and y are the same bits on all.

    Args:
        own: this rank's clients, with weights among themselves.
        group: a process group of `torch.distributed`, or `bilevel.ranks.Ranks`, which then counts messages.
        mass: what this rank's clients weigh beside those of the others, such as how many samples they have in all.

    Raises:
        ValueError: if there is no such group.

    Example:
        >>> import tempfile
        >>> from torch import distributed
        >>> from bilevel import BilevelProblem
        >>> from bilevel.federated import Clients, FederatedSOBA, federate
        >>> problem = BilevelProblem(
        ...     lambda x, y, a: (y - a).square() / 2, lambda x, y, a: (y - a * x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> own = Clients(problem, x0, x0, torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     distributed.init_process_group(
        ...         "gloo", init_method=f"file://{file.name}.0", rank=0, world_size=1
        ...     )
        >>> clients = ClientsOnRanks(own, distributed.group.WORLD)
        >>> found = federate(clients, x0, x0, method=FederatedSOBA(0.5, 0.02), steps=400)
        >>> distributed.destroy_process_group()
        >>> round(float(found.x), 4)
        1.0
    """

    @checked(mass=POSITIVE)
    def __init__(self, own: AbstractClients, group: Any, mass: float = 1.0) -> None:
        ranks = demand_ranks("ClientsOnRanks", group)
        if ranks is None:
            raise ValueError("`ClientsOnRanks(group=...)` must be a process group of `torch.distributed`. Got None.")
        self._own, self._ranks = own, ranks
        told = ranks.gathered(mass * own.weights.cpu())
        self._first = sum(len(each) for each in told[: ranks.rank])
        weights = torch.cat(told).to(own.weights.device)
        self._weights = weights / weights.sum()

    @property
    def weights(self) -> Tensor:
        return self._weights

    def inner_gradients(self, who: Tensor, x: Tensor, y: Tensor) -> Tensor:
        mine = self._mine(who)
        found = y.new_zeros(len(who), y.shape[-1])
        if bool(mine.any()):
            found[mine] = self._own.inner_gradients(who[mine] - self._first, x, y[mine])
        return found

    def outer_gradients(self, who: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        mine = self._mine(who)
        fx, fy = x.new_zeros(len(who), len(x)), y.new_zeros(len(who), y.shape[-1])
        if bool(mine.any()):
            fx[mine], fy[mine] = self._own.outer_gradients(who[mine] - self._first, x, y[mine])
        return fx, fy

    def products(self, who: Tensor, x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mine = self._mine(who)
        gy, hv, gv = torch.zeros_like(v), torch.zeros_like(v), x.new_zeros(len(who), len(x))
        if bool(mine.any()):
            own = who[mine] - self._first
            gy[mine], hv[mine], gv[mine] = self._own.products(own, x, y[mine], v[mine])
        return gy, hv, gv

    def means(self, who: Tensor, weights: Tensor, *answers: Tensor) -> tuple[Tensor, ...]:
        mine = self._mine(who).to(weights.dtype) * weights
        return self._ranks.total(*(mine.to(each.dtype) @ each for each in answers))

    def _mine(self, who: Tensor) -> Tensor:
        return (who >= self._first) & (who < self._first + len(self._own.weights))
