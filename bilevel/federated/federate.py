"""`federate`: outer steps of a federated method, with what they send."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch

from bilevel._result import BilevelError, Status
from bilevel._tree import Tree, demand_alike, ravel
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, COUNT, demand_ranges
from bilevel.federated.clients import AbstractClients
from bilevel.federated.method import AbstractMethod, At
from bilevel.federated.server import Participation, Server, Traffic


@final
@dataclass(frozen=True)
class Reached:
    """Where a step has come to.

    Attributes:
        step: its number.
        norm: |h|, of the direction that x was moved along.
        traffic: all that was sent so far.
    """

    step: int
    norm: float
    traffic: Traffic

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, step=COUNT)


@final
@dataclass(frozen=True, eq=False)
class Federated:
    """Where a federated run has ended.

    Attributes:
        x: the outer variables, in the structure of x0.
        y: the inner ones.
        traffic: what was sent in all.
        history: a row for each step.
        status: `stopped` by the callback, `steps_used_up`, or `nonfinite`.
    """

    x: Tree
    y: Tree
    traffic: Traffic
    history: tuple[Reached, ...]
    status: Status

    def __post_init__(self) -> None:
        demand_types(self)


@checked(steps=AT_LEAST_0)
def federate(
    clients: AbstractClients,
    x0: Tree,
    y0: Tree,
    *,
    method: AbstractMethod,
    steps: int,
    participation: Participation = Participation(),
    callback: Callable[[Reached, Tree, Tree], bool | None] | None = None,
    throw: bool = True,
) -> Federated:
    """min_x f(x, y*(x)), f = sum_m w_m f_m and g = sum_m w_m g_m, by a server that sees means of clients' vectors only.

    From the same arguments the same bits follow.

    Args:
        clients: those who have f_m and g_m.
        x0: where x starts.
        y0: where y starts.
        method: what is done in the rounds: `FederatedSOBA` (begin with that), `AggITD`, `FedNest`.
        steps: outer steps.
        participation: who answers in a round.
        callback: called with each row of the history, x and y; a true value ends the run.
        throw: raise where x is not finite; otherwise see `Federated.status`.

    Returns:
        Where it ended, and what was sent.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if x0 and y0 are not alike, or no client ever answers.
        BilevelError: if `throw` and the iterates are not finite; `partial` is where it ended.

    Example:
        >>> from bilevel import BilevelProblem
        >>> from bilevel.federated import Clients, FederatedSOBA
        >>> problem = BilevelProblem(
        ...     lambda x, y, a: (y - a).square() / 2, lambda x, y, a: (y - a * x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> clients = Clients(problem, x0, x0, torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
        >>> half = Participation(share=0.67, seed=1)
        >>> found = federate(
        ...     clients, x0, x0, method=FederatedSOBA(0.1, 0.01), steps=100, participation=half
        ... )
        >>> found.traffic  # 2 of 3 clients, three vectors of one number of 8 bytes each way
        Traffic(rounds=100, down=4800, up=4800)
    """
    x, x_structure = ravel(x0, "x0")
    y, y_structure = ravel(y0, "y0")
    demand_alike("federate(x0, y0)", x_structure, y_structure)
    at = At(x.detach().clone(), y.detach().clone(), torch.zeros_like(y), torch.zeros_like(x))
    server, history = Server(clients, (len(x), len(y)), participation), list[Reached]()
    status = Status.steps_used_up
    for number in range(steps):
        at = method.step(server, at, number)
        history.append(Reached(number, float(torch.linalg.vector_norm(at.h)), server.traffic))
        if not bool(at.x.isfinite().all() and at.y.isfinite().all()):
            status = Status.nonfinite
            break
        if callback is not None and callback(history[-1], x_structure.unravel(at.x), y_structure.unravel(at.y)):
            status = Status.stopped
            break
    found = Federated(x_structure.unravel(at.x), y_structure.unravel(at.y), server.traffic, tuple(history), status)
    if throw and not status.ok:
        raise BilevelError(f"`federate` did not succeed at step {len(history) - 1}: {status.value}", status, found)
    return found
