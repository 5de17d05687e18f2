"""Which estimators can be compiled, and why others cannot."""

from __future__ import annotations

from torch import Tensor

from bilevel._calculus import Exact
from bilevel._estimate import AbstractEstimator
from bilevel._inner import AbstractInnerSolver
from bilevel.compiled.plain import STEPS, demand_optimizer
from bilevel.compiled.refused import refused
from bilevel.hypergrad.aid import AID
from bilevel.hypergrad.itd import ITD
from bilevel.hypergrad.unrolling.forward import Forward
from bilevel.solvers.cg import CG
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.neumann import Neumann


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
            raise refused("ITD(inner=...)", "with a tolerance the number of its steps, and what the derivative lacks,"
                          " are found by looking on the way", "Leave out `tol` or `compile=True`")  # fmt: skip
        if isinstance(estimator.unrolling, Forward):
            raise refused("ITD(unrolling=Forward())", "forward mode is not written as a loop of a program",
                          "Use `Reverse()`, which gives the same number")  # fmt: skip
    else:
        raise refused(f"{name}(...)", "only `AID` and `ITD` are written as programs")


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
        raise refused(f"AID(products={type(estimator.products).__name__}(...))", "only exact products are written so")
    for field, value in (("target_error", estimator.target_error), ("relative_error", estimator.relative_error),
                         ("side", estimator.side), ("otherwise", estimator.otherwise)):  # fmt: skip
        if value is not None:
            raise refused(f"AID({field}=...)", "what it takes is decided by looking at numbers on the way")


def _demand_steps(name: str, solver: AbstractInnerSolver) -> None:
    if not isinstance(solver, Iterate):
        raise refused(f"{name}(inner={type(solver).__name__}(...))", "its steps are not those of an optimizer", STEPS)
    if solver.line_search is not None:
        raise refused("Iterate(line_search=...)", "a line search looks at values on the way", STEPS)


def demand_steps_at(estimator: AbstractEstimator, y: Tensor) -> None:
    """Refuse an inner optimizer whose step is not one of tensors alone, at y.

    Raises:
        NotCompilableError: naming it.
    """
    solver = estimator.inner if isinstance(estimator, AID | ITD) else None
    if isinstance(solver, Iterate):
        demand_optimizer("Iterate(optimizer=...)", solver.optimizer, y)
