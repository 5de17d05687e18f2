"""How far `algorithm="auto"` comes on Q20 with no step given: the calls of its sweep and of its looks are counted."""

from __future__ import annotations

import torch
from _stochastic import q20

from bilevel import minimize


def main(steps: int = 1600) -> None:
    """Three orders of the data."""
    torch.set_num_threads(1)
    w = q20()
    print("| sum | order | note | passes | \\|grad Phi\\|^2 |\n|---|---|---|---|---|")
    for seed in range(3):
        found = minimize(w.problem, w.x0, w.y0, algorithm="auto", data=w.data(seed), max_steps=steps)
        note = found.estimate.note.partition(":")[0]
        passes = found.stats.sample_calls / w.samples
        print(f"| {w.name} | {seed} | {note} | {passes:.0f} | {w.measure(found.x):.1e} |")


if __name__ == "__main__":
    main()
