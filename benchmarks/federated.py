"""Rounds and bytes to |grad Phi| <= 1e-3 of federated methods on a heterogeneous logistic problem, all on one grid.

Twenty clients share 600 samples of four classes by a Dirichlet split (concentration 0.1), one class against the others;
the inner problem is logistic regression with a ridge penalty exp(x_j) / 200 for each weight, the outer one the loss on
other samples of the same clients, and |x|^2 / 4000. Each method is run with every step of one grid (and every number of
rounds that a step of it may have), and its best run counts. |grad Phi| is that of the whole problem, which no client
knows.

    python benchmarks/federated.py
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bilevel import AID, BilevelProblem, Split, hypergradient
from bilevel.federated import (
    AbstractMethod,
    AggITD,
    Clients,
    FederatedSOBA,
    FedNest,
    Traffic,
    dirichlet_split,
    federate,
    stacked,
)
from bilevel.solvers import CG, LBFGS

CLIENTS, SAMPLES, FEATURES, CLASSES = 20, 600, 6, 4
TARGET = 1e-3
INNER, OUTER, ROUNDS = (1.0, 3.0), (3.0, 10.0, 30.0, 100.0), (2, 5, 10, 20)
MOST = 300  # rounds of a run at most
NAMES = ("federated SOBA", "AggITD, derandomized", "FedNest", "FedNest, 3 local steps")


def _loss(y: Tensor, data: Any) -> Tensor:
    inputs, targets, weights = data
    losses: Tensor = torch.nn.functional.softplus(-targets * (inputs @ y))
    return (weights * losses).sum()


def _f(x: Tensor, y: Tensor, data: Any) -> Tensor:
    return _loss(y, data) + x.square().sum() / 4000


def _g(x: Tensor, y: Tensor, data: Any) -> Tensor:
    return _loss(y, data) + (x.exp() * y.square()).sum() / 400


PROBLEM = BilevelProblem(_f, _g)


def made(seed: int = 0) -> tuple[Clients, Any, Tensor]:
    """The clients, the whole problem's data, and a start of x and y."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(SAMPLES) % CLASSES
    centers = torch.randn(CLASSES, FEATURES, generator=generator, dtype=torch.float64)
    inputs = centers[labels] + torch.randn(SAMPLES, FEATURES, generator=generator, dtype=torch.float64)
    targets = torch.where(labels == 0, 1.0, -1.0).to(inputs)
    parts = dirichlet_split(labels, CLIENTS, 0.1, seed=seed)
    parts = [part[torch.randperm(len(part), generator=generator)] for part in parts]
    train, held = [part[: (len(part) + 1) // 2] for part in parts], [part[len(part) // 2 :] for part in parts]
    data = Split(f=stacked([inputs, targets], held), g=stacked([inputs, targets], train))
    sizes = torch.tensor([float(len(part)) for part in parts], dtype=torch.float64)
    x0 = torch.zeros(FEATURES, dtype=torch.float64)
    clients = Clients(PROBLEM, x0, torch.zeros_like(x0), data, sizes)
    w = clients.weights[:, None]

    def whole(side: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return side[0].flatten(0, 1), side[1].flatten(), (w * side[2]).flatten()

    return clients, Split(f=whole(data.f), g=whole(data.g)), x0


def methods(name: str) -> Iterator[AbstractMethod]:
    """A method with every setting of the grid; the numbers of rounds are those of local steps of federated SOBA."""
    for inner, outer in itertools.product(INNER, OUTER):
        if name == NAMES[0]:
            for rounds in (1, *ROUNDS):
                yield FederatedSOBA(inner, outer, local_steps=rounds)
            continue
        for rounds in ROUNDS:
            if name == NAMES[1]:
                yield AggITD(inner, outer, rounds=rounds)
            else:
                yield FedNest(inner, outer, inner_rounds=rounds, terms=rounds, local_steps=1 if name == NAMES[2] else 3)


def reached(method: AbstractMethod, most: int, seed: int = 0) -> Traffic | None:
    """What a method has sent when |grad Phi| is at most the target; None: more than so many rounds."""
    clients, data, x0 = made(seed)
    exact = AID(LBFGS(tol=1e-9), CG(rtol=1e-9))
    found: list[Traffic] = []

    def callback(row: Any, x: Any, y: Any) -> bool:
        if row.step and row.norm <= 2 * TARGET:
            h = hypergradient(PROBLEM, x, y, estimator=exact, data=data, throw=False).grad
            if float(torch.as_tensor(h).norm()) <= TARGET:
                found.append(row.traffic)
        return bool(found) or row.traffic.rounds >= most or not row.norm < 1e6

    federate(clients, x0, torch.zeros_like(x0), method=method, steps=most, callback=callback, throw=False)
    return found[0] if found else None


def best(name: str, most: int = MOST, seed: int = 0) -> tuple[Traffic, AbstractMethod] | None:
    """The best run of a method: fewest rounds, each run given up where one before had arrived."""
    top: tuple[Traffic, AbstractMethod] | None = None
    for method in methods(name):
        found = reached(method, most if top is None else top[0].rounds - 1, seed)
        if found is not None and (top is None or found.rounds < top[0].rounds):
            top = found, method
    return top


if __name__ == "__main__":
    for name in NAMES:
        top = best(name)
        told = "none arrived" if top is None else f"{top[0].rounds} rounds, {top[0].bytes} bytes, by {top[1]}"
        print(f"{name}: {told}", flush=True)
