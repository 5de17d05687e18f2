"""Solve the literature's test problems from seeded starts, and write a table that names every miss.

    python benchmarks/literature.py                          # all 109, one process
    python benchmarks/literature.py --kinds lp simple        # some classes
    python benchmarks/literature.py --table FILE...          # the tables of finished runs, as markdown

A problem is solved where |f - f*| <= 1e-4 max(1, |f*|), or f is smaller, and the point is sound: outer and inner
constraints hold to 1e-6, and no y that an independent search finds is better for g by 1e-6 max(1, |g|).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from bilevel.problems import literature
from bilevel.problems.literature.inner import Inner
from bilevel.problems.literature.programs import Model

torch.set_num_threads(1)
CHECKED_WITH = 12345  # the seed of the points from which the inner problem is solved again


def one(name: str, seed: int, starts: int) -> dict[str, Any]:
    """What a run of `literature.solve` found, and how good that is."""
    before = time.process_time()
    solution = literature.solve(name, seed=seed, starts=starts)
    seconds = time.process_time() - before
    said, instance = literature.statement(name), literature.load(name)
    assert instance.metrics is not None
    metrics = instance.metrics(solution.x, solution.y)
    x, y = (torch.as_tensor(each).numpy() for each in (solution.x, solution.y))
    lowest = Inner(Model(said), CHECKED_WITH).lowest(x, y)
    inner_gap = float("inf") if lowest is None else metrics["inner value"] - lowest[0]
    gap = metrics["gap to the best known"]
    violation = max(metrics["violation of outer constraints"], metrics["violation of inner constraints"])
    sound = violation <= 1e-6 and inner_gap <= 1e-6 * max(1.0, abs(metrics["inner value"]))
    return {
        "name": name,
        "class": said.kind,
        "found": solution.value,
        "best": said.best.f,
        "gap": gap,
        "inner gap": inner_gap,
        "violation": violation,
        "solved": bool(solution.history and sound and gap <= 1e-4),
        "points": len(solution.history),
        "seconds": seconds,
        "starts": starts,
        "seed": seed,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """By class what was solved, and the misses by name."""
    lines = ["| class | problems | solved | seconds of all | missed |", "|---|---|---|---|---|"]
    for kind in literature.KINDS:
        each = [row for row in rows if row["class"] == kind]
        if each:
            missed = "; ".join(
                f"{row['name']} (f = {row['found']:.6g}, best known {row['best']:.6g})"
                for row in each
                if not row["solved"]
            )
            solved = sum(row["solved"] for row in each)
            lines.append(
                f"| `{kind}` | {len(each)} | {solved} | {sum(row['seconds'] for row in each):.0f} | {missed} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", default=list(literature.KINDS), choices=literature.KINDS)
    parser.add_argument("--names", nargs="*")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--starts", type=int, default=12)
    parser.add_argument("--out", type=Path, help="a file with a JSON line for each problem, which is added to")
    parser.add_argument("--table", nargs="*", type=Path, help="read such files, and print the table")
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(line) for file in options.table for line in file.read_text().splitlines()]))
        return
    rows = []
    for name in options.names or [name for kind in options.kinds for name in literature.names(kind)]:
        row = one(name, options.seed, options.starts)
        rows.append(row)
        print(
            f"{'solved' if row['solved'] else 'MISSED'}  {row['class']:<21} {name:<31} f {row['found']:.8g} "
            f" best {row['best']:.8g}  inner gap {row['inner gap']:.1e}  violation {row['violation']:.1e} "
            f" {row['seconds']:.1f} s",
            flush=True,
        )
        if options.out is not None:
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
