"""Data hyper-cleaning on 10,000 digits: from mini-batches, and with all the data, test accuracy against CPU seconds.

    python benchmarks/stochastic_cleaning.py --data PATH --out benchmarks/results

`PATH` is a folder with mnist10k.npz (`images`, `labels`): 4,000 training samples, 40 % of them with wrong labels, each
with a weight; 2,000 for validation, 4,000 for testing; a linear softmax model, float32. Steps were tuned by hand, for
both sides alike: a factor of 3 either way is no better. The time of a run is that to the first point at which the
accuracy on the test samples is that of the full-batch run at its end; measuring it is not in the time.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _harness import Row, Table, machine, markdown, write

from bilevel import Estimate, FiniteSum, Split, minimize
from bilevel.algorithms import MASOBA, SABA, SOBA, SRBA
from bilevel.problems import Instance, hyper_cleaning_batches
from bilevel.solvers.adam import Adam

OUTER = 0.3  # the step of Adam in x, with all the data
RHO, OUTER_BATCH, GAMMA = 0.05, 0.01, 300.0  # that of y; of Adam in x and of x itself, from mini-batches
NAMES = ("full batch", "SOBA, Adam", "MA-SOBA, Adam", "SABA", "SRBA")


@dataclass(frozen=True)
class Curve:
    """(CPU seconds, test accuracy, AUC) along a run."""

    name: str
    points: list[tuple[float, float, float]]

    def first(self, accuracy: float) -> float | None:
        """CPU seconds to an accuracy."""
        return next((seconds for seconds, found, _ in self.points if found >= accuracy), None)


def followed(name: str, instance: Instance, run: Callable[[Any], object]) -> Curve:
    """The curve of a run that calls what it is given back with its records; the time of measuring is left out."""
    points: list[tuple[float, float, float]] = []
    spent = 0.0
    start = time.process_time()
    assert instance.metrics is not None

    def callback(_: object, estimate: Estimate) -> None:
        nonlocal spent
        begin = time.process_time()
        found = instance.metrics(estimate.x, estimate.y)  # type: ignore[misc]
        points.append((begin - start - spent, found["test_accuracy_learned"], found["auc"]))
        spent += time.process_time() - begin

    run(callback)
    return Curve(name, points)


def curves(
    path: Path | tuple[Any, Any],
    n_train: int = 4000,
    n_val: int = 2000,
    batch: int = 100,
    steps: int = 2000,
    full_steps: int = 30,
    every: int = 100,
    names: Sequence[str] | None = None,
) -> list[Curve]:
    """The full-batch run, then those from mini-batches."""
    instance, samples = hyper_cleaning_batches(n_train=n_train, n_val=n_val, data=path, double=False)
    problem, x0, y0 = instance.problem, instance.x0, instance.y0

    def full(callback: Any) -> object:
        return minimize(
            problem,
            x0,
            y0,
            data=samples,
            estimator="aid-cg",
            outer=Adam(OUTER),
            max_steps=full_steps,
            callback=callback,
            throw=False,
        )

    def on_batches(algorithm: Any) -> Callable[[Any], object]:
        def run(callback: Any) -> object:
            data = Split(f=FiniteSum(samples.f, batch), g=FiniteSum(samples.g, batch))
            return minimize(
                problem,
                x0,
                y0,
                algorithm=algorithm,
                data=data,
                max_steps=steps,
                evaluate_every=every,
                callback=callback,
                throw=False,
            )

        return run

    runs: dict[str, Callable[[Any], object]] = {
        "full batch": full,
        "SOBA, Adam": on_batches(SOBA(RHO, Adam(OUTER_BATCH), RHO)),
        "MA-SOBA, Adam": on_batches(MASOBA(RHO, Adam(OUTER_BATCH), RHO)),
        "SABA": on_batches(SABA(RHO, GAMMA)),
        "SRBA": on_batches(SRBA(RHO, GAMMA)),
    }
    chosen = {name: run for name, run in runs.items() if names is None or name in names}
    tiny, few = hyper_cleaning_batches(n_train=20, n_val=20, data=_random(), double=False)
    minimize(tiny.problem, tiny.x0, tiny.y0, data=few, estimator="aid-cg", max_steps=1, throw=False)  # imports
    sums = Split(f=FiniteSum(few.f, 5), g=FiniteSum(few.g, 5))
    minimize(tiny.problem, tiny.x0, tiny.y0, data=sums, algorithm=SABA(0.01, 0.01), max_steps=1, throw=False)
    return [followed(name, instance, run) for name, run in chosen.items()]


def _random() -> tuple[Any, Any]:
    return torch.randn(60, 3, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3


def table(found: list[Curve]) -> Table:
    """When each has the accuracy with which the first one ends."""
    full = found[0]
    aim = full.points[-1][1]
    own = full.first(aim)
    assert own is not None
    rows = []
    for curve in found:
        seconds, ends = curve.first(aim), curve.points[-1]
        cells = ["never" if seconds is None else f"{seconds:.1f}", "" if seconds is None else f"{seconds / own:.2f}"]
        cells += [f"{max(accuracy for _, accuracy, _ in curve.points):.4f}", f"{ends[1]:.4f}", f"{ends[0]:.1f}"]
        rows.append(Row(curve.name, cells, asdict(curve)))
    columns = ["", f"CPU s to {aim:.4f}", "x full batch", "best accuracy", "at its end", "CPU s in all"]
    note = "Accuracy on 4,000 test samples with clean labels; one thread, float32, imports left out."
    return Table("mnist10k, 40 % of 4,000 training labels wrong", columns, rows, [note])


def draw(found: list[Curve], path: Path) -> None:
    """Test accuracy against CPU seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    for curve in found:
        axis.plot([s for s, _, _ in curve.points], [a for _, a, _ in curve.points], label=curve.name, linewidth=1.3)
    axis.axhline(found[0].points[-1][1], color="0.6", linestyle=":", linewidth=1)
    axis.set(xscale="log", xlabel="CPU seconds, one thread", ylabel="test accuracy", ylim=(0.75, 0.92))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("BILEVEL_DATA", ".")), help="a folder ($BILEVEL_DATA)"
    )
    parser.add_argument("--algorithms", default=";".join(NAMES), help="which, the full-batch run first")
    parser.add_argument("--out", type=Path, help="write JSON and Markdown there")
    parser.add_argument("--draw", action="store_true", help="and a picture into docs/images")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = curves(given.data / "mnist10k.npz", names=given.algorithms.split(";"))
    shown = table(found)
    command = "python benchmarks/stochastic_cleaning.py --data PATH --out benchmarks/results --draw"
    text = f"`{command}`\n\n{markdown(shown)}"
    print(text)
    if given.draw:
        draw(found, Path(__file__).parent.parent / "docs" / "images" / "stochastic_cleaning.png")
    if given.out is not None:
        record = {"command": command, "machine": machine(), "tables": [asdict(shown)]}
        write(given.out / "stochastic_cleaning.json", json.dumps(record, indent=1) + "\n")
        write(given.out / "stochastic_cleaning.md", text)


if __name__ == "__main__":
    main()
