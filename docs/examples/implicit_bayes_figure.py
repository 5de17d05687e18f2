"""Error of explicit and implicit gradients against inner and linear steps, on a Bayesian regression in closed form.

`python docs/examples/implicit_bayes_figure.py` writes docs/images/implicit_bayes.png.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel import AID, ITD, AbstractEstimator, BilevelProblem, hypergradient, ravel
from bilevel.problems import BayesianRegression, KLProducts
from bilevel.solvers import CG, ClosedForm, Dense, GradientDescent, Iterate

Curve = tuple[list[int], list[float]]
FAMILY = BayesianRegression(variance=1.0)
EXPLICIT, IMPLICIT, SUBSTITUTED = "explicit (ABML)", "implicit, H v = b solved", "the same, substituted form"
INNER = (1, 2, 5, 10, 20, 50, 100, 200, 400, 800)
LINEAR = (1, 2, 3, 5, 8, 12, 16, 20, 24, 28, 32)


def regression(n: int = 32, kappa: float = 50.0) -> dict[str, Tensor]:
    """One task, with cond(X'X) = kappa."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    U, V = torch.linalg.qr(normal(2 * n, n))[0], torch.linalg.qr(normal(n, n))[0]
    X, Z = (
        U * torch.linspace(0, 1, n, dtype=torch.float64).mul(torch.tensor(kappa).log() / 2).exp() @ V.mT,
        normal(2 * n, n),
    )
    truth = normal(n)
    b, c = (inputs @ truth + normal(2 * n) for inputs in (X, Z))
    return {"support_x": X[None], "support_y": b[None], "query_x": Z[None], "query_y": c[None]}


def curves(inner: Sequence[int], linear: Sequence[int]) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """Relative errors against inner steps, and against linear steps at the exact posterior."""
    data = regression()
    size = data["support_x"].shape[-1]
    x = {"mean": torch.zeros(size, dtype=torch.float64), "log_variance": torch.zeros(size, dtype=torch.float64)}
    problem = BilevelProblem(FAMILY.f, FAMILY.g, init=lambda x, _: x, tasks=True)
    truth = ravel(FAMILY.gradient(x, data))[0]
    largest = float(torch.linalg.matrix_norm(data["support_x"][0], 2)) ** 2 / FAMILY.variance + 1

    def error(estimator: AbstractEstimator) -> float:
        found = ravel(hypergradient(problem, x, x, estimator=estimator, data=data, throw=False).grad)[0]
        return float(torch.linalg.vector_norm(found - truth) / torch.linalg.vector_norm(truth))

    def aid(solver: Any, steps: int | None, form: Any = "autograd") -> AID:
        solves = Dense() if steps is None else CG(rtol=0.0, max_steps=steps)
        return AID(solver, solves, products=KLProducts(FAMILY.expectation, FAMILY.kl_weight, form))

    descents = [Iterate(GradientDescent(1 / largest), steps) for steps in inner]
    exact = ClosedForm(FAMILY.solution)
    by_inner = {
        EXPLICIT: [error(ITD(solver)) for solver in descents],
        IMPLICIT: [error(aid(solver, None)) for solver in descents],
        "implicit, 16 CG steps": [error(aid(solver, 16)) for solver in descents],
        "implicit, 5 CG steps": [error(aid(solver, 5)) for solver in descents],
        SUBSTITUTED: [error(aid(solver, None, "substituted")) for solver in descents],
    }
    by_linear = {"implicit, at the exact posterior": [error(aid(exact, steps)) for steps in linear]}
    return (
        {name: (list(inner), values) for name, values in by_inner.items()},
        {name: (list(linear), values) for name, values in by_linear.items()},
    )


def draw(path: Path, inner: Sequence[int] = INNER, linear: Sequence[int] = LINEAR) -> tuple[Mapping[str, Curve], ...]:
    """Measure at these numbers of steps, draw, and return what was drawn."""
    from matplotlib.figure import Figure

    by_inner, by_linear = curves(inner, linear)
    figure = Figure(figsize=(9.0, 3.8), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for (name, curve), style in zip(by_inner.items(), ("C3s-", "C0o-", "C0^--", "C0v:", "C2D--"), strict=True):
        left.plot(*curve, style, ms=4, lw=1.3, label=name)
    left.set(xscale="log", yscale="log", ylim=(1e-9, 20), xlabel="inner steps K")
    left.axhline(1, color="0.5", lw=0.8)
    left.text(inner[-1], 1.1, "as bad as 0", ha="right", va="bottom", color="0.4")
    left.set_ylabel("relative error of the gradient")
    left.legend(loc="lower left", fontsize=8)
    for name, curve in by_linear.items():
        right.plot(*curve, "C0o-", ms=4, lw=1.3, label=name)
    right.set(xlabel="steps of conjugate gradients L")
    right.legend(loc="lower left", fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return by_inner, by_linear


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "images" / "implicit_bayes.png"
    for drawn in draw(out):
        for name, curve in drawn.items():
            print(name)
            print("  ".join(f"{steps}: {value:.2g}" for steps, value in zip(*curve, strict=True)))
