"""Total work: CPU seconds and passes over the data until |grad Phi| is 1e-3 and 1e-6 of what it was.

    python benchmarks/total_work.py --data PATH --out benchmarks/results --picture docs/images/total_work.png

PATH is a folder with a9a.npz and mnist10k.npz; without it there are data of the same size, and scikit-learn's digits.
Methods run in turn, in a rotating order; times are medians over the rounds, and every x is judged afterwards by an
exact gradient.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _threads  # noqa: F401
import numpy as np
import torch
from _harness import Row, Table, UnavailableError, machine, markdown, write
from _total_cases import Case, a9a, cleaning, ridge, sinusoids
from _total_methods import METHODS, Hand, OverTimeError, Trace, exact

LEVELS = (1e-3, 1e-6)


@dataclass(frozen=True)
class Judged:
    """A method on a case: when each x was there (median CPU seconds), how small grad Phi was, and calls until then."""

    seconds: list[float]
    errors: list[float]
    calls: list[tuple[int, int]]

    def at(self, level: float) -> int | None:
        """The first x that is good enough; None: there is none."""
        return next((k for k, error in enumerate(self.errors) if error <= level), None)


def run(case: Case, names: list[str], rounds: int, most: float) -> tuple[dict[str, Judged], dict[str, str]]:
    """All methods in turn."""
    for name in names:  # what is imported and compiled at the first call is no part of the work
        with contextlib.suppress(Exception):
            METHODS[name](ridge(quick=True), Trace(0.5))
    traces: dict[str, list[Trace]] = {}
    why: dict[str, str] = {}
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            if name in why:
                continue
            if index and traces[name][0].seconds[-1] >= most:
                continue  # one run that never arrives is enough
            gc.collect()
            trace = Trace(most)
            torch.manual_seed(0)
            try:
                METHODS[name](case, trace)
            except OverTimeError:
                pass
            except UnavailableError as error:
                why[name] = str(error)
                continue
            except Exception as error:  # a method's failure is a row of the table
                why[name] = f"failed: {type(error).__name__}: {error}"[:160]
                continue
            traces.setdefault(name, []).append(trace)
    return {name: judged(case, found) for name, found in traces.items()}, why


def judged(case: Case, traces: list[Trace]) -> Judged:
    """Errors of the first run, and the median times; runs are alike but for their times."""
    near, first = Hand(case), traces[0]
    initial = float(np.linalg.norm(exact(case, case.x0.numpy(), near)))
    count = min(len(trace.points) for trace in traces)
    stride = max(1, count // (150 if int(np.prod(case.y0.shape)) <= 3000 else 30))
    kept = sorted({*range(0, count, stride), count - 1})
    errors = [float(np.linalg.norm(exact(case, first.points[k], near))) / initial for k in kept]
    seconds = [statistics.median(trace.seconds[k] for trace in traces) for k in kept]
    return Judged(seconds, errors, [first.calls[k] for k in kept])


def table(case: Case, results: dict[str, Judged], why: dict[str, str]) -> Table:
    """A row a method: seconds, ratio to the loop by hand, gradients and products to each level."""
    columns = ["method"]
    for level in LEVELS:
        columns += [f"s to {level:g}", "x by hand", "gradients", "products"]
    columns.append("best")
    rows = []
    for name in METHODS:
        if name in why:
            rows.append(Row(name, [why[name]]))
        if name not in results:
            continue
        found, cells = results[name], []
        for level in LEVELS:
            k, reference = found.at(level), results.get("by hand")
            base = None if reference is None else reference.at(level)
            if k is None:
                cells += ["not reached", "", "", ""]
                continue
            ratio = "" if base is None or reference is None else f"{found.seconds[k] / reference.seconds[base]:.2f}"
            counts = [f"{n}" if n else "" for n in found.calls[k]]
            cells += [f"{found.seconds[k]:.3g}", ratio, *counts]
        rows.append(Row(name, [*cells, f"{min(found.errors):.1e}"]))
    return Table(case.name, columns, rows)


def draw(path: Path, cases: list[Case], results: list[dict[str, Judged]]) -> None:
    """Error against seconds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5))
    for axis, case, found in zip(axes.flat, cases, results, strict=False):
        for name, each in found.items():
            best = np.minimum.accumulate(each.errors)
            style = "-" if name.startswith("bilevel") else "--"
            axis.loglog(np.maximum(each.seconds, 1e-3), best, style, label=name, linewidth=1.4)
        axis.set_title(case.name, fontsize=9)
        axis.set_ylim(1e-7, 2)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("CPU seconds")
    for axis in axes[:, 0]:
        axis.set_ylabel("|grad Phi|, relative")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    """Run, print, write, draw."""
    parser = argparse.ArgumentParser(description="total work to a level of |grad Phi|")
    parser.add_argument("--data", type=Path, help="a folder with a9a.npz and mnist10k.npz")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=float, default=60.0, help="CPU seconds after which a run is ended (60)")
    parser.add_argument("--cases", default="a9a,digits,ridge,sinusoids", help="of these, and mnist (mnist10k)")
    parser.add_argument("--methods", default=None, help=f"comma-separated numbers of {', '.join(METHODS)}")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: does it run?")
    parser.add_argument("--out", type=Path, help="write the tables there as Markdown and JSON")
    parser.add_argument("--suffix", default="", help="of the names of these files")
    parser.add_argument("--picture", type=Path, help="draw errors against seconds there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    build: dict[str, Any] = {
        "a9a": lambda: a9a(given.data, given.quick),
        "digits": lambda: cleaning(None, given.quick),
        "mnist": lambda: cleaning(given.data, given.quick),
        "ridge": lambda: ridge(given.quick),
        "sinusoids": lambda: sinusoids(given.quick),
    }
    names = list(METHODS) if given.methods is None else [list(METHODS)[int(k)] for k in given.methods.split(",")]
    cases, results, tables = [], [], []
    for name in given.cases.split(","):
        case = build[name]()
        found, why = run(case, names, 1 if given.quick else given.rounds, 5.0 if given.quick else given.most)
        cases.append(case)
        results.append(found)
        tables.append(table(case, found, why))
        print(markdown(tables[-1]), flush=True)
    if given.out is not None:
        command = f"python benchmarks/total_work.py --rounds {given.rounds} --most {given.most:g} --cases {given.cases}"
        command += "" if given.data is None else " --data PATH"
        command += "" if given.methods is None else f" --methods {given.methods}"
        notes = f"### Total work\n\n`{command}`\n\n" + "\n".join(markdown(each) for each in tables)
        write(given.out / f"total_work{given.suffix}.md", notes)
        record = {"command": command, "machine": machine(), "tables": [asdict(each) for each in tables]}
        write(given.out / f"total_work{given.suffix}.json", json.dumps(record, indent=1) + "\n")
    if given.picture is not None:
        draw(given.picture, cases, results)


if __name__ == "__main__":
    main()
