"""benchmark_bilevel's JAX solvers beside ours, on Q20: |grad Phi|^2 after the same calls, and CPU time.

    git clone https://github.com/benchopt/benchmark_bilevel PATH
    pip install jax benchopt
    python benchmarks/stochastic_peers.py --checkout PATH --out benchmarks/results

The checkout is used as it is. Its sampler visits the last block of every epoch twice, so that numbers of methods whose
noise does not vanish differ from ours in more than the order of batches.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _harness import Row, Table, machine, markdown, write
from _stochastic import Entry, Workload, cpu_ms, q20, traced

from bilevel.algorithms import FSLA, SABA, SOBA, SRBA, Power

# name of the file there: ours, calls of a step, over the samples of a batch
PAIRS: dict[str, tuple[Callable[[Any, Any], Any], float]] = {
    "soba": (lambda rho, gamma: SOBA(rho, gamma, schedule=Power(0.5)), 4.0),
    "saba": (SABA, 4.0),
    "srba": (lambda rho, gamma: SRBA(rho, gamma, period=16), 12.0),
    "fsla": (FSLA, 7.0),
}
STEPS = {"soba": (1.0, 1.0), "saba": (0.3, 1.0), "srba": (1.0, 1.0), "fsla": (1.0, 1.0)}  # step, ratio: tuned there


def compare(workload: Workload, checkout: Path, names: list[str], passes: list[float]) -> Table:
    """A row for each solver and each side."""
    from peers import benchmark_bilevel

    rows = []
    for name in names:
        make, calls = PAIRS[name]
        step, ratio = STEPS[name]
        wanted = [round(count * workload.samples / (calls * workload.batch)) for count in passes]
        every = wanted[0]
        found, jax_ms = benchmark_bilevel.run(checkout, name, workload, step, ratio, wanted[-1], every)
        there = [workload.measure(_tensor(found[min(round(k / every), len(found)) - 1])) for k in wanted]
        rows.append(
            Row(f"{name}, JAX", [*(f"{v:.1e}" for v in there), f"{jax_ms:.3f}"], {"values": there, "cpu_ms": jax_ms})
        )
        here = traced(workload, Entry(name, make), [(step, step / ratio)], 0, passes)[0].values
        own_ms = cpu_ms(workload, make(step, step / ratio))
        rows.append(
            Row(f"{name}, bilevel", [*(f"{v:.1e}" for v in here), f"{own_ms:.3f}"], {"values": here, "cpu_ms": own_ms})
        )
    columns = ["", *(f"{count:g} passes" for count in passes), "CPU ms a step"]
    note = (
        "|grad Phi|^2, one order of the data each. Compiled scans of JAX against eager torch, one thread; compilation"
        " is not timed."
    )
    return Table(f"{workload.name}: benchmark_bilevel and bilevel", columns, rows, [note])


def _tensor(array: Any) -> Any:
    import torch

    return torch.from_numpy(array)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="of github.com/benchopt/benchmark_bilevel")
    parser.add_argument("--solvers", default=",".join(PAIRS), help=f"which of {','.join(PAIRS)}")
    parser.add_argument("--passes", default="10,30,100,300", help="budgets")
    parser.add_argument("--out", type=Path, help="write JSON and Markdown there")
    given = parser.parse_args()
    table = compare(q20(), given.checkout, given.solvers.split(","), [float(p) for p in given.passes.split(",")])
    command = "python benchmarks/stochastic_peers.py --checkout PATH --out benchmarks/results"
    text = f"`{command}`\n\n{markdown(table)}"
    print(text)
    if given.out is not None:
        record = {"command": command, "machine": machine(), "tables": [asdict(table)]}
        write(given.out / "stochastic_peers.json", json.dumps(record, indent=1) + "\n")
        write(given.out / "stochastic_peers.md", text)


if __name__ == "__main__":
    main()
