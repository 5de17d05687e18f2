"""What sparse models share: their data, terms, the largest penalty that matters, and pictures of paths."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._sets import Box
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, demand_ranges
from bilevel.inner_problems.linear_model import LinearModel
from bilevel.problems._plots import COLORS
from bilevel.prox.elastic_net import ElasticNet
from bilevel.prox.l1 import L1
from bilevel.prox.term import AbstractProxTerm

_DEEP, _HIGH = 12.0, math.log(0.9)  # log lambda within [log lambda_max - 12, log lambda_max + log 0.9]
START, _GRID, _LOW = 10.0, 30, 1e3  # from lambda_max / 10; points of a grid down to lambda_max / 1000


@checked()
def highest_penalty(model: LinearModel) -> Tensor:
    """lambda_max = max_j |grad_j g(0)|, from which on y* = 0 solves the lasso with g: a scalar.

    Above it Phi is constant and the hypergradient exactly zero, so that searches are kept below.

    Example:
        >>> highest_penalty(LinearModel(torch.eye(2), torch.tensor([3.0, -4.0])))
        tensor(2.)
    """
    z = model.X.new_zeros(model.X.shape[0])
    slopes = (model.sample_weights() * model.loss.slope(z, model.sample_targets())) @ model.X
    slopes = slopes if model.linear is None else slopes + model.linear
    return slopes.abs().max()


@final
@dataclass(frozen=True, eq=False)
class SparseData:
    """What a sparse model is fitted to, validated and tested on.

    Attributes:
        train: the objective of the inner problem, without its term.
        held: the held-out loss.
        test: the loss on the test part.
        name: of the data.
        variance: of the noise of the targets, where it is known.
    """

    train: LinearModel
    held: LinearModel
    test: LinearModel
    name: str
    variance: float | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, variance=AT_LEAST_0)


def l1_term(x: Tensor, *_: Any) -> L1:
    """exp(x) |y|_1, or sum_j exp(x_j) |y_j|."""
    return L1(x.exp())


def elastic_net_term(x: Tensor, *_: Any) -> ElasticNet:
    """exp(x_0) |y|_1 + exp(x_1) |y|^2 / 2."""
    return ElasticNet(x[0].exp(), x[1].exp())


def generated(n: int, d: int, nonzeros: int, rho: float, snr: float, seed: int, blocks: int = 1) -> SparseData:
    """Three parts of n samples each, with the variance of the noise; nonzero entries in blocks of so many."""
    if not rho < 1:
        raise ValueError(f"`rho=...` must be at least 0 and less than 1. Got {rho}.")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    columns = normal(d, 3 * n)
    for j in range(1, d):
        columns[j].mul_((1 - rho**2) ** 0.5).add_(columns[j - 1], alpha=rho)
    chosen = torch.randperm(d // blocks, generator=generator, device="cpu")[: max(nonzeros // blocks, 1)]
    truth = torch.zeros(d // blocks, blocks, dtype=torch.float64, device="cpu")
    truth[chosen] = normal(len(chosen), blocks)
    signal = truth.reshape(-1) @ columns
    noise = normal(3 * n)
    noise = noise * (torch.linalg.vector_norm(signal) / (snr * torch.linalg.vector_norm(noise)))
    targets = signal + noise
    parts = [
        LinearModel(columns[:, k * n : (k + 1) * n].contiguous().mT, targets[k * n : (k + 1) * n]) for k in range(3)
    ]
    return SparseData(parts[0], parts[1], parts[2], "generated data", float(noise.square().mean()))


def signs(labels: Tensor, classes: int) -> Tensor:
    """Labels 0 and 1 as -1 and 1.

    Raises:
        ValueError: if there are more classes.
    """
    if classes != 2:
        raise ValueError(f"`data=...` must have two classes. Got {classes}.")
    return (2 * labels - 1).double()


def clipped(x0: Tensor) -> Box:
    """The range of log lambda around a start at lambda_max / 10 for which the search makes sense."""
    top = float(x0.max()) + math.log(START)
    return Box(top - _DEEP, top + _HIGH)


@final
@dataclass(frozen=True, eq=False)
class Fits:
    """Solutions along a grid, and their held-out losses."""

    y: tuple[Tensor, ...]
    values: tuple[float, ...]

    @property
    def best(self) -> int:
        """Which has the least loss."""
        return min(range(len(self.values)), key=self.values.__getitem__)


def fitted(model: LinearModel, term: AbstractProxTerm, y: Tensor, tol: float = 1e-5, most: int = 300) -> Tensor:
    """A minimizer for baselines and pictures, to some digits: proximal steps with momentum that begins again."""
    w, b = model.sample_weights(), model.sample_targets()
    steep = float(model.loss.curvature(torch.zeros_like(w), b).max())
    t = 1 / (steep * float(torch.linalg.matrix_norm(w.sqrt().unsqueeze(1) * model.X, 2)) ** 2)
    z, k = y, 0
    for _ in range(most):
        slope = (w * model.loss.slope(model.X @ z, b)) @ model.X
        moved = term.prox(z - t * slope, t)
        assert isinstance(moved, Tensor)
        if float(torch.linalg.vector_norm(moved - z)) <= tol * t:
            return moved
        k = 0 if float((z - moved) @ (moved - y)) > 0 else k + 1
        z, y = moved + k / (k + 3) * (moved - y), moved
    return y


@final
@dataclass(frozen=True, eq=False)
class Shown:
    """What a person is told: losses at (x, y), and those of the best of a grid with one penalty for all.

    Attributes:
        data: the parts.
        term: what is learned.
        start: log lambda_max / 10.
    """

    data: SparseData
    term: Callable[..., AbstractProxTerm]
    start: Tensor

    @functools.cached_property
    def grid(self) -> Tensor:
        """log lambda from lambda_max to lambda_max / 1000."""
        top = float(self.start) + math.log(START)
        return torch.linspace(top, top - math.log(_LOW), _GRID, dtype=self.data.train.X.dtype, device="cpu")

    @functools.cached_property
    def path(self) -> Fits:
        """The path over that grid: of the term, where it has one penalty, else of the lasso."""
        term = l1_term if self.term is elastic_net_term else self.term
        y, found = torch.zeros_like(self.data.train.X[0]), list[Tensor]()
        for x in self.grid:
            y = fitted(self.data.train, term(x), y)
            found.append(y)
        return Fits(tuple(found), tuple(float(self.data.held(None, each)) for each in found))

    def refitted(self, x: Tensor) -> Tensor:
        """y*(x) on all training samples."""
        return fitted(self.data.train, self.term(x), torch.zeros_like(self.data.train.X[0]))

    def metrics(self, _: Tensor, y: Tensor) -> dict[str, float]:
        best = self.path.y[self.path.best]
        return {
            "validation_loss": float(self.data.held(None, y)),
            "test_loss": float(self.data.test(None, y)),
            "nonzeros": float((y != 0).sum()),
            "validation_loss_grid": float(self.data.held(None, best)),
            "test_loss_grid": float(self.data.test(None, best)),
            "nonzeros_grid": float((best != 0).sum()),
        }

    def plot(self, figure: Any, x: Tensor, y: Tensor) -> None:
        left, right = figure.subplots(1, 2)
        draw_path(left, right, self.grid, self.path, [float(self.data.test(None, each)) for each in self.path.y])
        value = float(self.data.held(None, y))
        if x.numel() == 1:
            for axes in (left, right):
                axes.axvline(float(x), color=COLORS[1], linestyle=":")
            right.plot([float(x)], [value], "o", color=COLORS[1], label="learned")
        else:
            right.axhline(value, color=COLORS[1], linestyle=":", label="learned, several penalties")
        right.legend()
        figure.tight_layout()


def draw_path(left: Any, right: Any, grid: Tensor, path: Fits, test: list[float]) -> None:
    """Coefficients, and the criterion and the test loss, over log lambda."""
    entries = torch.stack(list(path.y))
    for j in entries.abs().amax(0).topk(min(12, entries.shape[1])).indices.tolist():
        left.plot(grid.tolist(), entries[:, j].tolist(), linewidth=1)
    left.set_xlabel("log penalty")
    left.set_ylabel("coefficients (the 12 largest)")
    right.plot(grid.tolist(), list(path.values), color=COLORS[0], label="held-out loss")
    right.plot(grid.tolist(), test, color=COLORS[3], label="test loss")
    right.set_xlabel("log penalty")
