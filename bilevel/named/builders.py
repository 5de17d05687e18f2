"""How the estimator behind each name is made: `build(setting)`, with accurate solvers or with those of a budget.

They import what they make inside, so that the name of an estimator loads neither the others nor the solvers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from bilevel._calculus import Exact
from bilevel._estimate import AbstractEstimator
from bilevel._inner import AbstractInnerSolver
from bilevel._linear import AbstractLinearSolver
from bilevel.inner_problems.kinds import inner_problem
from bilevel.requirements.properties import Feature

if TYPE_CHECKING:
    from bilevel.named.setting import Setting

PENALTY_ACCURACY = 0.01, 0.05  # in float64 and in others: what a named penalty promises, or says that it misses
_FROM_COLD, _FROM_WARM = (100, 50), (10, 10)  # steps and products of "network": to train, and to follow x
_DAMPING, _ENOUGH = 1e-4, 1e-3  # of it, relative: to the largest curvature, and where fewer products will do
_DIRECTIONS = 20  # of `ESJ`, as many as it takes by default; where x has fewer entries all, which leaves no variance


Builder: TypeAlias = Callable[["Setting"], AbstractEstimator]


def aid(linear: Callable[[Setting], AbstractLinearSolver]) -> Builder:
    """`AID`: each inner step of one gradient brings one product of the linear solver."""

    def build(s: Setting) -> AbstractEstimator:
        from bilevel.hypergrad.aid import AID

        return AID(inner=s.inner(per_step=2), linear=linear(s))

    return build


def cg(s: Setting) -> AbstractLinearSolver:
    """`CG`."""
    return s.linear()


def neumann(s: Setting) -> AbstractLinearSolver:
    """`Neumann`: 10 000 terms reach 1e-6 up to condition numbers of about 700; what they miss is reported."""
    from bilevel.solvers.neumann import Neumann

    if Feature.fixed_point in s.features:  # the system is I - J', and the series that of the powers of J'
        return Neumann(step=1.0, terms=s.steps(2) or 10_000, rtol=s.accuracy(1e-9, 1e-4))
    return Neumann(step=None, terms=s.steps(2) or 10_000, rtol=s.accuracy(1e-6, 1e-3))


def dense(s: Setting) -> AbstractLinearSolver:  # noqa: ARG001
    """`Dense`: it takes its q products, whatever is left of a budget."""
    from bilevel.solvers.dense import Dense

    return Dense()


def minres(s: Setting) -> AbstractLinearSolver:
    """`MINRES`."""
    from bilevel.solvers.minres import MINRES

    return MINRES(rtol=s.accuracy(1e-9, 1e-4), max_steps=s.steps(2))


def gmres(s: Setting) -> AbstractLinearSolver:
    """`GMRES`."""
    from bilevel.solvers.gmres import GMRES

    return GMRES(rtol=s.accuracy(1e-9, 1e-4), max_steps=s.steps(2))


def nystrom(s: Setting) -> AbstractLinearSolver:
    """`Nystrom`: without a budget of rank 20, for the few large eigenvalues that the method is made for."""
    from bilevel.solvers.nystrom import Nystrom

    return Nystrom(rank=min(s.steps(2) or 20, s.y0.shape[-1]), damping=None)


def itd(forward: bool = False, checkpoint: bool = False) -> Builder:
    """`ITD`: a step brings a product, where it is recomputed a further gradient, and in forward mode p products."""

    def build(s: Setting) -> AbstractEstimator:
        from bilevel.hypergrad.itd import ITD

        per_step = 1 + s.x.shape[-1] if forward else 3 if checkpoint else 2
        inner = s.unrolled(per_step, min_steps=s.derivative_steps())
        return ITD(inner, forward=forward, checkpoint=checkpoint)

    return build


def truncated(last: int) -> Builder:
    """`ITD` through the last steps only, whose products are few beside the gradients of all.

    One step goes before them, so that none is taken at the start itself, which may be far from y* though its step leads
    there.
    """

    def build(s: Setting) -> AbstractEstimator:
        from bilevel.hypergrad.itd import ITD

        return ITD(s.unrolled(per_step=1, min_steps=last + 1), truncate=min(last, s.steps(1) or last))

    return build


def first_order(s: Setting) -> AbstractEstimator:
    """`FirstOrder`: no products."""
    from bilevel.hypergrad.first_order import FirstOrder

    return FirstOrder(_as_posed(s, per_step=1))


def esj(s: Setting) -> AbstractEstimator:
    """`ESJ`: every step is taken at x and along each direction."""
    from bilevel.hypergrad.esj import ESJ

    directions = min(s.x.shape[-1], _DIRECTIONS)
    # Differences of unfinished solves are those of the iteration: of gradient descent's, which is smooth in x.
    smooth = s.budget is not None and not s.features
    inner = s.unrolled(directions + 1) if smooth else _as_posed(s, directions + 1, over=s.rounding ** (1 / 3))
    return ESJ(inner, directions=directions, distribution="orthonormal")


def kkt(s: Setting) -> AbstractEstimator:
    """`KKT`: as `AID`; of many constraints `AID` with a solver of such systems."""
    from bilevel.hypergrad.aid import AID
    from bilevel.hypergrad.kkt import KKT

    inner = s.inner(per_step=2)
    if Feature.many_constraints not in s.features:
        return KKT(inner)
    from bilevel.solvers.sparse_saddle import SparseSaddle

    return AID(inner, SparseSaddle() if s.is_sparse else minres(s))


def penalty(s: Setting) -> AbstractEstimator:
    """`Penalty`: three inner problems: that of g, and those of two weights, at a weight whose error was measured."""
    from bilevel.hypergrad.penalty import Penalty

    inner, accuracy = s.inner(per_step=3, reads=False), PENALTY_ACCURACY[0 if s.double else 1]

    def at(weight: float) -> Penalty:
        return Penalty(inner, weight, extrapolate=True, accuracy=accuracy)

    return at(s.measured_weight(at, s.penalty_weight()))


def finite_difference(s: Setting) -> AbstractEstimator:
    """`FiniteDifference`: an inner solve at x, and two along each coordinate."""
    from bilevel.hypergrad.finite_difference import FiniteDifference

    inner = _as_posed(s, per_step=2 * s.x.shape[-1] + 1, over=s.rounding**0.25)
    # The tolerance of y comes over the step, so that accurate solves want one above that for rounding alone; those of
    # a budget take the same steps at both ends, and None is the step for rounding.
    step = None if s.budget is not None else s.rounding**0.25
    return FiniteDifference(inner, step=step)


def network(s: Setting) -> AbstractEstimator:
    """`Online`: a hundred steps of L-BFGS from a cold start, ten from a warm one, and truncated conjugate gradients.

    Where the inner problem declares its outputs and loss, a cold start takes `GaussNewton` products once it has met
    negative curvature, and a warm one always: between them y is in training. Elsewhere both end there. All are damped
    by 1e-4 of the largest curvature at the start, below which directions of networks are flat.
    """
    from bilevel.hypergrad.aid import AID
    from bilevel.hypergrad.gauss_newton import GaussNewton
    from bilevel.hypergrad.online import Online
    from bilevel.solvers.lbfgs import LBFGS
    from bilevel.solvers.truncated_cg import TruncatedCG

    declared = inner_problem(s.problem.problem).composition is not None
    damping, otherwise = s.relative_damping(_DAMPING), GaussNewton() if declared else None
    if s.budget is not None:
        return AID(s.inner(per_step=2), TruncatedCG(s.steps(2) or 1, _ENOUGH), damping, otherwise=otherwise)

    def linear(products: int) -> TruncatedCG:
        return TruncatedCG(products, _ENOUGH)

    (steps, products), (few, few_products) = _FROM_COLD, _FROM_WARM
    first = AID(LBFGS(0.0, steps), linear(products), damping, otherwise=otherwise)
    return Online(first, AID(LBFGS(0.0, few), linear(few_products), damping, otherwise or Exact()))


def _as_posed(s: Setting, per_step: int, over: float = 1.0) -> AbstractInnerSolver:
    """For estimators that see Phi by values: y*(x), or what the steps make of a start that depends on x."""
    from_start = s.problem.problem.init is not None and not s.features
    return s.unrolled(per_step) if from_start else s.inner(per_step, over)
