"""The small networks of few-shot experiments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from bilevel._numerics.batched import RANDOM
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import SEED, SIZE


@checked(filters=SIZE, channels=SIZE, blocks=SIZE, size=SIZE, classes=SIZE, seed=SEED)
def conv_net(
    filters: int = 64,
    channels: int = 1,
    *,
    blocks: int = 4,
    size: int = 28,
    classes: int | None = None,
    seed: int = 0,
) -> nn.Sequential:
    """`blocks` x [3x3 convolution of stride 2, batch normalization, ReLU], flattened; and a linear head, if asked for.

    28 x 28 images become 2 x 2 x `filters` features with 4 blocks. The network of Vinyals et al., NeurIPS 2016, with
    strides for poolings, as MAML and iMAML use it for Omniglot.

    Args:
        filters: of each convolution.
        channels: of the images.
        blocks: how many; each halves the side, rounding up.
        size: the side of the images, for the number of features.
        classes: outputs of the head; None: no head.
        seed: of the weights (torch's own initialization); the global generator is left as it was.

    Raises:
        ValueError: if a number is not positive.

    Example:
        >>> (
        ...     conv_net(8)(torch.zeros(2, 1, 28, 28)).shape,
        ...     conv_net(8, classes=5)(torch.zeros(2, 1, 28, 28)).shape,
        ... )
        (torch.Size([2, 32]), torch.Size([2, 5]))
    """
    with RANDOM, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers: list[nn.Module] = []
        for block in range(blocks):
            layers += [
                nn.Conv2d(channels if block == 0 else filters, filters, 3, stride=2, padding=1),
                nn.BatchNorm2d(filters),
                nn.ReLU(),
            ]
        layers.append(nn.Flatten())
        if classes is not None:
            layers.append(nn.Linear(features(filters, blocks, size), classes))
        return nn.Sequential(*layers)


def features(filters: int, blocks: int, size: int) -> int:
    """How many features `conv_net` has.

    Example:
        >>> features(32, 4, 28)
        128
    """
    for _ in range(blocks):
        size = (size + 1) // 2
    return filters * size * size


@checked(sizes=SIZE, seed=SEED)
def mlp(sizes: Sequence[int] = (1, 40, 40, 1), *, seed: int = 0) -> nn.Sequential:
    """Linear layers with ReLU between them; the default is the network of MAML's sinusoid regression.

    Args:
        sizes: inputs, hidden units, outputs.
        seed: of the weights (torch's own initialization); the global generator is left as it was.

    Raises:
        ValueError: if there are fewer than two sizes, or one is not positive.

    Example:
        >>> sum(parameter.numel() for parameter in mlp().parameters())
        1761
    """
    if len(sizes) < 2:
        raise ValueError(f"`mlp(sizes=...)` needs at least inputs and outputs. Got {tuple(sizes)}.")
    with RANDOM, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers: list[nn.Module] = []
        for k in range(len(sizes) - 1):
            layers += [nn.Linear(sizes[k], sizes[k + 1]), nn.ReLU()]
        return nn.Sequential(*layers[:-1])
