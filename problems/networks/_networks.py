"""Modules of recipes, and how they are trained outside of them: for what a person is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor, nn

Network: TypeAlias = Callable[[], nn.Module]
"""Makes a module, with the weights of a fresh start, from inputs `(n, d)` to outputs `(n, classes)`."""


@final
@dataclass(frozen=True)
class Made:
    """Makes the user's network, or a multilayer perceptron of tanh units with these widths, in a dtype."""

    network: Network | None
    widths: tuple[int, ...]
    dtype: torch.dtype

    def __call__(self) -> nn.Module:
        if self.network is not None:
            module = self.network()
            if not isinstance(module, nn.Module):
                raise TypeError(
                    f"`network=` must make a torch.nn.Module. Got {type(module).__name__}. Pass a function such as"
                    f" `lambda: nn.Linear(64, 10)`."
                )
            return module.to(self.dtype)
        layers: list[nn.Module] = []
        for inputs, outputs in zip(self.widths, self.widths[1:], strict=False):
            layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        return nn.Sequential(*layers[:-1]).to(self.dtype)


def trained(
    loss: Callable[[dict[str, Tensor], int], Tensor], y: dict[str, Tensor], step: float, steps: int
) -> dict[str, Tensor]:
    """Parameters after so many steps of gradient descent on `loss(y, number of the step)`."""
    y = {name: leaf.detach().clone().requires_grad_() for name, leaf in y.items()}
    for k in range(steps):
        with torch.enable_grad():
            grads = torch.autograd.grad(loss(y, k), list(y.values()))
        with torch.no_grad():
            for leaf, grad in zip(y.values(), grads, strict=True):
                leaf.sub_(grad, alpha=step)
    return {name: leaf.detach() for name, leaf in y.items()}


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropies `(n,)` of logits `(n, classes)`: torch's own go through Python, and a long import, under vmap."""
    return logits.logsumexp(-1) - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
