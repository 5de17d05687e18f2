"""Which name is the implicit derivative that fits the kind of inner problem."""

from __future__ import annotations

from torch import Tensor

from bilevel._flat import FlatProblem
from bilevel._result import Tally
from bilevel.inner_problems.kinds import inner_problem

IMPLICIT = "implicit"  # the name that stands for it, and the default wherever a name may be given


def implicit_name(problem: FlatProblem, x: Tensor, y: Tensor) -> str:
    """What the kind of inner problem says: `aid-cg` for smooth ones, `kkt` where y is constrained.

    A kind without an equation to differentiate names none: `aid-cg` is then refused with the kind's own reason.

    Args:
        problem: the problem in vectors.
        x: where the estimator is built.
        y: the inner variable, anywhere.
    """
    quiet = problem.with_tally(Tally())
    return inner_problem(problem.problem).implicit_at(quiet, x.detach(), quiet.spread(y.detach())) or "aid-cg"
