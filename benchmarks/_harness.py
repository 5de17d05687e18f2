"""Interleaved timing, the floor, the reference, our own call, and tables as Markdown and JSON."""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import _threads  # noqa: F401
import torch
from _workloads import Workload
from torch import Tensor

from bilevel import AID, BilevelProblem, Estimate, hypergradient
from bilevel.solvers.cg import CG
from bilevel.solvers.closed_form import ClosedForm
from bilevel.solvers.neumann import Neumann

PEERS = ("hypertorch", "torchopt", "betty", "boat", "higher", "jaxopt")
FLOOR, OURS = "floor", "bilevel"
Call = Callable[[], Tensor]


class UnavailableError(Exception):
    """Why a peer takes no part: it is not installed, or has no such method."""


# Timing


@dataclass(frozen=True)
class Timing:
    """CPU seconds and wall seconds of every round, in order."""

    cpu: list[float]
    wall: list[float]


def interleave(calls: dict[str, Call], rounds: int, least: float = 0.02) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times each call once a round, in an order that rotates; and why some calls failed.

    A call shorter than `least` seconds is repeated within its round. Garbage is collected between, not during.
    """
    failures: dict[str, str] = {}
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        try:
            call()
            start = time.perf_counter()
            call()
            repeats[name] = min(50, max(1, round(least / max(time.perf_counter() - start, 1e-9))))
        except Exception as error:  # a peer's failure is a row of the table
            failures[name] = f"failed: {type(error).__name__}: {error}"[:160]
    names = list(repeats)
    timings = {name: Timing([], []) for name in names}
    for index in range(rounds):
        shift = index % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            call, count = calls[name], repeats[name]
            gc.collect()
            gc.disable()
            try:
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(count):
                    call()
                timings[name].cpu.append((time.process_time() - cpu) / count)
                timings[name].wall.append((time.perf_counter() - wall) / count)
            finally:
                gc.enable()
    return timings, failures


def against(timing: Timing, floor: Timing) -> float:
    """The median over rounds of the ratio of CPU times."""
    return statistics.median(a / b for a, b in zip(timing.cpu, floor.cpu, strict=True))


# What is timed


def floor(workload: Workload, products: int) -> Call:
    """The least that eager autograd can do: the oracle calls alone, on one flat leaf, without a linear solver."""

    def call() -> Tensor:
        x, y = workload.x.detach().requires_grad_(), workload.flat.requires_grad_()
        (fy,) = torch.autograd.grad(workload.f(x, workload.cut(y)), y)
        (gy,) = torch.autograd.grad(workload.g(x, workload.cut(y)), y, create_graph=True)
        for _ in range(products):
            torch.autograd.grad(gy, y, fy, retain_graph=True)
        return torch.autograd.grad(gy, x, fy)[0]

    return call


def linear_solver(method: str, products: int, workload: Workload, recompute: bool = True) -> Any:
    """Our solver that takes exactly so many products, and one more for the true residual where it is recomputed."""
    if method == "cg":
        return CG(rtol=0.0, max_steps=products, recompute=recompute)
    return Neumann(step=workload.step, terms=products + 1)


def estimate(workload: Workload, method: str, products: int, recompute: bool = True) -> Callable[[], Estimate]:
    """`bilevel.hypergradient` at the given inner solution, by its public interface."""
    problem = BilevelProblem(workload.f, workload.g)
    inner = ClosedForm(lambda _: workload.ys)
    estimator = AID(inner=inner, linear=linear_solver(method, products, workload, recompute))
    return lambda: hypergradient(problem, workload.x, workload.ys, estimator=estimator, throw=False)


def ours(workload: Workload, method: str, products: int, recompute: bool = True) -> Call:
    """What is timed: the whole call."""
    call = estimate(workload, method, products, recompute)
    return lambda: call().grad


@dataclass(frozen=True)
class Reference:
    """A hypergradient in float64, and the steps at which p'Hp was not positive."""

    grad: Tensor
    concave: list[int]


def reference(workload: Workload, method: str, products: int) -> Reference:
    """The same truncated algorithm in float64, written out."""
    wide = workload.double()
    x, y = wide.x.requires_grad_(), wide.flat.requires_grad_()
    fx, b = torch.autograd.grad(wide.f(x, wide.cut(y)), (x, y), allow_unused=True, materialize_grads=True)
    (gy,) = torch.autograd.grad(wide.g(x, wide.cut(y)), y, create_graph=True)

    def hessian(v: Tensor) -> Tensor:
        return torch.autograd.grad(gy, y, v, retain_graph=True)[0]

    concave: list[int] = []
    if method == "cg":
        v, r, p = torch.zeros_like(b), b.clone(), b.clone()
        rr = float(r @ r)
        for k in range(products):
            Hp = hessian(p)
            pHp = float(p @ Hp)
            if pHp <= 0:
                concave.append(k)
            v, r = v + rr / pHp * p, r - rr / pHp * Hp
            rr, before = float(r @ r), rr
            p = r + rr / before * p
    else:
        term = v = b
        for _ in range(products):
            term = term - wide.step * hessian(term)
            v = v + term
        v = wide.step * v
    return Reference(fx - torch.autograd.grad(gy, x, v)[0], concave)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """|found - truth| / |truth|."""
    return float(torch.linalg.vector_norm(found.double() - truth) / torch.linalg.vector_norm(truth))


# Tables


@dataclass(frozen=True)
class Row:
    """One line: a candidate with its numbers, or with the reason why it has none."""

    name: str
    cells: list[str]
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A result: what was compared, by which command, on which machine."""

    title: str
    columns: list[str]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


def machine() -> dict[str, str | int]:
    """The processor and the versions; no names, no dates."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        processor = found.group(1).strip() if found else processor
    return {
        "processor": processor,
        "cores": os.cpu_count() or 1,
        "threads used": 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def markdown(table: Table) -> str:
    """A table with its notes."""
    lines = [f"**{table.title}**", "", "| " + " | ".join(table.columns) + " |"]
    lines.append("|" + "|".join(["---"] + ["---:"] * (len(table.columns) - 1)) + "|")
    for row in table.rows:
        cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in (row.name, *row.cells)]
        lines.append("| " + " | ".join(cells + [""] * (len(table.columns) - len(cells))) + " |")
    lines += [""] + [f"{note}\n" for note in table.notes]
    return "\n".join(lines).rstrip() + "\n"


def write(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save(name: str, heading: str, tables: list[Table], options: Options) -> None:
    """Print the tables; write `name.md` and `name.json` where `--out` says."""
    command = f"python benchmarks/{name}.py" + (" --quick" if options.quick else f" --rounds {options.rounds}")
    command += " --hypertorch PATH" if options.hypertorch else ""
    text = f"### {heading}\n\n`{command}`\n\n" + "\n".join(markdown(table) for table in tables)
    print(text)
    if options.out is not None:
        record = {"command": command, "machine": machine(), "tables": [asdict(table) for table in tables]}
        write(options.out / f"{name}.md", text)
        write(options.out / f"{name}.json", json.dumps(record, indent=1) + "\n")


# Command lines


@dataclass(frozen=True)
class Options:
    """What every benchmark takes from its command line."""

    rounds: int
    quick: bool
    out: Path | None
    hypertorch: Path | None
    peers: tuple[str, ...]


def options(description: str, rounds: int, arguments: list[str] | None = None) -> Options:
    """Parse a command line; `rounds` is the default number of rounds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"how often each candidate runs ({rounds})")
    parser.add_argument("--quick", action="store_true", help="small sizes and two rounds: does it run?")
    parser.add_argument("--out", type=Path, help="write the tables there as Markdown and JSON")
    parser.add_argument("--hypertorch", type=Path, help="a checkout of github.com/prolearner/hypertorch")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"which of {','.join(PEERS)} ('' for none)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chosen = tuple(name for name in given.peers.split(",") if name)
    for name in chosen:
        if name not in PEERS:
            parser.error(f"unknown peer {name!r}; there are {', '.join(PEERS)}")
    return Options(2 if given.quick else given.rounds, given.quick, given.out, given.hypertorch, chosen)


def peer(name: str, options: Options) -> Any:
    """The adapter of a peer.

    Raises:
        UnavailableError: if the peer cannot be imported.
    """
    if name == "hypertorch":
        if options.hypertorch is None:
            raise UnavailableError("skipped: pass --hypertorch PATH")
        sys.path.insert(0, str(options.hypertorch.resolve()))
    try:
        return importlib.import_module(f"peers.{name}")
    except ImportError as error:
        raise UnavailableError(f"skipped: not installed ({error})") from error


def candidates(
    options: Options, build: Callable[[Any], dict[str, Call]], names: Iterable[str] | None = None
) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls that the peers' adapters build, and why some do not."""
    calls: dict[str, Call] = {}
    refusals: dict[str, str] = {}
    for name in options.peers if names is None else names:
        try:
            for label, call in build(peer(name, options)).items():
                calls[f"{name} {label}".strip()] = call
        except UnavailableError as reason:
            refusals[name] = str(reason)
        except Exception as error:  # a peer's failure is a row of the table
            refusals[name] = f"failed: {type(error).__name__}: {error}"[:160]
    return calls, refusals


# The comparison that most benchmarks make


COLUMNS = ["", "CPU ms", "x floor", "wall ms", "relative error", ""]


def compare_implicit(workload: Workload, method: str, products: int, options: Options) -> Table:
    """The floor, ours and every peer on one workload, each against the float64 reference."""
    calls: dict[str, Call] = {FLOOR: floor(workload, products), OURS: ours(workload, method, products)}
    if method == "cg":  # as many products as the others take
        calls[f"{OURS}, recompute=False"] = ours(workload, method, products, recompute=False)
    built, refusals = candidates(
        options,
        lambda adapter: {"": adapter.implicit(workload, method, products)},
        [p for p in options.peers if p != "higher"],
    )
    calls |= built
    truth = reference(workload, method, products)
    timings, failures = interleave(calls, options.rounds)
    rows = [_timed(name, calls[name], timings, truth) for name in timings]
    rows += [Row(name, ["", "", "", "", why]) for name, why in (failures | refusals).items()]
    label = f"CG({products})" if method == "cg" else f"Neumann, {products} products"
    title = f"{workload.name}: {label}, {workload.size} inner and {workload.x.numel()} outer variables"
    return Table(title, COLUMNS, rows, _notes(workload, method, products, truth))


def _timed(name: str, call: Call, timings: dict[str, Timing], truth: Reference) -> Row:
    cpu, wall = (statistics.median(times) * 1e3 for times in (timings[name].cpu, timings[name].wall))
    ratio = against(timings[name], timings[FLOOR])
    error = None if name == FLOOR else relative_error(call(), truth.grad)
    remark = "" if error is None or error < 1e-2 else "not the reference's number"
    cpus, walls = ([round(1e3 * t, 3) for t in times] for times in (timings[name].cpu, timings[name].wall))
    numbers = {"cpu_ms": cpus, "wall_ms": walls, "ratio": ratio, "error": error}
    cells = [f"{cpu:.2f}", f"{ratio:.2f}", f"{wall:.2f}", "" if error is None else f"{error:.1e}", remark]
    return Row(f"**{name}**" if name == OURS else name, cells, numbers)


def _notes(workload: Workload, method: str, products: int, truth: Reference) -> list[str]:
    found = estimate(workload, method, products)()
    notes = []
    if found.stats.hvps != products + 1 or not found.status.ok:
        notes.append(
            f"bilevel took {found.stats.hvps - 1} of {products} products ({found.status.name}); its time is not that of"
            f" {products}."
        )
    if truth.concave:
        notes.append(
            f"Negative curvature in float64 at steps {truth.concave}: peers go on through it, and their numbers mean"
            " nothing."
        )
    return notes
