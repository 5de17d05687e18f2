"""Meta-learning over devices: each of them a task whose data stay with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem, Split
from bilevel._tree import Tree, tree_leaves, tree_map
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_1, BELOW_1, COUNT, POSITIVE, SEED, SIZE, WEIGHT
from bilevel.federated.clients import Clients
from bilevel.federated.maml import FederatedMAML
from bilevel.federated.over_clients import OverClients
from bilevel.federated.server import Participation
from bilevel.few_shot.networks import mlp
from bilevel.modules.functional import Functional, functional
from bilevel.problems._plots import draw_bars
from bilevel.tasks.sinusoid import Sinusoid

_NEW = 600  # devices that no run sees


@checked(
    devices=AT_LEAST_1,
    share=WEIGHT,
    dropout=BELOW_1,
    shots=SIZE,
    width=SIZE,
    inner_step=POSITIVE,
    outer_step=POSITIVE,
    max_steps=COUNT,
    seed=SEED,
)
def federated_maml(
    *,
    devices: int = 500,
    share: float = 0.05,
    dropout: float = 0.1,
    shots: int = 10,
    width: int = 40,
    inner_step: float = 0.01,
    outer_step: float = 0.05,
    first_order: bool = False,
    max_steps: int = 1500,
    seed: int = 0,
) -> Instance:
    """min_x mean_m f_m(x - a grad g_m(x)): each device adapts x to a sinusoid of its own; see :class:`FederatedMAML`.

    In every round a small share of the devices takes part, some of which do not answer. y is where adaptation starts,
    y*(x) = x, of g = |y - x|^2 / 2: what is adapted stays at the devices, and the problem of all of them has one
    level less than a client's.

    Metrics: the mean squared error on 600 new devices before and after a step of adaptation, of what was learned and
    (`start`) of the network at its start.

    Args:
        devices: M, each with a support and a query set.
        share: of the devices that are asked in a round.
        dropout: the probability that one of them does not answer.
        shots: points of a support set, and of a query set.
        width: of both hidden layers.
        inner_step: a.
        outer_step: gamma.
        first_order: without the Hessian product.
        max_steps: of a run.
        seed: of the devices, of who answers and of the network.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> instance = federated_maml(devices=8, share=0.5, width=4)
        >>> sorted(instance.metrics(instance.x0, instance.y0))
        ['mse_adapted', 'mse_adapted_start', 'mse_before', 'mse_before_start']
    """
    net = functional(mlp([1, width, width, 1], seed=seed))
    own, new = Sinusoid(shots, shots).sample(devices, seed), Sinusoid(shots, shots).sample(_NEW, seed + 2**20)
    family = _Adapting(net, inner_step, {name: leaf.detach() for name, leaf in net.params.items()}, own, new)
    shared = Split(f=(own["query_x"], own["query_y"]), g=(own["support_x"], own["support_y"]))
    x0 = family.start
    algorithm = OverClients(
        Clients(BilevelProblem(family.loss, family.loss), x0, x0, shared),
        FederatedMAML(inner_step, outer_step, first_order),
        Participation(share=share, dropout=dropout, seed=abs(seed)),
    )
    return Instance(
        problem=BilevelProblem(family.f, family.g),
        x0=x0,
        y0=x0,
        description=f"a start that {devices} devices adapt to a sinusoid each, {share:.0%} of them in a round",
        metrics=family.metrics,
        plot=family.plot,
        settings={"algorithm": algorithm, "max_steps": max_steps},
    )


@final
@dataclass(frozen=True, eq=False)
class _Adapting:
    """A network, the step of its adaptation, and devices."""

    net: Functional
    step: float
    start: dict[str, Tensor]
    own: dict[str, Tensor]
    new: dict[str, Tensor]

    def loss(self, _: Tree, y: Tree, data: Any) -> Tensor:
        """f_m and g_m."""
        return mse_loss(self.net(y, data[0]), data[1])

    def f(self, _: Tree, y: Tree) -> Tensor:
        """The mean of the f_m where one step from y leads."""
        return self.adapted(y, self.own)

    def g(self, x: Tree, y: Tree) -> Tensor:
        """|y - x|^2 / 2."""
        pairs = zip(tree_leaves(x), tree_leaves(y), strict=True)
        return torch.stack([(b - a).square().sum() for a, b in pairs]).sum() / 2

    def losses(self, y: Tree, data: Any) -> Tensor:
        """Of all devices, each with parameters of its own: `(M,)`."""
        return torch.vmap(lambda leaf, z, b: mse_loss(self.net(leaf, z), b))(y, *data)

    def adapted(self, y: Tree, tasks: dict[str, Tensor]) -> Tensor:
        """The mean over tasks after one step from y."""
        count = len(tasks["support_x"])
        with torch.enable_grad():
            rows = {name: leaf.expand(count, *leaf.shape) for name, leaf in y.items()}
            rows = {name: leaf if leaf.requires_grad else leaf.requires_grad_() for name, leaf in rows.items()}
            total = self.losses(rows, (tasks["support_x"], tasks["support_y"])).sum()
            gradients = torch.autograd.grad(total, list(rows.values()), create_graph=True)
        there = {name: leaf - self.step * d for (name, leaf), d in zip(rows.items(), gradients, strict=True)}
        return self.losses(there, (tasks["query_x"], tasks["query_y"])).mean()

    def metrics(self, x: Tree, y: Tree) -> dict[str, float]:
        found: dict[str, float] = {}
        for kind, at in (("", x), ("_start", self.start)):
            at = tree_map(lambda leaf: leaf.detach(), at)
            count = len(self.new["query_x"])
            rows = {name: leaf.expand(count, *leaf.shape) for name, leaf in at.items()}
            before = self.losses(rows, (self.new["query_x"], self.new["query_y"])).mean()
            after = self.adapted(at, self.new).detach()
            found |= {f"mse_before{kind}": float(before), f"mse_adapted{kind}": float(after)}
        return found

    def plot(self, figure: Any, x: Tree, y: Tree) -> None:
        draw_bars(figure.subplots(), self.metrics(x, y), "mean squared error on new devices", 2)
        figure.tight_layout()
