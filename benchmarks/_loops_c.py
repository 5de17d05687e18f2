"""Loops by hand beside `minimize`, in plain torch: data weights of a language model by F2SA and by SAMA."""

from __future__ import annotations

import copy
from typing import Any

import torch
from _by_hand import Pair
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bilevel import minimize
from bilevel.algorithms import F2SA, SAMA
from bilevel.problems import byte_gpt, language_sources
from bilevel.solvers import Adam

SIZE = {"width": 64, "depth": 2}
INNER, OUTER, WEIGHT = 3e-3, 0.05, 2.0


def by_library(algorithm: Any, steps: int) -> Tensor:
    made = language_sources(**SIZE)
    found = minimize(
        made.problem, made.x0, made.y0, algorithm=algorithm, data=made.settings["data"], max_steps=steps - 1
    )  # whose last evaluation is a step of y
    return found.x


def losses(net: nn.Module, windows: Tensor) -> Tensor:
    return cross_entropy(net(windows[:, :-1]).transpose(1, 2), windows[:, 1:], reduction="none").mean(1)


def weighted(x: Tensor, net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    windows, sources = batch
    return len(x) * (torch.softmax(x, 0)[sources] * losses(net, windows)).mean()


def f2sa(steps: int) -> Tensor:
    """Two copies of the network; the losses of both on one batch for the direction of x."""
    data = language_sources(**SIZE).settings["data"]
    x = torch.zeros(5, requires_grad=True)
    low = byte_gpt(context=data.context, **SIZE)
    high = copy.deepcopy(low)
    nets = (low, high)
    adams = [torch.optim.Adam(net.parameters(), lr=INNER) for net in nets]
    outer = torch.optim.Adam([x], lr=OUTER)
    for k in range(steps):
        batch, clean = data("g", 2 * k + 1), data("f", 2 * k + 1)
        for net, adam, share in zip(nets, adams, (0.0, 1 / WEIGHT), strict=True):
            adam.zero_grad()
            loss = weighted(x.detach(), net, batch)
            if share:
                loss = loss + share * losses(net, clean).mean()
            loss.backward()
            adam.step()
        batch, clean = data("g", 2 * k), data("f", 2 * k)
        with torch.no_grad():
            losses(high, clean).mean().item()  # what is watched
            windows, sources = batch
            apart = losses(high, windows) - losses(low, windows)
        outer.zero_grad()
        (WEIGHT * len(x) * (torch.softmax(x, 0)[sources] * apart).mean()).backward()
        if k < steps - 1:
            outer.step()
    return x.detach()


def sama(steps: int) -> Tensor:
    """A step of Adam, then losses at two points along its preconditioner times the gradient of f."""
    data = language_sources(**SIZE).settings["data"]
    x = torch.zeros(5, requires_grad=True)
    net = byte_gpt(context=data.context, **SIZE)
    weights = list(net.parameters())
    adam = torch.optim.Adam(weights, lr=INNER)
    outer = torch.optim.Adam([x], lr=OUTER)
    for k in range(steps):
        adam.zero_grad()
        weighted(x.detach(), net, data("g", 2 * k)).backward()
        adam.step()
        value = losses(net, data("f", k)).mean()
        of_f = torch.autograd.grad(value, weights)
        value.item()  # what is watched
        a, b = 1 - 0.9 ** (k + 1), 1 - 0.999 ** (k + 1)
        along = []
        for w, slope in zip(weights, of_f, strict=True):
            m, v, u = adam.state[w]["exp_avg"], adam.state[w]["exp_avg_sq"], w.grad
            root = (v / b).sqrt()
            safe = root.clamp_min(1e-12)
            d = 0.1 / a / (root + 1e-8) - (m / a) * 0.001 * u / b / (safe * (root + 1e-8).square())
            along.append(INNER * d * slope)
        size = torch.sqrt(sum(s.square().sum() for s in along))
        t = 0.01 / size
        windows, sources = data("g", 2 * k + 1)
        found = []
        with torch.no_grad():
            for sign in (1.0, -2.0):
                for w, s in zip(weights, along, strict=True):
                    w.add_(s * (sign * t))
                found.append(losses(net, windows))
            for w, s in zip(weights, along, strict=True):
                w.add_(s * t)
        outer.zero_grad()
        (len(x) * (torch.softmax(x, 0)[sources] * (found[0] - found[1])).mean() / (-2 * t)).backward()
        if k < steps - 1:
            outer.step()
    return x.detach()


PAIRS = (
    Pair(
        "language sources, F2SA",
        lambda steps: by_library(F2SA(Adam(INNER), Adam(OUTER), weight=WEIGHT, order=1), steps),
        f2sa,
        steps=10,
    ),
    Pair("language sources, SAMA", lambda steps: by_library(SAMA(Adam(INNER), Adam(OUTER)), steps), sama, steps=10),
)
