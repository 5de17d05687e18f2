"""A recipe against the loop that one would write by hand: memory, time and agreement, both in the same run.

A pair holds two functions of a number of steps that build everything anew (loaders, module, states), take these steps
and return x. Time is CPU time of the whole call, the two in turn; the ratio is the median of those within a round.
Memory is by how much the process's resident size peaks above what it was before the call (Linux only), in a process of
its own for each side, after a call that loads what torch loads once; the median over processes.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import _threads  # noqa: F401
import torch
from _harness import Row, Table, against, interleave, machine, markdown, write
from torch import Tensor

from bilevel import ravel

HAND, OURS = "by hand", "bilevel"
LIMIT = 1.15
COLUMNS = ["", "CPU ms a step", "x by hand", "peak MB", "x by hand", "distance of x"]
Loop = Callable[[int], Any]


@dataclass(frozen=True, eq=False)
class Pair:
    """A recipe by `minimize` and the same by hand.

    Attributes:
        name: of the recipe.
        ours: steps -> x, by the library.
        hand: steps -> x, in eager torch.
        steps: how many are timed.
    """

    name: str
    ours: Loop
    hand: Loop
    steps: int = 20

    def side(self, name: str) -> Loop:
        return {HAND: self.hand, OURS: self.ours}[name]


def distance(pair: Pair, steps: int) -> float:
    """|x - x by hand| / |x by hand| after so many steps."""
    ours, hand = (flat(loop(steps)) for loop in (pair.ours, pair.hand))
    return float(torch.linalg.vector_norm(ours - hand) / torch.linalg.vector_norm(hand))


def flat(x: Any) -> Tensor:
    return ravel(x)[0].detach().double()


def peak(loop: Loop, steps: int) -> float:
    """Megabytes of resident size, at the peak of a call above those before it."""
    loop(2)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    loop(steps)
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def memory(script: Path, pair: Pair, side: str, processes: int) -> float:
    """The median over child processes."""
    command = [sys.executable, str(script), "--one", pair.name, "--side", side, "--steps", str(pair.steps)]
    found = []
    for _ in range(processes):
        child = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(float(json.loads(child.stdout.strip().splitlines()[-1])))
    return statistics.median(found)


def compared(script: Path, pair: Pair, rounds: int, processes: int) -> tuple[list[Row], bool]:
    """The two rows of a recipe, and whether both ratios are within the limit."""
    timings, failures = interleave({side: _called(pair, side) for side in (HAND, OURS)}, rounds)
    if failures:
        raise RuntimeError(f"{pair.name}: {failures}")
    peaks = {side: memory(script, pair, side, processes) for side in (HAND, OURS)}
    apart = distance(pair, pair.steps)
    rows, good = [], True
    for side in (HAND, OURS):
        ms = 1e3 * statistics.median(timings[side].cpu) / pair.steps
        time, space = against(timings[side], timings[HAND]), peaks[side] / peaks[HAND]
        good = good and max(time, space) <= LIMIT
        cells = [f"{ms:.2f}", f"{time:.3f}", f"{peaks[side]:.1f}", f"{space:.3f}"]
        numbers = {"cpu_ms": ms, "time": time, "peak_mb": peaks[side], "memory": space, "distance": apart}
        rows.append(Row(f"{pair.name}: {side}", [*cells, f"{apart:.1e}" if side == OURS else ""], numbers))
    return rows, good


def _called(pair: Pair, side: str) -> Callable[[], Tensor]:
    return lambda: flat(pair.side(side)(pair.steps))


def main(script: str, description: str, pairs: Sequence[Pair]) -> int:
    """The command line that benchmarks of recipes share; the exit code is 1 where a limit is passed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processes", type=int, default=3, help="in which memory is measured, a side")
    parser.add_argument("--only", default="", help="names of recipes, separated by commas; default: all")
    parser.add_argument("--steps", type=int, help="of every recipe; default: its own")
    parser.add_argument("--out", type=Path, help="write JSON and Markdown there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    known = {pair.name: replace(pair, steps=given.steps or pair.steps) for pair in pairs}
    if given.one:
        print(json.dumps(peak(known[given.one].side(given.side), known[given.one].steps)))
        return 0
    rows, good = [], True
    for pair in known.values() if not given.only else [known[name.strip()] for name in given.only.split(",")]:
        found, within = compared(Path(script), pair, given.rounds, given.processes)
        print(f"{found[-1].name}: {json.dumps(found[-1].numbers)}", file=sys.stderr, flush=True)  # a run takes minutes
        rows, good = [*rows, *found], good and within
    table = Table("Recipes against loops by hand", COLUMNS, rows, [f"The limit of both ratios is {LIMIT}."])
    name = Path(script).stem
    command = f"python benchmarks/{name}.py --rounds {given.rounds} --processes {given.processes}"
    command += f" --only {given.only!r}" if given.only else ""
    command += f" --steps {given.steps}" if given.steps else ""
    text = f"`{command}`\n\n{markdown(table)}"
    print(text)
    if given.out is not None:
        record = {"command": command, "machine": machine(), "tables": [asdict(table)]}
        write(given.out / f"{name}.json", json.dumps(record, indent=1) + "\n")
        write(given.out / f"{name}.md", text)
    return 0 if good else 1
