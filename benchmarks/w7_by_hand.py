"""W7: beside loops by hand: CG on lists of tensors over other shapes and sizes, five variables, and what the BLAS does.

What a user would write instead is the measure here: conjugate gradients on lists, `torch._foreach_*`, which trusts its
recurrence. "first" is a first estimate, with its looks at f and g and at kinks; "later" is one of a run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import _threads  # noqa: F401
import torch
from _foreach import conjugate_gradients, hypergradient_of
from _harness import (
    COLUMNS,
    FLOOR,
    Call,
    Options,
    Row,
    Table,
    against,
    candidates,
    floor,
    interleave,
    linear_solver,
    options,
    reference,
    relative_error,
    save,
)
from _tasks import by_hand, ours, sinusoids
from _workloads import Workload, logistic, weighted_network
from torch import Tensor

from bilevel import AID, BilevelProblem, Start, hypergradient, minimize
from bilevel.solvers import CG, ClosedForm, GradientDescent, Iterate

HAND, PRODUCTS = "by hand, on lists", 20
REGRESSIONS = ((20_000, 300, 1), (6000, 1000, 20), (500, 50, 3))  # samples, features, classes
NETWORKS = {
    "20-40-5": [20, 40, 5],
    "1e3: 32-16-16-10": [32, 16, 16, 10],
    "1e4: 32-80-80-10": [32, 80, 80, 10],
    "1e5: 32-295-295-10": [32, 295, 295, 10],
    "300-300-300-10": [300, 300, 300, 10],
    "1e6: 32-978-978-10": [32, 978, 978, 10],
    "12 layers of 48": [64, *[48] * 12, 10],
}
RIDGE = {"12 layers of 48": 2.0}  # 0.3 for the others: enough that 20 steps meet no negative curvature


def beside(workload: Workload, chosen: Options) -> Table:
    """One workload: everybody's CG(20), in the same rounds."""
    problem, start = BilevelProblem(workload.f, workload.g), Start(workload.ys, None, 3)

    def estimate(begin: Start | None, recompute: bool = True) -> Call:
        linear = linear_solver("cg", PRODUCTS, workload, recompute)
        estimator = AID(inner=ClosedForm(lambda _: workload.ys), linear=linear)

        def call() -> Tensor:
            found = hypergradient(problem, workload.x, workload.ys, estimator=estimator, throw=False, start=begin)
            return found.grad  # type: ignore[no-any-return]

        return call

    calls: dict[str, Call] = {
        FLOOR: floor(workload, PRODUCTS),
        HAND: conjugate_gradients(workload, PRODUCTS),
        "bilevel, first": estimate(None),
        "bilevel, later": estimate(start),
        "bilevel, later, recompute=False": estimate(start, recompute=False),
    }
    names = [name for name in chosen.peers if name == "jaxopt"]
    built, refusals = candidates(chosen, lambda adapter: {"": adapter.implicit(workload, "cg", PRODUCTS)}, names)
    calls |= built
    truth = reference(workload, "cg", PRODUCTS)
    timings, failures = interleave(calls, chosen.rounds)
    rows = [_row(name, timings, calls, truth.grad) for name in timings]
    rows += [Row(name, ["", "", "", "", "", why]) for name, why in (failures | refusals).items()]
    title = f"{workload.name}: CG({PRODUCTS}), {workload.size} inner and {workload.x.numel()} outer variables"
    notes = [f"Negative curvature in float64 at steps {truth.concave}."] if truth.concave else []
    return Table(title, ["", "CPU ms", "x floor", "x by hand", *COLUMNS[3:]], rows, notes)


def _row(name: str, timings: dict[str, object], calls: dict[str, Call], truth: Tensor) -> Row:
    timing = timings[name]
    cpu, wall = (statistics.median(times) * 1e3 for times in (timing.cpu, timing.wall))  # type: ignore[attr-defined]
    to_floor, to_hand = (against(timing, timings[other]) for other in (FLOOR, HAND))  # type: ignore[arg-type]
    error = None if name == FLOOR else relative_error(calls[name](), truth)
    cells = [f"{cpu:.2f}", f"{to_floor:.2f}", f"{to_hand:.2f}", f"{wall:.2f}", "" if error is None else f"{error:.1e}"]
    numbers = {"cpu_ms": cpu, "x_floor": to_floor, "x_hand": to_hand, "error": error}
    return Row(f"**{name}**" if name.startswith("bilevel") else name, [*cells, ""], numbers)


def five_variables(chosen: Options) -> Table:
    """What is left of a problem whose derivatives cost nothing: ten steps of gradient descent, five of CG."""
    x0, y0 = torch.linspace(-0.5, 0.5, 5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    d, step, steps, products = torch.linspace(1.0, 3.0, 5, dtype=torch.float64), 0.2, 10, 5

    def f(_: Tensor, y: Tensor) -> Tensor:
        return (y - 3).square().sum() / 2

    def g(x: Tensor, y: Tensor) -> Tensor:
        return (d * (y - x).square()).sum() / 2 + y.cosh().log().sum()

    loop_of = hypergradient_of(f, g, step, steps, products)
    problem = BilevelProblem(f, g)
    estimator = AID(Iterate(GradientDescent(step), steps), CG(rtol=0.0, max_steps=products))

    def estimate(start: Start | None) -> Call:
        def call() -> Tensor:
            return hypergradient(problem, x0, y0, estimator=estimator, throw=False, start=start).grad  # type: ignore[no-any-return]

        return call

    def descent(count: int) -> Tensor:
        found = minimize(
            problem, x0, y0, estimator=estimator, outer=GradientDescent(0.1), max_steps=count, tol=0.0, throw=False
        )
        return found.x  # type: ignore[no-any-return]

    few, many = (2, 4) if chosen.quick else (20, 120)
    one: dict[str, Call] = {
        HAND: lambda: loop_of(x0, y0),
        "first": estimate(None),
        "later": estimate(Start(y0, None, 3)),
    }
    timings, _ = interleave(one, chosen.rounds)
    rows = []
    for name, timing in timings.items():
        cpu = statistics.median(timing.cpu) * 1e3
        label = name if name == HAND else f"**bilevel, hypergradient, {name}**"
        ratio = against(timing, timings[HAND])
        rows.append(Row(label, [f"{cpu:.3f}", f"{ratio:.2f}"], {"cpu_ms": cpu, "x_hand": ratio}))

    def loop() -> Tensor:
        x = x0
        for _ in range(many - few):
            x = x - 0.1 * loop_of(x, y0)
        return x

    ratios, times = [], []
    for _ in range(chosen.rounds):
        hand_took = _cpu(loop) / (many - few)
        ours_took = (_cpu(lambda: descent(many)) - _cpu(lambda: descent(few))) / (many - few)
        ratios.append(ours_took / hand_took)
        times.append(ours_took * 1e3)
    cpu, ratio = statistics.median(times), statistics.median(ratios)
    rows.append(
        Row("**bilevel, a step of `minimize`**", [f"{cpu:.3f}", f"{ratio:.2f}"], {"cpu_ms": cpu, "x_hand": ratio})
    )
    note = f"A step of `minimize` is the difference of {many} steps and {few}, so without the looks at the start."
    return Table("five variables, 10 inner steps, CG(5)", ["", "CPU ms", "x by hand"], rows, [note])


def _cpu(call: Callable[[], object]) -> float:
    before = time.process_time()
    call()
    return time.process_time() - before


def over_tasks(chosen: Options) -> Table:
    """Meta-gradients of all tasks in one batch, against stacked parameters and `baddbmm` written for this network."""
    rows = []
    for steps, weight in ((1, 0.0),) if chosen.quick else ((1, 0.0), (5, 0.0), (16, 0.0), (16, 20.0)):
        load = sinusoids(5 if chosen.quick else 25, steps, weight=weight)
        calls = {HAND: by_hand(load), "first": ours(load), "later": ours(load, later=True)}
        timings, _ = interleave(calls, chosen.rounds)
        method = f"{'iMAML' if weight else 'MAML'}, {steps} inner steps"
        ratios = [against(timings[name], timings[HAND]) for name in ("first", "later")]
        cpu = [statistics.median(timing.cpu) * 1e3 for timing in timings.values()]
        cells = [*(f"{each:.2f}" for each in cpu), *(f"{each:.2f}" for each in ratios)]
        rows.append(Row(method, cells, {"cpu_ms": cpu, "x_hand": ratios}))
    columns = ["", "by hand, ms", "first, ms", "later, ms", "first, x by hand", "later, x by hand"]
    return Table("sinusoid tasks side by side, eager", columns, rows)


def flat_or_lists(chosen: Options) -> Table:
    """A product, its inner product and an update: with respect to one flat vector, and to lists of leaves."""
    rows = []
    for name in ("20-40-5",) if chosen.quick else ("1e4: 32-80-80-10", "1e5: 32-295-295-10", "1e6: 32-978-978-10"):
        workload = weighted_network(name, NETWORKS[name], 64, ridge=0.3, steps=0, step=0.01)
        x, y = workload.x.detach().requires_grad_(), workload.flat.requires_grad_()
        (gy,) = torch.autograd.grad(workload.g(x, workload.cut(y)), y, create_graph=True)
        leaves = [part.detach().requires_grad_() for part in workload.cut(y)]
        parts = torch.autograd.grad(workload.g(x, leaves), leaves, create_graph=True)
        v = torch.randn(y.shape)
        r = torch.zeros_like(v)
        vs, rs = workload.cut(v), [part.reshape(-1) for part in workload.cut(r)]

        def flat(gy: Tensor = gy, y: Tensor = y, v: Tensor = v, r: Tensor = r) -> Tensor:
            (hv,) = torch.autograd.grad(gy, y, v, retain_graph=True)
            torch.dot(v, hv).item()
            return r.add_(hv, alpha=-0.1)

        def lists(parts: Any = parts, leaves: Any = leaves, vs: Any = vs, rs: Any = rs) -> Tensor:
            hvs = torch.autograd.grad(parts, leaves, vs, retain_graph=True)
            sum(torch.dot(a.reshape(-1), b.reshape(-1)).item() for a, b in zip(vs, hvs, strict=True))
            for a, b in zip(rs, hvs, strict=True):
                a.add_(b.reshape(-1), alpha=-0.1)
            return rs[0]  # type: ignore[no-any-return]

        timings, _ = interleave({"flat": flat, "lists": lists}, chosen.rounds)
        ratio = against(timings["lists"], timings["flat"])
        cpu = [statistics.median(timing.cpu) * 1e3 for timing in timings.values()]
        cells = [f"{cpu[0]:.2f}", f"{cpu[1]:.2f}", f"{ratio:.2f}"]
        rows.append(Row(name, cells, {"cpu_ms": cpu, "ratio": ratio}))
    note = "Flat is what the library does: its backward pass ends in one concatenation, whose cost this is."
    return Table(
        "a product for one vector of all leaves, or for each", ["", "flat, ms", "lists, ms", "x flat"], rows, [note]
    )


def blas(chosen: Options) -> Table:
    """Billions of operations a second of the four products that a linear model's derivatives are made of."""
    samples, features, classes = (500, 50, 3) if chosen.quick else (10_000, 500, 10)
    X, W = torch.randn(samples, features), torch.randn(classes, features)
    R = torch.randn(samples, classes)
    work, Wt = 2e-9 * samples * features * classes, W.t().contiguous()
    calls: dict[str, Call] = {
        "`F.linear(X, W)`, W (C, d)": lambda: torch.nn.functional.linear(X, W),
        "`X @ W`, W (d, C)": lambda: X @ Wt,
        "`R.t() @ X`, its gradient for (C, d)": lambda: R.t() @ X,
        "`X.t() @ R`, its gradient for (d, C)": lambda: X.t() @ R,
    }
    timings, _ = interleave(calls, chosen.rounds)
    rows = []
    for name, timing in timings.items():
        cpu = statistics.median(timing.cpu)
        rows.append(Row(name, [f"{cpu * 1e3:.2f}", f"{work / cpu:.1f}"], {"cpu_ms": cpu * 1e3, "gflops": work / cpu}))
    library = "MKL" if torch.backends.mkl.is_available() else "another library"
    note = (
        f"float32, one thread, {library}, {torch.backends.cpu.get_cpu_capability()}. A square product: {_peak():.0f}."
    )
    return Table(f"what the BLAS does, n={samples}, d={features}, C={classes}", ["", "CPU ms", "GF/s"], rows, [note])


def _peak() -> float:
    a = torch.randn(1024, 1024)
    best = min(_cpu(lambda: a @ a) for _ in range(5))
    return 2e-9 * 1024**3 / best


def main() -> None:
    chosen = options(__doc__ or "", rounds=9)
    shapes = REGRESSIONS[-1:] if chosen.quick else REGRESSIONS
    networks = ["20-40-5", "12 layers of 48"] if chosen.quick else list(NETWORKS)
    tables: list[Table] = []

    def done(table: Table) -> None:
        print(f"[{table.title}]", flush=True)
        tables.append(table)

    done(five_variables(chosen))
    done(over_tasks(chosen))
    for shape in shapes:
        done(beside(logistic(*shape), chosen))
    for name in networks:
        ridge = RIDGE.get(name, 0.3)
        workload = weighted_network(f"network {name}", NETWORKS[name], 64, ridge=ridge, steps=100, step=0.01)
        done(beside(workload, chosen))
    done(flat_or_lists(chosen))
    done(blas(chosen))
    save("w7_by_hand", "W7. Beside loops by hand", tables, chosen)


if __name__ == "__main__":
    main()
