"""Finite sums on which stochastic algorithms are compared, and what is measured there.

The quadratic sums are drawn here and not in `bilevel.problems`: their numbers are those of `numpy.random`, which the
library does without, and what a user of the catalogue runs is a problem, not a race.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import _threads  # noqa: F401
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from bilevel import BilevelProblem, Box, FiniteSum, Split, minimize
from bilevel._flat import FlatProblem
from bilevel._tree import ravel
from bilevel.algorithms import AbstractAlgorithm, Oracle
from bilevel.outer.batches import sources

Algorithm = AbstractAlgorithm[Any]


@dataclass(frozen=True, eq=False)
class Workload:
    """Two finite sums, where to start, and grad Phi to rounding.

    One pass is as many calls as there are samples of f and of g. `region` is the set that x is kept in, if any.
    """

    name: str
    problem: BilevelProblem
    f: tuple[Tensor, ...]
    g: tuple[Tensor, ...]
    x0: Tensor
    y0: Tensor
    gradient: Callable[[Tensor], Tensor]
    batch: int = 64
    region: Box | None = None

    @property
    def samples(self) -> int:
        """How many calls a pass has."""
        return len(self.f[0]) + len(self.g[0])

    def data(self, seed: int = 0) -> Split:
        return Split(f=FiniteSum(self.f, self.batch, seed=seed), g=FiniteSum(self.g, self.batch, seed=seed))

    def measure(self, x: Tensor) -> float:
        """|grad Phi(x)|^2."""
        found = float(self.gradient(x).square().sum()) if bool(x.isfinite().all()) else math.inf
        return found if math.isfinite(found) else math.inf


# Quadratics, a sample each of rank one


def quadratic(x: Tensor, y: Tensor, data: tuple[Tensor, ...]) -> Tensor:
    """mean_i (u_i'y)^2 / 2 + (w_i'x)^2 / 2 + (c_i'x)(e_i'y) + a_i'y + b_i'x."""
    u, w, c, e, a, b = data
    return ((u @ y).square() / 2 + (w @ x).square() / 2 + (c @ x) * (e @ y) + a @ y + b @ x).mean()


def quadratic_arrays(
    seed: int, n: int, m: int, q: int, p: int, mu: float = 0.1, L: float = 1.0, L_cross: float = 0.1
) -> tuple[list[Any], list[Any]]:
    """(u, w, c, e, a, b) of g, n samples of each, and of f, m samples: those of Q20 are those of seed 0."""
    rng = np.random.default_rng(seed)

    def orthogonal(d: int) -> Any:
        Q, R = np.linalg.qr(rng.standard_normal((d, d)))
        return Q * np.sign(np.diag(R))

    def family(count: int) -> list[Any]:
        Q = orthogonal(q)
        u = rng.standard_normal((count, q)) @ (Q * np.logspace(math.log10(mu) / 2, math.log10(L) / 2, q) @ Q.T)
        Q = orthogonal(p)
        curvatures = np.concatenate([[0.0], np.logspace(math.log10(mu) / 2, math.log10(L) / 2, p - 1)])
        w = rng.standard_normal((count, p)) @ (Q * curvatures @ Q.T)
        U, _, Vh = np.linalg.svd(rng.standard_normal((p, q)))
        S = np.zeros((p, q))
        np.fill_diagonal(S, np.logspace(math.log10(mu), math.log10(L_cross), min(p, q)))
        t = rng.standard_normal((count, q))
        return [
            u,
            w,
            t @ (U @ S).T,
            t @ Vh.T,
            rng.standard_normal((count, q)),
            rng.standard_normal((count, p)),
        ]

    return family(n), family(m)


def quadratic_sum(name: str, n: int, m: int, q: int, p: int, batch: int = 64, seed: int = 0) -> Workload:
    """A quadratic sum from x = -2, y = 0, with grad Phi in closed form."""
    g, f = (tuple(torch.from_numpy(a) for a in arrays) for arrays in quadratic_arrays(seed, n, m, q, p))
    H, C = _moment(g[0], g[0]), _moment(g[2], g[3])
    factor = torch.linalg.cholesky(H)

    def gradient(x: Tensor) -> Tensor:
        def solve(b: Tensor) -> Tensor:
            return torch.cholesky_solve(b.unsqueeze(-1), factor).squeeze(-1)

        y = -solve(C.T @ x + g[4].mean(0))
        fx = _moment(f[1], f[1]) @ x + _moment(f[2], f[3]) @ y + f[5].mean(0)
        fy = _moment(f[0], f[0]) @ y + _moment(f[3], f[2]) @ x + f[4].mean(0)
        return fx - C @ solve(fy)

    x0, y0 = torch.full((p,), -2.0, dtype=torch.float64), torch.zeros(q, dtype=torch.float64)
    return Workload(name, BilevelProblem(quadratic, quadratic), f, g, x0, y0, gradient, batch)


def _moment(a: Tensor, b: Tensor) -> Tensor:
    """mean_i a_i b_i'."""
    return a.T @ b / len(a)


def q20() -> Workload:
    return quadratic_sum("Q20", 1024, 1024, 20, 10)


def q100() -> Workload:
    return quadratic_sum("Q100", 32768, 1024, 100, 10)


# Logistic regression with a penalty for each feature


def losses(y: Tensor, rows: Tensor) -> Tensor:
    """mean_i log(1 + exp(-z_i'y)), rows z_i = label times features."""
    return softplus(-(rows @ y)).mean()


def logistic_sum(name: str, inner: Tensor, outer: Tensor, batch: int = 64) -> Workload:
    """g = mean logistic loss + sum_j exp(x_j) y_j^2 / 2, f the loss on other samples; from x = -3, y = 0, x <= 1."""
    q = inner.shape[1]
    problem = BilevelProblem(
        lambda _, y, data: losses(y, data[0]),
        lambda x, y, data: losses(y, data[0]) + (x.exp() * y.square()).sum() / 2,
    )

    def gradient(x: Tensor) -> Tensor:
        penalty, y = x.exp(), torch.zeros_like(x)
        for _ in range(50):  # Newton, damped where a whole step goes up: to rounding
            s = torch.sigmoid(-(inner @ y))
            slope = -(s @ inner) / len(inner) + penalty * y
            H = (inner.T * (s * (1 - s))) @ inner / len(inner) + penalty.diag()
            if float(slope.norm()) <= 1e-13:
                break
            step, t, value = torch.linalg.solve(H, slope), 1.0, float(losses(y, inner) + (penalty * y * y).sum() / 2)
            while t > 1e-4 and float(losses(y - t * step, inner) + (penalty * (y - t * step) ** 2).sum() / 2) > value:
                t /= 2
            y = y - (t if t > 1e-4 else 1.0) * step
        fy = -(torch.sigmoid(-(outer @ y)) @ outer) / len(outer)
        return -penalty * y * torch.linalg.solve(H, fy)

    x0 = torch.full((q,), -3.0, dtype=torch.float64)
    # Nothing bounds the curvature exp(x_j) of a feature that is better left out; above 2 / rho its y_j diverges.
    return Workload(name, problem, (outer,), (inner,), x0, torch.zeros_like(x0), gradient, batch, Box(upper=1.0))


def a9a(folder: Path) -> Workload:
    """a9a.npz (CSR, values 1): of its training rows, permuted, 24,000 for g and the next 8,192 for f."""
    found = np.load(folder / "a9a.npz")
    starts, columns = found["indptr_train"].astype(int), found["indices_train"].astype(int)
    dense = np.zeros((len(starts) - 1, 123))
    dense[np.repeat(np.arange(len(dense)), np.diff(starts)), columns] = 1.0
    rows = dense * (2.0 * found["y_train"] - 1.0)[:, None]
    rows = torch.from_numpy(rows[np.random.default_rng(0).permutation(len(rows))])
    return logistic_sum("a9a", rows[:24000].contiguous(), rows[24000:32192].contiguous())


# What is measured


@dataclass(frozen=True, eq=False)
class Entry:
    """An algorithm that takes part: a function of rho and gamma."""

    name: str
    make: Callable[[Any, Any], Algorithm]


@dataclass(frozen=True)
class Traced:
    """|grad Phi|^2 after so many passes, of one configuration and one order of the data; and the steps of a pass."""

    values: tuple[float, ...]
    steps: float


def traced(
    workload: Workload, entry: Entry, grid: Sequence[tuple[float, float]], seed: int, passes: Sequence[float]
) -> list[Traced]:
    """Every configuration of the grid, side by side in one batch where the algorithm can be."""
    rho, gamma = (torch.tensor(column, dtype=torch.float64) for column in zip(*grid, strict=True))
    beside = _seeded(entry.make(1.0, 1.0), seed).beside(rho, gamma)
    if beside is not None:
        return _run(workload, beside, len(grid), seed, passes)
    found = []
    for rho, gamma in grid:
        try:
            found += _run(workload, _seeded(entry.make(rho, gamma), seed), 0, seed, passes)
        except (ValueError, ArithmeticError):  # refused, or out of range: as good as diverged
            found.append(Traced(tuple(math.inf for _ in passes), math.nan))
    return found


def _seeded(algorithm: Algorithm, seed: int) -> Algorithm:
    own = any(part.name == "seed" for part in fields(algorithm))  # type: ignore[arg-type]
    return replace(algorithm, seed=seed) if own else algorithm  # type: ignore[type-var]


def _run(workload: Workload, algorithm: Algorithm, rows: int, seed: int, passes: Sequence[float]) -> list[Traced]:
    x, y = workload.x0, workload.y0
    like = FlatProblem(workload.problem, ravel(x)[1], ravel(y)[1])
    oracle = Oracle(like, sources(workload.data(seed)), algorithm.draws, workload.region)
    if rows:
        x, y = x.expand(rows, -1).clone(), y.expand(rows, -1).clone()
    state, seen = algorithm.init(oracle, x, y), []
    limits = [count * workload.samples * max(rows, 1) for count in passes]
    while len(seen) < len(limits):
        found = algorithm.evaluate(oracle, state)
        while (
            len(seen) < len(limits) and like.tally.sampled > limits[len(seen)]
        ):  # the step that goes beyond is not taken
            seen.append(algorithm.point(state)[0])
        if not bool(algorithm.point(state)[0].isfinite().any()):
            seen += [algorithm.point(state)[0]] * (len(limits) - len(seen))
            break
        state = algorithm.step(oracle, state, found)
        oracle = oracle.at(oracle.step + 1)
    steps = oracle.step / passes[-1]
    if not rows:
        return [Traced(tuple(map(workload.measure, seen)), steps)]
    return [Traced(tuple(workload.measure(x[row]) for x in seen), steps) for row in range(rows)]


@dataclass(frozen=True)
class Tuned:
    """The best of a grid at one budget, by the median over seeds.

    Attributes:
        passes: the budget.
        value: the median of |grad Phi|^2.
        worst: the largest of them.
        rho: the step of y.
        gamma: the step of x.
    """

    passes: float
    value: float
    worst: float
    rho: float
    gamma: float


@dataclass(frozen=True)
class Result:
    """An algorithm on a workload: the best at each budget, steps and CPU milliseconds of a single run."""

    name: str
    tuned: tuple[Tuned, ...]
    steps: float
    cpu_ms: float

    def at(self, passes: float) -> Tuned:
        return next(tuned for tuned in self.tuned if tuned.passes == passes)

    def seconds(self, passes: float) -> float:
        """CPU seconds of a single run of so many passes."""
        return passes * self.steps * self.cpu_ms / 1e3


def tuned(
    workload: Workload,
    entry: Entry,
    grid: Sequence[tuple[float, float]],
    passes: Sequence[float],
    seeds: Sequence[int] = (0, 1, 2),
    seconds: float = 0.3,
) -> Result:
    """Choose the steps of every budget from a grid, by the median over the seeds; time a single run with the last ones.

    What cannot run side by side is tuned on the first seed alone, and what was chosen runs on the other ones.
    """
    first, chosen = traced(workload, entry, grid, seeds[0], passes), list(range(len(grid)))
    if entry.make(1.0, 1.0).beside(torch.ones(1), torch.ones(1)) is None:
        chosen = sorted({min(chosen, key=lambda i: first[i].values[k]) for k in range(len(passes))})
        first = [first[i] for i in chosen]
    some = [grid[i] for i in chosen]
    runs = [first, *(traced(workload, entry, some, seed, passes) for seed in seeds[1:])]
    best = []
    for k, count in enumerate(passes):
        each = [sorted(run[i].values[k] for run in runs) for i in range(len(some))]
        medians = [statistics.median(values) for values in each]
        i = min(range(len(some)), key=medians.__getitem__)
        best.append(Tuned(count, medians[i], each[i][-1], *some[i]))
    i = some.index((best[-1].rho, best[-1].gamma))
    return Result(entry.name, tuple(best), runs[0][i].steps, cpu_ms(workload, entry.make(*some[i]), seconds=seconds))


def cpu_ms(workload: Workload, algorithm: Algorithm, rounds: int = 3, seconds: float = 0.3) -> float:
    """CPU milliseconds of a step of `minimize`, without what a run does once: the least of some rounds."""

    def call(count: int) -> float:
        start = time.process_time()
        minimize(
            workload.problem,
            workload.x0,
            workload.y0,
            algorithm=algorithm,
            data=workload.data(),
            constraint=workload.region,
            max_steps=count,
            evaluate_every=count,
            throw=False,
        )
        return time.process_time() - start

    call(2)
    steps = max(4, min(300, round(seconds / max((call(6) - call(2)) / 4, 1e-3))))
    times = [(call(2), call(2 + steps)) for _ in range(rounds)]
    return (min(long for _, long in times) - min(short for short, _ in times)) / steps * 1e3
