"""Hypergradients through 1,000 quadratic programs of 20 variables: one batch, and a loop over cvxpylayers.

    python benchmarks/quadratic_programs.py

The programs are argmin_y {y'Qy / 2 + x'diag(q) y : G y <= h}, with Q, q, G and h of their own and one x; f is the sum
of squares. cvxpylayers is asked for accuracy too: mode "dense", as its iterative ones leave gradients wrong without a
word, with SCS to 1e-8 (its default solver) and with Clarabel to 1e-10.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _harness import machine, write
from torch import Tensor

from bilevel import KKT, BilevelProblem, Polytope, hypergradient
from bilevel.solvers import QuadraticProgram

D = torch.float64
LAYERS = {
    "SCS": {"solve_method": "SCS", "eps": 1e-8, "max_iters": 100_000, "mode": "dense"},
    "Clarabel": {
        "solve_method": "CLARABEL",
        "tol_gap_abs": 1e-10,
        "tol_gap_rel": 1e-10,
        "tol_feas": 1e-10,
        "mode": "dense",
    },
}


def programs(count: int, n: int, k: int) -> dict[str, Tensor]:
    """Q = L L' / n + I, and q, G and h with h >= 0, so that y = 0 is feasible."""
    generator = torch.Generator().manual_seed(0)
    L, q, G = (torch.randn(count, *shape, generator=generator, dtype=D) for shape in ((n, n), (n,), (k, n)))
    return {
        "Q": L @ L.mT / n + torch.eye(n, dtype=D),
        "q": q,
        "G": G,
        "h": torch.rand(count, k, generator=generator, dtype=D),
    }


def problem(tasks: bool) -> BilevelProblem:
    """The same, for all programs or for one."""
    return BilevelProblem(
        lambda _, y, __: y.square().sum() / 2,
        lambda x, y, d: y @ d["Q"] @ y / 2 + (x * d["q"]) @ y,
        constraints=lambda _, d: Polytope(G=d["G"], h=d["h"]),
        tasks=tasks,
    )


def one(data: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """A program of its own."""
    return {name: part[i] for name, part in data.items()}


def layer(n: int, k: int) -> Callable[..., Any]:
    """The program as a layer: F with F'F = Q, as cvxpy wants what it multiplies."""
    import cvxpy as cp
    from cvxpylayers.torch import CvxpyLayer

    F, q, G, h, y = cp.Parameter((n, n)), cp.Parameter(n), cp.Parameter((k, n)), cp.Parameter(k), cp.Variable(n)
    made = cp.Problem(cp.Minimize(cp.sum_squares(F @ y) / 2 + q @ y), [G @ y <= h])
    return CvxpyLayer(made, parameters=[F, q, G, h], variables=[y])


def by_layers(
    layer: Callable[..., Any], data: dict[str, Tensor], roots: Tensor, x: Tensor, settings: dict[str, Any]
) -> Tensor:
    """The hypergradient by a loop."""
    leaf, total = x.clone().requires_grad_(), torch.zeros_like(x)
    for i in range(len(roots)):
        (y,) = layer(roots[i], leaf * data["q"][i], data["G"][i], data["h"][i], solver_args=settings)
        total += torch.autograd.grad(y.square().sum() / 2, leaf)[0]
    return total / len(roots)


def timed(run: Callable[[], Tensor], rounds: int) -> tuple[Tensor, list[float]]:
    """What it returns, and the CPU seconds of every round."""
    found, seconds = run(), []
    for _ in range(rounds):
        begun = time.process_time()
        found = run()
        seconds.append(time.process_time() - begun)
    return found, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="programs of a batch")
    parser.add_argument("--size", type=int, default=20, help="variables of each")
    parser.add_argument("--rows", type=int, default=10, help="inequalities of each")
    parser.add_argument("--looped", type=int, default=100, help="of how many programs the loops are timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="does it run?")
    parser.add_argument("--out", type=Path, help="where Markdown and JSON go")
    given = parser.parse_args()
    if given.quick:
        given.count, given.looped, given.rounds = 20, 3, 1
    torch.set_num_threads(1)
    data, x = programs(given.count, given.size, given.rows), torch.ones(given.size, dtype=D)
    y0, few, looped = torch.zeros(given.size, dtype=D), {k: v[: given.looped] for k, v in data.items()}, given.looped
    roots = torch.linalg.cholesky(few["Q"]).mT.contiguous()
    kkt = KKT(QuadraticProgram())

    def batch(data: dict[str, Tensor]) -> Tensor:
        return hypergradient(problem(True), x, y0, data=data, estimator=kkt).grad

    def singles() -> Tensor:
        grads = [hypergradient(problem(False), x, y0, data=one(few, i), estimator=kkt).grad for i in range(looped)]
        return torch.stack(grads).mean(0)

    first = hypergradient(problem(True), x, y0, data=data, estimator=kkt)

    def later() -> Tensor:
        return hypergradient(problem(True), x, y0, data=data, estimator=kkt, start=first.start).grad

    expected = batch(few)
    rows: list[tuple[str, list[float], float]] = []
    for name, run in (
        ("**bilevel, one batch, as a run goes on** (`start=`)", later),
        ("bilevel, one batch, the first", lambda: batch(data)),
    ):
        _, seconds = timed(run, given.rounds)
        rows.append((name, [1e3 * s / given.count for s in seconds], 0.0))
    found, seconds = timed(singles, 1)
    rows.append(
        ("bilevel, one after the other", [1e3 * s / looped for s in seconds], float((found - expected).abs().max()))
    )
    try:
        made = layer(given.size, given.rows)
    except ImportError:
        print("cvxpylayers is not installed: pip install cvxpylayers diffcp")
        made = None
    for name, settings in LAYERS.items() if made is not None else ():
        found, seconds = timed(lambda: by_layers(made, few, roots, x, settings), 1)  # noqa: B023
        error = float((found - expected).abs().max())
        rows.append((f"loop over cvxpylayers, {name}", [1e3 * s / looped for s in seconds], error))
    ours = statistics.median(rows[0][1])
    size = f"{given.count} programs of {given.size} variables with {given.rows} inequalities"
    lines = [
        "### Quadratic programs. One batch against a loop over cvxpylayers",
        "",
        "`python benchmarks/quadratic_programs.py`",
        "",
        f"**{size}; loops timed on {looped} of them**",
        "",
        "|  | CPU ms a program | times slower | off by |",
        "|---|---:|---:|---:|",
    ]
    for name, times, error in rows:
        middle = statistics.median(times)
        lines.append(f"| {name} | {middle:.3g} | {middle / ours:.1f} | {error:.1e} |")
    print("\n".join(lines), flush=True)
    if given.out is not None:
        import json

        record = {"machine": machine(), "rows": [{"name": n, "ms": t, "off_by": e} for n, t, e in rows]}
        write(given.out / "quadratic_programs.md", "\n".join(lines) + "\n")
        write(given.out / "quadratic_programs.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
