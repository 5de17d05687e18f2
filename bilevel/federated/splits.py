"""Splitting one data set among clients, more or less unlike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_1, COUNT, POSITIVE
from bilevel.arguments.shapes import Shape


@checked(labels=Shape("n", "integer"), clients=AT_LEAST_1, concentration=POSITIVE, seed=COUNT)
def dirichlet_split(labels: Tensor, clients: int, concentration: float, seed: int = 0) -> list[Tensor]:
    """Which samples each client has: of every class, shares drawn from Dirichlet(concentration, ..., concentration).

    The lower the concentration the fewer classes a client has; towards infinity all have the same. Every sample
    belongs to one client, and every client has one at least, which is taken from the one with the most.

    Source: Hsu, Qi, Brown, "Measuring the effects of non-identical data distribution for federated visual
    classification", 2019.

    Args:
        labels: of the samples `(n,)`, integers.
        clients: how many there are.
        concentration: positive.
        seed: of the shares and of the order of samples.

    Returns:
        The numbers of the samples of each client.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if there are fewer samples than clients, or the labels are no vector.

    Example:
        >>> parts = dirichlet_split(torch.arange(100) % 4, clients=5, concentration=0.3)
        >>> sorted(torch.cat(parts).tolist()) == list(range(100)), min(map(len, parts)) > 0
        (True, True)
    """
    if labels.dim() != 1 or len(labels) < clients:
        raise ValueError(
            f"`dirichlet_split(labels=...)` must be a vector of at least as many labels as clients ({clients})."
            f" Got shape {tuple(labels.shape)}."
        )
    generator = torch.Generator("cpu")
    generator.manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in range(clients)]
    shares = torch.distributions.Dirichlet(torch.full((clients,), concentration, dtype=torch.float64))
    with torch.random.fork_rng(devices=[]):  # distributions take no generator
        torch.manual_seed(seed)
        for label in sorted(set(labels.tolist())):
            members = (labels == label).nonzero()[:, 0].cpu()
            members = members[torch.randperm(len(members), generator=generator)]
            drawn = shares.sample()
            ends = (drawn.cumsum(0) * len(members)).round().long().tolist()
            for part, start, end in zip(parts, [0, *ends[:-1]], [*ends[:-1], len(members)], strict=True):
                part.append(members[start:end])
    found = [torch.cat(part) for part in parts]
    for k in range(clients):
        if not len(found[k]):
            most = max(range(clients), key=lambda other: len(found[other]))
            found[k], found[most] = found[most][:1], found[most][1:]
    return [part.sort().values for part in found]


@checked()
def stacked(tensors: Sequence[Tensor], parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The samples of all clients with a leading axis of clients, padded by zeros, and last the weights of samples.

    A weight is 1 / n_m for the n_m samples of client m, and 0 for what is padded: a mean over its samples is
    `(weights * losses).sum()`.

    Args:
        tensors: that share a leading axis of samples.
        parts: which samples each client has, such as `dirichlet_split` tells.

    Raises:
        ValueError: if there is no client, or one without a sample.

    Example:
        >>> stacked([torch.arange(3.0)], [torch.tensor([0, 2]), torch.tensor([1])])
        (tensor([[0., 2.],
                [1., 0.]]), tensor([[0.5000, 0.5000],
                [1.0000, 0.0000]]))
    """
    if not parts or not all(len(part) for part in parts):
        raise ValueError("`stacked(parts=...)` must be at least one client's samples, and one sample of each at least.")
    most = max(map(len, parts))
    kind = next((each.dtype for each in tensors if each.is_floating_point()), torch.get_default_dtype())
    found = []
    for each in tensors:
        padded = each.new_zeros(len(parts), most, *each.shape[1:])
        for k, part in enumerate(parts):
            padded[k, : len(part)] = each[part.to(each.device)]
        found.append(padded)
    device = tensors[0].device if tensors else None
    weights = torch.zeros(len(parts), most, dtype=kind, device=device)
    for k, part in enumerate(parts):
        weights[k, : len(part)] = 1 / len(part)
    return (*found, weights)
