"""Which name is the implicit derivative that fits the kind of inner problem."""

from __future__ import annotations

from bilevel._flat import FlatProblem
from bilevel.inner_problems.kinds import inner_problem

IMPLICIT = "implicit"  # the name that stands for it, and the default wherever a name may be given


def implicit_name(problem: FlatProblem) -> str:
    """What the kind of inner problem says: `aid-cg` for smooth ones, `kkt` where y is constrained.

    A kind without an equation to differentiate names none: `aid-cg` is then refused with the kind's own reason.
    """
    return inner_problem(problem.problem).implicit or "aid-cg"
