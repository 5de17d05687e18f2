"""Linear models: objectives that see y through X y alone."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._numerics.misfits import called
from bilevel.arguments.checked import fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import POSITIVE, demand_ranges
from bilevel.arguments.shapes import Shape, demand_shapes
from bilevel.portable.pickling import AbstractPortable


class AbstractSampleLoss(AbstractPortable, abc.ABC):
    """A convex loss l(z, b) of a prediction z and a target b, with two derivatives in z; every one elementwise."""

    @abc.abstractmethod
    def value(self, z: Tensor, b: Tensor) -> Tensor:
        """l(z, b)."""

    @abc.abstractmethod
    def slope(self, z: Tensor, b: Tensor) -> Tensor:
        """dl/dz."""

    @abc.abstractmethod
    def curvature(self, z: Tensor, b: Tensor) -> Tensor:
        """d2l/dz2."""

    @property
    def is_quadratic(self) -> bool:
        """Whether the curvature is the same everywhere. False unless it says so."""
        return False

    @property
    def is_smooth(self) -> bool:
        """Whether it has all derivatives everywhere. False unless it says so, as it does where it is quadratic."""
        return self.is_quadratic


@final
@dataclass(frozen=True)
class Squared(AbstractSampleLoss):
    """l = (z - b)^2 / 2.

    Example:
        >>> Squared().value(torch.tensor(3.0), torch.tensor(1.0))
        tensor(2.)
    """

    @fitting
    def value(self, z: Tensor, b: Tensor) -> Tensor:
        return (z - b).square() / 2

    @fitting
    def slope(self, z: Tensor, b: Tensor) -> Tensor:
        return z - b

    @fitting
    def curvature(self, z: Tensor, b: Tensor) -> Tensor:
        return torch.ones_like(z)

    @property
    def is_quadratic(self) -> bool:
        return True


@final
@dataclass(frozen=True)
class LogLoss(AbstractSampleLoss):
    """l = log(1 + exp(-b z)) for b = 1 or -1: logistic regression.

    Example:
        >>> LogLoss().value(torch.tensor(0.0), torch.tensor(1.0))
        tensor(0.6931)
    """

    @property
    def is_smooth(self) -> bool:
        return True

    @fitting
    def value(self, z: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-b * z)

    @fitting
    def slope(self, z: Tensor, b: Tensor) -> Tensor:
        return -b * torch.sigmoid(-b * z)

    @fitting
    def curvature(self, z: Tensor, b: Tensor) -> Tensor:
        p = torch.sigmoid(b * z)
        return p * (1 - p)


@final
@dataclass(frozen=True)
class Huber(AbstractSampleLoss):
    """l = (z - b)^2 / 2 where |z - b| <= delta, delta |z - b| - delta^2 / 2 beyond.

    Its curvature jumps where |z - b| = delta; the one taken there is 1.

    Args:
        delta: where it becomes linear.

    Example:
        >>> Huber(1.0).value(torch.tensor(3.0), torch.tensor(0.0))
        tensor(2.5000)
    """

    delta: float = 1.0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, delta=POSITIVE)

    @fitting
    def value(self, z: Tensor, b: Tensor) -> Tensor:
        small = (z - b).clamp(-self.delta, self.delta)
        return (z - b) * small - small.square() / 2

    @fitting
    def slope(self, z: Tensor, b: Tensor) -> Tensor:
        return (z - b).clamp(-self.delta, self.delta)

    @fitting
    def curvature(self, z: Tensor, b: Tensor) -> Tensor:
        return ((z - b).abs() <= self.delta).to(z.dtype)


@final
@dataclass(frozen=True, eq=False)
class LinearModel(AbstractPortable):
    """(x, y) -> sum_i w_i l(X_i y, b_i) + q'y: an objective whose structure can be read, and a function like any other.

    As g of a problem with a separable `prox` it is what `CoordinateDescent` takes, and the implicit derivative is one
    on the support alone. As f it is a held-out loss. It does not depend on x.

    y is one tensor `(d,)`. Nothing is copied: rows of X.T that are contiguous in memory (X.T.contiguous().T) make
    columns of X cheap to collect, which is what solvers do.

    Args:
        X: inputs `(n, d)`.
        targets: b `(n,)`; or a function of the data of the problem, or of the task.
        loss: l.
        weights: w `(n,)`; None: 1/n each, the mean; or a function of the data, such as the samples that a fold trains
            on: folds of a cross-validation are tasks that share X.
        linear: q `(d,)`; None: zero.

    Raises:
        ValueError: if shapes do not fit.

    Example:
        >>> g = LinearModel(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([1.0, 0.0]))
        >>> g(None, torch.tensor([3.0, 1.0]))
        tensor(2.)
    """

    X: Tensor
    targets: Tensor | Callable[[Any], Tensor]
    loss: AbstractSampleLoss = Squared()
    weights: Tensor | Callable[[Any], Tensor] | None = None
    linear: Tensor | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        axes = {"X": Shape("n d")} | ({"targets": Shape("n")} if isinstance(self.targets, Tensor) else {})
        axes |= {"weights": Shape("n")} if isinstance(self.weights, Tensor) else {}
        axes |= {"linear": Shape("d")} if self.linear is not None else {}
        demand_shapes("LinearModel", axes, {name: getattr(self, name) for name in axes})

    def sample_weights(self, *data: Any) -> Tensor:
        """w `(n,)`, of the data of a problem or of a task."""
        if self.weights is None:
            return self.X.new_full((self.X.shape[0],), 1 / self.X.shape[0])
        if isinstance(self.weights, Tensor):
            return self.weights
        return called("LinearModel(weights=...)(data)", self.weights, *data)

    def sample_targets(self, *data: Any) -> Tensor:
        """b `(n,)`, of the data of a problem or of a task."""
        if isinstance(self.targets, Tensor):
            return self.targets
        return called("LinearModel(targets=...)(data)", self.targets, *data)

    def __call__(self, x: Any, y: Tensor, *data: Any) -> Tensor:
        """The value at y: a scalar, twice differentiable where l is."""
        z = torch.nn.functional.linear(self.X, y)
        total = self.sample_weights(*data) @ self.loss.value(z, self.sample_targets(*data))
        return total if self.linear is None else total + self.linear @ y
