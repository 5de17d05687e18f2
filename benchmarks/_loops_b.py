"""Loops by hand of recipes: distillation, replay, a representation by forward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _by_hand import Pair
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy, one_hot

from bilevel import minimize
from bilevel.problems import Instance, distillation, representation
from bilevel.problems.networks._networks import Made


def ours(build: Callable[[], Instance]) -> Callable[[int], Any]:
    """The recipe as it runs, for so many steps."""

    def loop(steps: int) -> Any:
        instance = build()
        return minimize(instance.problem, instance.x0, instance.y0, **dict(instance.settings) | {"max_steps": steps}).x

    return loop


def distilled(steps: int) -> Any:
    """Unrolled, a network after the other, each with its backward pass; the batches and the Adam of the recipe."""
    instance = distillation()
    data, make, labels = instance.settings["data"], Made(None, (64, 64, 10), torch.float32), torch.arange(10)
    module = make()
    images = instance.x0["images"].clone().requires_grad_()
    log_step = instance.x0["log_step"].clone().requires_grad_()
    optimizer = torch.optim.Adam([images, log_step], lr=0.05)
    for (inputs, targets), starts in zip(data.f, data.g, strict=True):
        if not steps:
            break
        steps -= 1
        optimizer.zero_grad()
        for k in range(len(inputs)):
            y = {name: start[k].requires_grad_() for name, start in starts.items()}
            for _ in range(20):
                loss = log_step.exp() * cross_entropy(functional_call(module, y, (images,)), labels)
                grads = torch.autograd.grad(loss, list(y.values()), create_graph=True)
                y = {name: leaf - grad for (name, leaf), grad in zip(y.items(), grads, strict=True)}
            (cross_entropy(functional_call(module, y, (inputs[k],)), targets[k]) / len(inputs)).backward()
        optimizer.step()
    return {"images": images.detach(), "log_step": log_step.detach()}


def represented(steps: int) -> Any:
    """One vector of directions at a time; the recipe's batches, directions and steps."""
    instance, width = representation(), 2240
    data, Q, radius, step = instance.settings["data"], 4, 5e-4, 0.003
    module = Made(None, (64, width, width, width, 64), torch.float32)()
    x = {name: leaf.clone() for name, leaf in instance.x0.items()}

    def features(x: dict[str, Tensor], inputs: Tensor) -> Tensor:
        found = functional_call(module, x, (inputs,)).tanh()
        return torch.cat([found, torch.ones_like(found[:, :1])], dim=1)

    def head(z: Tensor, targets: Tensor) -> Tensor:
        gram = z.T @ z / len(z) + 0.1 * torch.eye(z.shape[1])
        return torch.linalg.solve(gram, z.T @ targets / len(z))

    for number, ((X_val, val), (X, labels)) in enumerate(zip(data.f, data.g, strict=True)):
        if number == steps:
            break
        T = one_hot(labels, 10).float()
        with torch.no_grad():
            y = head(features(x, X), T)
        leaves = {name: leaf.requires_grad_() for name, leaf in x.items()}
        at = y.clone().requires_grad_()
        f = (features(leaves, X_val) @ at - one_hot(val, 10)).square().sum() / len(val)
        *h, fy = torch.autograd.grad(f, [*leaves.values(), at])
        x = {name: leaf.detach() for name, leaf in leaves.items()}
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for _ in range(Q):
                u = torch.empty(sum(leaf.numel() for leaf in x.values()))
                u.random_(0, 2, generator=generator).mul_(2).sub_(1)
                parts = [
                    part.view_as(leaf)
                    for part, leaf in zip(u.split([leaf.numel() for leaf in x.values()]), x.values(), strict=True)
                ]
                moved = {name: leaf + radius * part for (name, leaf), part in zip(x.items(), parts, strict=True)}
                slope = float(((head(features(moved, X), T) - y) * fy).sum()) / radius / Q
                for grad, part in zip(h, parts, strict=True):
                    grad.add_(part, alpha=slope)
            for leaf, grad in zip(x.values(), h, strict=True):
                leaf.sub_(grad, alpha=step)
    return x


PAIRS = (
    Pair("distillation", ours(distillation), distilled, steps=10),
    Pair("representation", ours(representation), represented, steps=4),
)
