"""Is a problem well posed: plain verdicts, each with a remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bilevel._flat import FlatProblem
from bilevel._hypergradient import own_start
from bilevel._inner import AbstractInnerSolver
from bilevel._numerics.transforms import demand_autograd
from bilevel._problem import BilevelProblem, check_signature
from bilevel._result import Tally
from bilevel._tree import Tree, demand_alike, ravel
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import SEED
from bilevel.diagnostics.against_differences import hypergradient_agrees
from bilevel.diagnostics.applicability import why_not_applicable
from bilevel.diagnostics.constraints import constraints_are_regular
from bilevel.diagnostics.dependence import y_depends_on_x
from bilevel.diagnostics.derivatives import derivatives_are_right, second_derivatives_exist
from bilevel.diagnostics.findings import Findings
from bilevel.diagnostics.graphs import graphs_are_whole
from bilevel.diagnostics.solution import g_is_smooth_there, inner_problem_is_solved, minimum_is_strict, scales_are_even
from bilevel.diagnostics.subject import Subject
from bilevel.diagnostics.support import support_is_clear
from bilevel.diagnostics.values import values_are_finite, values_are_repeatable
from bilevel.diagnostics.verdict import Check
from bilevel.named.implicit import IMPLICIT, implicit_name
from bilevel.named.registry import estimators

Test: TypeAlias = Callable[[Subject, Findings], Findings]

_OF_FUNCTIONS: tuple[Test, ...] = (values_are_repeatable, derivatives_are_right)
_OF_THE_PROBLEM: tuple[Test, ...] = (
    second_derivatives_exist,
    inner_problem_is_solved,
    g_is_smooth_there,
    minimum_is_strict,
    constraints_are_regular,
    support_is_clear,
    y_depends_on_x,
    scales_are_even,
    graphs_are_whole,
    hypergradient_agrees,
)


@checked(seed=SEED)
def check(
    problem: BilevelProblem,
    x: Tree,
    y0: Tree = None,
    *,
    data: Any = None,
    inner: AbstractInnerSolver | None = None,
    seed: int = 0,
) -> Check:
    """Test whether min_x f(x, argmin_y g(x, y)) is well posed near x, and which estimators apply to it.

    Values and dtypes; whether f and g give the same value twice; Taylor remainders of f and g in x and y, and of
    grad_y g, which vanish like t^2 where a function is smooth and its derivative right; second derivatives: whether
    torch has them, and the symmetry of the Hessian; how far the inner solver gets; the sign of the curvature there and
    its condition number, with a non-smooth term those on the support, and how far that is from changing; whether g has
    a kink there; whether y depends on x, and by which way; the scales of x and y; and, where all of that is sound, the
    implicit gradient, or the derivative of the steps of an iteration, against differences of Phi to both sides along a
    random direction.

    An estimator that is wrong by what was found is not listed as one that applies; `compare` leaves out the same ones
    for the same reasons.

    Cost: some ten inner solves, some 60 evaluations of f and g, q Hessian products for q <= 200 and some 30 above.

    Args:
        problem: f and g.
        x: a typical outer point.
        y0: where the inner solver starts. None where the problem has `init`: init(x).
        data: the third argument of f and g, if they take one.
        inner: the inner solver; by default accurate L-BFGS.
        seed: of the random directions.

    Returns:
        The verdicts. Nothing is raised for what is wrong with the problem.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if x, y0 and data do not fit together; if there is neither y0 nor `init`.

    Example:
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square().sum(), lambda x, y: (y - x).square().sum()
        ... )
        >>> check(
        ...     problem, torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        ... ).ok
        True
    """
    demand_autograd("check")
    check_signature(problem, data)
    x_vector, x_structure = ravel(x, "x")
    y_vector, y_structure = ravel(own_start("check", problem, x, data) if y0 is None else y0, "y0")
    demand_alike("check(x, y0)", x_structure, y_structure)
    flat = FlatProblem(problem, x_structure, y_structure, data, Tally())
    subject = subject_at(flat, x_vector.detach().clone(), y_vector.detach().clone(), inner, seed)
    found = examined(subject)
    names = {name: _meant(subject) if name == IMPLICIT else name for name in estimators()}
    applicable = {name: why_not_applicable(meant, subject, found) for name, meant in names.items()}
    return Check(found.verdicts, found.dependence, applicable)


def _meant(subject: Subject) -> str:
    """What "implicit" stands for; where the user's functions do not run, which is a verdict, what their kind says."""
    try:
        return implicit_name(subject.problem, subject.x, subject.given)
    except Exception:
        return subject.kind.implicit or "aid-cg"


def subject_at(
    problem: FlatProblem, x: Tensor, y0: Tensor, inner: AbstractInnerSolver | None = None, seed: int = 0
) -> Subject:
    """The problem at a point, in vectors."""
    start, generator = problem.start(x, y0).detach(), torch.Generator(device="cpu").manual_seed(seed)
    return Subject(problem, x, y0, start, inner, generator)


def examined(subject: Subject) -> Findings:
    """What the tests find, in the order in which they build on each other."""
    found = values_are_finite(subject, Findings(subject.y0, subject.constrained))
    if not found.wrong:
        for test in _OF_FUNCTIONS:
            found = test(subject, found)
    if not found.wrong & {"values", "g in y"}:  # nothing that follows would mean anything
        for test in _OF_THE_PROBLEM:
            if "values" not in found.wrong:  # as steps of the problem's own may turn out to be
                found = test(subject, found)
    return found
