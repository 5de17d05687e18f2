"""A deep equilibrium network: the features of each sample are the fixed point of a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import POSITIVE, SEED, SIZE
from bilevel.modules.functional import Functional, functional


@final
class EquilibriumLayer(nn.Module):
    """T(z) = tanh(W z + U u + b) with W = modulus V / sqrt(1 + |V|_F^2): a contraction in z by construction.

    |W|_2 <= |W|_F < modulus, and tanh does not expand, so that |T(z) - T(z')| <= modulus |z - z'| whatever the weights
    are trained to. For samples side by side, `(n, width)` and `(n, inputs)`.

    Args:
        inputs: the entries of u.
        width: those of z.
        modulus: in (0, 1); 1 and more are taken too, of which nothing contracts any more.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> layer = EquilibriumLayer(2, 4, modulus=0.5)
        >>> bool(torch.linalg.matrix_norm(layer.weight(), 2) < 0.5)
        True
    """

    @checked(inputs=SIZE, width=SIZE, modulus=POSITIVE)
    def __init__(self, inputs: int, width: int, modulus: float = 0.9) -> None:
        nn.Module.__init__(self)
        self.modulus = modulus
        self.V = nn.Parameter(2 * torch.randn(width, width) / math.sqrt(width))
        self.U = nn.Parameter(torch.randn(width, inputs) / math.sqrt(inputs))
        self.b = nn.Parameter(torch.zeros(width))

    def weight(self) -> Tensor:
        """W."""
        return self.modulus * self.V / (1 + self.V.square().sum()).sqrt()

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        """T(z)."""
        return torch.tanh(z @ self.weight().mT + u @ self.U.mT + self.b)


@final
@dataclass(frozen=True, eq=False)
class _Network:
    """f = mean cross-entropy of a linear head on z*, z*_i = T(z*_i; u_i) the features of sample i.

    x holds the weights of the layer, by their names, and the head; y is z* `(n, width)`. The network has one layer and
    as many as it takes: infinitely many with shared weights.

    Source: Bai, Kolter, Koltun, "Deep equilibrium models", NeurIPS 2019; contractive by a norm as in Winston, Kolter,
    "Monotone operator equilibrium networks", NeurIPS 2020.

    Args:
        layer: T, as a function of its parameters.
        inputs: u `(n, d)`.
        labels: `(n,)`.
        test_inputs: those of samples that are not trained on.
        test_labels: alike.
    """

    layer: Functional
    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor

    def f(self, x: Mapping[str, Any], y: Tensor) -> Tensor:
        """The training loss."""
        return nn.functional.cross_entropy(self.scores(x, y), self.labels)

    def step(self, x: Mapping[str, Any], y: Tensor) -> Tensor:
        """T of all training samples."""
        found: Tensor = self.layer(x["layer"], y, self.inputs)
        return found

    def scores(self, x: Mapping[str, Any], y: Tensor) -> Tensor:
        """The logits of features."""
        found: Tensor = y @ x["head"].mT
        return found

    def metrics(self, x: Mapping[str, Any], y: Tensor) -> Mapping[str, float]:
        """Accuracies, that on the test samples at a fixed point to rounding."""
        z = y.new_zeros(len(self.test_inputs), y.shape[-1])
        with torch.no_grad():
            for _ in range(1000):
                new: Tensor = self.layer(x["layer"], z, self.test_inputs)
                moved, z = float((new - z).abs().max()), new
                if moved <= 1e-9:
                    break
            right = (self.scores(x, y).argmax(-1) == self.labels).double().mean()
            on_test = (self.scores(x, z).argmax(-1) == self.test_labels).double().mean()
        return {"training accuracy": float(right), "test accuracy": float(on_test)}


@checked(samples=SIZE, width=SIZE, modulus=POSITIVE, seed=SEED)
def deep_equilibrium(*, samples: int = 60, width: int = 8, modulus: float = 0.9, seed: int = 0) -> Instance:
    """A deep equilibrium network that tells two interleaved spirals apart.

    Args:
        samples: for training, and as many for testing.
        width: the features of a sample.
        modulus: by how much the layer contracts at most.
        seed: of the samples and of the weights.

    Example:
        >>> instance = deep_equilibrium(samples=4, width=3)
        >>> instance.y0.shape
        torch.Size([4, 3])
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(2):
        labels = torch.arange(samples, device="cpu") % 2
        turn = 3.5 * torch.rand(samples, generator=generator, dtype=torch.float64, device="cpu") + 0.5
        angle = turn + math.pi * labels
        noise = torch.randn(samples, 2, generator=generator, dtype=torch.float64, device="cpu")
        points = torch.stack([turn * angle.cos(), turn * angle.sin()], dim=-1) / 2 + 0.05 * noise
        parts += [points, labels]
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        layer = EquilibriumLayer(2, width, modulus).double()
        head = torch.randn(2, width, dtype=torch.float64) / math.sqrt(width)
    net = functional(layer)
    network = _Network(net, *parts)
    return Instance(
        problem=BilevelProblem(network.f, fixed_point=network.step),
        x0={"layer": net.params, "head": head},
        y0=torch.zeros(samples, width, dtype=torch.float64, device="cpu"),
        description=f"deep equilibrium network of width {width}, contracting by {modulus:g}: two spirals",
        metrics=network.metrics,
        settings={"estimator": "implicit", "max_steps": 60},
    )
