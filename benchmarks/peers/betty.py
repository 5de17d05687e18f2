"""betty: `Engine.train_step` with `Config(type="cg" | "neumann")`.

Settings: one inner step an outer step, with both learning rates zero, so that nothing moves; the hypergradient is taken
by the documented `grad_callback`. The time contains the inner step, since there is no call for the hypergradient alone.
"""

from __future__ import annotations

import logging

import torch
from _harness import Call, UnavailableError
from _workloads import Workload
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.logging.logger_base import get_logger
from betty.problems import ImplicitProblem
from torch import Tensor


class _Leaves(torch.nn.Module):
    def __init__(self, leaves: tuple[Tensor, ...]) -> None:
        torch.nn.Module.__init__(self)
        self.leaves = torch.nn.ParameterList([torch.nn.Parameter(leaf.clone()) for leaf in leaves])


def implicit(workload: Workload, method: str, products: int, tolerance: float = 0.0) -> Call:  # noqa: ARG001
    """CG or Neumann, after an inner step of length zero; neither has a tolerance."""
    get_logger().setLevel(logging.WARNING)
    found: list[Tensor] = []

    class Inner(ImplicitProblem):
        def get_batch(self) -> tuple[()]:
            return ()

        def training_step(self, batch: object) -> Tensor:
            return workload.g(self.outer.module.leaves[0], tuple(self.module.leaves))

    class Outer(ImplicitProblem):
        def get_batch(self) -> tuple[()]:
            return ()

        def training_step(self, batch: object) -> Tensor:
            return workload.f(self.module.leaves[0], tuple(self.inner.module.leaves))

        def grad_callback(self) -> None:
            found[:] = [self.module.leaves[0].grad.clone()]

    inner_module, outer_module = _Leaves(workload.ys), _Leaves((workload.x,))
    inner = Inner(
        name="inner",
        module=inner_module,
        optimizer=torch.optim.SGD(inner_module.parameters(), lr=0.0),
        config=Config(
            type=method,
            unroll_steps=1,
            cg_iterations=products,
            cg_alpha=1.0,
            neumann_iterations=products,
            neumann_alpha=workload.step,
        ),
    )
    outer = Outer(
        name="outer",
        module=outer_module,
        optimizer=torch.optim.SGD(outer_module.parameters(), lr=0.0),
        config=Config(retain_graph=True),
    )
    engine = Engine(
        problems=[outer, inner],
        config=EngineConfig(strategy="cpu"),
        dependencies={"l2u": {inner: [outer]}, "u2l": {outer: [inner]}},
    )
    engine.train()

    def call() -> Tensor:
        found.clear()
        engine.global_step += 1
        engine.train_step()
        return found[0]

    return call


def unrolled(workload: Workload, steps: int) -> dict[str, Call]:  # noqa: ARG001
    """Not compared."""
    raise UnavailableError("skipped: `IterativeProblem` has no adapter here")
