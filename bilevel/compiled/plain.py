"""Which problems and which optimizers are tensors and nothing else."""

from __future__ import annotations

from torch import Tensor

from bilevel._optimizer import AbstractOptimizer
from bilevel._problem import BilevelProblem
from bilevel.compiled.refused import refused
from bilevel.inner_problems.kinds import inner_problem
from bilevel.inner_problems.smooth import SmoothMinimization

STEPS = "Use `Iterate(GradientDescent(step), max_steps=N)`, or leave out `compile=True`"


def demand_smooth(problem: BilevelProblem) -> None:
    """Refuse a kind of inner problem that is not written as a program.

    Raises:
        NotCompilableError: naming it.
    """
    kind = inner_problem(problem)
    if not isinstance(kind, SmoothMinimization):
        raise refused(f"{type(kind).__name__}(...)", "only the unconstrained minimization of a smooth g is compiled")
    if problem.tasks == "loop":
        raise refused("BilevelProblem(tasks='loop')", "tasks one after the other are as many programs",
                      "Use `tasks=True`, or leave out `compile=True`")  # fmt: skip


def demand_optimizer(part: str, optimizer: AbstractOptimizer, point: Tensor) -> None:
    """Refuse an optimizer whose step is not one of tensors alone.

    Raises:
        NotCompilableError: naming it.
    """
    name = type(optimizer).__name__
    if optimizer.needs_curvature:
        raise refused(part, f"the step of `{name}()` is open, and derived from the curvature that is met", STEPS)
    if optimizer.settings:
        raise refused(part, f"a setting of `{name}` is a function of x", STEPS)
    for key, entry in optimizer.init(point).items():
        if not isinstance(entry, Tensor):
            raise refused(part, f"the state of `{name}` has an entry {key!r} that is no tensor",
                          "Use `GradientDescent`, `HeavyBall`, `Nesterov` or `Adam`")  # fmt: skip
