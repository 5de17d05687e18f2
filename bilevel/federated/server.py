"""Rounds: who takes part, the mean of what they answer, and what went over the wire."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, COUNT, demand_ranges
from bilevel.arguments.shapes import Shape
from bilevel.federated.clients import AbstractClients


@final
@dataclass(frozen=True)
class Participation:
    """Which clients answer in a round: a function of the seed and its number.

    Of those that are asked some drop out, and send nothing; of others the answer comes too late (stragglers), after the
    round has ended: it is sent, and not used. With M clients of which A answer in time, the mean is estimated by
    (M / A) sum_m w_m a_m over these: unbiased, as all of them are equally likely to. A round without any is repeated.

    Args:
        share: of the clients that are asked, in (0, 1]; at least one is.
        dropout: the probability that one who was asked sends nothing.
        late: that its answer comes too late.
        seed: of all that.

    Raises:
        ValueError: if `share` is not in (0, 1], or `dropout` and `late` are below 0 or 1 in sum.

    Example:
        >>> Participation(share=0.5).asked(6, number=0).tolist() != Participation(share=0.5).asked(
        ...     6, number=1
        ... ).tolist()
        True
    """

    share: float = 1.0
    dropout: float = 0.0
    late: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, seed=COUNT)
        if not (0 < self.share <= 1 and self.dropout >= 0 and self.late >= 0 and self.dropout + self.late < 1):
            raise ValueError(
                f"`Participation(...)` needs 0 < share <= 1 and dropout, late >= 0 below 1 in sum. Got share="
                f"{self.share}, dropout={self.dropout}, late={self.late}."
            )

    @checked(clients=AT_LEAST_1, number=COUNT)
    def asked(self, clients: int, number: int) -> Tensor:
        """The numbers of those that are asked in a round, ascending."""
        if self.share == 1:
            return torch.arange(clients)
        count = max(1, round(self.share * clients))
        generator = self._drawn(2 * number)
        return torch.randperm(clients, generator=generator)[:count].sort().values

    @checked(asked=Shape("k", "integer"), number=COUNT)
    def answered(self, asked: Tensor, number: int) -> tuple[Tensor, int]:
        """Those of them whose answer comes in time, and how many answers are sent in all."""
        if not self.dropout and not self.late:
            return asked, len(asked)
        luck = torch.rand(len(asked), generator=self._drawn(2 * number + 1), dtype=torch.float64)
        sent = luck >= self.dropout
        return asked[luck >= self.dropout + self.late], int(sent.sum())

    def _drawn(self, number: int) -> torch.Generator:
        generator = torch.Generator("cpu")
        generator.manual_seed(self.seed * 1_000_003 + number)
        return generator


@final
@dataclass(frozen=True)
class Traffic:
    """What has been sent.

    Attributes:
        rounds: how often the server has asked and clients have answered.
        down: bytes from the server to all the clients that were asked.
        up: bytes from them to the server.
    """

    rounds: int = 0
    down: int = 0
    up: int = 0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, rounds=COUNT, down=COUNT, up=COUNT)

    @property
    def bytes(self) -> int:
        """In both directions."""
        return self.down + self.up


# (who `(k,)`, the vectors that were sent to them, a row each) -> vectors `(k, p)` or `(k, q)`
Work = Callable[..., tuple[Tensor, ...]]


@final
class Server:
    """What a method sees of the clients: means of vectors of p or q floats over those that answer, and what they cost.

    Args:
        clients: the clients.
        sizes: p and q: no answer has another size.
        participation: who answers.
        traffic: of earlier steps.
        tried: how many rounds these have begun: what follows goes on from there.

    Attributes:
        traffic: so far.
        tried: rounds that were begun so far, those that nobody answered in included.
    """

    @checked(tried=COUNT)
    def __init__(
        self,
        clients: AbstractClients,
        sizes: tuple[int, int],
        participation: Participation = Participation(),
        *,
        traffic: Traffic = Traffic(),
        tried: int = 0,
    ) -> None:
        self.clients, self.sizes, self.participation = clients, sizes, participation
        self.traffic, self.tried = traffic, tried

    def ask(self, work: Work, *sent: Tensor, known: int = 0) -> tuple[Tensor, ...]:
        """One round: the vectors are sent to those who take part, and their answers are averaged.

        Args:
            work: what each client does, for all of those at once.
            sent: `(p,)` or `(q,)` each, to all of them.
            known: how many of these, the first ones, they have already: they are not sent again.

        Raises:
            ValueError: if an answer is no vector of p or q floats of each client.
        """
        weights, count = self.clients.weights, len(self.clients.weights)
        down = sum(each.numel() * each.element_size() for each in sent[known:])
        for _ in range(1000):
            asked = self.participation.asked(count, self.tried)
            who, answers = self.participation.answered(asked, self.tried)
            self.tried += 1
            found = work(who, *sent) if len(who) else ()
            for each in found:
                if each.shape not in ((len(who), self.sizes[0]), (len(who), self.sizes[1])):
                    raise ValueError(
                        f"a client's answer must be vectors of p = {self.sizes[0]} or q = {self.sizes[1]} floats, a"
                        f" row for each client, and nothing else leaves a client. Got shape {tuple(each.shape)} from"
                        f" {len(who)} clients. Return sums over samples that are such vectors."
                    )
            size = sum(each[0].numel() * each.element_size() for each in found)
            so_far = self.traffic
            self.traffic = Traffic(so_far.rounds + 1, so_far.down + down * len(asked), so_far.up + size * answers)
            if len(who):
                share = weights[who] * (count / len(who))
                return self.clients.means(who, share, *found)
        raise ValueError(
            "`Participation(...)`: nobody has answered in 1000 rounds. Raise `share`, or lower `dropout` and `late`."
        )
