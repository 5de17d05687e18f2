"""A step for each layer, a momentum and a schedule for twenty steps of training, learned from the best of a grid.

`python docs/examples/learned_settings_figure.py` writes docs/images/learned_settings.png and prints the numbers of the
page "Neural networks".
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bilevel import ITD, BilevelProblem, functional, minimize
from bilevel.solvers import Adam, Clipped, HeavyBall, Iterate, Scheduled

STEPS = 20
GRID = [(step, momentum) for step in (0.1, 0.3, 0.6, 1.0, 1.5) for momentum in (0.0, 0.5, 0.8, 0.9)]


def data() -> list[tuple[Tensor, Tensor]]:
    """Digits to train with, to choose settings by, and to report."""
    from sklearn.datasets import load_digits

    pixels, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels, labels = pixels[order].float() / 16, labels[order]
    return [(pixels[part], labels[part]) for part in (slice(300), slice(300, 600), slice(600, None))]


def measured(outer_steps: int) -> tuple[dict[str, list[float]], Any, tuple[float, float]]:
    """The reported loss after each step with learned and with the best constant settings; the learned ones; those."""
    train, held_out, reported = data()
    torch.manual_seed(0)
    net = functional(nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)))

    def loss(params: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(net(params, batch[0]), batch[1])

    ball = HeavyBall(
        step=lambda x: {name: log_step.exp() for name, log_step in x["log_steps"].items()},
        momentum=lambda x: x["raw"].sigmoid(),
    )
    learned = Scheduled(ball, factors=lambda x: x["log_factors"].exp())
    problem = BilevelProblem(lambda _, y: loss(y, held_out), lambda _, y: loss(y, train))
    itd = ITD(Iterate(learned, max_steps=STEPS))

    def curve(settings: Any, batch: tuple[Tensor, Tensor]) -> list[float]:
        """The loss on a batch after each step."""
        y = {name: p.detach().requires_grad_() for name, p in net.params.items()}
        moves = {name: torch.zeros_like(p) for name, p in y.items()}
        losses = [float(loss(y, batch).detach())]
        for k in range(STEPS):
            grads = torch.autograd.grad(loss(y, train), list(y.values()))
            for (name, p), g in zip(list(y.items()), grads, strict=True):
                step, momentum, factor = settings(name, k)
                move = momentum * moves[name] - step * g
                y[name] = (p + factor * move).detach().requires_grad_()
                moves[name] = move
            losses.append(float(loss(y, batch).detach()))
        return losses

    def of_x(name: str, k: int) -> tuple[float, float, float]:
        return float(x["log_steps"][name].exp()), float(x["raw"].sigmoid()), float(x["log_factors"][k].exp())

    best = min(GRID, key=lambda pair: curve(lambda *_: (*pair, 1.0), held_out)[-1])
    x0 = {
        "log_steps": {name: torch.tensor(best[0]).log() for name in net.params},
        "raw": torch.tensor(best[1]).logit(),
        "log_factors": torch.zeros(STEPS),
    }
    outer = Clipped(Adam(0.02), max_norm=0.1)  # training is near the edge where it blows up
    found = minimize(problem, x0, dict(net.params), estimator=itd, outer=outer, max_steps=outer_steps, throw=False)
    assert found.best is not None
    x = found.best.x
    return (
        {
            "learned": curve(of_x, reported),
            f"best of {len(GRID)} constants": curve(lambda *_: (*best, 1.0), reported),
        },
        x,
        best,
    )


def draw(path: Path, outer_steps: int) -> dict[str, float]:
    """Measure, draw, and return the loss at the end by name."""
    from matplotlib.figure import Figure

    curves, x, best = measured(outer_steps)
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, values in curves.items():
        left.semilogy(values, label=name)
    left.set(xlabel="step of training", ylabel="loss on the other 1197 digits")
    left.legend()
    factors = x["log_factors"].exp()
    for name, log_step in x["log_steps"].items():
        right.plot(factors * log_step.exp(), label=name)
    right.axhline(best[0], color="black", linestyle=":", label="best constant")
    right.set(xlabel="step of training", ylabel=f"step length (momentum {float(x['raw'].sigmoid()):.2f})", yscale="log")
    right.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    return {name: values[-1] for name, values in curves.items()} | {"step": best[0], "momentum": best[1]}


if __name__ == "__main__":
    folder = Path(__file__).resolve().parent.parent / "images"
    print(draw(folder / "learned_settings.png", int(sys.argv[1]) if len(sys.argv) > 1 else 60))
