"""Loops by hand of three recipes: noisy labels, learned augmentation, mixed operations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _by_hand import Pair
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss

from bilevel import Instance, minimize
from bilevel.problems import learned_augmentation, mixed_operations, noisy_labels
from bilevel.problems.networks._modules import convolutions, made
from bilevel.problems.networks.learned_augmentation import Draws, augmented
from bilevel.problems.networks.mixed_operations import Supernet

Objective = Callable[[Tensor, dict[str, Tensor], Any], Tensor]
Parts = Sequence[Tensor]
Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


def ours(build: Callable[[], Instance]) -> Callable[[int], Tensor]:
    """The recipe as it comes."""

    def run(steps: int) -> Any:
        instance = build()
        settings = dict(instance.settings) | {"max_steps": steps}
        return minimize(instance.problem, instance.x0, instance.y0, throw=False, **settings).x

    return run


def pair_of_modules(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """One that drops out, and the same that does not."""
    plain = copy.deepcopy(module)
    for part in plain.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return module, plain


def called(module: nn.Module, seed: int) -> Callable[..., Tensor]:
    """The module at given parameters, its masks those of a seed."""

    def call(y: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        torch.manual_seed(seed)
        output: Tensor = functional_call(module, y, inputs)
        return output

    return call


def decay(y: dict[str, Tensor]) -> Tensor:
    return sum((leaf.square().sum() for leaf in y.values()), torch.zeros(()))


def stepped(optimizer: torch.optim.Optimizer, points: Parts, directions: Parts) -> None:
    for point, direction in zip(points, directions, strict=True):
        point.grad = direction.detach()
    optimizer.step()


def soba(
    f: Objective, g: Objective, x: Tensor, y: dict[str, Tensor], data: Any, steps: int, of_y: Optimizer, rho_v: float
) -> Tensor:
    """SOBA, x by Adam: one gradient of g with its graph, one backward pass through it, one gradient of f."""
    names, x = list(y), x.clone().requires_grad_()
    parts = [leaf.clone().requires_grad_() for leaf in y.values()]
    v = [torch.zeros_like(leaf) for leaf in parts]
    outer, inner = made_outer(x, 0.05 if x.dim() == 1 else 0.01), of_y(parts)
    for _, of_f, of_g in zip(range(steps), data.f, data.g, strict=False):
        there = dict(zip(names, parts, strict=True))
        gy = torch.autograd.grad(g(x, there, of_g), parts, create_graph=True)
        gv, *hv = torch.autograd.grad(gy, (x, *parts), v, allow_unused=True, materialize_grads=True)
        gy = tuple(each.detach() for each in gy)
        fx, *fy = torch.autograd.grad(f(x, there, of_f), (x, *parts), allow_unused=True, materialize_grads=True)
        v = [each - rho_v * (h - b) for each, h, b in zip(v, hv, fy, strict=True)]
        stepped(outer, [x], [fx - gv])
        stepped(inner, parts, gy)
    return x.detach()


def made_outer(x: Tensor, step: float) -> torch.optim.Optimizer:
    return torch.optim.Adam([x], lr=step)


def by_hand_labels(steps: int) -> Tensor:
    instance = noisy_labels()
    net, plain = (called(each, 0) for each in pair_of_modules(made(lambda: convolutions(8, 10, 16, 0.2), 0)))

    def f(_: Tensor, y: dict[str, Tensor], batch: Any) -> Tensor:
        return cross_entropy(plain(y, batch[0]), batch[1])

    def g(x: Tensor, y: dict[str, Tensor], batch: Any) -> Tensor:
        losses = cross_entropy(net(y, batch[0]), batch[1], reduction="none")
        return (torch.sigmoid(x[batch[2]]) * losses).mean() + 5e-4 * decay(y)

    def sgd(y: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(y, lr=0.2)

    return soba(f, g, instance.x0, instance.y0, instance.settings["data"], steps, sgd, 0.05)


def by_hand_operations(steps: int) -> Tensor:
    instance = mixed_operations()
    net, plain = (called(each, 0) for each in pair_of_modules(made(lambda: Supernet(10, 8, 16, 0.05), 1)))

    def f(x: Tensor, y: dict[str, Tensor], batch: Any) -> Tensor:
        return mse_loss(plain(y, batch[0], torch.softmax(x, 1)), batch[1])

    def g(x: Tensor, y: dict[str, Tensor], batch: Any) -> Tensor:
        return mse_loss(net(y, batch[0], torch.softmax(x, 1)), batch[1]) + 1e-5 * decay(y)

    def adam(y: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam(y, lr=5e-3)

    return soba(f, g, instance.x0, instance.y0, instance.settings["data"], steps, adam, 0.02)


def by_hand_augmentation(steps: int) -> Tensor:
    """F2SA of first order: two copies of y by Adam, a batch of each side for their step and one for the difference."""
    instance, weight = learned_augmentation(), 30.0
    net, plain = (called(each, 0) for each in pair_of_modules(made(lambda: convolutions(8, 10, 16, 0.1), 0)))

    def f(y: dict[str, Tensor], batch: Any) -> Tensor:
        return cross_entropy(plain(y, batch[0]), batch[1])

    def g(x: Tensor, y: dict[str, Tensor], batch: Any) -> Tensor:
        images, labels, *draws = batch
        values = x.exp()
        logs = torch.log_softmax(net(y, augmented(images, values[:4], Draws(*draws))) / values[5], 1)
        right = logs.gather(1, labels.unsqueeze(1)).mean()
        return values[6] * decay(y) - (1 - values[4]) * right - values[4] * logs.mean()

    x, region, data = instance.x0.clone().requires_grad_(), instance.settings["constraint"], instance.settings["data"]
    copies = [{name: leaf.clone().requires_grad_() for name, leaf in instance.y0.items()} for _ in range(2)]
    outer, of_f, of_g = torch.optim.Adam([x], lr=0.02), iter(data.f), iter(data.g)
    inner = [torch.optim.Adam(list(y.values()), lr=3e-3) for y in copies]
    for k in range(steps):
        last, (bf, bg) = (next(of_f), next(of_g)), (next(of_f), next(of_g))
        for j, (y, optimizer) in enumerate(zip(copies, inner, strict=True)):
            value = g(x.detach(), y, bg) + (f(y, bf) / weight if j else 0.0)
            stepped(optimizer, list(y.values()), torch.autograd.grad(value, list(y.values())))
        bf, bg = last
        low, high = ({name: leaf.detach() for name, leaf in y.items()} for y in copies)
        f(high, bf)  # its value is that of the record
        (up,) = torch.autograd.grad(g(x, high, bg), x)
        (down,) = torch.autograd.grad(g(x, low, bg), x)
        before = x.detach().clone()
        stepped(outer, [x], [weight * (up - down)])
        with torch.no_grad():
            x.copy_(before if k < 100 else region.project(x))
    return x.detach()


PAIRS = (
    Pair("noisy-labels", ours(noisy_labels), by_hand_labels, steps=20),
    Pair("learned-augmentation", ours(learned_augmentation), by_hand_augmentation, steps=110),
    Pair("mixed-operations", ours(mixed_operations), by_hand_operations, steps=40),
)
