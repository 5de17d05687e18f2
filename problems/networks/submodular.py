"""How much a set of samples says of others: submodular mutual information, and sets that have nearly the most of it."""

from __future__ import annotations

import abc
import heapq
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, final

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bilevel.arguments.checked import checked, fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, COUNT, POSITIVE, SHARE, demand_ranges
from bilevel.portable.pickling import AbstractPortable

Found: TypeAlias = tuple[Tensor, ...]  # what a greedy choice has so far


class Similarities(NamedTuple):
    """Of `n` samples, and of them with `q` that a set is to be like."""

    query: Tensor  # (n, q)
    own: Tensor  # (n, n)
    among: Tensor  # (q, q)


@fitting
def cosines(samples: Tensor, queries: Tensor) -> Similarities:
    """The cosines of rows `(n, d)` and `(q, d)`.

    Example:
        >>> cosines(torch.eye(2), torch.tensor([[3.0, 0.0]])).query
        tensor([[1.],
                [0.]])
    """
    a, b = normalize(samples, dim=-1), normalize(queries, dim=-1)
    return Similarities(a @ b.mT, a @ a.mT, b @ b.mT)


class AbstractInformation(AbstractPortable, abc.ABC):
    """I(A; Z) for sets A of samples and a fixed set Z of queries, with I({}; Z) = 0, and what one sample more adds."""

    @abc.abstractmethod
    def value(self, chosen: Tensor, s: Similarities) -> Tensor:
        """I(A; Z), A given by booleans `(n,)`: directly, `()`."""

    @abc.abstractmethod
    def begin(self, s: Similarities) -> Found:
        """What is known of the empty set."""

    @abc.abstractmethod
    def gains(self, found: Found, s: Similarities) -> Tensor:
        """I(A and j; Z) - I(A; Z) for each j `(n,)`; of those in A nothing is asked."""

    @abc.abstractmethod
    def add(self, found: Found, s: Similarities, j: Tensor) -> Found:
        """What is known of A and j."""


@final
@dataclass(frozen=True)
class GraphCut(AbstractInformation):
    """GCMI = sum_{j in A} sum_q s_jq: modular, so that the best set are the samples with the largest sums.

    Example:
        >>> greedy(GraphCut(), cosines(torch.eye(3), torch.tensor([[0.0, 1.0, 2.0]])), 2)
        tensor([2, 1])
    """

    @fitting
    def value(self, chosen: Tensor, s: Similarities) -> Tensor:
        return (s.query.sum(1) * chosen).sum()

    def begin(self, s: Similarities) -> Found:
        return ()

    def gains(self, found: Found, s: Similarities) -> Tensor:
        return s.query.sum(1)

    def add(self, found: Found, s: Similarities, j: Tensor) -> Found:
        return ()


@final
@dataclass(frozen=True)
class FacilityQueries(AbstractInformation):
    """FL2MI = sum_q [max_{j in A} s_jq]_+ + eta sum_{j in A} max_q s_jq: queries near samples, samples near queries.

    Submodular; monotone where similarities are at least 0.

    Args:
        eta: of the second sum.

    Example:
        >>> FacilityQueries().value(
        ...     torch.tensor([True, False]), cosines(torch.eye(2), torch.eye(2))
        ... )
        tensor(2.)
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, eta=AT_LEAST_0)

    @fitting
    def value(self, chosen: Tensor, s: Similarities) -> Tensor:
        covered = torch.where(chosen.bool().unsqueeze(1), s.query, torch.zeros_like(s.query)).amax(0).clamp_min(0)
        return covered.sum() + self.eta * (s.query.amax(1) * chosen).sum()

    def begin(self, s: Similarities) -> Found:
        return (torch.zeros_like(s.query[0]),)

    def gains(self, found: Found, s: Similarities) -> Tensor:
        return (s.query - found[0]).clamp_min(0).sum(1) + self.eta * s.query.amax(1)

    def add(self, found: Found, s: Similarities, j: Tensor) -> Found:
        return (torch.maximum(found[0], s.query.index_select(0, j.reshape(1))[0]),)


@final
@dataclass(frozen=True)
class FacilitySamples(AbstractInformation):
    """FL1MI = sum_i min([max_{j in A} s_ij]_+, eta max_q s_iq), over all samples i: A stands for those that are like Z.

    Monotone and submodular, where similarities with queries are at least 0 (others are taken for 0).

    Args:
        eta: how much likeness with Z counts.

    Example:
        >>> FacilitySamples().value(
        ...     torch.tensor([True, False]), cosines(torch.eye(2), torch.eye(2))
        ... )
        tensor(1.)
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, eta=AT_LEAST_0)

    @fitting
    def value(self, chosen: Tensor, s: Similarities) -> Tensor:
        covered = torch.where(chosen.bool(), s.own, torch.zeros_like(s.own)).amax(1).clamp_min(0)
        cap = self._cap(s)
        return torch.minimum(covered, cap).sum()

    def _cap(self, s: Similarities) -> Tensor:
        return self.eta * s.query.amax(1).clamp_min(0)

    def begin(self, s: Similarities) -> Found:
        return (torch.zeros_like(s.own[0]),)

    def gains(self, found: Found, s: Similarities) -> Tensor:
        cap, covered = self._cap(s).unsqueeze(1), found[0].unsqueeze(1)
        return (torch.minimum(torch.maximum(s.own, covered), cap) - torch.minimum(covered, cap)).sum(0)

    def add(self, found: Found, s: Similarities, j: Tensor) -> Found:
        return (torch.maximum(found[0], s.own.index_select(1, j.reshape(1))[:, 0]),)


@final
@dataclass(frozen=True)
class LogDeterminant(AbstractInformation):
    """LogDetMI = log det K_A - log det (K_A - eta^2 S_AZ K_Z^-1 S_ZA),  K = S + ridge I.

    Monotone for eta up to 1. It need not be submodular, so that a greedy set has no bound.

    Args:
        eta: how much likeness with Z counts, at most 1.
        ridge: of both sets.

    Raises:
        ValueError: if eta is above 1 or the ridge is not positive.

    Example:
        >>> round(
        ...     float(
        ...         LogDeterminant().value(
        ...             torch.tensor([True]), cosines(torch.ones(1, 1), torch.ones(1, 1))
        ...         )
        ...     ),
        ...     4,
        ... )
        0.2877
    """

    eta: float = 1.0
    ridge: float = 1.0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, eta=SHARE, ridge=POSITIVE)

    def _pair(self, s: Similarities) -> tuple[Tensor, Tensor]:
        K, Z = (part + self.ridge * torch.eye(len(part), dtype=part.dtype, device=part.device) for part in s[1:])
        return K, K - self.eta**2 * s.query @ torch.linalg.solve(Z, s.query.mT)

    @fitting
    def value(self, chosen: Tensor, s: Similarities) -> Tensor:
        kept = chosen.bool()
        first, second = (torch.logdet(part[kept][:, kept]) for part in self._pair(s))
        return first - second if bool(kept.any()) else torch.zeros_like(s.own[0, 0])

    def begin(self, s: Similarities) -> Found:
        return self._pair(s)

    def gains(self, found: Found, s: Similarities) -> Tensor:
        tiny = torch.finfo(s.own.dtype).tiny
        first, second = (part.diagonal(dim1=-2, dim2=-1).clamp_min(tiny).log() for part in found)
        return first - second

    def add(self, found: Found, s: Similarities, j: Tensor) -> Found:
        def left(K: Tensor) -> Tensor:  # the covariance of the others, given j
            column = K.index_select(1, j.reshape(1))
            return K - column @ column.mT / column.index_select(0, j.reshape(1))

        return left(found[0]), left(found[1])


@checked(budget=COUNT)
def greedy(information: AbstractInformation, s: Similarities, budget: int, free: Tensor | None = None) -> Tensor:
    """The numbers `(budget,)` of samples, each the one that adds most to those before it; of equals the first.

    For a monotone submodular I it has at least 1 - 1/e of the most that so many samples have. Nothing depends on values
    in its course, so that under `torch.vmap` it makes the choices of many classes and tasks at once.

    Cost: `budget` evaluations of all gains: O(n q) each, O(n^2) where similarities of samples among themselves count.

    Source: Nemhauser, Wolsey, Fisher, "An analysis of approximations for maximizing submodular set functions", Math.
    Programming 14 (1978); the functions: Kothawade, Kaushal, Ramakrishnan, Bilmes, Iyer, "PRISM", AAAI 2022.

    Args:
        information: I.
        s: the similarities.
        budget: how many, at most the number of samples that are free.
        free: which samples may be chosen: ones `(n,)`; None: all.
    """
    found = information.begin(s)
    order: list[Tensor] = []
    barred = torch.zeros_like(s.query[:, 0]) if free is None else 1 - free.to(s.query)
    rows = torch.arange(len(s.query), device=s.query.device)
    for _ in range(min(budget, len(s.query))):
        gains = torch.where(barred > 0, torch.full_like(barred, -torch.inf), information.gains(found, s))
        j = gains.argmax()
        order.append(j)
        barred = torch.maximum(barred, (rows == j).to(barred))
        found = information.add(found, s, j)
    return torch.stack(order) if order else rows[:0]


@checked(budget=COUNT)
def lazy_greedy(information: AbstractInformation, s: Similarities, budget: int) -> tuple[Tensor, int]:
    """The same numbers as `greedy` where I is submodular, and how many gains were looked at.

    What a sample adds to a smaller set bounds what it adds to a larger: only the head of a queue is looked at again.
    For one set at a time, where a gain is dear; `greedy` takes all gains in one product.

    Source: Minoux, "Accelerated greedy algorithms for maximizing submodular set functions", 1978.

    Args:
        information: I.
        s: the similarities.
        budget: how many.
    """
    found, looked = information.begin(s), len(s.query)
    order: list[int] = []
    queue = [(-float(gain), j, 0) for j, gain in enumerate(information.gains(found, s))]
    heapq.heapify(queue)
    while queue and len(order) < budget:
        _, j, seen = heapq.heappop(queue)
        if seen == len(order):
            order.append(j)
            found = information.add(found, s, torch.tensor(j, device=s.query.device))
            continue
        looked += 1
        heapq.heappush(queue, (-float(information.gains(found, s)[j]), j, len(order)))
    return torch.tensor(order, dtype=torch.long, device=s.query.device), looked
