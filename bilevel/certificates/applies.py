"""Which problems certificates are of: the one place that says it for all that certify."""

from __future__ import annotations

from torch import Tensor

from bilevel._calculus import demand_beyond_start
from bilevel._flat import FlatProblem
from bilevel._problem import BilevelProblem
from bilevel._result import Tally
from bilevel.inner_problems.kinds import inner_problem
from bilevel.requirements.properties import DoesNotApply, Property

CERTIFIABLE = frozenset({Property.stationary, Property.minimum, Property.smooth})


def no_certificate(problem: BilevelProblem) -> str:
    """Why the theorems say nothing about this kind of inner problem, as far as that is declared; empty: they apply.

    They are of y*(x) = argmin_y g(x, y) with grad_y g(x, y*) = 0: no constraints on y, no non-smooth term, no steps of
    the problem's own, no other equation.
    """
    kind = inner_problem(problem)
    if kind.offers >= CERTIFIABLE:
        return ""
    return (
        "its theorems are for an inner problem that is a smooth minimization, without constraints on y. Here"
        f" {kind.refusal}"
    )


def no_certificate_at(problem: FlatProblem, x: Tensor, y: Tensor) -> str:
    """The same, and whether y depends on x through its start only; one uncounted gradient where there is an `init`."""
    why = no_certificate(problem.problem)
    if why:
        return why
    try:
        demand_beyond_start(problem.with_tally(Tally()), x, y)
    except DoesNotApply as error:
        return error.reason
    except NotImplementedError:
        pass  # g has no second derivatives: whoever needs them says so, and the others see its gradient in x
    return ""
