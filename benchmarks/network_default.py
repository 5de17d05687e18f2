"""`estimator="network"` on an MLP, a conv net and a transformer: against a loop by hand, and against the truth.

Time and memory of outer steps from a warm start (ten steps of L-BFGS, ten Gauss-Newton products, one exact one, Adam),
by `minimize` and by a loop in plain torch with `torch.optim.LBFGS`, which evaluates g as often or nearly so: the
gradients of both are in the table. N steps are N + 1 estimates on both sides, as each tells Phi and its gradient at the
x that it ends with. What `minimize` asks of f and g once, at its first estimate, is in its time.

Accuracy: at y trained to a small gradient in float64, against conjugate gradients on the Hessian
itself to 1e-8, and that against a central difference of Phi along one direction.

`--half`: the network under autocast to bfloat16 against float32, from a y that 50 steps of L-BFGS have come to.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _threads  # noqa: F401
import torch
from torch import Tensor

from bilevel import AID, BilevelProblem, Start, hypergradient, minimize, ravel
from bilevel.diagnostics.memory import peak_memory
from bilevel.problems import small_network
from bilevel.solvers import CG, LBFGS, Adam, TruncatedCG

NETWORKS = ("mlp", "conv", "transformer")
STEPS, PRODUCTS, DAMPING = 10, 10, 1e-3
DECAY = {"mlp": -4.0, "conv": -3.0, "transformer": -2.0}


def by_hand(problem: BilevelProblem, x0: Any, y0: Any, steps: int) -> tuple[Tensor, int]:
    """x after so many steps, and the gradients of g that were taken."""
    kind: Any = problem.inner
    x, x_structure = ravel(x0, "x")
    flat, structure = ravel(y0, "y")
    x, y = x.clone(), flat.clone().requires_grad_()
    moments, count = [torch.zeros_like(x), torch.zeros_like(x)], 0
    for step in range(1, steps + 2):
        xs = x_structure.unravel(x)
        inner = torch.optim.LBFGS(
            [y], max_iter=STEPS, history_size=10, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure(inner: Any = inner, xs: Any = xs) -> Tensor:
            nonlocal count
            count += 1
            inner.zero_grad()
            value: Tensor = kind.g(xs, structure.unravel(y))
            value.backward()
            return value

        inner.step(closure)
        leaf, at = x.clone().requires_grad_(), y.detach().requires_grad_()
        xs, ys = x_structure.unravel(leaf), structure.unravel(at)
        z = kind.outputs(xs, ys)
        in_z = torch.autograd.grad(kind.loss(xs, z), z, create_graph=True)[0]
        pulled = torch.autograd.grad(z, at, in_z, create_graph=True)[0]
        rest = torch.autograd.grad(kind.regularizer(xs, ys), at, create_graph=True)[0]
        count += 1
        fx, fy = torch.autograd.grad(problem.f(xs, structure.unravel(at)), (leaf, at), allow_unused=True)
        v, r = torch.zeros_like(at), fy.clone()
        p, rr = r.clone(), r @ r
        for _ in range(PRODUCTS):
            moved = torch.autograd.grad(pulled, in_z, p, retain_graph=True)[0]
            weighted = torch.autograd.grad(in_z, z, moved, retain_graph=True)[0]
            Ap = torch.autograd.grad(z, at, weighted, retain_graph=True)[0] + DAMPING * p
            Ap = Ap + torch.autograd.grad(rest, at, p, retain_graph=True)[0]
            alpha = rr / (p @ Ap)
            v, r = v + alpha * p, r - alpha * Ap
            new = r @ r
            p, rr = r + new / rr * p, new
        moved, hv, gv = torch.autograd.grad(pulled + rest, (in_z, at, leaf), v, retain_graph=True)
        weighted = torch.autograd.grad(in_z, z, moved, retain_graph=True)[0]
        gn = torch.autograd.grad(z, at, weighted)[0]
        _ = float((fy - hv).norm() / fy.norm()), float((fy - gn).norm())
        h = -gv if fx is None else fx - gv
        if step > steps:
            break
        moments = [0.9 * moments[0] + 0.1 * h, 0.999 * moments[1] + 0.001 * h * h]
        x = x - 0.1 * (moments[0] / (1 - 0.9**step)) / ((moments[1] / (1 - 0.999**step)).sqrt() + 1e-8)
    return x, count


def ours(problem: BilevelProblem, x0: Any, y0: Any, steps: int) -> tuple[Any, int]:
    """The same by `minimize`."""
    from bilevel import GaussNewton
    from bilevel.hypergrad import Online

    aid = AID(LBFGS(0.0, STEPS), TruncatedCG(PRODUCTS, 1e-3), DAMPING, GaussNewton())
    # the estimator of the name from a warm start; the cold one is no part of the comparison
    found = minimize(problem, x0, y0, estimator=Online(aid, aid), outer=Adam(0.1), max_steps=steps, throw=False)
    return found.x, found.stats.gradients


def compared(network: str, rounds: int, steps: int, samples: int) -> dict[str, Any]:
    instance = small_network(network=network, n_train=samples, n_val=samples, decay=DECAY[network])
    problem, x0 = instance.problem, instance.x0
    y0 = hypergradient(problem, x0, instance.y0, estimator="network", throw=False).y
    calls: dict[str, Callable[[], tuple[Any, int]]] = {
        "by hand": lambda: by_hand(problem, x0, y0, steps),
        "minimize": lambda: ours(problem, x0, y0, steps),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    gradients = {name: call()[1] for name, call in calls.items()}
    for index in range(rounds):
        for name in sorted(calls, reverse=index % 2 == 0):
            gc.collect()
            before = time.process_time()
            calls[name]()
            seconds[name].append((time.process_time() - before) / steps)
    ratio = statistics.median(a / b for a, b in zip(seconds["minimize"], seconds["by hand"], strict=True))
    memory = {name: peak_memory(call, torch.device("cpu"))[1] for name, call in calls.items()}
    return {
        "network": network,
        "weights": ravel(y0, "y")[0].numel(),
        "ms": {name: 1e3 * statistics.median(times) for name, times in seconds.items()},
        "gradients": gradients,
        "time": ratio,
        "memory": memory["minimize"] / memory["by hand"],
    }


def accuracy(network: str, samples: int) -> dict[str, Any]:
    make = dict(network=network, n_train=samples, n_val=samples, width=4, decay=DECAY[network], double=True)
    instance, plain = small_network(**make), small_network(**make, declared=False)
    problem, x0 = instance.problem, instance.x0
    trained = AID(LBFGS(1e-8, 3000), CG(1e-8, max_steps=3000))
    truth = hypergradient(problem, x0, instance.y0, estimator=trained, throw=False)
    h, structure = ravel(truth.grad, "x")
    x, y = ravel(x0, "x")[0], truth.y
    d = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    d, t = d / d.norm(), 1e-2
    ends = [
        hypergradient(problem, structure.unravel(x + s * t * d), y, estimator=trained, throw=False).value
        for s in (1, -1)
    ]
    slope = (ends[0] - ends[1]) / (2 * t)
    found: dict[str, Any] = {
        "network": network,
        "residual": truth.reports[0].residual,
        "statuses": [report.status.name for report in truth.reports],
        "difference": abs(slope - float(h @ d)) / float(h.norm()),
    }
    single, half = (small_network(**(make | {"double": False}), half=half) for half in (False, True))
    rows = {"declared": (problem, "network", y, None), "not declared": (plain.problem, "network", y, None)}
    rows["declared, warm"] = (problem, "network", y, Start(y, truth.v, 1))
    for name, (of, estimator, start, warm) in rows.items():
        made = hypergradient(of, x0, start, estimator=estimator, start=warm, throw=False)
        g = ravel(made.grad, "x")[0]
        assert made.substitute is not None
        found[name] = {
            "cosine": float(g @ h / (g.norm() * h.norm())),
            "error": float((g - h).norm() / h.norm()),
            "status": made.status.name,
            "substitute": str(made.substitute),
        }
    y32 = {name: weight.float() for name, weight in y.items()}
    pair = [hypergradient(each.problem, each.x0, y32, estimator="network", throw=False) for each in (single, half)]
    a, b = (ravel(each.grad, "x")[0] for each in pair)
    found["bf16"] = {"error": float((a - b).norm() / a.norm()), "statuses": [each.status.name for each in pair]}
    return found


HALF = (*((name, 300, -1.0) for name in NETWORKS), *((name, 30, d) for name in NETWORKS for d in (-1.0, -3.0)))


def in_half(network: Any, samples: int, decay: float) -> str:
    """A row of a table: the distance of the hypergradient under autocast from that in float32, and what it says."""
    make = dict(network=network, n_train=samples, n_val=samples, decay=decay)
    single, half = small_network(**make), small_network(**make, half=True)
    trained = AID(LBFGS(0.0, 50), TruncatedCG(1))
    y = hypergradient(single.problem, single.x0, single.y0, estimator=trained, throw=False).y
    pair = [hypergradient(each.problem, each.x0, y, estimator="network", throw=False) for each in (single, half)]
    a, b = (ravel(each.grad, "x")[0] for each in pair)
    apart, last = float((a - b).norm() / a.norm()), pair[1].reports[-1]
    return f"| {network} | {samples} | {decay:g} | {apart:.4f} | {last.residual:.4f} | `{pair[1].status.name}` |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--loops", action="store_true", help="time and memory only, not the accuracy")
    parser.add_argument("--half", action="store_true", help="bfloat16 only")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    chosen = parser.parse_args()
    if chosen.half:
        print(
            "| network | samples | decay | distance from float32 | measured | status |\n|---|---:|---:|---:|---:|---|"
        )
        for row in HALF:
            print(in_half(*row), flush=True)
        return
    rounds, steps, samples = (1, 2, 40) if chosen.quick else (chosen.rounds, 20, 300)
    rows = []
    for name in chosen.networks:
        rows.append(compared(name, rounds, steps, samples))
        print(json.dumps(rows[-1]), flush=True)
    lines = [
        "| network | weights | by hand, ms | `minimize`, ms | gradients | time | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ms, count = row["ms"], row["gradients"]
        lines.append(
            f"| {row['network']} | {row['weights']} | {ms['by hand']:.1f} | {ms['minimize']:.1f} |"
            f" {count['by hand']} / {count['minimize']} | {row['time']:.2f} | {row['memory']:.2f} |"
        )
    truths = []
    for name in () if chosen.loops else chosen.networks:
        truths.append(accuracy(name, 30 if chosen.quick else 100))
        print(json.dumps(truths[-1]), flush=True)
    for each in truths:
        lines += ["", f"{each['network']}: |grad_y g| = {each['residual']:.1g}, difference {each['difference']:.1g}"]
        lines += [f"- {name}: {each[name]}" for name in ("declared", "not declared", "declared, warm", "bf16")]
    text = "\n".join(lines)
    print(text)
    if chosen.out is not None:
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / "network_default.md").write_text(text + "\n")
        (chosen.out / "network_default.json").write_text(json.dumps({"loops": rows, "truth": truths}, indent=1) + "\n")


if __name__ == "__main__":
    main()
