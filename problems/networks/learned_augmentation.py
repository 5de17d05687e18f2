"""Learned augmentation: how strongly training images are to be changed, and the parameters of the loss, all at once."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem, Split
from bilevel._sets import Box
from bilevel._tree import Tree, tree_leaves
from bilevel.algorithms.f2sa import F2SA
from bilevel.arguments.checked import checked, fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import BETWEEN_0_AND_1, COUNT, SEED, SIZE
from bilevel.modules.functional import Functional, functional
from bilevel.problems._data import Arrays, Dataset
from bilevel.problems._plots import COLORS
from bilevel.problems.networks._batches import loader
from bilevel.problems.networks._modules import as_images, convolutions, images, made, scores, trained
from bilevel.problems.networks.noisy_labels import descent
from bilevel.solvers.adam import Adam

STRENGTHS = ("rotation", "translation", "brightness", "noise")
NAMES = (*STRENGTHS, "smoothing", "temperature", "decay")
_START = (0.2, 0.1, 0.2, 0.3, 0.02, 1.0, 3e-4)
_LEAST = (0.01, 0.01, 0.01, 0.01, 0.0025, 0.5, 1e-6)
_MOST = (1.0, 0.3, 1.0, 1.0, 0.35, 2.0, 1e-2)
_SHIFT = (0.5, 0.02, 0.5, 0.1)  # by which the images of validation and test have been changed
_RHO, _GAMMA, _WEIGHT, _UNTOUCHED = 3e-3, 0.02, 30.0, 100
# The grid: a common factor of all strengths at the start, label smoothing, weight decay.
GRID = tuple(itertools.product((0.05, 0.5, 1.0, 2.0, 4.0), (0.007, 0.1), (1e-5, 1e-3)))


class Draws(NamedTuple):
    """Standard normal numbers that belong to a batch of images `(n, 1, h, w)`.

    Attributes:
        whole: of angle, two translations and brightness: `(n, 4)`.
        pixels: like the images.
    """

    whole: Tensor
    pixels: Tensor

    @staticmethod
    def of(generator: torch.Generator, images: Tensor) -> Draws:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=images.dtype, device="cpu")

        return Draws(normal(len(images), 4), normal(*images.shape))


def augmented(images: Tensor, strengths: Tensor, draws: Draws) -> Tensor:
    """Images turned by s_0 e radians, moved by s_1 e (half a side is 1), times 1 + s_2 e, plus s_3 e for each pixel.

    With e standard normal: differentiable in the strengths s `(4,)`, since the draws are arguments.
    """
    angle = strengths[0] * draws.whole[:, 0]
    move = strengths[1] * draws.whole[:, 1:3]
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack([cos, -sin, move[:, 0]], 1), torch.stack([sin, cos, move[:, 1]], 1)
    grid = affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    turned = grid_sample(images, grid, padding_mode="border", align_corners=False)
    return turned * (1 + strengths[2] * draws.whole[:, 3]).reshape(-1, 1, 1, 1) + strengths[3] * draws.pixels


@final
@dataclass(frozen=True, eq=False)
class LearnedAugmentation:
    """g = mean_i loss(net(y; a(z_i, s, e_i)), b_i) + c |y|^2,  f = mean CE(net(y; z), b) on images as they come.

    x = (log s, log of smoothing, temperature and c) `(7,)`, in the order of `NAMES`. With logits u, temperature t and
    smoothing k, loss = CE(u / t, (1 - k) [label] + k / classes).

    Both are means over a batch: (images, labels, *draws) for g, the draws as in :class:`Draws`, and (images, labels)
    for f. The network of g drops out, that of f does not; both normalize by the batch at hand.

    Args:
        net: of g, y are its parameters.
        plain: of f, with the same parameters.
    """

    net: Functional
    plain: Functional

    def __post_init__(self) -> None:
        demand_types(self)

    @fitting
    def f(self, _: Tensor, y: Tree, batch: Any) -> Tensor:
        """The outer objective."""
        inputs, labels = batch
        return cross_entropy(self.plain(y, inputs), labels)

    @fitting
    def g(self, x: Tensor, y: Tree, batch: Any) -> Tensor:
        """The inner objective."""
        inputs, labels, *draws = batch
        values = x.exp()
        strengths, (smoothing, temperature, decay) = values[:4], values[4:]
        logits = self.net(y, augmented(inputs, strengths, Draws(*draws)))
        logs = torch.log_softmax(logits / temperature, 1)
        right = logs.gather(1, labels.unsqueeze(1)).mean()
        size = torch.stack([leaf.square().sum() for leaf in tree_leaves(y)]).sum()
        found: Tensor = decay * size - torch.lerp(right, logs.mean(), smoothing)
        return found


@checked(n_train=SIZE, n_val=SIZE, channels=SIZE, dropout=BETWEEN_0_AND_1, batch=SIZE, max_steps=COUNT, seed=SEED)
def learned_augmentation(
    *,
    shift: bool = True,
    n_train: int = 300,
    n_val: int = 700,
    channels: int = 16,
    dropout: float = 0.1,
    batch: int = 100,
    max_steps: int = 600,
    grid: bool = False,
    data: Arrays | None = None,
    seed: int = 0,
    double: bool = False,
) -> Instance:
    """Strengths of four augmentations and three parameters of the loss, on scikit-learn's digits (8 x 8), or on `data`.

    With `shift`, the images of validation and test have been turned (by 0.5 radians, standard deviation) and lit
    otherwise (by a half) than the few clean ones that the network is trained on, and hardly been moved or blurred by
    noise: what is to be learned is what to train with. F2SA (first order; y by Adam) moves seven outer variables;
    `DataLoader`s give batches at both levels, with the draws of the augmentations; see :class:`LearnedAugmentation`.

    Metrics: the seven values; loss and accuracy on test images of the network of the run (`learned`), and of the same
    network trained by as many steps of the same Adam with the values at the start (`start`) and with those learned
    (`retrained`). With `grid`, 20 combinations (five factors of the strengths at the start, two smoothings, two
    decays) are trained in the same way too: the best on validation data (`grid_chosen`), and the least test loss that
    is among them (`grid_least`), which nobody could choose.

    Args:
        shift: whether validation and test images are others than those that are trained on.
        n_train: training images.
        n_val: validation images.
        channels: of the first convolution; the second has twice as many.
        dropout: the share of features that are dropped.
        batch: images of a batch of each level.
        max_steps: steps of a run, and of every training that it is compared with.
        grid: whether the 20 are trained, when metrics are asked for.
        data: the user's own square images; see `bilevel.problems.Arrays`.
        seed: of the split, the shift, the network and the batches.
        double: float64, else float32.

    Raises:
        ImportError: if scikit-learn is needed and missing.
        ValueError: if an argument is out of its range, or the data are no square images.

    Example:
        >>> X, labels = (
        ...     torch.randn(60, 16, generator=torch.Generator().manual_seed(0)),
        ...     torch.arange(60) % 3,
        ... )
        >>> learned_augmentation(n_train=30, n_val=20, data=(X, labels)).x0.shape
        torch.Size([7])
    """
    parts, side = images(data, (n_train, n_val), seed, double)
    module = made(lambda: convolutions(side, parts.classes, channels, dropout), seed)
    module = module.double() if double else module
    net = functional(module, seed=seed)
    family = LearnedAugmentation(net, functional(module, dropout="off"))
    X, X_val, X_test = (as_images(part, side) for part in (parts.X_train, parts.X_val, parts.X_test))
    if shift:
        X_val, X_test = (_shifted(each, seed + k) for k, each in enumerate((X_val, X_test), start=1))
    training = loader((X, parts.y_train), batch, seed + 1, _drawn)
    start, least, most = (torch.tensor(each, dtype=torch.float64).log().to(X) for each in (_START, _LEAST, _MOST))
    shown = _Shown(family, parts, X, X_val, X_test, training, max_steps, start, shift, grid)
    return Instance(
        problem=BilevelProblem(family.f, family.g),
        x0=start,
        y0=net.params,
        description=f"augmentations of {'digits' if data is None else 'your data'}, {len(X)} images, two convolutions",
        metrics=shown.metrics,
        plot=shown.plot,
        settings={
            "algorithm": F2SA(Adam(_RHO), Adam(_GAMMA), weight=_WEIGHT, order=1, outer_schedule=_After(_UNTOUCHED)),
            "data": Split(f=loader((X_val, parts.y_val), batch, seed + 2), g=training),
            "max_steps": max_steps,
            "constraint": Box(least, most),
        },
    )


@final
@dataclass(frozen=True)
class _After:
    """0 before a step, then 1: x waits until y says something."""

    begin: int

    def __call__(self, step: int) -> float:
        return float(step >= self.begin)


def _drawn(generator: torch.Generator, samples: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return Draws.of(generator, samples[0])


def _shifted(images: Tensor, seed: int) -> Tensor:
    strengths = torch.tensor(_SHIFT).to(images)
    return augmented(images, strengths, Draws.of(torch.Generator("cpu").manual_seed(seed), images))


@final
@dataclass(frozen=True, eq=False)
class _Shown:
    """What a person is told of a solution; other trainings are done when they are first asked for."""

    family: LearnedAugmentation
    parts: Dataset
    X: Tensor
    X_val: Tensor
    X_test: Tensor
    training: Any
    steps: int
    start: Tensor
    shift: bool
    grid: bool

    @functools.cached_property
    def baselines(self) -> dict[str, float]:
        found = self._test(self._trained(self.start), "start")
        if self.grid:
            found |= self._of_grid()
        return found

    def metrics(self, x: Tensor, y: Tree) -> dict[str, float]:
        values = dict(zip(NAMES, x.detach().exp().tolist(), strict=True))
        return values | self._test(y, "learned") | self._test(self._trained(x.detach()), "retrained") | self.baselines

    def plot(self, figure: Any, x: Tensor, y: Tree) -> None:
        found = self.metrics(x, y)
        left, middle, right = figure.subplots(1, 3, width_ratios=(4, 3, 3))
        several = [("start", dict(zip(NAMES, _START, strict=True))), ("learned", found)]
        several += [("of the data", dict(zip(STRENGTHS, _SHIFT, strict=True)))] if self.shift else []
        for k, (label, values) in enumerate(several):
            places = [row + 0.27 * (k - 1) for row in range(len(STRENGTHS))]
            left.barh(places, [values[name] for name in STRENGTHS], 0.25, label=label, color=COLORS[(3, 0, 1)[k]])
        left.set_yticks(range(len(STRENGTHS)), STRENGTHS)
        left.invert_yaxis()
        left.set_xlabel("strength")
        left.legend()
        _others(middle, found)
        _losses(right, found)
        figure.tight_layout()

    def _trained(self, x: Tensor) -> Tree:
        def g(y: Tree, batch: Any) -> Tensor:
            return self.family.g(x, y, batch)

        def adam(y: list[Tensor]) -> torch.optim.Optimizer:
            return torch.optim.Adam(y, lr=_RHO)

        return descent(g, self.family.net.params, self.training, self.steps, adam)

    def _test(self, y: Tree, name: str) -> dict[str, float]:
        loss, accuracy = scores(trained(self.family.plain, y, self.X), self.X_test, self.parts.y_test)
        return {f"test_loss_{name}": loss, f"test_accuracy_{name}": accuracy}

    def _of_grid(self) -> dict[str, float]:
        found = []
        for factor, smoothing, decay in GRID:
            x = self.start.clone()
            x[:4] += math.log(factor)
            x[4], x[6] = math.log(smoothing), math.log(decay)
            y = self._trained(x)
            held_out = scores(trained(self.family.plain, y, self.X), self.X_val, self.parts.y_val)[0]
            found.append((held_out, self._test(y, "grid_chosen")))
        chosen = min(found, key=lambda each: each[0])[1]
        return chosen | {"test_loss_grid_least": min(each["test_loss_grid_chosen"] for _, each in found)}


def _others(axes: Any, found: dict[str, float]) -> None:
    """What is learned of the loss, as multiples of what it began with."""
    names = NAMES[len(STRENGTHS) :]
    ratios = [found[name] / _START[NAMES.index(name)] for name in names]
    bars = axes.barh(range(len(names)), ratios, color=COLORS[0])
    axes.bar_label(bars, [f"{found[name]:.2g}" for name in names], padding=3)
    axes.set_xscale("log")
    axes.margins(x=0.4)
    axes.axvline(1.0, color=COLORS[3])
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("learned / at the start")


def _losses(axes: Any, found: dict[str, float]) -> None:
    labels = {"start": "start", "grid_chosen": "best of grid", "learned": "learned", "retrained": "retrained"}
    names = [name for name in labels if f"test_loss_{name}" in found]
    colors = [COLORS[0] if name in ("learned", "retrained") else COLORS[3] for name in names]
    bars = axes.barh(range(len(names)), [found[f"test_loss_{name}"] for name in names], color=colors)
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.margins(x=0.25)
    axes.set_yticks(range(len(names)), [labels[name] for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("test loss")
