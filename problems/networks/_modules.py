"""Small modules of recipes, and how well one does that has been trained as a function."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bilevel._tree import Tree
from bilevel.modules.functional import Functional
from bilevel.problems._data import Arrays, Dataset, load

_LARGE = 16  # pixels a side from which the first convolution takes every other one
_AT_ONCE = 500  # samples
Made = TypeVar("Made")


def images(data: Arrays | None, sizes: tuple[float, float], seed: int, double: bool) -> tuple[Dataset, int]:
    """The parts of a data set of square images of one channel, and how many pixels a side has.

    Raises:
        ValueError: if the number of features is not a square.
    """
    parts = load(data, "digits", sizes=sizes, seed=seed, per_feature=False, bias=False, double=double)
    features = parts.X_train.shape[1]
    side = math.isqrt(features)
    if side * side != features or side < 4:
        raise ValueError(
            f"`data=` needs square images of one channel, of at least 4 x 4 pixels. Got {features} features a sample."
        )
    return parts, side


def as_images(X: Tensor, side: int) -> Tensor:
    """`(n, side * side)` as `(n, 1, side, side)`."""
    return X.reshape(-1, 1, side, side)


def convolutions(side: int, classes: int, channels: int, dropout: float) -> nn.Module:
    """Two convolutions, each with batch normalization, and a linear layer behind dropout."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, stride=1 if side < _LARGE else 2, padding=1),
        nn.BatchNorm2d(channels),
        nn.Softplus(),
        nn.AvgPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.BatchNorm2d(2 * channels),
        nn.Softplus(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(8 * channels, classes),
    )


def made(make: Callable[[], Made], seed: int) -> Made:
    """What is made in float32 with torch's global random numbers at a seed; both defaults are put back."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float32)  # in another type the same seed would be other numbers
        try:
            return make()
        finally:
            torch.set_default_dtype(before)


def trained(net: Functional, y: Tree, inputs: Tensor) -> nn.Module:
    """The module with parameters y for use: in eval mode, with statistics of normalization taken over all `inputs`."""
    module = net.load(y).eval()
    layers = [each for each in module.modules() if isinstance(each, nn.BatchNorm2d)]
    for each in layers:
        each.reset_running_stats()
        each.momentum = None  # a mean over the batches
        each.train()
    with torch.no_grad():
        for begin in range(0, len(inputs), _AT_ONCE) if layers else ():
            module(inputs[begin : begin + _AT_ONCE])
    return module.eval()


def scores(module: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """(mean cross entropy, accuracy) of a module."""
    with torch.no_grad():
        logits = torch.cat([module(inputs[k : k + _AT_ONCE]) for k in range(0, len(inputs), _AT_ONCE)])
    return float(cross_entropy(logits, labels)), float((logits.argmax(1) == labels).double().mean())
