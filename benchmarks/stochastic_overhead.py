"""What a step of SOBA costs beside its derivatives, and what a sweep costs beside one run: CPU time, one thread.

    python benchmarks/stochastic_overhead.py --out benchmarks/results

Four tables. A step of `minimize(algorithm=SOBA(...))` against a loop by hand in eager torch that does the same: on
Q20, where a derivative takes a tenth of a millisecond, and on a convolutional network. The clock is read at every step,
where the schedule is asked; a number is the lower quartile of all steps, the two loops in turn, so that it says little
of what else the machine does, and nothing of what a run does once. A sweep of 84 rows side by side, and sweeps
of each kind that goes side by side (seeds on blocks of two sizes, coins, optimizers), against single runs of as many
steps, in turn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from _harness import Row, Table, machine, markdown, write
from _stochastic import Workload, q20
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from bilevel import BilevelProblem, FiniteSum, Split, minimize
from bilevel.algorithms import BSA, ESJS, SABA, SAMA, SOBA, SPABA, Power, ScaleBiO
from bilevel.solvers import Adam, TorchOptim

Loop = Callable[[int], Any]
RHO = 0.3


@dataclass(frozen=True)
class Clock:
    """The schedule 1 / sqrt(t + 1), which writes down when it is asked."""

    times: list[float] = field(default_factory=list)

    def __call__(self, step: int) -> float:
        self.times.append(time.process_time())
        return (step + 1) ** -0.5


def by_hand(
    f: Callable[..., Tensor],
    g: Callable[..., Tensor],
    x0: Tensor,
    y0: Sequence[Tensor],
    data: tuple[tuple[Tensor, ...], tuple[Tensor, ...]],
    batch: int,
    build: Callable[[Sequence[Tensor]], Any],
    clock: Clock,
) -> Loop:
    """SOBA with steps rho / sqrt(k + 1) in eager torch, y a list of tensors."""
    of_f, of_g = data
    blocks_f, blocks_g = (-(-len(side[0]) // batch) for side in (of_f, of_g))

    def run(steps: int) -> Tensor:
        x, y, v = x0.clone(), [t.clone() for t in y0], [torch.zeros_like(t) for t in y0]
        generator = torch.Generator().manual_seed(0)
        for k in range(steps):
            if k % blocks_g == 0:
                order_g = torch.randperm(blocks_g, generator=generator).tolist()
            if k % blocks_f == 0:
                order_f = torch.randperm(blocks_f, generator=generator).tolist()
            i, j = order_g[k % blocks_g] * batch, order_f[k % blocks_f] * batch
            bg, bf = tuple(t[i : i + batch] for t in of_g), tuple(t[j : j + batch] for t in of_f)
            xs, ys = x.detach().requires_grad_(), [t.detach().requires_grad_() for t in y]
            gy = torch.autograd.grad(g(xs, build(ys), bg), ys, create_graph=True)
            gv, *hv = torch.autograd.grad(gy, (xs, *ys), v, allow_unused=True, materialize_grads=True)
            xs, ys = x.detach().requires_grad_(), [t.detach().requires_grad_() for t in y]
            fx, *fy = torch.autograd.grad(f(xs, build(ys), bf), (xs, *ys), allow_unused=True, materialize_grads=True)
            rho = RHO * clock(k)
            x = x - rho * (fx - gv)
            y = [t - rho * d.detach() for t, d in zip(y, gy, strict=True)]
            v = [t - rho * (h - d) for t, h, d in zip(v, hv, fy, strict=True)]
        return x

    return run


def ours(problem: BilevelProblem, x0: Any, y0: Any, data: Callable[[], Split], clock: Clock) -> Loop:
    """The same by `minimize`, which looks at all the data before and after."""

    def run(steps: int) -> Any:
        algorithm = SOBA(RHO, RHO, schedule=clock)
        return minimize(
            problem, x0, y0, algorithm=algorithm, data=data(), max_steps=steps, evaluate_every=steps, throw=False
        ).x

    return run


def step_ms(loops: dict[str, Loop], clock: Clock, steps: int, rounds: int) -> dict[str, float]:
    """CPU milliseconds of a step: the lower quartile."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            clock.times.clear()
            loop(steps)
            times[name] += [1e3 * (b - a) for a, b in itertools.pairwise(clock.times)]
    return {name: sorted(each)[len(each) // 4] for name, each in times.items()}


def quadratic_loops(w: Workload, clock: Clock) -> dict[str, Loop]:
    hand = by_hand(w.problem.f, w.problem.g, w.x0, [w.y0], (w.f, w.g), w.batch, lambda parts: parts[0], clock)
    return {"by hand": hand, "bilevel": ours(w.problem, w.x0, w.y0, lambda: w.data(), clock)}


def network_loops(clock: Clock, samples: int = 256, batch: int = 64, channels: int = 32) -> dict[str, Loop]:
    """A network of two convolutions, a weight decay for each of its tensors, on random images."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, channels, 3),
        nn.Softplus(),
        nn.AvgPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3),
        nn.Softplus(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(32 * channels, 10),
    )
    names = [name for name, _ in net.named_parameters()]
    y0 = {name: value.detach().clone() for name, value in net.named_parameters()}

    def f(_: Tensor, y: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(functional_call(net, y, (data[0],)), data[1])

    def g(x: Tensor, y: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        decay = sum((x[k].exp() * y[name].square().sum() for k, name in enumerate(names)), torch.zeros(()))
        return f(x, y, data) + decay

    x0 = torch.full((len(names),), -4.0)
    sides = [(torch.randn(samples, 1, 28, 28), torch.randint(10, (samples,))) for _ in range(2)]
    hand = by_hand(
        f,
        g,
        x0,
        list(y0.values()),
        (sides[0], sides[1]),
        batch,
        lambda parts: dict(zip(names, parts, strict=True)),
        clock,
    )

    def data() -> Split:
        return Split(f=FiniteSum(sides[0], batch), g=FiniteSum(sides[1], batch))

    return {"by hand": hand, "bilevel": ours(BilevelProblem(f, g), x0, y0, data, clock)}


def steps_table(title: str, found: dict[str, float]) -> Table:
    hand = found["by hand"]
    rows = [
        Row(name, [f"{ms:.3f}", f"{ms / hand:.3f}"], {"step_ms": ms, "ratio": ms / hand}) for name, ms in found.items()
    ]
    return Table(title, ["", "CPU ms a step", "x by hand"], rows)


def in_turn(
    w: Workload, algorithm: Any, grid: dict[str, list[Any]], steps: int, rounds: int
) -> tuple[list[float], list[float]]:
    """CPU seconds of single runs and of sweeps of as many steps, one after the other."""

    def call(**given: Any) -> float:
        start = time.process_time()
        minimize(w.problem, w.x0, w.y0, algorithm=algorithm, data=w.data(), max_steps=steps, **given, throw=False)
        return time.process_time() - start

    pairs = [(call(evaluate_every=steps), call(sweep=grid, sweep_steps=steps)) for _ in range(rounds)]
    return [one for one, _ in pairs], [many for _, many in pairs]


def sweep_table(w: Workload, steps: int, rounds: int) -> Table:
    """84 configurations side by side, against one."""
    grid = {"inner_step": [0.03, 0.1, 0.3, 1.0], "outer_step": [0.05 * k for k in range(1, 22)]}
    one, many = in_turn(w, SOBA(RHO, RHO, schedule=Power(0.5)), grid, steps, rounds)
    rows = [
        Row(
            name,
            [f"{min(found):.2f}", f"{min(found) / min(one):.2f}"],
            {"cpu_s": found, "ratio": min(found) / min(one)},
        )
        for name, found in {"one run": one, "a sweep of 84": many}.items()
    ]
    return Table(f"{w.name}: SOBA, {steps} steps", ["", "CPU s", "x one run"], rows)


def sweeps_table(w: Workload, steps: int, rounds: int) -> Table:
    """Some configurations side by side, of each kind."""
    steps_of_x = {"outer_step": [0.01 * k for k in range(1, 17)]}
    seeds = {"seed": [*range(16)]}
    ragged = replace(w, batch=60)  # a last block of 4
    kinds: dict[str, tuple[Workload, Any, dict[str, list[Any]]]] = {
        "SOBA, steps": (w, SOBA(RHO, RHO), steps_of_x),
        "SOBA, seeds": (w, SOBA(RHO, 0.1), seeds),
        "SOBA, 7 seeds of each of 12 steps": (
            w,
            SOBA(RHO, 0.1),
            {"outer_step": steps_of_x["outer_step"][:12], "seed": [*range(7)]},
        ),
        "SOBA, seeds, a last block of 4": (ragged, SOBA(RHO, 0.1), seeds),
        "SABA, seeds, a last block of 4": (ragged, SABA(RHO, 0.1), seeds),
        "SPABA, seeds: coins, a last block of 4": (ragged, SPABA(RHO, 0.1), seeds),
        "BSA, seeds: coins, a last block of 4": (ragged, BSA(RHO, 0.1, inner_steps=1), seeds),
        "SOBA, Adam in x": (w, SOBA(RHO, 0.1), {"outer_step": [Adam(0.01 * k) for k in range(1, 17)]}),
        "SOBA, torch's Adam in x": (w, SOBA(RHO, 0.1), {"outer_step": [_torch_adam(0.01 * k) for k in range(1, 17)]}),
        "SAMA, steps": (w, SAMA(RHO, 0.1), steps_of_x),
        "ScaleBiO, learning rates": (w, ScaleBiO(0.02, 0.01), {"outer_step": [0.001 * k for k in range(1, 17)]}),
        "ESJ-S, steps": (w, ESJS(RHO, 0.1, inner_steps=2, directions=5), steps_of_x),
        "ESJ-S, seeds, a last block of 4": (ragged, ESJS(RHO, 0.1, inner_steps=2, directions=5), seeds),
    }
    rows = []
    for name, (workload, algorithm, grid) in kinds.items():
        one, many = in_turn(workload, algorithm, grid, steps, rounds)
        ratio = min(many) / min(one)
        count = math.prod(map(len, grid.values()))
        numbers = {"one": one, "sweep": many, "ratio": ratio, "configurations": count}
        rows.append(Row(name, [f"{count}", f"{min(one):.2f}", f"{min(many):.2f}", f"{ratio:.1f}"], numbers))
    title = f"{w.name}: sweeps of what goes side by side, {steps} steps"
    return Table(title, ["", "configurations", "CPU s of one run", "of the sweep", "x one run"], rows)


def _torch_adam(step: float) -> TorchOptim:
    return TorchOptim(lambda parameters: torch.optim.Adam(parameters, lr=step))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="q20,network,sweep,kinds")
    parser.add_argument("--out", type=Path, help="write JSON and Markdown there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tables = []
    clock = Clock()
    if "q20" in given.only:
        found = step_ms(quadratic_loops(q20(), clock), clock, 100, given.rounds)
        tables.append(steps_table("Q20: SOBA, batches of 64", found))
    if "network" in given.only:
        found = step_ms(network_loops(clock), clock, 8, max(2, given.rounds // 4))
        tables.append(steps_table("A network of two convolutions (32 and 64 channels): SOBA, 64 images a step", found))
    if "sweep" in given.only:
        tables.append(sweep_table(q20(), 400, max(2, given.rounds // 10)))
    if "kinds" in given.only:
        tables.append(sweeps_table(q20(), 200, max(2, given.rounds // 7)))
    command = "python benchmarks/stochastic_overhead.py --out benchmarks/results"
    text = f"`{command}`\n\n" + "\n".join(map(markdown, tables))
    print(text)
    if given.out is not None:
        record = {"command": command, "machine": machine(), "tables": [asdict(table) for table in tables]}
        write(given.out / "stochastic_overhead.json", json.dumps(record, indent=1) + "\n")
        write(given.out / "stochastic_overhead.md", text)


if __name__ == "__main__":
    main()
