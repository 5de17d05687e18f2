"""Errors of the adjoint system of a fixed point against products, where the map contracts and where it does not.

`python docs/examples/fixed_point_figure.py` writes docs/images/fixed_points.png.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from bilevel import AID, BilevelProblem, hypergradient
from bilevel.solvers import GMRES, Anderson, Dense, LinearAnderson, Neumann
from bilevel.testing import FixedPointFamily
from bilevel.testing.strategies import gaussian

RADII = (0.938, 1.4)
PRODUCTS = (1, 2, 3, 5, 8, 12, 16, 20, 25, 30, 40, 60, 80, 100)
SOLVERS = ("Neumann", "LinearAnderson", "GMRES")


def family(radius: float, q: int = 20) -> FixedPointFamily:
    """A linear map of this spectral radius, drawn at random."""
    A = gaussian(q, q, seed=1)
    A = A * (radius / torch.linalg.eigvals(A).abs().max())
    return FixedPointFamily(A, gaussian(q, 3, seed=2), gaussian(q, seed=3), gaussian(q, seed=4), gaussian(3, seed=5))


def errors(radius: float, solver: str) -> list[float]:
    """Relative errors of the hypergradient after so many products."""
    at, x = family(radius), torch.ones(3, dtype=torch.float64)
    problem = BilevelProblem(at.f, fixed_point=at.map)
    y0 = torch.zeros(20, dtype=torch.float64)
    exact = hypergradient(problem, x, y0, estimator=AID(Anderson(1e-12, memory=25), Dense())).grad
    found = []
    for k in PRODUCTS:
        linear = {
            "Neumann": Neumann(1.0, k),
            "LinearAnderson": LinearAnderson(0.0, k, memory=25),
            "GMRES": GMRES(0.0, k),
        }[solver]
        est = hypergradient(problem, x, y0, estimator=AID(Anderson(1e-12, memory=25), linear), throw=False)
        found.append(float((est.grad - exact).norm() / exact.norm()))
    return found


def main(path: str) -> None:
    """Draw."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, radius in zip(axes, RADII, strict=True):
        for solver, mark in zip(SOLVERS, "o^s", strict=True):
            axis.semilogy(PRODUCTS, [max(e, 1e-16) for e in errors(radius, solver)], marker=mark, ms=3.5, label=solver)
        axis.set_title(f"spectral radius of dT/dy: {radius:g}")
        axis.set_xlabel("products")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative error of h")
    axes[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parents[1] / "images" / "fixed_points.png"))
