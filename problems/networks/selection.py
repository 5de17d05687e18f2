"""Which unlabelled samples an adaptation takes as its own, and under which labels."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from bilevel.arguments.checked import fitting
from bilevel.arguments.fits import demand_types
from bilevel.portable.pickling import AbstractPortable
from bilevel.problems.networks.submodular import AbstractInformation, FacilityQueries, Similarities, cosines, greedy


class Seen(NamedTuple):
    """What a network makes of a task's sets; none of it is differentiated."""

    logits: Tensor  # of unlabelled samples (n, classes)
    features: Tensor  # of them, before the last layer (n, d)
    labels: Tensor  # of the support set (s,)
    support_logits: Tensor  # (s, classes)
    support_features: Tensor  # (s, d)
    free: Tensor  # ones at samples that may be chosen (n,)
    noise: Tensor  # of this step (n,)


class AbstractSelection(AbstractPortable, abc.ABC):
    """A choice of unlabelled samples and their labels: without values in its course, for many tasks at once."""

    @abc.abstractmethod
    def choose(self, seen: Seen, count: int) -> Tensor:
        """Ones `(classes, n)` where a sample is taken under a label: `count` for each class, and zeros."""


@final
@dataclass(frozen=True)
class Nothing(AbstractSelection):
    """No sample at all: supervised adaptation."""

    def choose(self, seen: Seen, count: int) -> Tensor:
        return torch.zeros_like(seen.logits).mT


@final
@dataclass(frozen=True)
class Confident(AbstractSelection):
    """Pseudo-labels: the samples of the largest probabilities, under the classes of which these are."""

    @fitting
    def choose(self, seen: Seen, count: int) -> Tensor:
        sure = seen.logits.softmax(-1).amax(-1)
        return _under_their_own(seen, torch.where(seen.free > 0, sure, sure - 2), count)


@final
@dataclass(frozen=True)
class AtRandom(AbstractSelection):
    """As many samples at random, under their most probable classes."""

    @fitting
    def choose(self, seen: Seen, count: int) -> Tensor:
        return _under_their_own(seen, torch.where(seen.free > 0, seen.noise, seen.noise - 2), count)


def _under_their_own(seen: Seen, score: Tensor, count: int) -> Tensor:
    """The samples of the highest scores, `count` times the number of classes of them, under their argmax."""
    n, classes = seen.logits.shape
    order = score.argsort(descending=True, stable=True)[: min(count * classes, n)]
    rows = torch.arange(n, device=score.device)
    taken = (rows.unsqueeze(1) == order).any(1).to(score)
    return one_hot(seen.logits.argmax(-1), classes).to(score).mT * taken


@final
@dataclass(frozen=True)
class Informative(AbstractSelection):
    """For each class the samples that together say most of its support samples: A_k = argmax I(A; Z_k), greedily.

    Samples are compared by the gradients of their losses in the last layer, (e, e h'), e = softmax - onehot(label), h
    the features, whose cosine is that of the e times that of the (1, h): of support samples at their labels, of others
    at their most probable ones. A sample may be taken under several labels.

    Args:
        information: I.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
        >>> labels = torch.tensor([0, 1])
        >>> seen = Seen(
        ...     logits, logits, labels, logits[:2], logits[:2], torch.ones(3), torch.zeros(3)
        ... )
        >>> Informative().choose(seen, 1)
        tensor([[1., 0., 0.],
                [0., 1., 0.]])
    """

    information: AbstractInformation = FacilityQueries()

    def __post_init__(self) -> None:
        demand_types(self)

    @fitting
    def choose(self, seen: Seen, count: int) -> Tensor:
        classes = seen.logits.shape[-1]
        own = embedded(seen.logits, seen.features, seen.logits.argmax(-1))
        labelled = embedded(seen.support_logits, seen.support_features, seen.labels)
        shots = len(labelled) // classes
        order = seen.labels.argsort(stable=True)
        whole = cosines(own, labelled.index_select(0, order))
        rows = torch.arange(len(own), device=own.device)
        chosen = []
        for k in range(classes):  # each class has as many support samples
            ends = slice(k * shots, (k + 1) * shots)
            part = Similarities(whole.query[:, ends], whole.own, whole.among[ends, ends])
            order_k = greedy(self.information, part, count, seen.free)
            chosen.append((rows.unsqueeze(1) == order_k).any(1).to(own))
        return torch.stack(chosen)


@fitting
def embedded(logits: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """The gradient of the cross-entropy of each sample in the last layer's bias and weight: `(n, classes (1 + d))`.

    Example:
        >>> embedded(torch.zeros(1, 2), torch.tensor([[3.0]]), torch.tensor([0]))
        tensor([[-0.5000, -1.5000,  0.5000,  1.5000]])
    """
    error = logits.softmax(-1) - one_hot(labels, logits.shape[-1]).to(logits)
    with_one = torch.cat([torch.ones_like(features[:, :1]), features], 1)
    return (error.unsqueeze(2) * with_one.unsqueeze(1)).flatten(1)
