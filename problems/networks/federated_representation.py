"""A representation that clients learn together, with a linear head on top."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem
from bilevel._tree import Tree
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_1, BELOW_1, COUNT, POSITIVE, SEED, SIZE, WEIGHT
from bilevel.federated.clients import Clients
from bilevel.federated.over_clients import OverClients
from bilevel.federated.server import Participation
from bilevel.federated.soba import FederatedSOBA
from bilevel.problems._data import Arrays, Dataset, load
from bilevel.problems._fit import fit
from bilevel.problems._losses import accuracy, outputs, sample_losses
from bilevel.problems._plots import draw_bars
from bilevel.problems.networks._on_clients import mean_over, on_clients

Layer = dict[str, Tensor]


def features(x: Layer, inputs: Tensor) -> Tensor:
    """tanh(W z + b) `(n, h)`."""
    return torch.tanh(inputs @ x["weight"].T + x["bias"])


@checked(
    clients=AT_LEAST_1,
    concentration=POSITIVE,
    share=WEIGHT,
    dropout=BELOW_1,
    width=SIZE,
    n_train=SIZE,
    n_val=SIZE,
    regularization=POSITIVE,
    inner_step=POSITIVE,
    outer_step=POSITIVE,
    local_steps=AT_LEAST_1,
    max_steps=COUNT,
    seed=SEED,
)
def federated_representation(
    *,
    clients: int = 20,
    concentration: float = 0.5,
    share: float = 0.5,
    dropout: float = 0.05,
    width: int = 16,
    n_train: int = 400,
    n_val: int = 600,
    regularization: float = 5e-3,
    inner_step: float = 0.3,
    outer_step: float = 1.0,
    local_steps: int = 1,
    max_steps: int = 400,
    data: Arrays | None = None,
    seed: int = 0,
) -> Instance:
    """min_x f, the loss of held-out samples under the head y*(x) that is fitted to training samples; both over clients.

        g = mean CE(y tanh(W z + b)) + c |y|^2 on training samples,  f = mean CE on held-out ones,  x = (W, b)

    All clients share the layer x and the head y, of which neither belongs to one of them; their samples of few classes
    each stay where they are. The algorithm is `FederatedSOBA` with `share` of the clients in every round.

    Metrics: accuracy on test samples of what was learned, and of the head that is fitted to all training samples on
    the layer at its start (`random`).

    Args:
        clients: M.
        concentration: of the Dirichlet distribution by which each class is split; low is unlike.
        share: of the clients that are asked in a round.
        dropout: the probability that one of them does not answer.
        width: h.
        n_train: training samples of all clients.
        n_val: held-out samples of all clients.
        regularization: c.
        inner_step: of y and v.
        outer_step: of x.
        local_steps: of y and v at each client between two rounds.
        max_steps: of a run.
        data: the user's own data; see `bilevel.problems.Arrays`.
        seed: of the split of the data, of the clients, of who answers and of the layer at its start.

    Raises:
        ImportError: if scikit-learn is needed and missing.
        ValueError: if an argument is out of its range.

    Example:
        >>> X, labels = (
        ...     torch.randn(60, 2, generator=torch.Generator().manual_seed(0)),
        ...     torch.arange(60) % 3,
        ... )
        >>> instance = federated_representation(
        ...     clients=4, width=5, n_train=30, n_val=20, data=(X, labels)
        ... )
        >>> instance.x0["weight"].shape, instance.y0.shape
        (torch.Size([5, 3]), torch.Size([3, 5]))
    """
    parts = load(data, "digits", sizes=(n_train, n_val), seed=seed, per_feature=False)
    generator, d = torch.Generator().manual_seed(seed + 1), parts.X_train.shape[1]
    draw = torch.randn(width, d, generator=generator, dtype=torch.float64) / math.sqrt(d)
    x0 = {"weight": draw.to(parts.X_train), "bias": parts.X_train.new_zeros(width)}
    y0 = parts.X_train.new_zeros(outputs(parts.classes), width)

    shared = on_clients(
        (parts.X_train, parts.y_train),
        (parts.X_val, parts.y_val),
        (parts.y_train, parts.y_val),
        clients,
        concentration,
        seed,
    )
    own = _OnClient(regularization)
    one, shown = BilevelProblem(own.f, own.g), _Shown(parts, x0, y0, regularization)
    algorithm = OverClients(
        Clients(one, x0, y0, shared),
        FederatedSOBA(inner_step, outer_step, local_steps=local_steps),
        Participation(share=share, dropout=dropout, seed=abs(seed)),
    )
    return Instance(
        problem=mean_over(one, shared),
        x0=x0,
        y0=y0,
        description=f"a layer of {width} units under a linear head, learned by {clients} clients",
        metrics=shown.metrics,
        plot=shown.plot,
        settings={"algorithm": algorithm, "max_steps": max_steps},
    )


@final
@dataclass(frozen=True)
class _OnClient:
    """The objectives of one client, from its samples and their weights."""

    c: float

    def f(self, x: Layer, y: Tensor, own: Any) -> Tensor:
        inputs, labels, weights = own
        value: Tensor = (weights * sample_losses(features(x, inputs) @ y.T, labels)).sum()
        return value

    def g(self, x: Layer, y: Tensor, own: Any) -> Tensor:
        return self.f(x, y, own) + self.c * y.square().sum()


@final
@dataclass(frozen=True, eq=False)
class _Shown:
    """What a person is told of a solution."""

    parts: Dataset
    x0: Layer
    y0: Tensor
    c: float

    @functools.cached_property
    def at_random(self) -> float:
        parts = self.parts
        Z = features(self.x0, parts.X_train)

        def loss(y: Tensor) -> Tensor:
            head = y.view_as(self.y0)
            return sample_losses(Z @ head.T, parts.y_train).mean() + self.c * head.square().sum()

        head = fit(loss, self.y0.flatten(), tol=1e-8).view_as(self.y0)
        return accuracy(features(self.x0, parts.X_test) @ head.T, parts.y_test)

    def metrics(self, x: Tree, y: Tree) -> dict[str, float]:
        learned = accuracy(features(x, self.parts.X_test) @ y.T, self.parts.y_test)
        return {"test_accuracy_learned": learned, "test_accuracy_random": self.at_random}

    def plot(self, figure: Any, x: Tree, y: Tree) -> None:
        draw_bars(figure.subplots(), self.metrics(x, y), "accuracy on test samples", 2)
        figure.tight_layout()
