"""True error and certificate of a hypergradient against work, on logistic regression of real data.

`python docs/examples/certificate_figure.py` writes docs/images/certificate.png.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bilevel import AID, ITD, AbstractEstimator, Stats, certify, hypergradient
from bilevel.problems import logistic_breast_cancer
from bilevel.solvers import CG, LBFGS, Dense, GradientDescent, Iterate, Newton

Curve = tuple[list[int], list[float]]
NAMES = ("true error", "certificate", "certificate, refine=True")


def work(stats: Stats) -> int:
    """Oracle calls with derivatives of g."""
    return stats.gradients + stats.hvps + stats.cross_products


def measure(estimators: Sequence[AbstractEstimator]) -> tuple[dict[str, Curve], float]:
    """For each estimator: work (certificates with their own), error and bounds; and |h|."""
    made = logistic_breast_cancer()
    problem, x, y0, constants = made.problem, made.x0 + 2, made.y0, made.constants
    assert constants is not None
    exact = hypergradient(problem, x, y0, estimator=AID(Newton(tol=1e-14), Dense()), throw=False).grad
    curves: dict[str, Curve] = {name: ([], []) for name in NAMES}
    for estimator in estimators:
        est = hypergradient(problem, x, y0, estimator=estimator, throw=False)
        plain = certify(problem, x, est, constants(x))
        refined = certify(problem, x, est, constants(x), refine=True)
        spent = work(est.stats)
        error = float(torch.linalg.vector_norm(est.grad - exact))
        for name, cost, value in zip(
            NAMES,
            (spent, spent + work(plain.stats), spent + work(refined.stats)),
            (error, plain.bound, refined.bound),
            strict=True,
        ):
            curves[name][0].append(cost)
            curves[name][1].append(value)
    return curves, float(torch.linalg.vector_norm(exact))


def draw(path: Path, steps: Sequence[int]) -> dict[str, dict[str, Curve]]:
    """Measure at these numbers of steps, draw, and return what was drawn."""
    from matplotlib.figure import Figure

    families: dict[str, Sequence[AbstractEstimator]] = {
        "AID: L-BFGS and CG, as many steps of each": [
            AID(LBFGS(tol=0.0, max_steps=k), CG(rtol=0.0, max_steps=k)) for k in steps
        ],
        "ITD: gradient descent": [ITD(Iterate(GradientDescent(), max_steps=20 * k)) for k in steps],
    }
    figure = Figure(figsize=(9.0, 3.8), dpi=100, layout="constrained")
    drawn = {}
    for axes, (family, estimators) in zip(figure.subplots(1, 2, sharey=True), families.items(), strict=True):
        drawn[family], size = measure(estimators)
        for name, style in zip(NAMES, ("ko-", "C0o--", "C1s--"), strict=True):
            axes.plot(*drawn[family][name], style, ms=3, lw=1.2, label=name)
        axes.axhline(size, color="0.5", lw=0.8)
        axes.set(yscale="log", ylim=(1e-12, 1e3), xlabel="gradients + Hessian products + cross products")
        axes.set_title(family, loc="left")
        axes.text(0.99, size, "|h|", transform=axes.get_yaxis_transform(), ha="right", va="bottom", color="0.4")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("distance to the true hypergradient")
    figure.axes[1].legend(loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return drawn


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "images" / "certificate.png"
    for family, curves in draw(out, range(1, 25)).items():
        print(family)
        for row in zip(curves[NAMES[0]][0], *(values for _, values in curves.values()), strict=True):
            print("  ".join(f"{number:9.2e}" for number in row))
