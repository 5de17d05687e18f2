"""What an optimizer with learned parameters does with a gradient: steps, a preconditioner, a network for each entry."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor

from bilevel._tree import Tree
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import POSITIVE, SEED, SIZE, demand_ranges
from bilevel.portable.pickling import AbstractPortable
from bilevel.problems.networks._batches import generator

Point: TypeAlias = dict[str, Tensor]


class AbstractRule(AbstractPortable, abc.ABC):
    """(x, point, gradient, memory, k) -> (point, memory): a step whose parameters are x, differentiable in all of them.

    Points and gradients are dicts of tensors; a memory is any structure of tensors.
    """

    @abc.abstractmethod
    def parameters(self, point: Point) -> Tree:
        """X at the start of learning, for points like this one."""

    def memory(self, point: Point) -> Tree:
        """What is remembered before the first step: nothing, unless said."""
        return {}

    @abc.abstractmethod
    def step(self, x: Tree, point: Point, gradient: Point, memory: Tree, k: int) -> tuple[Point, Tree]:
        """Step number k."""


@final
@dataclass(frozen=True)
class LearnedSteps(AbstractRule):
    """u - exp(x_k) grad: step lengths, one for each of N steps; for each layer, or each coordinate, one of its own.

    After N steps the first one comes again, as the steps of Chebyshev do.

    Args:
        count: N.
        per: "step": the same for all entries; "layer": for each tensor of the point; "coordinate": for each entry.
        start: the length that all begin with; or two, of which the lengths are a geometric progression, the longest
            first.

    Raises:
        ValueError: if a number is not positive.

    Example:
        >>> rule = LearnedSteps(3, per="layer", start=0.5)
        >>> point = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
        >>> {name: tuple(leaf.shape) for name, leaf in rule.parameters(point).items()}
        {'weight': (3, 1, 1), 'bias': (3, 1)}
        >>> rule.step(rule.parameters(point), point, point, {}, 0)[0]["bias"]
        tensor([0.5000, 0.5000])
    """

    count: int
    per: Literal["step", "layer", "coordinate"] = "step"
    start: float | tuple[float, float] = 0.1

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, count=SIZE, start=POSITIVE)

    def parameters(self, point: Point) -> Tree:
        high, low = self.start if isinstance(self.start, tuple) else (self.start, self.start)
        lengths = torch.linspace(math.log(high), math.log(low), self.count, dtype=torch.float64, device="cpu")
        if self.per == "step":
            return {"all": lengths.to(next(iter(point.values())))}
        found = {}
        for name, leaf in point.items():
            shape = leaf.shape if self.per == "coordinate" else (1,) * leaf.dim()
            column = lengths.to(leaf).reshape(-1, *(1,) * leaf.dim())
            found[name] = column.expand(self.count, *shape).clone()
        return found

    def step(self, x: Tree, point: Point, gradient: Point, memory: Tree, k: int) -> tuple[Point, Tree]:
        place = k % self.count
        lengths = {name: (x["all"] if self.per == "step" else x[name])[place].exp() for name in point}
        return {name: u - lengths[name] * gradient[name] for name, u in point.items()}, memory


@final
@dataclass(frozen=True)
class LearnedPreconditioner(AbstractRule):
    """u - P grad with P = x x', a matrix for each tensor of the point, the same at every step.

    P is at least 0 whatever x is; it begins as `start` times the identity. A tensor of n entries has n^2.

    Args:
        start: what P is a multiple of at first.

    Raises:
        ValueError: if `start` is not positive.

    Example:
        >>> rule, point = LearnedPreconditioner(0.25), {"u": torch.ones(2)}
        >>> rule.step(rule.parameters(point), point, point, {}, 0)[0]
        {'u': tensor([0.7500, 0.7500])}
    """

    start: float = 0.1

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, start=POSITIVE)

    def parameters(self, point: Point) -> Tree:
        return {
            name: math.sqrt(self.start) * torch.eye(u.numel(), dtype=u.dtype, device=u.device)
            for name, u in point.items()
        }

    def step(self, x: Tree, point: Point, gradient: Point, memory: Tree, k: int) -> tuple[Point, Tree]:
        moved = {}
        for name, u in point.items():
            moved[name] = u - (x[name] @ (x[name].T @ gradient[name].reshape(-1))).reshape(u.shape)
        return moved, memory


@final
@dataclass(frozen=True)
class CoordinateLSTM(AbstractRule):
    """u - `scale` V h: every entry has a small LSTM of its own, with memory (h, c) and the same weights as all others.

    It sees the gradient's entry g as (log|g| / 10, sign g), or (-1, e^10 g) where |g| < e^-10.

    Source: Andrychowicz et al., "Learning to learn by gradient descent by gradient descent", NeurIPS 2016.

    Args:
        hidden: units.
        scale: of the update, which begins as that of a random network.
        seed: of the weights.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> rule, point = CoordinateLSTM(hidden=4), {"u": torch.ones(2, 3)}
        >>> moved, memory = rule.step(rule.parameters(point), point, point, rule.memory(point), 0)
        >>> moved["u"].shape, memory["u"]["h"].shape
        (torch.Size([2, 3]), torch.Size([6, 4]))
    """

    hidden: int = 20
    scale: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, hidden=SIZE, scale=POSITIVE, seed=SEED)

    def parameters(self, point: Point) -> Tree:
        draws, like = generator(self.seed, 0), next(iter(point.values()))

        def uniform(*shape: int) -> Tensor:
            drawn = torch.rand(shape, generator=draws, dtype=torch.float64, device="cpu")
            return ((2 * drawn - 1) / math.sqrt(self.hidden)).to(like)

        sizes = {"seen": (2, 4 * self.hidden), "kept": (self.hidden, 4 * self.hidden), "bias": (4 * self.hidden,)}
        return {name: uniform(*shape) for name, shape in sizes.items()} | {"out": uniform(self.hidden)}

    def memory(self, point: Point) -> Tree:
        return {name: {part: u.new_zeros(u.numel(), self.hidden) for part in ("h", "c")} for name, u in point.items()}

    def step(self, x: Tree, point: Point, gradient: Point, memory: Tree, k: int) -> tuple[Point, Tree]:
        moved, kept = {}, {}
        for name, u in point.items():
            h, c = memory[name]["h"], memory[name]["c"]
            gates = _seen(gradient[name].reshape(-1)) @ x["seen"] + h @ x["kept"] + x["bias"]
            enter, forget, leave, new = gates.split(self.hidden, -1)
            c = (forget + 1.0).sigmoid() * c + enter.sigmoid() * new.tanh()
            h = leave.sigmoid() * c.tanh()
            kept[name] = {"h": h, "c": c}
            moved[name] = u - self.scale * (h @ x["out"]).reshape(u.shape)
        return moved, kept


def _seen(g: Tensor) -> Tensor:
    """Large gradients by their logarithm and sign, small ones as they are: `(n, 2)`."""
    size = g.abs()
    large = size >= math.exp(-10.0)
    logs = torch.where(large, size, 1.0).log() / 10.0
    return torch.stack((torch.where(large, logs, -1.0), torch.where(large, g.sign(), math.exp(10.0) * g)), -1)
