"""W4: memory and time against the number of inner steps, logistic regression with n=2000, d=200, C=10.

Memory is how much more the process's resident size peaks during N steps than during 2 steps (Linux only), in a process
of its own for each library and each N. Time is interleaved, at 500 steps, against a plain autograd loop on a flat leaf.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import _threads  # noqa: F401
import torch
from _harness import Call, Options, Row, Table, against, candidates, interleave, options, relative_error, save
from _workloads import Workload, logistic
from torch import Tensor

from bilevel import AID, ITD, BilevelProblem, hypergradient
from bilevel.solvers.cg import CG
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate

LOOP = "autograd loop"


def workload() -> Workload:
    return replace(logistic(2000, 200, 10, solved=False), step=0.5)


def loop(w: Workload, steps: int) -> Call:
    """Unrolling as one would write it, on one flat leaf."""

    def call() -> Tensor:
        x, y = w.x.detach().requires_grad_(), w.flat.requires_grad_()
        for _ in range(steps):
            y = y - w.step * torch.autograd.grad(w.g(x, w.cut(y)), y, create_graph=True)[0]
        return torch.autograd.grad(w.f(x, w.cut(y)), x)[0]

    return call


def ours(w: Workload, steps: int) -> dict[str, Call]:
    problem = BilevelProblem(w.f, w.g)
    inner = Iterate(GradientDescent(w.step), max_steps=steps)
    estimators = {
        "bilevel ITD": ITD(inner),
        "bilevel ITD(checkpoint=True)": ITD(inner, checkpoint=True),
        "bilevel AID, CG(20)": AID(inner=inner, linear=CG(rtol=0.0, max_steps=20)),
    }
    return {
        name: lambda e=e: hypergradient(problem, w.x, w.ys, estimator=e, throw=False).grad  # type: ignore[misc]
        for name, e in estimators.items()
    }


def calls(w: Workload, steps: int, chosen: Options) -> tuple[dict[str, Call], dict[str, str]]:
    built, refusals = candidates(chosen, lambda adapter: adapter.unrolled(w, steps))
    return {LOOP: loop(w, steps), **ours(w, steps), **built}, refusals


# Memory, in a process of its own


def peak(call: Call) -> float:
    """Megabytes of the peak resident size during the call."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    call()
    return _status("VmHWM") / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def measure(name: str, steps: int, chosen: Options) -> float:
    w = workload()
    make: Callable[[int], dict[str, Call]]
    if name.startswith("bilevel"):
        make = lambda n: ours(w, n)  # noqa: E731
    elif name == LOOP:
        make = lambda n: {LOOP: loop(w, n)}  # noqa: E731
    else:
        only = replace(chosen, peers=(name.split()[0],))
        make = lambda n: candidates(only, lambda adapter: adapter.unrolled(w, n))[0]  # noqa: E731
    short, call = make(2)[name], make(steps)[name]
    if name.startswith("jaxopt"):
        call()  # compiles
    short()
    before = peak(short)
    return peak(call) - before


def memory(name: str, steps: int, chosen: Options) -> str:
    """The growth, measured by a child process, or why there is none."""
    command = [sys.executable, __file__, "--one", name, "--steps", str(steps)]
    command += ["--hypertorch", str(chosen.hypertorch)] if chosen.hypertorch else []
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = child.stdout.strip().splitlines()
    return f"{json.loads(lines[-1]):.1f}" if child.returncode == 0 and lines else "failed"


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--one")
    parser.add_argument("--steps", type=int)
    single, rest = parser.parse_known_args()
    chosen = options(__doc__ or "", rounds=3, arguments=rest)
    if single.one is not None:
        print(json.dumps(measure(single.one, single.steps, chosen)))
        return

    numbers = [10, 500] if chosen.quick else [10, 100, 500, 1000]
    timed_at = 50 if chosen.quick else 500
    w = workload()
    built, refusals = calls(w, timed_at, chosen)
    timings, failures = interleave(built, chosen.rounds)
    truth = loop(w.double(), timed_at)()
    rows = []
    for name in timings:
        growth = [memory(name, n, chosen) for n in numbers]
        cpu = statistics.median(timings[name].cpu)
        ratio, error = against(timings[name], timings[LOOP]), relative_error(built[name](), truth)
        values = {"steps": numbers, "growth_mb": growth, "cpu_s": timings[name].cpu, "ratio": ratio, "error": error}
        label = f"**{name}**" if name.startswith("bilevel") else name
        implicit = "AID" in name
        remark = "implicit, at the same last step: another number than unrolling's" if implicit else ""
        accuracy = "" if implicit else f"{error:.1e}"
        rows.append(Row(label, [*growth, f"{cpu:.2f}", f"{ratio:.2f}", accuracy, remark], values))
    rows += [Row(name, [""] * (len(numbers) + 3) + [why]) for name, why in (refusals | failures).items()]
    columns = ["", *(f"MB, N={n}" for n in numbers), f"CPU s, N={timed_at}", "x loop", "relative error", ""]
    table = Table("Growth of the peak resident size (MB) against the number N of inner steps", columns, rows)
    save("w4_memory", "W4. Memory against inner steps", [table], chosen)


if __name__ == "__main__":
    main()
