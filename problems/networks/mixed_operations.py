"""Mixing weights of operations: which candidates made the data, by a softmax on every edge of a network (DARTS)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, mse_loss, one_hot

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem, Split
from bilevel._tree import Tree, tree_leaves
from bilevel.algorithms.soba import SOBA
from bilevel.arguments.checked import checked, fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, AT_LEAST_1, BETWEEN_0_AND_1, COUNT, SEED, SIZE, demand_ranges
from bilevel.modules.functional import Functional, functional
from bilevel.problems._plots import COLORS
from bilevel.problems.networks._batches import loader
from bilevel.problems.networks._modules import made
from bilevel.solvers.adam import Adam

EDGES = ((0, 1), (0, 2), (1, 2))  # between the embedded tokens, node 0, and two nodes with a head each
_RHO, _GAMMA, _RHO_V = 5e-3, 0.01, 0.02  # steps of y (by Adam), of x (by Adam) and of v
_OUTPUTS, _SHARP = 4, 2.0


@final
class Convolution(nn.Module):
    """gelu of three neighbors, `dilation` apart: `(batch, length, width)` to the same."""

    def __init__(self, width: int, dilation: int = 1) -> None:
        nn.Module.__init__(self)
        self.along = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)

    def forward(self, tokens: Tensor) -> Tensor:
        return gelu(self.along(tokens.transpose(1, 2))).transpose(1, 2)


@final
class Attention(nn.Module):
    """softmax(q k' / sqrt(width)) v, one head, written out: the fused operation has no second derivative."""

    def __init__(self, width: int) -> None:
        nn.Module.__init__(self)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        products = self.query(tokens) @ self.key(tokens).transpose(1, 2) / tokens.shape[2] ** 0.5
        mixed: Tensor = torch.softmax(products, -1) @ self.value(tokens)
        return mixed


@final
class RunningMean(nn.Module):
    """A linear layer of the mean of all tokens up to each."""

    def __init__(self, width: int) -> None:
        nn.Module.__init__(self)
        self.linear = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        counts = torch.arange(1, tokens.shape[1] + 1, device=tokens.device).unsqueeze(1)
        mean: Tensor = self.linear(tokens.cumsum(1) / counts)
        return mean


OPERATIONS: dict[str, Callable[[int], nn.Module]] = {
    "convolution": Convolution,
    "dilated": lambda width: Convolution(width, 2),
    "attention": Attention,
    "running mean": RunningMean,
}


@final
class Supernet(nn.Module):
    """Embedded tokens, then two nodes: each is the sum over its edges of what all candidate operations make, weighted.

    forward(tokens `(batch, length)`, weights `(edges, operations)`) -> `(batch, length, 2 _OUTPUTS)`, a linear head of
    each node. What an operation makes is normalized before it is weighted, so that a weight cannot be made up for by
    parameters; so are the nodes.
    """

    def __init__(self, vocabulary: int, length: int, width: int, dropout: float) -> None:
        nn.Module.__init__(self)
        self.embedding, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.edges = nn.ModuleList(nn.ModuleList(make(width) for make in OPERATIONS.values()) for _ in EDGES)
        self.norm, self.dropout = nn.LayerNorm(width, elementwise_affine=False), nn.Dropout(dropout)
        self.heads = nn.ModuleList(nn.Linear(width, _OUTPUTS) for _ in range(2))

    def forward(self, tokens: Tensor, weights: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        nodes = [self.norm(self.embedding(tokens) + self.places(places))]
        for node in (1, 2):
            parts = [
                weight * self.norm(operation(nodes[begin]))
                for (begin, end), row, candidates in zip(EDGES, weights, self.edges, strict=True)
                if end == node
                for weight, operation in zip(row, candidates.children(), strict=True)
            ]
            nodes.append(self.norm(torch.stack(parts).sum(0)))
        return torch.cat([head(self.dropout(node)) for head, node in zip(self.heads, nodes[1:], strict=True)], -1)


@final
@dataclass(frozen=True, eq=False)
class MixedOperations:
    """g = mean |net(y; tokens, softmax(x)) - targets|^2 + c |y|^2 on training data, f = the same without c elsewhere.

    x `(edges, operations)`, softmax along each row. Both are means over a batch (tokens, targets); the network of g
    drops out, that of f does not.

    Args:
        net: of g, y are its parameters.
        plain: of f, with the same parameters.
        c: the weight of |y|^2.
    """

    net: Functional
    plain: Functional
    c: float

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, c=AT_LEAST_0)

    @fitting
    def f(self, x: Tensor, y: Tree, batch: Any) -> Tensor:
        """The outer objective."""
        tokens, targets = batch
        return mse_loss(self.plain(y, tokens, torch.softmax(x, 1)), targets)

    @fitting
    def g(self, x: Tensor, y: Tree, batch: Any) -> Tensor:
        """The inner objective."""
        tokens, targets = batch
        loss = mse_loss(self.net(y, tokens, torch.softmax(x, 1)), targets)
        for leaf in tree_leaves(y):
            loss = loss + self.c * leaf.square().sum()
        return loss


@checked(
    n_train=SIZE,
    n_val=SIZE,
    vocabulary=SIZE,
    length=AT_LEAST_1,
    width=SIZE,
    noise=AT_LEAST_0,
    dropout=BETWEEN_0_AND_1,
    regularization=AT_LEAST_0,
    batch=SIZE,
    max_steps=COUNT,
    seed=SEED,
)
def mixed_operations(
    *,
    n_train: int = 1024,
    n_val: int = 1024,
    vocabulary: int = 10,
    length: int = 8,
    width: int = 16,
    noise: float = 0.1,
    dropout: float = 0.05,
    regularization: float = 1e-5,
    batch: int = 128,
    max_steps: int = 400,
    seed: int = 0,
    double: bool = False,
) -> Instance:
    """Which operations made the data: a softmax over four candidates on each of three edges; a planted task.

    Targets are what a network of the same form makes of random tokens, whose edges have one operation each, drawn by
    the seed, and weights of its own, plus noise. The candidates are a convolution, a dilated one, attention and a
    running mean. SOBA moves all iterates at once, y and x by Adam; `DataLoader`s give batches at both levels; see
    :class:`MixedOperations` and :class:`Supernet`.

    Metrics: on how many of the three edges the largest weight is that of the planted operation (`edges_found`), and the
    least of the planted operations' weights (`least_weight`).

    Args:
        n_train: training sequences.
        n_val: validation sequences.
        vocabulary: how many tokens there are.
        length: of a sequence.
        width: of an embedded token.
        noise: standard deviation of the noise of the targets, whose own is 1.
        dropout: the share of features that are dropped in front of the heads.
        regularization: c.
        batch: sequences of a batch of each level.
        max_steps: steps of a run.
        seed: of the planted operations, their weights, the data, the network's start and the batches.
        double: float64, else float32.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> instance = mixed_operations(n_train=8, n_val=8, width=4, batch=4)
        >>> instance.metrics(instance.x0, instance.y0)["least_weight"]
        0.25
    """
    planted, tokens, targets = _task(n_train + n_val, vocabulary, length, width, noise, seed)
    module = made(lambda: Supernet(vocabulary, length, width, dropout), 2 * seed + 1)
    if double:
        module, targets = module.double(), targets.double()
    net = functional(module, seed=seed)
    family = MixedOperations(net, functional(module, dropout="off"), regularization)
    shown = _Shown(planted)
    training, validation = (tokens[:n_train], targets[:n_train]), (tokens[n_train:], targets[n_train:])
    return Instance(
        problem=BilevelProblem(family.f, family.g),
        x0=torch.zeros(len(EDGES), len(OPERATIONS), dtype=targets.dtype),
        y0=net.params,
        description=f"{len(OPERATIONS)} candidate operations on {len(EDGES)} edges, data of a network with one on each",
        metrics=shown.metrics,
        plot=shown.plot,
        settings={
            "algorithm": SOBA(Adam(_RHO), Adam(_GAMMA), _RHO_V),
            "data": Split(f=loader(validation, batch, seed + 2), g=loader(training, batch, seed + 1)),
            "max_steps": max_steps,
        },
    )


def _task(n: int, vocabulary: int, length: int, width: int, noise: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Planted operations `(edges,)`, tokens `(n, length)`, targets `(n, length, outputs)` of variance 1."""
    generator = torch.Generator("cpu").manual_seed(seed)
    planted = torch.randint(len(OPERATIONS), (len(EDGES),), generator=generator, device="cpu")
    tokens = torch.randint(vocabulary, (n, length), generator=generator, device="cpu")
    source = made(lambda: Supernet(vocabulary, length, width, 0.0), 2 * seed).eval()
    with torch.no_grad():
        for name, weight in source.named_parameters():
            if name.startswith("edges") and weight.dim() > 1:
                weight.mul_(_SHARP)  # so that attention attends and convolutions bend
        targets = source(tokens, one_hot(planted, len(OPERATIONS)).to(torch.float32))
    deviation, mean = torch.std_mean(targets, (0, 1))
    targets = (targets - mean) / deviation.clamp(min=1e-6)
    return (
        planted,
        tokens,
        targets + noise * torch.randn(targets.shape, generator=generator, dtype=targets.dtype, device="cpu"),
    )


@final
@dataclass(frozen=True, eq=False)
class _Shown:
    """What a person is told of a solution."""

    planted: Tensor

    def metrics(self, x: Tensor, _: Tree) -> dict[str, float]:
        weights, planted = torch.softmax(x.detach(), 1).cpu(), self.planted
        chosen = weights.gather(1, planted.unsqueeze(1))
        return {
            "edges_found": float((weights.argmax(1) == planted).sum()),
            "edges": float(len(planted)),
            "least_weight": float(chosen.min()),
        }

    def plot(self, figure: Any, x: Tensor, _: Tree) -> None:
        weights, names = torch.softmax(x.detach(), 1).cpu(), list(OPERATIONS)
        for k, (axes, (begin, end)) in enumerate(zip(figure.subplots(1, len(EDGES), sharey=True), EDGES, strict=True)):
            planted = int(self.planted[k])
            colors = [COLORS[0 if row == planted else 3] for row in range(len(names))]
            bars = axes.barh(range(len(names)), weights[k].tolist(), color=colors)
            axes.bar_label(bars, fmt="%.2f", padding=3)
            axes.set_yticks(range(len(names)), names)
            axes.set_xlim(0, 1.15)
            axes.axvline(1 / len(names), color=COLORS[3], linestyle=":")
            axes.set_title(f"edge {begin} → {end}\nplanted: {names[planted]}", fontsize=10)
            axes.set_xlabel("weight softmax(x)")
        figure.axes[0].invert_yaxis()
        figure.tight_layout()
