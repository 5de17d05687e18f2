"""Which estimators can be compiled, and why others cannot."""

from __future__ import annotations

from torch import Tensor

from bilevel._calculus import Exact
from bilevel._estimate import AbstractEstimator
from bilevel._inner import AbstractInnerSolver
from bilevel._optimizer import AbstractOptimizer
from bilevel._problem import BilevelProblem
from bilevel.compiled.refused import refused
from bilevel.hypergrad.aid import AID
from bilevel.hypergrad.itd import ITD
from bilevel.hypergrad.unrolling.forward import Forward
from bilevel.inner_problems.kinds import inner_problem
from bilevel.inner_problems.smooth import SmoothMinimization
from bilevel.solvers.cg import CG
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.neumann import Neumann

_STEPS = "Use `Iterate(GradientDescent(step), max_steps=N)`, or leave out `compile=True`"


def demand_compilable(estimator: AbstractEstimator) -> None:
    """Refuse an estimator that is no fixed program.

    Raises:
        NotCompilableError: naming the part, with the reason.
    """
    name = type(estimator).__name__
    if isinstance(estimator, AID):
        _demand_implicit(estimator)
    elif isinstance(estimator, ITD):
        solver = estimator.inner
        _demand_steps(name, solver)
        if isinstance(solver, Iterate) and solver.tol:
            raise refused("ITD(inner=...)", "with a tolerance the number of its steps, and what the derivative lacks, are"
                          " found by looking on the way", "Leave out `tol`, or leave out `compile=True`")  # fmt: skip
        if isinstance(estimator.unrolling, Forward):
            raise refused("ITD(unrolling=Forward())", "forward mode is not written as a loop of a program",
                          "Use `Reverse()`, which gives the same number")  # fmt: skip
    else:
        raise refused(f"{name}(...)", "only `AID` and `ITD` are written as programs")


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
        raise refused(part, f"the step of `{name}()` is open, and derived from the curvature that is met", _STEPS)
    if optimizer.settings:
        raise refused(part, f"a setting of `{name}` is a function of x", _STEPS)
    for key, entry in optimizer.init(point).items():
        if not isinstance(entry, Tensor):
            raise refused(part, f"the state of `{name}` has an entry {key!r} that is no tensor",
                          "Use `GradientDescent`, `HeavyBall`, `Nesterov` or `Adam`")  # fmt: skip


def _demand_implicit(estimator: AID) -> None:
    _demand_steps("AID", estimator.inner)
    linear = estimator.linear
    if isinstance(linear, CG):
        if linear.preconditioner is not None:
            raise refused("CG(preconditioner=...)", "preconditioners are built by looking at products")
    elif isinstance(linear, Neumann):
        if linear.step is None:
            raise refused("Neumann(step=None)", "its step is derived from the largest eigenvalue that is met",
                          "Pass a step")  # fmt: skip
    else:
        raise refused(f"AID(linear={type(linear).__name__}(...))", "only `CG` and `Neumann` are written as programs",
                      "Use `CG`")  # fmt: skip
    if not isinstance(estimator.products, Exact):
        raise refused(f"AID(products={type(estimator.products).__name__}(...))", "only exact products are")
    for field, value in (("target_error", estimator.target_error), ("relative_error", estimator.relative_error),
                         ("side", estimator.side), ("otherwise", estimator.otherwise)):  # fmt: skip
        if value is not None:
            raise refused(f"AID({field}=...)", "what it takes is decided by looking at numbers on the way")


def _demand_steps(name: str, solver: AbstractInnerSolver) -> None:
    if not isinstance(solver, Iterate):
        raise refused(f"{name}(inner={type(solver).__name__}(...))", "its steps are not those of an optimizer", _STEPS)
    if solver.line_search is not None:
        raise refused("Iterate(line_search=...)", "a line search looks at values on the way", _STEPS)


def demand_steps_at(estimator: AbstractEstimator, y: Tensor) -> None:
    """Refuse an inner optimizer whose step is not one of tensors alone, at y.

    Raises:
        NotCompilableError: naming it.
    """
    solver = estimator.inner if isinstance(estimator, AID | ITD) else None
    if isinstance(solver, Iterate):
        demand_optimizer("Iterate(optimizer=...)", solver.optimizer, y)
