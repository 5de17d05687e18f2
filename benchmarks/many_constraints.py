"""Hypergradients under many constraints on many y, by ways to solve: the table of docs/constraints.md.

python benchmarks/many_constraints.py
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bilevel import AID, KKT, BilevelProblem, Polytope, hypergradient
from bilevel.inner_problems import ManyConstraints
from bilevel.solvers import MINRES, ProximalMultipliers, QuadraticProgram, SparseInteriorPoint, SparseSaddle

SMALL, LARGE = 300, 10_000
PRODUCTS_AT_MOST = 1000  # entries up to which chains are tried by products


def rows(at: list[Tensor], values: list[Tensor], shape: tuple[int, int]) -> Tensor:
    """A sparse matrix."""
    where = torch.stack([torch.cat(at[::2]), torch.cat(at[1::2])])
    return torch.sparse_coo_tensor(where, torch.cat(values), shape, check_invariants=True).coalesce()


def differences(q: int) -> Tensor:
    """y[i] - y[i + 1]."""
    i, one = torch.arange(q - 1), torch.ones(q - 1, dtype=torch.float64)
    return rows([i, i, i, i + 1], [one, -one], (q - 1, q))


Case = tuple[str, Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Polytope], Tensor, tuple[int, ...]]


def cases(q: int) -> Iterator[Case]:
    """Name, g, constraints, x and the shape of y."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(q, generator=generator, dtype=torch.float64)
    signal = torch.linspace(0, 6, q, dtype=torch.float64).sin() + 0.1 * noise
    D = differences(q)
    near = lambda x, y: (y - signal * x).square().sum() / 2  # noqa: E731
    one = torch.tensor(1.0, dtype=torch.float64)
    yield "in order", near, lambda x: Polytope(G=D, h=0.0 * x), one, (q,)
    both = torch.cat([D, -D])
    yield "differences at most x / 100", near, lambda x: Polytope(G=both, h=x / 100), one, (q,)
    k = q // 2
    at = torch.arange(k).repeat_interleave(5), torch.randint(0, q, (5 * k,), generator=generator)
    if q <= 3000:
        R = rows([*at], [torch.randn(5 * k, generator=generator, dtype=torch.float64)], (k, q))
        chain = lambda x, y: near(x, y) + (y[1:] - y[:-1]).square().sum()  # noqa: E731
        yield "random rows of five entries", chain, lambda x: Polytope(G=R, h=x / 10, lower=-0.5, upper=0.7), one, (q,)
    n = int(q**0.5)
    line = torch.linspace(-1, 1, n, dtype=torch.float64)
    floor = (0.3 - line.square().unsqueeze(-1) - line.square()).reshape(-1)
    eye = torch.arange(n * n)
    minus = rows([eye, eye], [-torch.ones(n * n, dtype=torch.float64)], (n * n, n * n))

    def membrane(_: Tensor, y: Tensor) -> Tensor:
        y = torch.nn.functional.pad(y, (1, 1, 1, 1))
        return (y.diff(dim=0).square().sum() + y.diff(dim=1).square().sum()) / 2

    yield "a membrane over an obstacle", membrane, lambda x: Polytope(G=minus, h=-x * floor), one, (n, n)
    cost = torch.rand(n, n, generator=generator, dtype=torch.float64)
    i = torch.arange(n * n)
    ones = torch.ones(n * n, dtype=torch.float64)
    A = rows([i // n, i, n + i % n, i], [ones, ones], (2 * n, n * n)).to_dense()[:-1].to_sparse()
    mass = torch.rand(2 * n - 1, generator=generator, dtype=torch.float64)
    mass[n:] *= mass[:n].sum() / (mass[n:].sum() * (1 + 1 / n))
    yield (
        "transport, a linear program",
        lambda _, y: (cost * y).sum(),
        lambda x: Polytope(A=A, b=mass * x, lower=0.0),
        one,
        (n, n),
    )


def measured(problem: BilevelProblem, x: Tensor, shape: tuple[int, ...], estimator: AID | KKT) -> str:
    """CPU seconds and the violation; or how it ended."""
    begun = time.process_time()
    found = hypergradient(problem, x, torch.zeros(shape, dtype=torch.float64), estimator=estimator, throw=False)
    seconds = time.process_time() - begun
    if not found.status.ok:
        return f"{found.status.name}, {seconds:.2g} s"
    return f"{seconds:.2g} s ({found.reports[0].residual:.0e})"


def main() -> None:
    """Print a row for each case and size."""
    torch.set_num_threads(1)

    def f(_: Tensor, y: Tensor) -> Tensor:
        return (y - 0.3).square().sum()

    for q in (SMALL, LARGE):
        for name, g, constraints, x, shape in cases(q):
            polytope = constraints(x)
            small = q <= PRODUCTS_AT_MOST
            A, G = (None if part is None or not small else part.to_dense() for part in (polytope.A, polytope.G))

            def dense(
                x: Tensor,
                constraints: Callable[[Tensor], Polytope] = constraints,
                A: Tensor | None = A,
                G: Tensor | None = G,
            ) -> Polytope:
                given = constraints(x)
                return Polytope(A=A, b=given.b, G=G, h=given.h, lower=given.lower, upper=given.upper)

            by_sparse = AID(SparseInteriorPoint(), SparseSaddle())
            sparse = BilevelProblem(f, inner=ManyConstraints(g, constraints=constraints))
            cells = [measured(sparse, x, shape, by_sparse), "", ""]
            if small:
                cells[1] = measured(sparse, x, shape, AID(ProximalMultipliers(), MINRES(1e-10)))
                cells[2] = measured(BilevelProblem(f, g, constraints=dense), x, shape, KKT(QuadraticProgram()))
            count = sum(0 if part is None else part.shape[0] for part in (polytope.A, polytope.G))
            print(f"| {name} | {shape} | {count} | {' | '.join(cells)} |", flush=True)
    points = 2 * torch.randn(LARGE, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    disks = ManyConstraints(lambda _, y: (y - points).square().sum() / 2, lambda x, y: y.square().sum(-1) - x.square())
    cell = measured(
        BilevelProblem(f, inner=disks),
        torch.ones(LARGE, dtype=torch.float64),
        (LARGE, 2),
        AID(ProximalMultipliers(), MINRES(1e-10)),
    )
    print(f"| points in disks, curved | {(LARGE, 2)} | {LARGE} | | {cell} | |")


if __name__ == "__main__":
    main()
