"""benchmark_bilevel: its JAX solvers as they are, from a checkout, on a quadratic sum of `_stochastic`.

Called by `stochastic_peers.py`: `Solver.get_instance(...)`, `set_objective(...)` and `run(callback)` of
`solvers/NAME.py`, whose compiled epochs of `every` steps are timed one by one, the first (compilation) left out. They
are given the same function as ours, of vectors and not of matrices. float64. Needs jax and benchopt.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _stochastic import Workload

jax.config.update("jax_enable_x64", True)


def _objective(arrays: tuple[Any, ...]) -> Any:
    held = tuple(map(jnp.asarray, arrays))

    def f(inner_var: Any, outer_var: Any, start: Any = 0, batch_size: int = 1) -> Any:
        u, w, c, e, a, b = (jax.lax.dynamic_slice(k, (start, 0), (batch_size, k.shape[1])) for k in held)
        y, x = inner_var, outer_var
        return jnp.mean((u @ y) ** 2 / 2 + (w @ x) ** 2 / 2 + (c @ x) * (e @ y) + a @ y + b @ x)

    return f


def run(
    checkout: Path, name: str, workload: Workload, step: float, ratio: float, steps: int, every: int, seed: int = 1
) -> tuple[list[np.ndarray], float]:
    """Outer variables after every `every` steps, and CPU milliseconds of a step.

    Args:
        checkout: of github.com/benchopt/benchmark_bilevel.
        name: of the file in its `solvers`.
        workload: a quadratic sum.
        step: of the inner variable.
        ratio: that over the step of the outer one.
        steps: how many.
        every: how many in an epoch.
        seed: of its sampler.
    """
    root = str(checkout.resolve())
    if root not in sys.path:
        sys.path.insert(0, root)
    path = checkout.resolve() / "solvers" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_bilevel_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    solver = module.Solver.get_instance(
        step_size=step, outer_ratio=ratio, batch_size=workload.batch, eval_freq=every, random_state=seed
    )
    solver.set_objective(
        f_inner=_objective(tuple(t.numpy() for t in workload.g)),
        f_outer=_objective(tuple(t.numpy() for t in workload.f)),
        n_inner_samples=len(workload.g[0]),
        n_outer_samples=len(workload.f[0]),
        inner_var0=jnp.asarray(workload.y0.numpy()),
        outer_var0=jnp.asarray(workload.x0.numpy()),
    )
    seen: list[np.ndarray] = []
    times: list[float] = []

    def callback() -> bool:
        if times:  # after an epoch
            seen.append(np.array(solver.outer_var))  # waits for it
        times.append(time.process_time())
        return len(seen) * every < steps

    solver.run(callback)
    epochs = sorted(b - a for a, b in itertools.pairwise(times[1:]))
    return seen, epochs[len(epochs) // 2] / every * 1e3 if epochs else float("nan")
