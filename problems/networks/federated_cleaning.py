"""Data hyper-cleaning over clients whose data stay with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_1, BELOW_1, BETWEEN_0_AND_1, COUNT, POSITIVE, SEED, SIZE, WEIGHT
from bilevel.federated.clients import Clients
from bilevel.federated.over_clients import OverClients
from bilevel.federated.server import Participation
from bilevel.federated.soba import FederatedSOBA
from bilevel.problems._data import Arrays
from bilevel.problems._losses import sample_losses
from bilevel.problems.hyper_cleaning import logits, set_up_cleaning
from bilevel.problems.networks._on_clients import mean_over, on_clients


@checked(
    clients=AT_LEAST_1,
    concentration=POSITIVE,
    share=WEIGHT,
    dropout=BELOW_1,
    corrupted=BETWEEN_0_AND_1,
    n_train=SIZE,
    n_val=SIZE,
    regularization=POSITIVE,
    inner_step=POSITIVE,
    outer_step=POSITIVE,
    local_steps=AT_LEAST_1,
    max_steps=COUNT,
    seed=SEED,
)
def federated_cleaning(
    *,
    clients: int = 20,
    concentration: float = 0.5,
    share: float = 0.5,
    dropout: float = 0.05,
    corrupted: float = 0.4,
    n_train: int = 900,
    n_val: int = 400,
    regularization: float = 5e-3,
    inner_step: float = 0.2,
    outer_step: float = 300.0,
    local_steps: int = 1,
    max_steps: int = 600,
    data: Arrays | None = None,
    seed: int = 0,
) -> Instance:
    """Hyper-cleaning where the samples belong to clients with few classes each; see :class:`HyperCleaning`.

    x has a weight for each training sample of all clients, y is a linear classifier. A client answers with vectors of
    p = `n_train` and of q floats, and keeps its samples; of its entries of x only it has an opinion. The objectives are
    the means over all samples: the answer is that of :func:`hyper_cleaning`, which sees them all.

    The algorithm is `FederatedSOBA` with `share` of the clients in every round.

    Metrics: as of :func:`hyper_cleaning`.

    Args:
        clients: M.
        concentration: of the Dirichlet distribution by which each class is split; low is unlike.
        share: of the clients that are asked in a round.
        dropout: the probability that one of them does not answer.
        corrupted: the share of training labels that are replaced.
        n_train: training samples of all clients.
        n_val: validation samples.
        regularization: c.
        inner_step: of y and v.
        outer_step: of x.
        local_steps: of y and v at each client between two rounds.
        max_steps: of a run.
        data: the user's own data, with clean labels; see `bilevel.problems.Arrays`.
        seed: of the split of the data, of the corruption, of the clients and of who answers.

    Raises:
        ImportError: if scikit-learn is needed and missing.
        ValueError: if an argument is out of its range.

    Example:
        >>> X, labels = (
        ...     torch.randn(60, 2, generator=torch.Generator().manual_seed(0)),
        ...     torch.arange(60) % 3,
        ... )
        >>> instance = federated_cleaning(clients=4, n_train=30, n_val=20, data=(X, labels))
        >>> instance.x0.shape, instance.settings["algorithm"].participation.share
        (torch.Size([30]), 0.5)
    """
    family, shown, y0, _ = set_up_cleaning(corrupted, n_train, n_val, 0, regularization, data, seed, True)
    numbers = torch.arange(n_train)

    shared = on_clients(
        (family.X, family.labels, numbers),
        (family.X_val, family.labels_val),
        (shown.parts.y_train, family.labels_val),
        clients,
        concentration,
        seed,
    )
    own = _OnClient(family.c)
    one, x0 = BilevelProblem(own.f, own.g), torch.zeros_like(family.X[:, 0])
    algorithm = OverClients(
        Clients(one, x0, y0, shared),
        FederatedSOBA(inner_step, outer_step, local_steps=local_steps),
        Participation(share=share, dropout=dropout, seed=abs(seed)),
    )
    return Instance(
        problem=mean_over(one, shared),
        x0=x0,
        y0=y0,
        description=f"{n_train} samples of {clients} clients with {corrupted:.0%} wrong labels, a linear model",
        constants=family.constants,
        metrics=shown.metrics,
        plot=shown.plot,
        settings={"algorithm": algorithm, "max_steps": max_steps},
    )


@final
@dataclass(frozen=True)
class _OnClient:
    """The objectives of one client, from its samples and their weights."""

    c: float

    def f(self, _: Tensor, y: Tensor, own: Any) -> Tensor:
        inputs, labels, weights = own
        value: Tensor = (weights * sample_losses(logits(y, inputs), labels)).sum()
        return value

    def g(self, x: Tensor, y: Tensor, own: Any) -> Tensor:
        inputs, labels, which, weights = own
        losses = weights * torch.sigmoid(x[which]) * sample_losses(logits(y, inputs), labels)
        value: Tensor = losses.sum() + self.c * y.square().sum()
        return value
