"""Digits of which some have a wrong label, ranked by what each does to the loss of held-out digits.

`python docs/examples/influence_figure.py` writes docs/images/influence.png and prints the numbers of the page "Neural
networks".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bilevel import Influence, functional, influence
from bilevel.solvers import MINRES

L2 = 1e-2
TRAIN, TEST, WRONG = 1000, 400, 100


def trained() -> tuple[Any, Any, Any, Any, Tensor]:
    """A network, its parameters, the training and the test set, and which labels of the former are wrong."""
    from sklearn.datasets import load_digits

    pixels, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)[: TRAIN + TEST]
    pixels, labels = pixels[order].double() / 16, labels[order].clone()
    labels[:WRONG] = (labels[:WRONG] + torch.randint(1, 10, (WRONG,), generator=generator)) % 10
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    train, test = (pixels[:TRAIN], labels[:TRAIN]), (pixels[TRAIN:], labels[TRAIN:])
    parameters = list(module.parameters())
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=3000,
        history_size=50,
        tolerance_grad=1e-7,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        objective = cross_entropy(module(train[0]), train[1])
        objective = objective + L2 / 2 * sum((p.square().sum() for p in parameters), torch.zeros(()).double())
        objective.backward()
        return objective

    optimizer.step(closure)  # type: ignore[arg-type]
    net = functional(module)
    return net, dict(net.params), train, test, torch.arange(TRAIN) < WRONG


def area(scores: Tensor, wrong: Tensor) -> float:
    """The probability that a wrong one is below a right one."""
    return float((scores[wrong].unsqueeze(1) < scores[~wrong]).double().mean())


def measured() -> tuple[Influence, dict[str, float], Any, Tensor]:
    """The scores, the areas, the training set and which labels are wrong."""
    net, params, train, test, wrong = trained()

    def loss(params: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(net(params, batch[0]), batch[1], reduction="none")

    found = influence(loss, params, train, test, l2=L2, solver=MINRES(rtol=1e-6, max_steps=2000))
    own = loss(params, train).detach()
    areas = {"influence": area(found.scores, wrong), "own loss": area(-own, wrong)}
    return found, areas, train, wrong


def draw(path: Path) -> dict[str, float]:
    """Measure, draw, and return the areas by name."""
    from matplotlib.figure import Figure

    found, areas, (pixels, labels), wrong = measured()
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.3))
    axes = left.subplots()
    reach = float(found.scores.abs().quantile(0.99))
    for which, name in ((~wrong, "right label"), (wrong, "wrong label")):
        axes.hist(found.scores[which].numpy(), bins=40, range=(-reach, reach), density=True, alpha=0.6, label=name)
    axes.set(xlabel="score: change of the test loss without it", yscale="log", title=f"AUC {areas['influence']:.3f}")
    axes.legend(fontsize="small")
    for axis, k in zip(right.subplots(3, 6).flat, found.most_harmful(18).tolist(), strict=True):
        axis.imshow(pixels[k].reshape(8, 8).numpy(), cmap="gray_r")
        axis.set_title(f"{int(labels[k])}", color="tab:red" if wrong[k] else "black", fontsize=9, pad=2)
        axis.axis("off")
    right.suptitle("most harmful, with their labels (red: planted)", fontsize=9)
    figure.savefig(path, dpi=110)
    return areas | {
        "planted among the worst 100": float(wrong[found.most_harmful(100)].double().mean()),
        "stationarity": found.stationarity,
        "largest error of a score": float(found.errors.max() / found.scores.abs().max()),
        "linear steps": found.stats.linear_steps,
    }


if __name__ == "__main__":
    print(draw(Path(__file__).resolve().parent.parent / "images" / "influence.png"))
