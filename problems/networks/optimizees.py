"""What optimizers are learned on: quadratics, logistic regressions by batches, and a small network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import POSITIVE, SEED, SIZE, demand_ranges
from bilevel.problems.networks.update_rules import Point
from bilevel.tasks._random import generator, normal, uniform
from bilevel.tasks.source import AbstractTasks


@final
@dataclass(frozen=True)
class Quadratics(AbstractTasks):
    """L(u) = u' diag(a) u / 2, a in [low, high] with the arcsine law, u_0 ~ N(0, I); f is |u|^2 / |u_0|^2.

    Under that law, the density of Chebyshev's nodes, steps that are best in the worst case are nearly so in the mean.

    Args:
        size: entries of u.
        low: the least curvature.
        high: the largest one.
        dtype: of all tensors; None: torch's default.

    Raises:
        ValueError: if a number is out of range, or low above high.

    Example:
        >>> tasks = Quadratics(size=3).sample(2, seed=0)
        >>> tasks["curvature"].shape, bool((tasks["curvature"] >= 0.05).all())
        (torch.Size([2, 3]), True)
    """

    size: int = 20
    low: float = 0.05
    high: float = 1.0
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, size=SIZE, low=POSITIVE, high=POSITIVE)
        if self.low > self.high:
            raise ValueError(f"`Quadratics(low=..., high=...)` must be in order. Got {self.low} and {self.high}.")

    @checked(count=SIZE, seed=SEED)
    def sample(self, count: int, seed: int) -> dict[str, Any]:
        draws = generator(seed)
        angles = uniform(0.0, math.pi, count, self.size, generator=draws)
        curvature = (self.low + self.high) / 2 - (self.high - self.low) / 2 * angles.cos()
        return _cast({"curvature": curvature, "start": {"u": normal(count, self.size, generator=draws)}}, self.dtype)

    @staticmethod
    def loss(point: Point, task: Any, number: Tensor) -> Tensor:
        """L(u), and |u|^2 / |u_0|^2 at the end."""
        square = point["u"].square()
        relative = square.sum() / task["start"]["u"].square().sum()
        return torch.where(number < 0, relative, (task["curvature"] * square).sum() / 2)


@final
@dataclass(frozen=True)
class LogisticBatches(AbstractTasks):
    """L(u; k) = mean over batch k of log(1 + exp(-b <a, u>)) + r |u|^2 / 2; f is that of all samples, less its least.

    Each task has coefficients of its own, features of unequal scales, and labels that a tenth of are flipped.

    Args:
        size: features.
        samples: of a task.
        batch: samples that a step sees; step k those from k batch on, around.
        regularization: r.
        dtype: of all tensors; None: torch's default.

    Raises:
        ValueError: if a number is out of range, or a batch no divisor of the samples.

    Example:
        >>> LogisticBatches(size=3).sample(2, seed=0)["inputs"].shape
        torch.Size([2, 64, 3])
    """

    size: int = 10
    samples: int = 64
    batch: int = 16
    regularization: float = 1e-2
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, size=SIZE, samples=SIZE, batch=SIZE, regularization=POSITIVE)
        if self.samples % self.batch:
            raise ValueError(
                f"`LogisticBatches(samples=..., batch=...)` needs whole batches. Got {self.samples} and {self.batch}."
            )

    @checked(count=SIZE, seed=SEED)
    def sample(self, count: int, seed: int) -> dict[str, Any]:
        draws = generator(seed)
        scales = torch.logspace(0, -1, self.size, dtype=torch.float64, device="cpu")
        inputs = scales * normal(count, self.samples, self.size, generator=draws)
        scores = (inputs @ (2 * normal(count, self.size, 1, generator=draws) / scales.unsqueeze(1))).squeeze(-1)
        flipped = uniform(0.0, 1.0, count, self.samples, generator=draws) < 0.1
        signs = torch.where(flipped, -scores.sign(), scores.sign())
        start = {"u": torch.zeros(count, self.size, dtype=torch.float64, device="cpu")}
        tasks = {"inputs": inputs, "signs": signs, "start": start}
        return _cast(tasks | {"least": self._least(inputs, signs)}, self.dtype)

    def loss(self, point: Point, task: Any, number: Tensor) -> Tensor:
        """The loss of a batch; at the end that of all samples, less the least."""
        losses = softplus(-task["signs"] * (task["inputs"] @ point["u"]))
        places = torch.arange(self.samples, device=losses.device) // self.batch
        seen = (places == number % (self.samples // self.batch)).to(losses)
        value = torch.where(number < 0, losses.mean() - task["least"], (losses * seen).sum() / self.batch)
        return value + self.regularization / 2 * point["u"].square().sum()

    def _least(self, inputs: Tensor, signs: Tensor) -> Tensor:
        """The least of the whole loss of each task, by Newton's method."""
        u = torch.zeros_like(inputs[:, 0])
        for _ in range(30):
            p = torch.sigmoid(-signs * (inputs @ u.unsqueeze(-1)).squeeze(-1))
            gradient = -(inputs * (signs * p).unsqueeze(-1)).mean(1) + self.regularization * u
            weighted = inputs * (p * (1 - p)).unsqueeze(-1)
            eye = torch.eye(self.size, dtype=u.dtype, device=u.device)
            u = u - torch.linalg.solve(inputs.mT @ weighted / self.samples + self.regularization * eye, gradient)
        margins = signs * (inputs @ u.unsqueeze(-1)).squeeze(-1)
        return softplus(-margins).mean(1) + self.regularization / 2 * u.square().sum(1)


@final
@dataclass(frozen=True)
class SmallNetworks(AbstractTasks):
    """Cross-entropy of a network 2 - hidden - 2 with tanh units, from random weights, on two classes of its own.

    The classes of a task are two mixtures of two Gaussians each; all samples are seen at every step, and f is the loss.

    Args:
        hidden: units.
        samples: of a task.
        dtype: of all tensors; None: torch's default.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> SmallNetworks(hidden=4).sample(2, seed=0)["start"]["first"].shape
        torch.Size([2, 2, 4])
    """

    hidden: int = 8
    samples: int = 40
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, hidden=SIZE, samples=SIZE)

    @checked(count=SIZE, seed=SEED)
    def sample(self, count: int, seed: int) -> dict[str, Any]:
        draws = generator(seed)
        kinds = torch.arange(self.samples, device="cpu") % 4
        centers = 2 * normal(count, 4, 2, generator=draws)
        inputs = centers[:, kinds] + 0.5 * normal(count, self.samples, 2, generator=draws)
        start = {
            "first": normal(count, 2, self.hidden, generator=draws) / math.sqrt(2),
            "bias": torch.zeros(count, self.hidden, dtype=torch.float64, device="cpu"),
            "second": normal(count, self.hidden, 2, generator=draws) / math.sqrt(self.hidden),
        }
        return _cast({"inputs": inputs, "start": start}, self.dtype) | {"labels": (kinds % 2).expand(count, -1)}

    @staticmethod
    def loss(point: Point, task: Any, number: Tensor) -> Tensor:  # noqa: ARG004
        """The cross-entropy of all samples."""
        hidden = torch.tanh(task["inputs"] @ point["first"] + point["bias"])
        return cross_entropy(hidden @ point["second"], task["labels"])


def _cast(tasks: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    wanted = torch.get_default_dtype() if dtype is None else dtype
    return {name: _cast(each, dtype) if isinstance(each, dict) else each.to(wanted) for name, each in tasks.items()}
