"""What problems over clients share: samples that are split among them, and the mean of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._problem import BilevelProblem, Split
from bilevel._tree import Tree
from bilevel.federated.splits import dirichlet_split, stacked


def on_clients(
    train: Sequence[Tensor],
    val: Sequence[Tensor],
    labels: tuple[Tensor, Tensor],
    clients: int,
    unlike: float,
    seed: int,
) -> Split:
    """The samples of all clients, last the weights of samples, which make the mean over clients that over samples.

    Args:
        train: tensors with a leading axis of samples, for g.
        val: the same for f.
        labels: of both, by which they are split: of each class a client has like shares of both.
        clients: M.
        unlike: the concentration; low is unlike.
        seed: of the split.
    """
    sides = []
    for tensors, each in zip((val, train), reversed(labels), strict=True):
        *parts, weights = stacked(list(tensors), dirichlet_split(each, clients, unlike, seed))
        sides.append((*parts, (weights > 0) * (clients / len(each))))
    return Split(f=sides[0], g=sides[1])


def mean_over(one: BilevelProblem, data: Split) -> BilevelProblem:
    """The problem of all clients: means over them, whose data have a leading axis of them."""
    family = _Mean(one, data)
    return BilevelProblem(family.f, family.g)


@final
@dataclass(frozen=True, eq=False)
class _Mean:
    one: BilevelProblem
    data: Split

    def f(self, x: Tree, y: Tree) -> Tensor:
        return torch.vmap(lambda own: self.one.f(x, y, own))(self.data.f).mean()

    def g(self, x: Tree, y: Tree) -> Tensor:
        return torch.vmap(lambda own: self.one.g(x, y, own))(self.data.g).mean()
