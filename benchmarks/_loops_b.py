"""Loops by hand of recipes: distillation, replay, a representation by forward passes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _by_hand import Pair
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import one_hot

from bilevel import minimize
from bilevel.problems import Instance, distillation, replay, representation
from bilevel.problems._data import load
from bilevel.problems.networks._networks import Made

# Smaller than by default, and with more steps: `minimize` evaluates once more at the end, and a loop by hand does not.
REPLAY: dict[str, Any] = {"inner_steps": 20, "n_train": 600}


def ours(build: Callable[[], Instance]) -> Callable[[int], Any]:
    """The recipe as it runs, for so many steps."""

    def loop(steps: int) -> Any:
        instance = build()
        return minimize(instance.problem, instance.x0, instance.y0, **dict(instance.settings) | {"max_steps": steps}).x

    return loop


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.logsumexp(-1) - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def distilled(steps: int) -> Any:
    """Unrolled by `torch.func.vmap` over the networks of a step; the batches and the Adam of the recipe."""
    instance = distillation()
    data, module, labels = instance.settings["data"], Made(None, (64, 64, 10), torch.float32)(), torch.arange(10)
    images = instance.x0["images"].clone().requires_grad_()
    log_step = instance.x0["log_step"].clone().requires_grad_()
    optimizer = torch.optim.Adam([images, log_step], lr=0.02)

    def loss(y: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        return cross_entropies(functional_call(module, y, (inputs,)), labels).mean()

    inner, outer = torch.vmap(loss, in_dims=(0, None, None)), torch.vmap(loss)
    for number, ((inputs, targets), y) in enumerate(zip(data.f, data.g, strict=True)):
        if number == steps:
            break
        y = {name: leaf.requires_grad_() for name, leaf in y.items()}
        for _ in range(20):
            g = log_step.exp() * inner(y, images, labels).sum()
            grads = torch.autograd.grad(g, list(y.values()), create_graph=True)
            y = {name: leaf - grad for (name, leaf), grad in zip(y.items(), grads, strict=True)}
        optimizer.zero_grad()
        outer(y, inputs, targets).mean().backward()
        slopes = [images.grad, log_step.grad]
        norm = torch.sqrt(sum((slope.square().sum() for slope in slopes if slope is not None), torch.zeros(())))
        for slope in slopes:
            if slope is not None:
                slope.mul_((0.2 / norm).clamp(max=1.0))
        optimizer.step()
        with torch.no_grad():
            log_step.clamp_(max=0.0)
    return {"images": images.detach(), "log_step": log_step.detach()}


def replayed(steps: int) -> Any:
    """Unrolled alike, from the states before every fifth step; a selection by the gradients in the weights."""
    instance, N, every = replay(**REPLAY), 20, 5
    module, own, groups = Made(None, (64, 64, 10), torch.float32)(), _data(), instance.settings["outer"].groups
    x = instance.x0.clone()

    def losses(y: dict[str, Tensor]) -> Tensor:
        return torch.vmap(lambda y: cross_entropies(functional_call(module, y, (own[0],)), own[1]))(y)

    def step(y: dict[str, Tensor], x: Tensor, stage: Any, graph: bool) -> dict[str, Tensor]:
        each, weights, t = losses(y), stage["row"] @ x, stage["earlier"]
        kept = (weights * each).sum(1) / weights.sum(1).clamp_min(1.0)
        g = ((stage["now"] * each).sum(1) + t * kept) / (t + 1)
        grads = torch.autograd.grad(g.sum(), list(y.values()), create_graph=graph)
        return {name: leaf - 0.5 * grad for (name, leaf), grad in zip(y.items(), grads, strict=True)}

    def leaves(y: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: leaf.detach().requires_grad_() for name, leaf in y.items()}

    for number, stage in enumerate(instance.settings["data"]):
        if number == steps:
            break
        y, kept = leaves(stage["start"]), []
        for k in range(N):
            if k % every == 0:
                kept.append(y)
            y = leaves(step(y, x, stage, graph=False))
        f = (stage["seen"] * losses(y)).sum(1).mean()
        adjoint, slope = list(torch.autograd.grad(f, list(y.values()))), torch.zeros_like(x)
        for begin in reversed(range(0, N, every)):
            states = [kept.pop()]
            for _ in range(begin + 1, min(begin + every, N)):
                states.append(leaves(step(states[-1], x, stage, graph=False)))
            while states:
                y, leaf = states.pop(), x.clone().requires_grad_()
                after = step(y, leaf, stage, graph=True)
                *adjoint, more = torch.autograd.grad(list(after.values()), [*y.values(), leaf], adjoint)
                slope += more
        slope = torch.where(x == 0, slope, torch.inf)
        for group in range(int(groups.max()) + 1):
            least, place = torch.where(groups == group, slope, torch.inf).min(dim=1)
            x[torch.arange(len(x))[least.isfinite()], place[least.isfinite()]] = 1.0
    return x


def _data() -> tuple[Tensor, Tensor]:
    parts = load(None, "digits", sizes=(599, 1), seed=0, per_feature=False, bias=False, double=False)
    return torch.cat([parts.X_train, parts.X_val]), torch.cat([parts.y_train, parts.y_val])


def represented(steps: int) -> Any:
    """One vector of directions at a time; the recipe's batches, directions and steps."""
    instance, width = representation(), 2240
    data, Q, radius, step = instance.settings["data"], 4, 1e-4, 0.003
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
    Pair("distillation", ours(distillation), distilled, steps=20),
    Pair("replay", ours(partial(replay, **REPLAY)), replayed, steps=15),
    Pair("representation", ours(representation), represented, steps=25),
)
