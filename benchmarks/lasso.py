"""The lasso's penalty by hypergradients, against a warm-started path and against sparse-ho's algorithm in numba."""

from __future__ import annotations

import importlib
import math
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import _threads  # noqa: F401
import torch
from _harness import Row, Table, markdown, options, save
from _lasso import FULL, QUICK, LassoData, lasso_data

from bilevel import AID, BilevelProblem, Box, minimize, solution_path
from bilevel.inner_problems import LinearModel
from bilevel.problems import highest_penalty
from bilevel.prox import L1
from bilevel.solvers import CG, CoordinateDescent, QuasiNewton

TOL, GRID, WITHIN = 1e-6, 30, 1.01  # of the least subgradient; points from lambda_max to lambda_max / 1000; of the best
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Found:
    """When a value within 1 % of the grid's best was evaluated, after how many inner solves, and the value."""

    seconds: float
    solves: int
    value: float


def ours(data: LassoData, log_lambda: float, target: float) -> Found:
    """`minimize` from the start to the first evaluation at the target."""
    begun = time.process_time()
    g, f = LinearModel(data.X, data.b), LinearModel(data.U, data.c)
    problem = BilevelProblem(f, g, prox=lambda x: L1(x.exp()))
    x0 = torch.tensor(log_lambda, dtype=torch.float64)
    seen: list[Found] = []

    def callback(record: Any, _: Any) -> bool:
        seen.append(Found(time.process_time() - begun, len(seen) + 1, record.value))
        return bool(record.value <= target)

    minimize(
        problem,
        x0,
        data.X.new_zeros(data.X.shape[1]),
        estimator=AID(CoordinateDescent(TOL), CG(rtol=1e-6)),
        outer=QuasiNewton(),
        constraint=Box(x0 + math.log(10) - 12, x0 + math.log(10) + math.log(0.9)),
        max_steps=30,
        callback=callback,
        throw=False,
    )
    return seen[-1]


def path(data: LassoData, lambdas: list[float]) -> tuple[float, list[float]]:
    """Seconds and validation losses of our own warm-started path."""
    begun = time.process_time()
    g, f = LinearModel(data.X, data.b), LinearModel(data.U, data.c)
    problem = BilevelProblem(f, g, prox=lambda x: L1(x.exp()))
    points = [torch.tensor(each, dtype=torch.float64).log() for each in lambdas]
    found = solution_path(problem, points, data.X.new_zeros(data.X.shape[1]), inner=CoordinateDescent(TOL))
    return time.process_time() - begun, list(found.values)


def table(size: tuple[int, int], seed: int, rounds: int) -> Table:
    """All candidates on one draw."""
    data = lasso_data(*size, seed)
    top = float(highest_penalty(LinearModel(data.X, data.b)))
    lambdas = [top * 10 ** (-3 * k / (GRID - 1)) for k in range(GRID)]
    whole, values = path(data, lambdas)
    best, start = min(values), math.log(top / 10)
    target = WITHIN * best
    found: dict[str, list[Found]] = {"**bilevel**": []}
    try:
        numba: Any = importlib.import_module("peers.numba_lasso")
    except ImportError as error:
        numba, missing = None, str(error)
    arrays = [part.numpy() for part in (data.X, data.b, data.U, data.c)]
    candidates = {"**bilevel**": lambda: ours(data, start, target)}
    if numba is not None:

        def peer(cyclic: bool) -> Found:
            points = numba.search(*arrays, start, target, TOL, cyclic)
            return Found(points[-1].seconds, len(points), points[-1].value)

        candidates |= {"numba, working sets": lambda: peer(False), "numba, cyclic": lambda: peer(True)}
        for cyclic in (False, True):  # compiled before it is timed
            small = [part.numpy() for part in vars(lasso_data(50, 100, 0)).values()]
            numba.search(*small, 0.0, 0.0, TOL, cyclic, 2)
    ours(data, start, target)
    for index in range(rounds):
        for name, call in candidates.items():
            if index and name == "numba, cyclic":  # once: it takes many times as long
                continue
            found.setdefault(name, []).append(call())
    seconds = {name: statistics.median(each.seconds for each in all_) for name, all_ in found.items()}
    first = seconds["**bilevel**"]
    rows = [
        Row(
            name,
            [f"{1e3 * seconds[name]:.0f}", str(all_[0].solves), f"{all_[0].value:.4f}", f"{seconds[name] / first:.2f}"],
            {"ms": [1e3 * each.seconds for each in all_], "solves": all_[0].solves, "value": all_[0].value},
        )
        for name, all_ in found.items()
    ]
    rows.append(
        Row(
            f"our path, {GRID} points",
            [f"{1e3 * whole:.0f}", str(GRID), f"{best:.4f}", f"{whole / first:.1f}"],
            {"ms": [1e3 * whole], "values": values},
        )
    )
    if numba is None:
        rows.append(Row("numba", ["", "", "", f"skipped: {missing}"]))
    title = f"n = {size[0]}, d = {size[1]}, seed {seed}: to {WITHIN} times the best of the grid, {best:.4f}"
    return Table(title, ["", "CPU ms", "inner solves", "validation loss", "times the first row"], rows)


def main() -> None:
    chosen = options(__doc__ or "", rounds=3)
    size, seeds = (QUICK, SEEDS[:1]) if chosen.quick else (FULL, SEEDS)
    tables = []
    for seed in seeds:
        tables.append(table(size, seed, chosen.rounds))
        print(markdown(tables[-1]), file=sys.stderr, flush=True)
    heading = "Lasso. From lambda_max / 10 to within 1 % of the best of 30 points down to lambda_max / 1000"
    save("lasso", heading, tables, chosen)


if __name__ == "__main__":
    main()
