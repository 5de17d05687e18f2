"""BOAT: `Problem.run_iter` with the operators NGD and CG, NS or RAD.

Settings: tolerance 0 by default; one inner step (at least one is required) for CG and NS, with the workload's step as
its learning rate, which their fixed-point map uses as well, so that it differentiates at a y one step on. The time
contains that step and two loss evaluations. Its loss history, which it writes to disk again at each call, is emptied
after each.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from _harness import Call
from _workloads import Workload
from boat_torch.boat_opt import Problem
from torch import Tensor


class _Leaves(torch.nn.Module):
    def __init__(self, leaves: tuple[Tensor, ...]) -> None:
        torch.nn.Module.__init__(self)
        self.leaves = torch.nn.ParameterList([torch.nn.Parameter(leaf.clone()) for leaf in leaves])


def inner_loss(feed: Any, outer_model: Any, inner_model: Any, params: Any = None) -> Tensor:
    """The inner loss, which BOAT finds by its import string."""
    params = tuple(inner_model.parameters()) if params is None else tuple(params)
    return feed["workload"].g(next(iter(outer_model.parameters())), params)


def outer_loss(feed: Any, outer_model: Any, inner_model: Any, params: Any = None) -> Tensor:
    """The outer loss."""
    params = tuple(inner_model.parameters()) if params is None else tuple(params)
    return feed["workload"].f(next(iter(outer_model.parameters())), params)


def _problem(workload: Workload, operator: str, inner_steps: int, products: int, tolerance: float = 0.0) -> Call:
    inner, outer = _Leaves(workload.ys), _Leaves((workload.x,))
    log = Path(tempfile.mkdtemp()) / "losses.json"
    config = {
        "fo_op": None,
        "gm_op": ["NGD"],
        "na_op": [operator],
        "lower_level_model": inner,
        "upper_level_model": outer,
        "lower_level_var": list(inner.parameters()),
        "upper_level_var": list(outer.parameters()),
        "lower_level_opt": torch.optim.SGD(inner.parameters(), lr=workload.step),
        "upper_level_opt": torch.optim.SGD(outer.parameters(), lr=0.0),
        "lower_iters": inner_steps,
        "device": "cpu",
        "GDA": {"alpha_init": 0.0, "alpha_decay": 0.0},
        "RGT": {"truncate_iter": 0},
        "CG": {"tolerance": tolerance, "k": products},
        "FD": {"r": 1e-2},
        "copy_last_param": False,
        "return_grad": True,
        "accumulate_grad": False,
        "fo_ol_batch_input": False,
        "loss_log_path": str(log),
    }
    losses = {
        "lower_level_loss": {"function": "peers.boat.inner_loss", "params": {}},
        "upper_level_loss": {"function": "peers.boat.outer_loss", "params": {}},
    }
    problem = Problem(config, losses)
    problem.build_ll_solver()
    problem.build_ul_solver()
    feed = {"workload": workload}

    def call() -> Tensor:
        outer.leaves[0].grad = None
        gradients, _ = problem.run_iter(feed, feed, 0)
        problem.loss_history.clear()
        problem._log_results.clear()
        return gradients[0].clone()

    return call


def implicit(workload: Workload, method: str, products: int, tolerance: float = 0.0) -> Call:
    """CG or Neumann, after one inner step."""
    return _problem(workload, "CG" if method == "cg" else "NS", 1, products, tolerance)


def unrolled(workload: Workload, steps: int) -> dict[str, Call]:
    """Through all the steps of gradient descent."""
    return {"RAD": _problem(workload, "RAD", steps, 0)}
