"""A federated method as an algorithm of `minimize`: with its records, checkpoints and command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._estimate import FlatEstimate
from bilevel._result import Report, Status
from bilevel.algorithms.algorithm import AbstractAlgorithm, Evaluated
from bilevel.algorithms.oracle import Oracle
from bilevel.arguments.fits import demand_types
from bilevel.federated.clients import AbstractClients
from bilevel.federated.method import AbstractMethod, At
from bilevel.federated.server import Participation, Server, Traffic
from bilevel.requirements.properties import Property


@final
@dataclass(frozen=True, eq=False)
class ServedState:
    """Where the server is, and what was sent on the way.

    Attributes:
        x: `(p,)`.
        y: `(q,)`.
        v: `(q,)`.
        h: `(p,)`.
        rounds: so far.
        down: bytes to the clients.
        up: bytes from them.
        tried: rounds that were begun.
    """

    x: Tensor
    y: Tensor
    v: Tensor
    h: Tensor
    rounds: int = 0
    down: int = 0
    up: int = 0
    tried: int = 0


@final
@dataclass(frozen=True, eq=False)
class OverClients(AbstractAlgorithm[ServedState]):
    """The steps of a federated method, as `federate` takes them, in `minimize`: a step of it is one of the method.

    The problem that `minimize` is given is the mean over the clients, f = sum_m w_m f_m and g = sum_m w_m g_m: the
    value of f is recorded from it, which no client is asked for, and nothing else. `tol` is compared with
    the method's own measure, of h and of the directions of y and v; it is refused where some clients only are asked.
    With a truncated series (`AggITD`, `FedNest`) h has its bias. What was sent is the note of an estimate.

    Cost: the rounds of the method, and f on all clients for each record.

    Args:
        clients: those who have f_m and g_m.
        method: what is done in the rounds.
        participation: who answers.

    Raises:
        TypeError: if an argument is of the wrong type.

    Example:
        >>> from bilevel import BilevelProblem, minimize
        >>> from bilevel.federated import Clients, FederatedSOBA
        >>> a = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
        >>> one = BilevelProblem(
        ...     lambda x, y, a: (y - a).square() / 2, lambda x, y, a: (y - a * x).square() / 2
        ... )
        >>> all_of_them = BilevelProblem(
        ...     lambda x, y: one.f(x, y, a).mean(), lambda x, y: one.g(x, y, a).mean()
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> algorithm = OverClients(Clients(one, x0, x0, a), FederatedSOBA(0.5, 0.02))
        >>> found = minimize(all_of_them, x0, x0, algorithm=algorithm, max_steps=400)
        >>> round(float(found.x), 4), found.estimate.note  # y*(x) = 3 x
        (1.0, '401 rounds, 57.7 kB')
    """

    clients: AbstractClients
    method: AbstractMethod
    participation: Participation = Participation()

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def requires(self) -> frozenset[Property]:
        return frozenset({Property.stationary, Property.smooth, Property.beyond_start})

    @property
    def sees_everything(self) -> bool:
        who = self.participation
        return who.share == 1 and not who.dropout and not who.late and not self.method.is_random

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> ServedState:
        return ServedState(x, y, torch.zeros_like(y), torch.zeros_like(x))

    def evaluate(self, oracle: Oracle, state: ServedState) -> Evaluated:
        so_far = Traffic(state.rounds, state.down, state.up)
        sizes = (len(state.x), len(state.y))
        server = Server(self.clients, sizes, self.participation, traffic=so_far, tried=state.tried)
        at = self.method.step(server, At(state.x, state.y, state.v, state.h), oracle.step)
        sent = server.traffic
        then = ServedState(*at, sent.rounds, sent.down, sent.up, server.tried)
        with torch.no_grad():
            value = oracle.problem().f(state.x, state.y)
        moved = float(torch.linalg.vector_norm(at.y - state.y))
        status = Status.successful if math.isfinite(moved) else Status.nonfinite
        reports = (Report("step of y", status, moved, 0),)
        note = f"{sent.rounds} rounds, {_size(sent.bytes)}"
        return Evaluated(FlatEstimate(at.h, value, state.y, reports, note=note), then)

    def step(self, oracle: Oracle, state: ServedState, found: Evaluated) -> ServedState:
        then: ServedState = found.kept
        return ServedState(oracle.project(then.x), then.y, then.v, then.h, then.rounds, then.down, then.up, then.tried)

    def stationarity(self, oracle: Oracle, state: ServedState, found: Evaluated) -> Tensor:
        then: ServedState = found.kept
        h = oracle.residual(state.x, then.h).reshape(1)  # its norm, with the set of x in mind
        before, after = At(state.x, state.y, state.v, state.h), At(then.x, then.y, then.v, h)
        return self.method.arrival(before, after)

    def point(self, state: ServedState) -> tuple[Tensor, Tensor]:
        return state.x, state.y


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
