"""ESJ: all the perturbed inner solves as one batch, against a loop over the directions, on a small network."""

from __future__ import annotations

import statistics

import _threads  # noqa: F401
import torch
from _harness import Call, Row, Table, against, interleave, options, relative_error, save
from _workloads import Workload, weighted_network
from torch import Tensor

from bilevel import ESJ, BilevelProblem, hypergradient
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate

RADIUS, STEPS, LOOP = 1e-2, 20, "loop over directions"


def estimator(w: Workload, directions: int, chunk: int | None = None) -> ESJ:
    inner = Iterate(GradientDescent(w.step), max_steps=STEPS)
    return ESJ(inner, directions=directions, radius=RADIUS, distribution="gaussian", seed=0, chunk=chunk)


def loop(w: Workload, directions: int) -> Call:
    """The same estimate with one inner solve after the other, written out."""
    u = torch.randn(directions, w.x.numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(w.x)

    def solve(x: Tensor) -> Tensor:
        y = w.flat
        for _ in range(STEPS):
            leaf = y.detach().requires_grad_()
            y = leaf.detach() - w.step * torch.autograd.grad(w.g(x, w.cut(leaf)), leaf)[0]
        return y

    def call() -> Tensor:
        x, y = w.x.detach().requires_grad_(), solve(w.x).requires_grad_()
        fx, fy = torch.autograd.grad(w.f(x, w.cut(y)), (x, y), allow_unused=True, materialize_grads=True)
        y = y.detach()
        slopes = torch.stack([(solve(w.x + RADIUS * direction) - y) @ fy for direction in u]) / RADIUS
        return fx + (slopes.unsqueeze(-1) * u).mean(0)

    return call


def main() -> None:
    chosen = options(__doc__ or "", rounds=15)
    tables = []
    for directions in (10,) if chosen.quick else (10, 50):
        w = weighted_network("network 8-40-40-4", [8, 40, 40, 4], 10, ridge=1e-2, steps=0, step=0.1)
        problem = BilevelProblem(w.f, w.g)

        def call(chunk: int | None, w: Workload = w, count: int = directions, p: BilevelProblem = problem) -> Tensor:
            found = hypergradient(p, w.x, w.ys, estimator=estimator(w, count, chunk), throw=False)
            return found.grad  # type: ignore[no-any-return]

        calls: dict[str, Call] = {
            LOOP: loop(w, directions),
            "bilevel, one batch": lambda call=call: call(None),  # type: ignore[misc]
            "bilevel, chunk=1": lambda call=call: call(1),  # type: ignore[misc]
        }
        timings, failures = interleave(calls, chosen.rounds)
        truth = loop(w.double(), directions)()
        rows = []
        for name, timing in timings.items():
            ratio, error = against(timing, timings[LOOP]), relative_error(calls[name](), truth)
            cpu, wall = statistics.median(timing.cpu) * 1e3, statistics.median(timing.wall) * 1e3
            label = f"**{name}**" if name == "bilevel, one batch" else name
            values = {"cpu_ms": [1e3 * t for t in timing.cpu], "speedup": 1 / ratio, "error": error}
            rows.append(Row(label, [f"{cpu:.1f}", f"{1 / ratio:.2f}", f"{wall:.1f}", f"{error:.1e}"], values))
        rows += [Row(name, ["", "", "", "", why]) for name, why in failures.items()]
        title = f"{w.name}, {w.size} parameters, {directions} directions, {STEPS} inner steps"
        tables.append(Table(title, ["", "CPU ms", "times faster", "wall ms", "relative error", ""], rows))
    save("esj", "ESJ. One batch against a loop over the directions", tables, chosen)


if __name__ == "__main__":
    main()
