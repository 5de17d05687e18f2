"""What a product costs by `CompiledProducts`, which keeps what a gradient leaves, and by `Exact`: CPU time, one thread.

    python benchmarks/compiled_products.py --out benchmarks/results

H v of logistic regressions (samples x features x classes) and of networks (widths, samples), the two in turn; a number
is the median over rounds of the ratio. Compiling is not timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import _threads  # noqa: F401
import torch
from _harness import Row, Table, against, interleave, machine, markdown, write
from torch import Tensor, nn

from bilevel import BilevelProblem, CompiledProducts, Exact, functional, ravel
from bilevel._flat import FlatProblem
from bilevel.hypergrad.product_costs import work_of

LOGISTIC = (
    *((200, 20, 1), (1000, 50, 1), (2000, 100, 1), (4000, 200, 1), (10000, 500, 1)),
    *((500, 50, 3), (2000, 100, 10), (10000, 500, 10), (6000, 1000, 20)),
)
NETWORKS = (((1, 40, 40, 1), 10), ((20, 40, 5), 64), ((784, 128, 10), 128))


def logistic(samples: int, features: int, classes: int) -> tuple[FlatProblem, Tensor, Tensor]:
    """Cross-entropy with a penalty for each feature."""
    X = torch.randn(samples, features)
    t = torch.randint(max(classes, 2), (samples,))

    def g(x: Tensor, y: Tensor) -> Tensor:
        if classes == 1:
            loss = nn.functional.softplus((1 - 2 * t) * (X @ y[0])).mean()
        else:
            loss = nn.functional.cross_entropy(nn.functional.linear(X, y), t)
        return loss + (x.exp() * y.square()).sum() / 2

    x, y = torch.full((features,), -4.0), 0.1 * torch.randn(classes, features)
    return flat(BilevelProblem(lambda _, y: y.square().sum(), g), x, y)


def network(widths: tuple[int, ...], samples: int) -> tuple[FlatProblem, Tensor, Tensor]:
    """A network with tanh, its squared error, and a penalty."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    net = functional(nn.Sequential(*layers[:-1]))
    X, t = torch.randn(samples, widths[0]), torch.randn(samples, widths[-1])

    def g(x: Tensor, y: Any) -> Tensor:
        penalty = sum((part.square().sum() for part in y.values()), torch.zeros(()))
        return nn.functional.mse_loss(net(y, X), t) + x.exp() * penalty

    return flat(BilevelProblem(lambda _, y: net(y, X).square().mean(), g), torch.tensor(-4.0), net.params)


def flat(problem: BilevelProblem, x: Any, y: Any) -> tuple[FlatProblem, Tensor, Tensor]:
    """In vectors."""
    (x_vector, x_structure), (y_vector, y_structure) = ravel(x), ravel(y)
    return FlatProblem(problem, x_structure, y_structure), x_vector.detach(), y_vector.detach()


def products_of(
    made: tuple[FlatProblem, Tensor, Tensor], compiled: CompiledProducts
) -> dict[str, Callable[[], Tensor]]:
    """A product by each."""
    problem, x, y = made
    v, calls = torch.randn_like(y), dict[str, Callable[[], Tensor]]()
    for name, products in (("Exact", Exact()), ("CompiledProducts", compiled)):
        mv = products.linearize(problem, x, y).operator.mv
        calls[name] = lambda mv=mv: mv(v)
    exact, found = (call() for call in calls.values())
    assert float((exact - found).norm() / exact.norm()) <= 1e-4
    return calls


def main() -> None:
    """Measure, and write the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--only", choices=["logistic", "networks"], help="these alone")
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    torch.manual_seed(0)
    cases = [(f"logistic {'x'.join(map(str, sizes))}", logistic(*sizes)) for sizes in LOGISTIC]
    cases = [] if given.only == "networks" else cases
    networks = () if given.only == "logistic" else NETWORKS
    cases += [(f"network {'-'.join(map(str, w))}, {n} samples", network(w, n)) for w, n in networks]
    rows = []
    for name, made in cases:
        timings, _ = interleave(products_of(made, CompiledProducts()), given.rounds)
        ms = {each: 1e3 * sorted(timing.cpu)[len(timing.cpu) // 2] for each, timing in timings.items()}
        ratio = against(timings["CompiledProducts"], timings["Exact"])
        work = work_of(*made)
        cells = [f"{work.calls}", f"{work.entries}", *(f"{number:.3f}" for number in ms.values()), f"{ratio:.2f}"]
        rows.append(Row(name, cells, {**ms, "ratio": ratio, "calls": work.calls, "entries": work.entries}))
        print(rows[-1].name, rows[-1].cells, flush=True)
    columns = ["", "calls", "entries", "Exact", "CompiledProducts", "ratio"]
    table = Table("A product H v, CPU milliseconds", columns, rows)
    only = f" --only {given.only}" if given.only else ""
    command = f"python benchmarks/compiled_products.py{only} --rounds {given.rounds} --out benchmarks/results"
    print(text := f"`{command}`\n\n{markdown(table)}")
    if given.out is not None:
        record = {"command": command, "machine": machine(), "tables": [asdict(table)]}
        write(given.out / "compiled_products.json", json.dumps(record, indent=1) + "\n")
        write(given.out / "compiled_products.md", text)


if __name__ == "__main__":
    main()
