"""Rounds and bytes to |grad Phi| <= 1e-3 of federated methods on heterogeneous logistic problems, all on one grid.

Twenty clients share samples by a Dirichlet split (concentration 0.1); the inner problem is logistic regression with a
ridge penalty exp(x_j) / 200 for each weight, the outer one the loss on other samples of the same clients, and
|x|^2 / 4000. Of "breast cancer" the samples are scikit-learn's 569, with 30 standardized features and a constant, and
two classes; of "drawn" 600 of four classes around Gaussian centres with 6 features, one class against the others. Each
method is run with every step of one grid (and every number of rounds that a step of it may have); its run of the fewest
rounds and that of the fewest bytes count. |grad Phi| is that of the whole problem, which no client knows.

    python benchmarks/federated.py [--problem "breast cancer"]

takes about ten minutes on an idle core.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
PROBLEMS = ("breast cancer", "drawn")
TARGET = 1e-3
INNER, OUTER, ROUNDS = (1.0, 3.0), (3.0, 10.0, 30.0, 100.0), (2, 5, 10, 20)
MOST = 3000  # rounds of a run at most
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


def samples(name: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets 1 or -1, and the classes by which clients differ."""
    if name == "drawn":
        labels = torch.arange(SAMPLES) % CLASSES
        centers = torch.randn(CLASSES, FEATURES, generator=generator, dtype=torch.float64)
        inputs = centers[labels] + torch.randn(SAMPLES, FEATURES, generator=generator, dtype=torch.float64)
    else:
        from sklearn.datasets import load_breast_cancer

        X, y = load_breast_cancer(return_X_y=True)
        inputs, labels = torch.from_numpy(X), torch.from_numpy(y)
        inputs = (inputs - inputs.mean(0)) / inputs.std(0)
        inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
    return inputs, torch.where(labels == 0, 1.0, -1.0).to(inputs), labels


def made(name: str, seed: int = 0) -> tuple[Clients, Any, Tensor]:
    """The clients, the whole problem's data, and a start of x and y."""
    generator = torch.Generator().manual_seed(seed)
    inputs, targets, labels = samples(name, generator)
    parts = dirichlet_split(labels, CLIENTS, 0.1, seed=seed)
    parts = [part[torch.randperm(len(part), generator=generator)] for part in parts]
    train, held = [part[: (len(part) + 1) // 2] for part in parts], [part[len(part) // 2 :] for part in parts]
    data = Split(f=stacked([inputs, targets], held), g=stacked([inputs, targets], train))
    sizes = torch.tensor([float(len(part)) for part in parts], dtype=torch.float64)
    x0 = torch.zeros(inputs.shape[1], dtype=torch.float64)
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


@dataclass(frozen=True)
class Best:
    """The runs of the fewest rounds and of the fewest bytes, with their methods."""

    rounds: int = MOST
    bytes: float = math.inf
    by_rounds: AbstractMethod | None = None
    by_bytes: AbstractMethod | None = None

    def or_(self, method: AbstractMethod, traffic: Traffic | None) -> Best:
        """The better of each."""
        found = self
        if traffic is not None and traffic.rounds <= found.rounds:
            found = replace(found, rounds=traffic.rounds, by_rounds=method)
        if traffic is not None and traffic.bytes < found.bytes:
            found = replace(found, bytes=traffic.bytes, by_bytes=method)
        return found


def reached(problem: str, method: AbstractMethod, limit: Best, seed: int = 0) -> Traffic | None:
    """What a method has sent when |grad Phi| is at most the target; None: more rounds and bytes than the limit."""
    clients, data, x0 = made(problem, seed)
    exact = AID(LBFGS(tol=1e-9), CG(rtol=1e-9))
    found: list[Traffic] = []

    def callback(row: Any, x: Any, y: Any) -> bool:
        if row.step and row.norm <= 2 * TARGET:
            h = hypergradient(PROBLEM, x, y, estimator=exact, data=data, throw=False).grad
            if float(torch.as_tensor(h).norm()) <= TARGET:
                found.append(row.traffic)
        worse = row.traffic.rounds >= limit.rounds and row.traffic.bytes >= limit.bytes
        return bool(found) or worse or row.traffic.rounds >= MOST or not row.norm < 1e6

    federate(clients, x0, torch.zeros_like(x0), method=method, steps=MOST, callback=callback, throw=False)
    return found[0] if found else None


def best(problem: str, name: str, seed: int = 0) -> Best:
    """The best runs of a method: one is given up where those before needed fewer rounds and fewer bytes."""
    top = Best()
    for method in methods(name):
        top = top.or_(method, reached(problem, method, top, seed))
    return top


def table(problem: str, names: tuple[str, ...] = NAMES, seed: int = 0) -> dict[str, Best]:
    """The best of each method, printed as it comes."""
    print(f"\n| {problem} | rounds | kB | steps of the fewest rounds | of the fewest bytes |\n|---|---:|---:|---|---|")
    found = {}
    for name in names:
        top = found[name] = best(problem, name, seed)
        numbers = (
            f"{top.rounds} | {top.bytes / 1000:.0f}" if top.by_rounds is not None else f"more than {MOST} | not reached"
        )
        print(f"| {name} | {numbers} | {top.by_rounds} | {top.by_bytes} |", flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=PROBLEMS, action="append")
    for problem in parser.parse_args().problem or PROBLEMS:
        table(problem)
