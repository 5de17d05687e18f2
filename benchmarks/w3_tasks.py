"""W3: a meta-gradient of MAML and of iMAML over 25 sinusoid tasks: all tasks in one batch, against loops over tasks."""

from __future__ import annotations

import statistics

import _threads  # noqa: F401
from _harness import Call, Options, Row, Table, against, candidates, interleave, options, relative_error, save
from _tasks import TaskLoad, by_hand, one_by_one, ours, sinusoids

COLUMNS = ["", "CPU ms", "x by hand", "x bilevel", "relative error", ""]
HAND, LOOP = "by hand, in one batch", "autograd, task by task"
OURS, COMPILED = "bilevel", "bilevel, compiled"


def compare(title: str, load: TaskLoad, method: str, chosen: Options) -> Table:
    """One meta-gradient, computed by everybody, against the same truncated algorithm in float64."""
    calls: dict[str, Call] = {HAND: by_hand(load), OURS: ours(load), LOOP: one_by_one(load)}
    calls[COMPILED] = ours(load, compiled=True)
    names = [name for name in chosen.peers if name in ("higher", "torchopt", "hypertorch")]
    built, refusals = candidates(chosen, lambda adapter: getattr(adapter, method)(load), names)
    calls |= built
    truth = one_by_one(load.double())()
    timings, failures = interleave(calls, chosen.rounds)
    rows = []
    for name, timing in timings.items():
        error = relative_error(calls[name](), truth)
        by_us, hand = against(timing, timings[OURS]), against(timing, timings[HAND])
        cpu = statistics.median(timing.cpu) * 1e3
        cells = [f"{cpu:.2f}", f"{hand:.2f}", f"{by_us:.2f}", f"{error:.1e}", ""]
        numbers = {
            "cpu_ms": [round(1e3 * t, 3) for t in timing.cpu],
            "x_hand": hand,
            "x_bilevel": by_us,
            "error": error,
        }
        rows.append(Row(f"**{name}**" if name == OURS else name, cells, numbers))
    rows += [Row(name, ["", "", "", "", why]) for name, why in (failures | refusals).items()]
    return Table(title, COLUMNS, rows, ["Errors are against the same truncated algorithm in float64."])


def main() -> None:
    chosen = options(__doc__ or "", rounds=15)
    tasks = 5 if chosen.quick else 25
    tables = [
        compare(f"MAML, {steps} inner steps, {tasks} tasks", sinusoids(tasks, steps), "maml", chosen)
        for steps in ((1,) if chosen.quick else (1, 5, 16))
    ]
    load = sinusoids(tasks, 2 if chosen.quick else 16, weight=20.0)
    tables.append(
        compare(f"iMAML, {load.steps} inner steps, CG({load.products}), {tasks} tasks", load, "imaml", chosen)
    )
    save("w3_tasks", "W3. Meta-gradients over tasks", tables, chosen)


if __name__ == "__main__":
    main()
