"""Steps and seconds of the solvers of composite problems, on lassos: the table of docs/non_smooth.md.

python benchmarks/composite_solvers.py
"""

from __future__ import annotations

import time

import torch

from bilevel import AID, BilevelProblem, hypergradient
from bilevel.prox import L1
from bilevel.solvers import ADMM, CG, FISTA, PrimalDual, ProximalGradient

CASES = ((100, 50, 0.1, 0.0), (100, 300, 0.1, 0.0), (100, 300, 0.01, 0.0), (200, 400, 0.05, 0.9))
TOL = 1e-10
SOLVERS = (
    ProximalGradient(tol=TOL, max_steps=100_000),
    FISTA(tol=TOL, max_steps=100_000),
    ADMM(tol=TOL, max_steps=100_000),
    PrimalDual(tol=TOL, max_steps=100_000),
)


def lasso(n: int, d: int, part: float, correlation: float) -> tuple[BilevelProblem, torch.Tensor]:
    """|A y - b|^2 / (2 n) + x |y|_1, columns correlated with their neighbors, at a part of the largest x."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(n, d, generator=generator, dtype=torch.float64)
    for j in range(1, d):
        A[:, j] = correlation * A[:, j - 1] + (1 - correlation**2) ** 0.5 * A[:, j]
    y = torch.zeros(d, dtype=torch.float64)
    y[: max(d // 20, 2)] = 1
    b = A @ y + 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)
    problem = BilevelProblem(
        lambda _, y: y.sum(), lambda _, y: (A @ y - b).square().sum() / (2 * n), prox=lambda x: L1(x)
    )
    return problem, part * (A.T @ b).abs().max() / n


def main() -> None:
    """Print a row for each case."""
    torch.set_num_threads(1)
    warm, x = lasso(10, 5, 0.5, 0.0)
    hypergradient(warm, x, torch.zeros(5, dtype=torch.float64))
    for case in CASES:
        problem, x = lasso(*case)
        cells, found = [], []
        for solver in SOLVERS:
            begun = time.perf_counter()
            estimate = hypergradient(
                problem, x, torch.zeros(case[1], dtype=torch.float64), estimator=AID(solver, CG(1e-10))
            )
            cells.append(f"{estimate.stats.inner_steps} ({time.perf_counter() - begun:.2f} s)")
            found.append(estimate.y)
        apart = max(float((y - found[0]).abs().max()) for y in found)
        print(f"| {', '.join(map(str, case))} | {' | '.join(cells)} |  y apart by {apart:.1e}", flush=True)


if __name__ == "__main__":
    main()
