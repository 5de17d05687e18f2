"""What is differentiated: two losses of (x, ys), in torch and in jax, at a point near an inner minimum."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import _threads  # noqa: F401
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

Leaves = tuple[Tensor, ...]


@dataclass(frozen=True)
class Workload:
    """min_x f(x, y*(x)), y*(x) = argmin_y g(x, y), with one outer tensor x and several inner tensors ys.

    Attributes:
        name: what tables call it.
        arrays: the data, by name; both losses take them as their first argument.
        outer: f(arrays, x, ys).
        inner: g(arrays, x, ys).
        outer_jax: f in jax.numpy.
        inner_jax: g in jax.numpy.
        x: the outer variable.
        ys: the inner variables, where everything is differentiated.
        step: a step below 1 / L, for Neumann series and gradient maps.
    """

    name: str
    arrays: dict[str, Tensor] = field(repr=False)
    outer: Callable[[Any, Any, Any], Any]
    inner: Callable[[Any, Any, Any], Any]
    outer_jax: Callable[[Any, Any, Any], Any]
    inner_jax: Callable[[Any, Any, Any], Any]
    x: Tensor = field(repr=False)
    ys: Leaves = field(repr=False)
    step: float = 1.0

    def f(self, x: Tensor, ys: Any) -> Tensor:
        """The outer loss."""
        return self.outer(self.arrays, x, ys)

    def g(self, x: Tensor, ys: Any) -> Tensor:
        """The inner loss."""
        return self.inner(self.arrays, x, ys)

    @property
    def size(self) -> int:
        """The number of inner variables."""
        return sum(y.numel() for y in self.ys)

    @property
    def flat(self) -> Tensor:
        """All the inner variables in one vector."""
        return torch.cat([y.reshape(-1) for y in self.ys])

    def cut(self, y: Tensor) -> Leaves:
        """The inner variables as views of one vector."""
        if len(self.ys) == 1:
            return (y.view(self.ys[0].shape),)
        parts = y.split_with_sizes([leaf.numel() for leaf in self.ys])
        return tuple(part.view(leaf.shape) for part, leaf in zip(parts, self.ys, strict=True))

    def double(self) -> Workload:
        """The same in float64."""
        wide = {key: a.double() if a.is_floating_point() else a for key, a in self.arrays.items()}
        return replace(self, arrays=wide, x=self.x.double(), ys=tuple(y.double() for y in self.ys))


# Losses that both torch and jax understand


def _cross_entropy_jax(z: Any, labels: Any) -> Any:
    import jax
    import jax.numpy as jnp

    return jax.nn.logsumexp(z, axis=1) - jnp.take_along_axis(z, labels[:, None], axis=1)[:, 0]


def _binary(z: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z.squeeze(1), labels)


def _binary_jax(z: Any, labels: Any) -> Any:
    import jax.numpy as jnp

    return jnp.mean(jnp.logaddexp(0.0, z[:, 0]) - labels * z[:, 0])


def logistic(samples: int, features: int, classes: int, seed: int = 0, *, solved: bool = True) -> Workload:
    """Logistic regression (multinomial for several classes), x the logarithms of one L2 penalty for each feature.

    ys = (W,) with W (classes, features): the layout in which the products are fastest. Features have standard
    deviations from 1 down to 0.1, so that 20 steps do not solve the linear system exactly.
    """
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -1, features)
    truth = torch.randn(classes, features, generator=generator) * 4 / features**0.5
    arrays: dict[str, Tensor] = {}
    for part, count in (("train", samples), ("val", samples // 2)):
        inputs = torch.randn(count, features, generator=generator) * scales
        z = F.linear(inputs, truth) + torch.randn(count, classes, generator=generator)
        arrays[part] = inputs
        arrays[part + "_labels"] = (z.squeeze(1) > 0).float() if classes == 1 else z.argmax(1)

    def loss(z: Tensor, labels: Tensor) -> Tensor:
        return _binary(z, labels) if classes == 1 else F.cross_entropy(z, labels)

    def loss_jax(z: Any, labels: Any) -> Any:
        return _binary_jax(z, labels) if classes == 1 else _cross_entropy_jax(z, labels).mean()

    workload = Workload(
        name=f"logistic regression, n={samples}, d={features}, C={classes}",
        arrays=arrays,
        outer=lambda a, _, ys: loss(F.linear(a["val"], ys[0]), a["val_labels"]),
        inner=lambda a, x, ys: (
            loss(F.linear(a["train"], ys[0]), a["train_labels"]) + (ys[0].square() @ x.exp()).sum() / 2
        ),
        outer_jax=lambda a, _, ys: loss_jax(a["val"] @ ys[0].T, a["val_labels"]),
        inner_jax=lambda a, x, ys: (
            loss_jax(a["train"] @ ys[0].T, a["train_labels"]) + ((ys[0] ** 2) @ _exp_jax(x)).sum() / 2
        ),
        x=torch.full((features,), -7.0) + 0.5 * torch.randn(features, generator=generator),
        ys=(torch.zeros(classes, features),),
        step=1.5,
    )
    return solve(workload, 200) if solved else workload


def _exp_jax(x: Any) -> Any:
    import jax.numpy as jnp

    return jnp.exp(x)


def _mlp(inputs: Any, ys: Any) -> Any:
    h = inputs
    for k in range(0, len(ys) - 2, 2):
        h = torch.tanh(F.linear(h, ys[k], ys[k + 1]))
    return F.linear(h, ys[-2], ys[-1])


def _mlp_jax(inputs: Any, ys: Any) -> Any:
    import jax.numpy as jnp

    h = inputs
    for k in range(0, len(ys) - 2, 2):
        h = jnp.tanh(h @ ys[k].T + ys[k + 1])
    return h @ ys[-2].T + ys[-1]


def weighted_network(
    name: str, widths: list[int], samples: int, *, ridge: float, steps: int, step: float, seed: int = 0
) -> Workload:
    """Hyper-cleaning: x weighs the training samples (through a sigmoid), ys are a tanh network's weights and biases.

    Four in ten training labels are wrong. The penalty is ridge / 2 times the squared distance to the initial weights.
    A network without a hidden layer is multinomial logistic regression.
    """
    generator = torch.Generator().manual_seed(seed)
    features, classes = widths[0], widths[-1]
    centres = torch.randn(classes, features, generator=generator) * 3 / features**0.5
    arrays: dict[str, Tensor] = {}
    for part in ("train", "val"):
        labels = torch.randint(0, classes, (samples,), generator=generator)
        arrays[part] = centres[labels] + torch.randn(samples, features, generator=generator) * 10 / features**0.5
        wrong = torch.rand(samples, generator=generator) < 0.4
        other = torch.randint(0, classes, (samples,), generator=generator)
        arrays[part + "_labels"] = torch.where(wrong, other, labels) if part == "train" else labels
    ys: list[Tensor] = []
    for before, after in itertools.pairwise(widths):
        ys += [torch.randn(after, before, generator=generator) / before**0.5, torch.zeros(after)]

    arrays |= {f"start{k}": y for k, y in enumerate(ys)}

    def inner(a: Any, x: Tensor, ys: Any) -> Tensor:
        losses = F.cross_entropy(_mlp(a["train"], ys), a["train_labels"], reduction="none")
        return (torch.sigmoid(x) * losses).mean() + ridge / 2 * sum(
            (y - a[f"start{k}"]).square().sum() for k, y in enumerate(ys)
        )

    def inner_jax(a: Any, x: Any, ys: Any) -> Any:
        import jax

        losses = _cross_entropy_jax(_mlp_jax(a["train"], ys), a["train_labels"])
        return (jax.nn.sigmoid(x) * losses).mean() + ridge / 2 * sum(
            ((y - a[f"start{k}"]) ** 2).sum() for k, y in enumerate(ys)
        )

    workload = Workload(
        name=name,
        arrays=arrays,
        outer=lambda a, _, ys: F.cross_entropy(_mlp(a["val"], ys), a["val_labels"]),
        inner=inner,
        outer_jax=lambda a, _, ys: _cross_entropy_jax(_mlp_jax(a["val"], ys), a["val_labels"]).mean(),
        inner_jax=inner_jax,
        x=torch.randn(samples, generator=generator),
        ys=tuple(ys),
        step=step,
    )
    return solve(workload, steps)


def solve(workload: Workload, steps: int) -> Workload:
    """The workload at an approximate inner minimum, where the Hessian is positive definite."""
    if steps == 0:
        return workload
    y = workload.flat.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([y], max_iter=steps, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = workload.g(workload.x, workload.cut(y))
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return replace(workload, ys=tuple(leaf.clone() for leaf in workload.cut(y.detach())))
