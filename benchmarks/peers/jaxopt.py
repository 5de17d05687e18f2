"""jaxopt: `custom_root` with `linear_solve.solve_cg`, and `GradientDescent(implicit_diff=False)`, both compiled.

Settings: `tol=0` by default, so that CG takes all the steps. Compilation is not timed. Compiled code is not bound by
the floor of eager autograd.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jaxopt
import torch
from _harness import Call, UnavailableError
from _workloads import Workload
from torch import Tensor


def _arrays(workload: Workload) -> tuple[dict[str, Any], Any, tuple[Any, ...]]:
    arrays = {key: jnp.asarray(a.numpy()) for key, a in workload.arrays.items()}
    return arrays, jnp.asarray(workload.x.numpy()), tuple(jnp.asarray(y.numpy()) for y in workload.ys)


def _result(value: Any) -> Tensor:
    return torch.from_numpy(jax.device_get(value).copy())


def implicit(workload: Workload, method: str, products: int, tolerance: float = 0.0) -> Call:
    """CG at the given inner solution."""
    if method != "cg":
        raise UnavailableError("skipped: no Neumann series")
    arrays, x, ys = _arrays(workload)
    solve = functools.partial(jaxopt.linear_solve.solve_cg, maxiter=products, tol=tolerance)

    @jax.jit
    def gradient(x: Any, ys: Any, arrays: Any) -> Any:
        optimality = jax.grad(lambda ys, x, arrays: workload.inner_jax(arrays, x, ys))
        solution = jaxopt.implicit_diff.custom_root(optimality, solve=solve)(lambda init, *_: init)
        return jax.grad(lambda x: workload.outer_jax(arrays, x, solution(ys, x, arrays)))(x)

    return lambda: _result(gradient(x, ys, arrays).block_until_ready())


def unrolled(workload: Workload, steps: int) -> dict[str, Call]:
    """Through all the steps of gradient descent, as one compiled scan."""
    arrays, x, ys = _arrays(workload)
    descent = jaxopt.GradientDescent(
        lambda ys, x, arrays: workload.inner_jax(arrays, x, ys),
        maxiter=steps,
        tol=0.0,
        stepsize=workload.step,
        acceleration=False,
        implicit_diff=False,
        jit=True,
        unroll=True,
    )

    @jax.jit
    def gradient(x: Any, ys: Any, arrays: Any) -> Any:
        return jax.grad(lambda x: workload.outer_jax(arrays, x, descent.run(ys, x, arrays).params))(x)

    return {"GradientDescent": lambda: _result(gradient(x, ys, arrays).block_until_ready())}
