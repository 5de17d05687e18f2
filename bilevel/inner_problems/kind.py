"""What an inner problem is: how y follows from x, and what is declared of it."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from bilevel.inner_problems.declarations import AbstractDeclaredKind
from bilevel.requirements.properties import DoesNotApply

if TYPE_CHECKING:  # a problem holds its kind, and a kind is given the problem
    from bilevel._calculus import AbstractProducts, Linearization
    from bilevel._flat import FlatProblem
    from bilevel._inner import Objective
    from bilevel._result import Solved
    from bilevel.inner_problems.flat_term import FlatTerm
    from bilevel.inner_problems.polytope import FlatPolytope


class AbstractInnerProblem(AbstractDeclaredKind):
    """A kind of inner problem: y*(x) as a minimizer, a constrained one, a fixed point, or the end of an iteration.

    A kind is a frozen value that holds functions of the user's x and y. It declares what it offers, builds what inner
    solvers are given, and, where y solves an equation F(x, y) = 0, that equation to first order. Estimators know no
    kinds: they state what they require, and one place compares (`bilevel.requirements.why_not`). What a kind does not
    declare it does not have.
    """

    @abc.abstractmethod
    def objective(self, problem: FlatProblem, x: Tensor, products: AbstractProducts | None) -> Objective:
        """What inner solvers are given at x `(p,)`, or at several `(k, p)`.

        Args:
            problem: the problem in vectors.
            x: the outer variable; where it requires a gradient, steps are differentiated through the objective.
            products: how to linearize where the solver stops, and to evaluate gradients; None: not at all, and by
                autograd.
        """

    def implicit_at(self, problem: FlatProblem, x: Tensor, y: Tensor) -> str:
        """`implicit` at x, where it depends on what the functions of the problem return there.

        Args:
            problem: the problem in vectors.
            x: the outer variable.
            y: the inner variable `(*tasks, q)`, anywhere.
        """
        return self.implicit

    def term(self, problem: FlatProblem) -> FlatTerm | None:
        """The non-smooth term h in y*(x) = argmin_y g(x, y) + h_x(y), where it is such a problem; None: it is not."""
        return None

    def linear_constraints(self, problem: FlatProblem, x: Tensor) -> FlatPolytope | None:
        """The constraints on y at x, differentiable, where these are all that it has beyond g; None: they are not."""
        return None

    def linearize(
        self,
        problem: FlatProblem,
        x: Tensor,
        solved: Solved,
        smooth: Callable[[], Linearization],
        margin: float | None,
    ) -> Linearization:
        """F(x, y) = 0 to first order at the solution.

        Args:
            problem: the problem in vectors.
            x: the outer variable.
            solved: what the inner solver returned.
            smooth: makes the linearization of grad_y g there, for kinds with a g; one gradient, if it is not known.
            margin: the relative distance from a kink of y*(x) below which it is reported; None: that of the dtype.

        Raises:
            DoesNotApply: if there is no such equation.
        """
        raise DoesNotApply(self.refusal)
