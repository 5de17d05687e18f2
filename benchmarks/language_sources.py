"""Data weights of a language model: shares over a run, and hypergradients against the exact unroll.

    python benchmarks/language_sources.py runs --out benchmarks/results --picture docs/images/networks_language.png
    python benchmarks/language_sources.py hypergradients --out benchmarks/results
    python benchmarks/language_sources.py head --out benchmarks/results

`runs`: each algorithm on the problem of `bilevel run language-sources`; the share of every source at every step.

`hypergradients`: x is held at equal shares and the data are one batch of g and one of f. The network is first trained
by Adam on other batches. From there y takes N steps on the batch, and the exact hypergradient is that of f(y_N(x)) by
`ITD(..., Checkpointed())`. A method's is its D_x after N of its own steps with x held: by then its second copy of y
(F2SA, ScaleBiO), or its v (SOBA), has followed for N steps as well. Methods that step by Adam are compared with the
unroll of Adam, the others with that of gradient descent. `head`: the same for the last layer alone, with a penalty, on
constant features, where y* is unique and all have converged. Cosine, and relative error |h - exact| / |exact|.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import _threads  # noqa: F401
import torch
from _harness import Row, Table, machine, markdown, write
from torch import Tensor

from bilevel import (
    AID,
    ITD,
    BilevelProblem,
    Checkpointed,
    FiniteDifferences,
    Instance,
    Split,
    hypergradient,
    minimize,
)
from bilevel.algorithms import F2SA, SAMA, SOBA, ScaleBiO
from bilevel.problems import byte_gpt, language_sources
from bilevel.problems.networks.language_sources import CORRUPTED, NAMES_OF_ALGORITHMS, STEP_TIMES_WIDTH
from bilevel.solvers import CG, LBFGS, Adam, GradientDescent, Iterate

TITLES = {"f2sa": "F2SA", "soba-fd": "SOBA, differences", "sama": "SAMA", "scalebio": "ScaleBiO"}
PENALTY = 0.02  # of the head
HELD = 1e-30  # a step of x that changes nothing


def run(algorithm: str, steps: int, **settings: Any) -> dict[str, Any]:
    """One run: shares `(steps + 1, S)`, values of f on batches, metrics and seconds of CPU."""
    instance = language_sources(algorithm=algorithm, max_steps=steps, **settings)
    problem, seen = instance.problem, []

    def g(x: Tensor, y: Any, batch: Any) -> Tensor:
        seen.append(x.detach().clone())
        return problem.g(x, y, batch)

    shares: list[list[float]] = []
    values: list[float] = []

    def tell(record: Any, _: Any) -> None:
        shares.append(torch.softmax(seen[-1], 0).tolist())
        values.append(record.value)

    began = time.process_time()
    solution = minimize(
        BilevelProblem(problem.f, g), instance.x0, instance.y0, callback=tell, **instance.settings
    )  # fmt: skip
    seconds = time.process_time() - began
    assert instance.metrics is not None
    found = dict(instance.metrics(solution.x, solution.y))
    return {"algorithm": algorithm, "seconds": seconds, "shares": shares, "values": values, "metrics": found}


def draw(path: Path, runs: list[dict[str, Any]]) -> None:
    """Shares over steps, a panel for each algorithm, and f on batches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), dpi=90, layout="constrained")
    panels = figure.subplots(1, len(runs) + 1)
    names = [name.removeprefix("share_") for name in runs[0]["metrics"] if name.startswith("share_")]
    for axes, found in zip(panels, runs, strict=False):
        for name, curve in zip(names, zip(*found["shares"], strict=True), strict=True):
            bad = name == CORRUPTED
            axes.plot(curve, label=name, color="black" if bad else None, linewidth=2.2 if bad else 1.1)
        axes.axhline(0.05, color="#8c8c8c", linewidth=0.8, linestyle=":")
        axes.set_title(TITLES[found["algorithm"]], fontsize=10, loc="left")
        axes.set_ylim(0, 1)
        axes.set_xlabel("step")
        panels[-1].plot(smoothed(found["values"]), label=TITLES[found["algorithm"]], linewidth=1.1)
    panels[0].set_ylabel("share")
    panels[0].legend(fontsize=7)
    panels[-1].set_title("loss on clean text", fontsize=10, loc="left")
    panels[-1].set_xlabel("step")
    panels[-1].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def smoothed(values: list[float], over: int = 9) -> list[float]:
    """Means over the last few steps."""
    windows = [values[max(0, k + 1 - over) : k + 1] for k in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def table_of_runs(runs: list[dict[str, Any]]) -> Table:
    rows = []
    for found in runs:
        metrics = found["metrics"]
        clean = min(v for k, v in metrics.items() if k.startswith("share_") and not k.endswith(CORRUPTED))
        bad, learned, equal = metrics[f"share_{CORRUPTED}"], metrics["test_loss_learned"], metrics["test_loss_equal"]
        cells = [f"{bad:.3f}", f"{clean:.3f}", f"{learned:.3f}", f"{equal:.3f}", f"{found['seconds']:.0f}"]
        numbers = {"corrupted": bad, "least_clean": clean, "learned": learned, "equal": equal, "s": found["seconds"]}
        rows.append(Row(TITLES[found["algorithm"]], cells, numbers))
    columns = ["algorithm", "share of the corrupted", "least of the others", "test loss", "with equal shares", "CPU s"]
    return Table("Shares of sources", columns, rows, ["Losses in nats a byte, on text that no run sees."])


def trained(instance: Instance, steps: int, step: float) -> dict[str, Tensor]:
    """The network after so many steps of Adam with equal shares."""
    y = {name: leaf.clone().requires_grad_() for name, leaf in instance.y0.items()}
    adam = torch.optim.Adam(y.values(), lr=step)
    for number in range(steps):
        adam.zero_grad()
        instance.problem.g(instance.x0, y, instance.settings["data"]("g", number)).backward()
        adam.step()
    return {name: leaf.detach() for name, leaf in y.items()}


def estimate(instance: Instance, y0: dict[str, Tensor], data: Split, algorithm: Any, steps: int) -> Tensor:
    """D_x of an algorithm after so many steps with x held."""
    found: list[Tensor] = []
    minimize(
        instance.problem,
        instance.x0,
        y0,
        algorithm=algorithm,
        data=data,
        max_steps=steps,
        callback=lambda _, estimate: found.append(estimate.grad),
        throw=False,
    )
    return found[steps - 1 if isinstance(algorithm, F2SA | SAMA | ScaleBiO) else steps]


def hypergradients(instance: Instance, y0: dict[str, Tensor], steps: int, gd: float, adam: float) -> list[Row]:
    """Each method's hypergradient of the logits against the exact one."""
    batches = instance.settings["data"]
    data = Split(f=batches("f", 10**6), g=batches("g", 10**6))
    references = {}
    rows = []
    for name, optimizer in (("gradient descent", GradientDescent(gd)), ("Adam", Adam(adam))):
        exact = ITD(Iterate(optimizer, max_steps=steps), Checkpointed())
        found = hypergradient(instance.problem, instance.x0, y0, data=data, estimator=exact)
        references[name] = found.grad
        print(f"exact, by {name}: f = {found.value:.3f}, |h| = {float(found.grad.norm()):.3g}", flush=True)
    methods: tuple[tuple[str, str, Any], ...] = (
        *((f"F2SA, weight {w:g}", "gradient descent", F2SA(gd, HELD, weight=w, order=1)) for w in (2.0, 10.0, 100.0)),
        ("SOBA, differences", "gradient descent", SOBA(gd, HELD, products=FiniteDifferences())),
        ("SOBA, exact products", "gradient descent", SOBA(gd, HELD)),
        ("SAMA", "gradient descent", SAMA(gd, HELD)),
        ("SAMA", "Adam", SAMA(Adam(adam), HELD)),
        *((f"ScaleBiO, weight {w:g}", "Adam", ScaleBiO(adam, HELD, weight=w)) for w in (2.0, 10.0)),
    )
    for name, of, algorithm in methods:
        began = time.process_time()
        h = estimate(instance, y0, data, algorithm, steps)
        rows.append(compared(name, of, h, references[of], s=time.process_time() - began))
    return rows


def head(instance: Instance, y0: dict[str, Tensor], steps: int) -> list[Row]:
    """The same where y* is unique and reached: the last layer with a penalty, on features of the trained network."""
    batches = instance.settings["data"]
    net = byte_gpt(width=y0["norm.weight"].numel(), depth=len(y0) // 12, context=batches.context).double()
    net.load_state_dict({name: leaf.double() for name, leaf in y0.items()})
    net.requires_grad_(False)
    (windows, sources), clean = batches("g", 10**6), batches("f", 10**6)
    scale = y0["norm.weight"].numel() ** -0.5

    def losses(y: Tensor, seen: Tensor, following: Tensor) -> Tensor:
        logits = (seen @ y.T).transpose(1, 2)
        return torch.nn.functional.cross_entropy(logits, following, reduction="none").mean(1)

    def f(_: Tensor, y: Tensor, batch: Any) -> Tensor:
        return losses(y, *batch).mean()

    def g(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        *inputs, of = batch
        loss = x.numel() * (torch.softmax(x, 0)[of] * losses(y, *inputs)).mean()
        return loss + PENALTY / 2 * y.square().sum()

    data = Split(
        f=(scale * net.features(clean[:, :-1]), clean[:, 1:]),
        g=(scale * net.features(windows[:, :-1]), windows[:, 1:], sources),
    )
    x, y = instance.x0.double(), torch.zeros(256, round(scale**-2), dtype=torch.float64)
    problem = BilevelProblem(f, g)
    rows = data.g[0].reshape(-1, y.shape[1])  # the curvature of softmax is at most 1/2
    step = 1 / (float(torch.linalg.matrix_norm(rows.T @ rows / len(rows), 2)) / 2 + PENALTY)
    unroll = ITD(Iterate(GradientDescent(step), max_steps=steps), Checkpointed())
    exact = hypergradient(problem, x, y, data=data, estimator=unroll).grad
    implicit = hypergradient(problem, x, y, data=data, estimator=AID(LBFGS(1e-8), CG(1e-8))).grad
    print(f"step {step:.3g}; the unroll is {float((exact - implicit).norm() / implicit.norm()):.1e} from AID")
    methods: tuple[tuple[str, Any], ...] = (
        *(
            (f"F2SA of order {order}, weight {w:g}", F2SA(step, HELD, weight=w, order=order))
            for order in (1, 2)
            for w in (10.0, 100.0)
        ),
        ("SOBA, differences", SOBA(step, HELD, products=FiniteDifferences())),
        ("SAMA", SAMA(step, HELD)),
    )
    found = []
    for name, algorithm in methods:
        h = estimate(replace(instance, problem=problem, x0=x), y, data, algorithm, steps)
        found.append(compared(name, "gradient descent", h, exact))
    return found


def compared(name: str, of: str, h: Tensor, exact: Tensor, **more: float) -> Row:
    cosine = float(torch.nn.functional.cosine_similarity(h.double(), exact.double(), dim=0))
    error, scaled = float((h - exact).norm() / exact.norm()), math.sqrt(max(0.0, 1 - cosine * cosine))
    cells = [of, f"{cosine:.4f}", f"{error:.4f}", f"{scaled:.4f}"]
    print(name, *cells, flush=True)
    return Row(name, cells, {"cosine": cosine, "error": error, "best_scaled": scaled, **more})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("runs", "hypergradients", "head"))
    parser.add_argument("--algorithms", default=",".join(NAMES_OF_ALGORITHMS))
    parser.add_argument("--width", type=int, default=200)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of a run (200), or of the unroll (50; of the head 250)")
    parser.add_argument("--trained", type=int, default=120, help="steps before the hypergradient is taken")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gd", type=float, default=0.02, help="step of gradient descent")
    parser.add_argument("--out", type=Path, help="write JSON and Markdown there")
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    steps = given.steps if given.steps is not None else {"runs": 200, "hypergradients": 50, "head": 250}[given.what]
    settings = {"width": given.width, "depth": given.depth, "seed": given.seed}
    content: dict[str, Any] = {}
    if given.what == "runs":
        runs: list[dict[str, Any]] = []
        for name in given.algorithms.split(","):
            runs.append(run(name, steps, **settings))
            print(name, {k: round(v, 3) for k, v in runs[-1]["metrics"].items()}, f"{runs[-1]['seconds']:.0f} s")
        content["runs"], table = runs, table_of_runs(runs)
        if given.picture is not None:
            draw(given.picture, runs)
    else:
        instance = language_sources(**settings)
        y0 = trained(instance, given.trained, STEP_TIMES_WIDTH / given.width)
        if given.what == "head":
            rows, where = head(instance, y0, steps), "of the head, on features of a network"
        else:
            rows, where = hypergradients(instance, y0, steps, given.gd, 3e-4), "from a network"
        title = f"Hypergradients after {steps} steps {where} trained for {given.trained}"
        table = Table(title, ["method", "steps by", "cosine", "relative error", "at the best scale"], rows, [])
    command = (
        f"python benchmarks/language_sources.py {given.what} --width {given.width} --depth {given.depth}"
        f" --steps {steps} --seed {given.seed}"
    )
    text = f"`{command}`\n\n{markdown(table)}"
    print(text)
    if given.out is not None:
        name = f"language_sources_{given.what}"
        record = {"command": command, "machine": machine(), "tables": [asdict(table)], **content}
        write(given.out / f"{name}.json", json.dumps(record, indent=1) + "\n")
        write(given.out / f"{name}.md", text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
