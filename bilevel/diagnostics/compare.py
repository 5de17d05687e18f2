"""Every estimator that applies, side by side, against a certified reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

from torch import Tensor

from bilevel._apply import apply_estimator
from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._hypergradient import own_start
from bilevel._numerics.misfits import called
from bilevel._numerics.rows import safe_row_norms
from bilevel._numerics.transforms import demand_autograd
from bilevel._problem import BilevelProblem, check_signature
from bilevel._result import Stats, Status, Tally
from bilevel._tree import Tree, demand_alike, ravel
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import SIZE
from bilevel.certificates.applies import no_certificate_at
from bilevel.certificates.certificate import Constants
from bilevel.certificates.certify_flat import certify_flat
from bilevel.diagnostics.applicability import why_not_applicable, why_not_here
from bilevel.diagnostics.comparison import Comparison, Row
from bilevel.diagnostics.memory import peak_memory
from bilevel.named.implicit import IMPLICIT, implicit_name
from bilevel.named.reference import reference
from bilevel.named.registry import build, demand_names, estimators as named_estimators
from bilevel.named.setting import Setting
from bilevel.requirements.iterations import why_iteration
from bilevel.solvers.cg import accurate_cg


@checked(budgets=SIZE)
def compare(
    problem: BilevelProblem,
    x: Tree,
    y0: Tree = None,
    *,
    estimators: Sequence[str] | Mapping[str, AbstractEstimator] | None = None,
    budgets: Sequence[int] | None = None,
    data: Any = None,
    constants: Constants | Callable[[Tree], Constants] | None = None,
    memory: bool = True,
) -> Comparison:
    """Every estimator that applies at (x, y0): its error against a reference, its certificate, its cost.

    The reference is the implicit gradient at an inner solution as accurate as the dtype allows, by a dense
    factorization for q <= 200 and tight conjugate gradients above, itself certified where constants are given. It has
    to agree with a difference of Phi along a random direction; where it does not (g has a kink at y*), the reference is
    a central difference of Phi. Estimators that `check` finds not to apply are not run, for the reason that it gives.

    Cost: that of `check` and of the reference, some twenty inner solves; each estimator three times (twice to time it,
    once to measure its memory), and one linear solve more for its certificate where it has none of its own.

    Args:
        problem: f and g.
        x: where.
        y0: where the inner solvers start. None where the problem has `init`: init(x).
        estimators: names, or a dict of estimators under labels of yours; by default every name but "implicit", which
            stands for one of the others.
        budgets: for names: oracle calls to spend, one row each, instead of the names' own tolerances.
        data: the third argument of f and g, if they take one.
        constants: what is known of f and g, or a function of x that tells; for certificates, which there are
            of smooth minimizations only.
        memory: whether to measure peak memory, which takes a further, slow, call.

    Returns:
        The comparison; print it. Estimators that do not apply are listed with the reason.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if structures do not match, or a name is unknown.
        BilevelError: if not even the reference could be computed, or Phi has a kink at x.

    Example:
        >>> import torch
        >>> curvature = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square().sum(), lambda x, y: curvature @ (y - x).square()
        ... )
        >>> x = torch.ones(2, dtype=torch.float64)
        >>> found = compare(problem, x, torch.zeros_like(x), estimators=["aid-cg", "one-step"])
        >>> [row.name for row in found.rows if row.relative < 1e-6]
        ['aid-cg']
    """
    demand_autograd("compare")
    check_signature(problem, data)
    x_vector, x_structure = ravel(x, "x")
    y_vector, y_structure = ravel(own_start("compare", problem, x, data) if y0 is None else y0, "y0")
    demand_alike("compare(x, y0)", x_structure, y_structure)
    flat = FlatProblem(problem, x_structure, y_structure, data)
    comparer = _Comparer(flat, x_vector.detach().clone(), y_vector.detach().clone(), memory)
    if callable(constants):
        constants = called("constants(x)", constants, x)
    comparer.constants = constants
    comparer.make_reference()
    rows: list[Row] = []
    if isinstance(estimators, Mapping):
        for label, estimator in estimators.items():
            rows.append(comparer.row(label, None, lambda e=estimator: e, comparer.why_not(estimator)))  # type: ignore[misc]
        return comparer.comparison(rows)
    names = [name for name in named_estimators() if name != IMPLICIT] if estimators is None else list(estimators)
    demand_names(*names)
    for name in names:
        why = comparer.why_not(implicit_name(flat, comparer.x, comparer.y0) if name == IMPLICIT else name)
        for budget in (None,) if budgets is None else budgets:
            setting = Setting(flat, comparer.x, comparer.y0, budget)
            rows.append(comparer.row(name, budget, lambda n=name, s=setting: build(n, s), why))  # type: ignore[misc]
    return comparer.comparison(rows)


@final
class _Comparer:
    """One point of one problem, its reference and the rows measured against it."""

    def __init__(self, problem: FlatProblem, x: Tensor, y0: Tensor, memory: bool) -> None:
        self.problem, self.x, self.y0, self.memory = problem, x, y0, memory
        self.constants: Constants | None = None
        self.h = x
        self.how, self.error = "", float("nan")
        from bilevel.diagnostics.check import examined, subject_at

        self.subject = subject_at(problem.with_tally(Tally()), x, y0)
        self.findings = examined(self.subject)

    def why_not(self, estimator: AbstractEstimator | str) -> str:
        """Why `check` says that it does not apply."""
        if isinstance(estimator, str):
            return why_not_applicable(estimator, self.subject, self.findings)
        own = why_iteration(estimator)
        if own and self.subject.stationary:
            return (
                f"{own}, so that its Phi is another than that of the reference, which solves the inner problem. Compare"
                f" it with `FiniteDifference` with the same inner solver."
            )
        return why_not_here(lambda: estimator, self.subject, self.findings)

    def make_reference(self) -> None:
        """The hypergradient that the others are measured against, and how well it is known."""
        made = reference(Setting(self.problem, self.x, self.y0))
        found, self.how, self.error = made.estimate, made.how, made.off
        self.h = found.grad
        certifiable = not no_certificate_at(self.problem, self.x, found.y)
        if not certifiable:  # certificates and estimates of the error are of grad_y g = 0
            self.constants = None
        if self.constants is not None and found.v is not None:
            self.error = self._certificate(found)
        elif found.v is not None and certifiable and not made.wrong:
            from bilevel.certificates.error_estimate import second_level

            quiet = self.problem.with_tally(Tally())
            finer = second_level(quiet, self.x, found.y, found.v, found.grad)
            self.error = finer if finer == finer else self.error

    def row(self, name: str, budget: int | None, build: Callable[[], AbstractEstimator], why: str) -> Row:
        if why:
            return Row(name, budget, reason=why)
        try:
            estimator = build()
            found, stats, seconds = self._timed(estimator)
        except (ValueError, NotImplementedError, RuntimeError) as error:  # it costs its own row, and no other
            return Row(name, budget, reason=str(error))
        held = None
        if self.memory:
            run = self._run(estimator)
            held = peak_memory(lambda: run(self.problem.with_tally(Tally())), self.x.device)[1]
        off = float(safe_row_norms(found.grad - self.h))
        norm, size = float(safe_row_norms(self.h)), float(safe_row_norms(found.grad))
        status = Status.worst(report.status for report in found.reports)
        return Row(
            name=name,
            budget=budget,
            error=off,
            relative=off / norm if norm > 0 else off,
            cosine=float(found.grad @ self.h) / (norm * size) if norm > 0 and size > 0 else None,
            certificate=None if self.constants is None else self._certificate(found),
            standard_error=found.standard_error,
            stats=stats,
            seconds=seconds,
            memory=held,
            status=status.name,
            reason=" ".join(str(report) for report in found.reports if not report.status.ok),
            substitute="" if found.substitute is None else str(found.substitute),
        )

    def comparison(self, rows: list[Row]) -> Comparison:
        return Comparison(tuple(rows), float(safe_row_norms(self.h)), self.how, self.error)

    def _run(self, estimator: AbstractEstimator) -> Callable[[FlatProblem], FlatEstimate]:
        return lambda problem: apply_estimator(estimator, problem, self.x, FlatStart(self.y0))

    def _timed(self, estimator: AbstractEstimator) -> tuple[FlatEstimate, Stats, float]:
        run = self._run(estimator)

        def once() -> tuple[FlatEstimate, Stats, float]:
            problem = self.problem.with_tally(Tally())
            before = time.perf_counter()
            found = run(problem)
            seconds = time.perf_counter() - before
            return found, problem.tally.stats(), seconds

        return min(once(), once(), key=lambda timed: timed[2])

    def _certificate(self, found: FlatEstimate) -> float:
        assert self.constants is not None
        quiet = self.problem.with_tally(Tally())
        linear = accurate_cg(found.y)
        return certify_flat(quiet, self.x, found.grad, found.y, found.v, self.constants, linear).bound
