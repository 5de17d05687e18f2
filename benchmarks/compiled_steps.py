"""What a step of `minimize(compile=True)` costs: CPU time, one thread.

    python benchmarks/compiled_steps.py --before PATH --jax PYTHON --out benchmarks/results

A step (inner steps, linear solve, cross product, outer update, and a record of it) of three small problems: by this
code, eager and compiled; by another checkout of the library, whose eager step is what a compiled one is compared with
(`git worktree add PATH REVISION`); and by jit-compiled JAX, the same algorithm in one function, one number read a step,
in a Python of its own. Each candidate is a process a round, in turn; a number is the difference of a long run and a
short one over the steps between them, so that starts and compiling do not count, and of all rounds the median. The
time to compile is that of a first run with an empty cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

PROBLEMS = {
    "tiny": "5 variables, logistic: AID, 10 inner steps, CG(5)",
    "unrolled": "5 variables, logistic: ITD, 10 inner steps",
    "batches": "20 variables, logistic, another 64 samples a step: AID, 5 inner steps, CG(5), Adam",
}
INNER = {"tiny": 10, "unrolled": 10, "batches": 5}
PRODUCTS = 5


def worker_of_ours(name: str, compiled: bool) -> None:
    """Print microseconds of CPU a step, and seconds that the first run took."""
    import torch
    from torch.nn.functional import softplus

    from bilevel import AID, ITD, BilevelProblem, minimize
    from bilevel.solvers import CG, Adam, GradientDescent, Iterate

    torch.set_num_threads(1)
    n, d = (64, 20) if name == "batches" else (40, 5)
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(16, n, d, generator=generator, dtype=torch.float64)
    t = torch.randn(16, n, generator=generator, dtype=torch.float64).sign()
    x0, y0 = torch.full((d,), -1.0, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    given: dict[str, Any] = {"compile": True} if compiled else {}
    inner = Iterate(GradientDescent(0.5), max_steps=INNER[name])
    given["estimator"] = ITD(inner) if name == "unrolled" else AID(inner, CG(rtol=0.0, max_steps=PRODUCTS))
    given["outer"] = Adam(0.01) if name == "batches" else GradientDescent(0.1)
    if name == "batches":
        problem = BilevelProblem(
            lambda _, y, b: softplus(-b["t"] * (b["X"] @ y)).mean(),
            lambda x, y, b: softplus(-b["t"] * (b["X"] @ y)).mean() + (x.exp() * y.square()).sum() / 2,
        )
        given["data"] = lambda k: {"X": X[k % 16], "t": t[k % 16]}
    else:
        problem = BilevelProblem(
            lambda _, y: softplus(-t[0] * (X[0] @ y)).mean(),
            lambda x, y: softplus(-t[0] * (X[0] @ y)).mean() + (x.exp() * y.square()).sum() / 2,
        )

    def run(steps: int) -> Any:
        return minimize(problem, x0, y0, max_steps=steps, **given)

    begun = time.perf_counter()
    run(1)
    first = time.perf_counter() - begun
    found = per_step(run, (50, 2050) if compiled else (5, 105))
    value = run(200).value
    print(json.dumps({"us": found, "first": first, "value": value}))


def worker_of_jax(name: str) -> None:
    """The same algorithm as one jit-compiled step; the random numbers are those of torch, from a file."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    jax.config.update("jax_enable_x64", True)
    n, d = (64, 20) if name == "batches" else (40, 5)
    numbers = np.load(os.environ["COMPILED_STEPS_DATA"])
    X, t = (jnp.asarray(numbers[f"{part}{n}"]) for part in "Xt")

    def f(_: Any, y: Any, b: Any) -> Any:
        return jax.nn.softplus(-b[1] * (b[0] @ y)).mean()

    def g(x: Any, y: Any, b: Any) -> Any:
        return f(x, y, b) + (jnp.exp(x) * y * y).sum() / 2

    gy = jax.grad(g, 1)

    def inner(x: Any, b: Any) -> Any:
        y = jnp.zeros(d)
        return jax.lax.scan(lambda y, _: (y - 0.5 * gy(x, y, b), None), y, None, length=INNER[name])[0]

    def estimate(x: Any, b: Any) -> Any:
        if name == "unrolled":
            return jax.value_and_grad(lambda x: f(x, inner(x, b), b))(x)
        y = inner(x, b)
        value, (fx, fy) = jax.value_and_grad(f, (0, 1))(x, y, b)

        def step(carried: Any, _: Any) -> Any:
            v, r, p, rr = carried
            Ap = jax.jvp(lambda y: gy(x, y, b), (y,), (p,))[1]
            alpha = jnp.where(rr > 0, rr / (p @ Ap), 0.0)
            v, r = v + alpha * p, r - alpha * Ap
            new = r @ r
            return (v, r, r + jnp.where(rr > 0, new / rr, 0.0) * p, new), None

        v = jax.lax.scan(step, (jnp.zeros(d), fy, fy, fy @ fy), None, length=PRODUCTS)[0][0]
        return value, fx - jax.vjp(lambda x: gy(x, y, b), x)[1](v)[0]

    @jax.jit
    def one(x: Any, m: Any, s: Any, k: Any, b: Any) -> Any:
        value, h = estimate(x, b)
        if name != "batches":
            return x - 0.1 * h, m, s, k, jnp.stack([value, jnp.linalg.norm(h)])
        k = k + 1
        m, s = 0.9 * m + 0.1 * h, 0.999 * s + 0.001 * h * h
        x = x - 0.01 * (m / (1 - 0.9**k)) / (jnp.sqrt(s / (1 - 0.999**k)) + 1e-8)
        return x, m, s, k, jnp.stack([value, jnp.linalg.norm(h)])

    def run(steps: int) -> float:
        x, m, s, k = jnp.full(d, -1.0), jnp.zeros(d), jnp.zeros(d), jnp.zeros(())
        row = [0.0]
        for step in range(steps + 1):
            i = step % 16 if name == "batches" else 0
            x, m, s, k, row = one(x, m, s, k, (batches[i]))
            row = np.asarray(row).tolist()
        return row[0]

    batches = [(X[i], t[i]) for i in range(16)]
    begun = time.perf_counter()
    run(1)
    first = time.perf_counter() - begun
    print(json.dumps({"us": per_step(run, (50, 2050)), "first": first, "value": run(200)}))


def per_step(run: Callable[[int], Any], lengths: tuple[int, int]) -> float:
    """Microseconds of CPU a step."""
    run(lengths[0])
    spent = []
    for length in lengths:
        begun = time.process_time()
        run(length)
        spent.append(time.process_time() - begun)
    return (spent[1] - spent[0]) / (lengths[1] - lengths[0]) * 1e6


def data_for_jax(path: Path) -> None:
    """The numbers that the other workers draw."""
    import numpy as np
    import torch

    found = {}
    for n, d in ((64, 20), (40, 5)):
        generator = torch.Generator().manual_seed(0)
        found[f"X{n}"] = torch.randn(16, n, d, generator=generator, dtype=torch.float64).numpy()
        found[f"t{n}"] = torch.randn(16, n, generator=generator, dtype=torch.float64).sign().numpy()
    np.savez(path, **found)


def main() -> None:
    """Run the workers in turn, and write the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--before", help="another checkout, whose eager step is the one to compare with")
    options.add_argument("--jax", help="a Python that has jax")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--out", type=Path, help="the folder of results")
    options.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.worker:
        kind, name = given.worker
        worker_of_jax(name) if kind == "jax" else worker_of_ours(name, kind == "compiled")
        return
    from _harness import Row, Table, machine, markdown, write

    with tempfile.TemporaryDirectory() as scratch:
        numbers = Path(scratch) / "numbers.npz"
        data_for_jax(numbers)
        root = Path(__file__).resolve().parent.parent
        base = {**os.environ, "COMPILED_STEPS_DATA": str(numbers), "BILEVEL_CACHE_DIR": scratch}
        base |= {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        base["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        base["TORCHINDUCTOR_CACHE_DIR"] = str(Path(scratch) / "inductor")
        candidates = {"eager": (sys.executable, root), "compiled": (sys.executable, root)}
        if given.before:
            candidates["before"] = (sys.executable, Path(given.before))
        if given.jax:
            candidates["jax"] = (given.jax, root)
        rows = []
        for name, about in PROBLEMS.items():
            found: dict[str, list[dict[str, float]]] = {each: [] for each in candidates}
            for _ in range(given.rounds):
                for each, (python, path) in candidates.items():
                    kind = "eager" if each == "before" else each
                    command = [python, __file__, "--worker", kind, name]
                    ran = subprocess.run(
                        command, env={**base, "PYTHONPATH": str(path)}, capture_output=True, text=True, check=True
                    )
                    found[each].append(json.loads(ran.stdout.splitlines()[-1]))
            us = {each: statistics.median(one["us"] for one in of) for each, of in found.items()}
            firsts = [one["first"] for one in found["compiled"]]
            values = [of[0]["value"] for of in found.values()]
            assert max(values) - min(values) <= 1e-9 * abs(values[0]), values
            cells = [f"{us[each]:.0f}" if each in us else "" for each in ("before", "eager", "compiled", "jax")]
            cells += [f"{us['before'] / us['compiled']:.0f}" if "before" in us else ""]
            cells += [f"{us['compiled'] / us['jax']:.2f}" if "jax" in us else ""]
            cells += [f"{firsts[0]:.1f}", f"{min(firsts[1:] or firsts):.1f}"]
            rows.append(Row(about, cells, {**us, "first": firsts[0], "again": min(firsts[1:] or firsts)}))
            print(about, cells, flush=True)
        columns = ["", "before, us", "eager, us", "compiled, us", "jit-JAX, us", "before / compiled"]
        columns += ["compiled / JAX", "first run, s", "in another process, s"]
        table = Table("A step of `minimize(compile=True)`, CPU microseconds", columns, rows)
        command = "python benchmarks/compiled_steps.py --before PATH --jax PYTHON --out benchmarks/results"
        text = f"`{command}`\n\n{markdown(table)}"
        print(text)
        if given.out is not None:
            record = {"command": command, "machine": machine(), "tables": [asdict(table)]}
            write(given.out / "compiled_steps.json", json.dumps(record, indent=1) + "\n")
            write(given.out / "compiled_steps.md", text)


if __name__ == "__main__":
    main()
