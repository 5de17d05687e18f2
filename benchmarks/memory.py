"""Peak memory of an estimate in vectors of the size of y, against the same method as a loop by hand.

f is quadratic, and g = <d, (y - x)^2> / 2 + sum log cosh y, with x as long as y, 1e7 entries in float32. Each figure is
that of a process of its own on one thread: how far its resident size rose during the first call, and how much of that
was left with the result held, each over the size of a vector; Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _threads  # noqa: F401
import torch
from torch import Tensor

from bilevel import AID, ITD, BilevelProblem, Checkpointed, Penalty, hypergradient
from bilevel.solvers import CG, LBFGS, GradientDescent, Iterate, Neumann

STEP, INNER, LINEAR, UNROLLED, WEIGHT = 0.2, 5, 8, 9, 50.0
Call = Callable[[], Any]


def problem(n: int) -> tuple[BilevelProblem, Tensor, Tensor]:
    d, x = torch.linspace(1.0, 3.0, n), torch.linspace(-0.5, 0.5, n)

    def f(_: Tensor, y: Tensor) -> Tensor:
        return (y - 3).square().sum() / 2

    def g(x: Tensor, y: Tensor) -> Tensor:
        return (d * (y - x).square()).sum() / 2 + y.cosh().log().sum()

    return BilevelProblem(f, g), x, torch.zeros(n)


DESCENT = Iterate(GradientDescent(STEP), INNER)
ESTIMATORS = {
    "AID-CG": AID(DESCENT, CG(rtol=0.0, max_steps=LINEAR)),
    "AID-CG, L-BFGS": AID(LBFGS(1e-3, max_steps=20), CG(rtol=0.0, max_steps=LINEAR)),
    "AID-Neumann": AID(DESCENT, Neumann(STEP, LINEAR)),
    "ITD": ITD(Iterate(GradientDescent(STEP), UNROLLED)),
    "ITD, checkpointed": ITD(Iterate(GradientDescent(STEP), UNROLLED), Checkpointed()),
    "penalty": Penalty(DESCENT, weight=WEIGHT),
}


def ours(name: str, n: int) -> Call:
    at, x, y0 = problem(n)
    return lambda: hypergradient(at, x, y0, estimator=ESTIMATORS[name], throw=False)


# By hand


def descended(at: BilevelProblem, x: Tensor, y: Tensor, weight: float = 0.0) -> Tensor:
    for _ in range(INNER):
        leaf = y.detach().requires_grad_()
        value = at.g(x, leaf) + weight * at.f(x, leaf) if weight else at.g(x, leaf)
        y = leaf.detach() - STEP * torch.autograd.grad(value, leaf)[0]
        del value
        del leaf
    return y


def by_lbfgs(at: BilevelProblem, x: Tensor, y: Tensor) -> Tensor:
    y = y.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([y], history_size=10, max_iter=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = at.g(x, y)
        value.backward()
        return value

    optimizer.step(closure)
    y.grad = None
    return y.detach()


def conjugate_gradients(H: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    v, r, p = torch.zeros_like(b), b.clone(), b.clone()
    rr = float(r @ r)
    for _ in range(LINEAR):
        Hp = H(p)
        alpha = rr / float(p @ Hp)
        v.add_(p, alpha=alpha)
        r.sub_(Hp, alpha=alpha)
        del Hp
        before, rr = rr, float(r @ r)
        p.mul_(rr / before).add_(r)
    return v


def neumann(H: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    v, p = STEP * b, STEP * b
    for _ in range(LINEAR - 1):
        p.sub_(H(p), alpha=STEP)
        v.add_(p)
    return v


def implicit(
    inner: Callable[[BilevelProblem, Tensor, Tensor], Tensor],
    linear: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] = conjugate_gradients,
) -> Callable[[int], Call]:
    def build(n: int) -> Call:
        at, x0, y0 = problem(n)

        def call() -> Tensor:
            y, x = inner(at, x0, y0).requires_grad_(), x0.detach().requires_grad_()
            fx, b = torch.autograd.grad(at.f(x, y), (x, y), materialize_grads=True, allow_unused=True)
            gy = torch.autograd.grad(at.g(x, y), y, create_graph=True)[0]
            v = linear(lambda p: torch.autograd.grad(gy, y, p, retain_graph=True)[0], b)
            return fx - torch.autograd.grad(gy, x, v)[0]

        return call

    return build


def unrolled(n: int) -> Call:
    at, x0, y0 = problem(n)

    def call() -> Tensor:
        x, y = x0.detach().requires_grad_(), y0.detach().requires_grad_()
        for _ in range(UNROLLED):
            y = y - STEP * torch.autograd.grad(at.g(x, y), y, create_graph=True)[0]
        return torch.autograd.grad(at.f(x, y), x)[0]

    return call


def penalized(n: int) -> Call:
    at, x0, y0 = problem(n)

    def call() -> Tensor:
        y = descended(at, x0, y0)
        y_w = descended(at, x0, y, 1 / WEIGHT)
        x = x0.detach().requires_grad_()
        apart = torch.autograd.grad(at.g(x, y_w), x)[0]
        apart -= torch.autograd.grad(at.g(x, y), x)[0]
        return apart.mul_(WEIGHT)

    return call


HAND: dict[str, Callable[[int], Call]] = {
    "AID-CG": implicit(descended),
    "AID-CG, L-BFGS": implicit(by_lbfgs),
    "AID-Neumann": implicit(descended, neumann),
    "ITD": unrolled,
    "penalty": penalized,
}


# In a process of its own


def _resident(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def measure(name: str, hand: bool, n: int) -> tuple[float, float]:
    """Vectors at the peak of the call, and with its result held."""
    build = HAND[name] if hand else lambda n: ours(name, n)
    build(1000)()  # loads what there is to load
    call = build(n)
    gc.collect()
    gc.disable()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    result = call()
    found = (_resident("VmHWM") - before) / (4 * n), (_resident("VmRSS") - before) / (4 * n)
    del result
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=10_000_000, help="of y, and of x")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one is not None:
        print(json.dumps(measure(chosen.one[0], chosen.one[1] == "hand", chosen.entries)))
        return
    print(f"vectors of {chosen.entries:.0e} entries, float32: at the peak, and with the result held\n")
    print("| method | bilevel | by hand |\n|---|---:|---:|")
    for name in ESTIMATORS:
        cells = []
        for who in ("bilevel", "hand"):
            if who == "hand" and name not in HAND:
                cells.append("")
                continue
            command = [sys.executable, __file__, "--one", name, who, "--entries", str(chosen.entries)]
            child = subprocess.run(command, capture_output=True, text=True, check=True)
            peak, kept = json.loads(child.stdout.strip().splitlines()[-1])
            cells.append(f"{peak:.1f}, {kept:.1f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
