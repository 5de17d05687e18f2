"""Estimators by name: the one file that knows both the estimators and default solvers for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from torch import Tensor

from bilevel._estimate import AbstractEstimator
from bilevel._flat import FlatProblem
from bilevel._linear import AbstractLinearSolver
from bilevel._optimizer import AbstractOptimizer
from bilevel._result import Tally
from bilevel.inner_problems.kinds import inner_problem
from bilevel.named.auto import Auto, Chosen
from bilevel.named.budget import budgeted
from bilevel.named.choice import choose
from bilevel.named.reference import reference
from bilevel.named.setting import Setting, default_inner, default_unrolled
from bilevel.requirements.properties import Property
from bilevel.solvers.cg import accurate_cg


def _aid(linear: Callable[[Setting], AbstractLinearSolver]) -> Callable[[Setting], AbstractEstimator]:
    def build(s: Setting) -> AbstractEstimator:
        from bilevel.hypergrad.aid import AID

        return AID(inner=default_inner(s), linear=linear(s))

    return build


def _rtol(s: Setting) -> float:
    return 1e-9 if s.double else 1e-4


def _cg(s: Setting) -> AbstractLinearSolver:
    from bilevel.solvers.cg import CG

    return CG(rtol=_rtol(s))


def _neumann(s: Setting) -> AbstractLinearSolver:
    from bilevel.solvers.neumann import Neumann

    return Neumann(step=None, terms=10_000, rtol=1e-6 if s.double else 1e-3)


def _dense(s: Setting) -> AbstractLinearSolver:  # noqa: ARG001
    from bilevel.solvers.dense import Dense

    return Dense()


def _minres(s: Setting) -> AbstractLinearSolver:
    from bilevel.solvers.minres import MINRES

    return MINRES(rtol=_rtol(s))


def _gmres(s: Setting) -> AbstractLinearSolver:
    from bilevel.solvers.gmres import GMRES

    return GMRES(rtol=_rtol(s))


def _nystrom(s: Setting) -> AbstractLinearSolver:
    from bilevel.solvers.nystrom import Nystrom

    return Nystrom(rank=min(20, s.y0.shape[-1]), damping=None)


def _itd(
    truncate: int | None = None, forward: bool = False, checkpoint: bool = False
) -> Callable[[Setting], AbstractEstimator]:
    def build(s: Setting) -> AbstractEstimator:
        from bilevel.hypergrad.itd import ITD
        from bilevel.solvers.gradient_descent import GradientDescent
        from bilevel.solvers.iterate import Iterate

        if Property.steps not in inner_problem(s.problem.problem).offers:  # it is refused where it is applied
            return ITD(Iterate(GradientDescent(), max_steps=1))
        least = s.derivative_steps() if truncate is None else truncate
        return ITD(default_unrolled(s, least), truncate=truncate, forward=forward, checkpoint=checkpoint)

    return build


def _esj(s: Setting) -> AbstractEstimator:
    from bilevel.hypergrad.esj import ESJ

    directions = min(s.x.shape[-1], 20)
    # The rounding and the tolerance of y come over the radius, its square over one: the balance of the two.
    inner = default_unrolled(s) if s.problem.problem.init is not None else default_inner(s)
    return ESJ(inner, directions=directions, radius=1e-4 if s.double else 1e-2, distribution="orthonormal")


def _first_order(s: Setting) -> AbstractEstimator:
    from bilevel.hypergrad.first_order import FirstOrder

    return FirstOrder(default_unrolled(s) if s.problem.problem.init is not None else default_inner(s))


def _kkt(s: Setting) -> AbstractEstimator:
    from bilevel.hypergrad.kkt import KKT

    return KKT(default_inner(s))


def _penalty(s: Setting) -> AbstractEstimator:
    from bilevel.hypergrad.penalty import Penalty

    return Penalty(default_inner(s), weight=s.penalty_weight(), extrapolate=True)


def _finite_difference(s: Setting) -> AbstractEstimator:
    from bilevel.hypergrad.finite_difference import FiniteDifference

    inner = default_unrolled(s) if s.problem.problem.init is not None else default_inner(s)
    return FiniteDifference(inner, step=1e-4 if s.double else 2e-2)


@final
@dataclass(frozen=True)
class Named:
    """A name's description and how its safe defaults are built where the problem is first met."""

    description: str
    build: Callable[[Setting], AbstractEstimator]


_NAMED: dict[str, Named] = {
    "aid-cg": Named("implicit gradient, conjugate gradients: the default for smooth strongly convex g", _aid(_cg)),
    "aid-neumann": Named("implicit gradient, Neumann series with a step from the largest curvature", _aid(_neumann)),
    "aid-dense": Named("implicit gradient, Cholesky factorization of the dense inner Hessian (few y)", _aid(_dense)),
    "aid-minres": Named("implicit gradient, MINRES: symmetric systems, definite or not", _aid(_minres)),
    "aid-gmres": Named("implicit gradient, GMRES: any invertible system", _aid(_gmres)),
    "aid-nystrom": Named("implicit gradient, Nystrom approximation of low rank with damping (biased)", _aid(_nystrom)),
    "itd": Named("reverse mode through the inner steps; memory grows with them", _itd()),
    "itd-truncated": Named("reverse mode through the last 20 inner steps (biased)", _itd(truncate=20)),
    "itd-forward": Named("forward mode through the inner steps; cost grows with the number of x", _itd(forward=True)),
    "itd-checkpointed": Named(
        "reverse mode, recomputing: memory grows with the root of the steps", _itd(checkpoint=True)
    ),
    "one-step": Named("reverse mode through the last inner step only, Jacobian-free (biased)", _itd(truncate=1)),
    "first-order": Named("no second derivatives: y moves as its start does or not (biased; FOMAML)", _first_order),
    "esj": Named("evolution-strategy Jacobian: zeroth order, perturbed inner solves in one batch", _esj),
    "kkt": Named("implicit gradient under linear constraints on y, from the optimality conditions (few y)", _kkt),
    "penalty": Named("fully first-order value function, with Richardson extrapolation in the weight", _penalty),
    "finite-difference": Named("central differences of Phi: an oracle for tests, 2p inner solves", _finite_difference),
}


def estimators() -> dict[str, str]:
    """The estimators that can be asked for by name, each with one line of description.

    Example:
        >>> estimators()["aid-cg"][:17]
        'implicit gradient'
    """
    return {name: named.description for name, named in _NAMED.items()}


def resolve(
    estimator: AbstractEstimator | Auto | str, problem: FlatProblem, x: Tensor, y0: Tensor
) -> AbstractEstimator:
    """An estimator from a name or from itself.

    Raises:
        TypeError: if it is neither.
        ValueError: if there is no estimator of that name.
    """
    if isinstance(estimator, AbstractEstimator):
        return estimator
    if estimator == "auto" or isinstance(estimator, Auto):
        wish = estimator if isinstance(estimator, Auto) else Auto()
        return _choose(wish, Setting(problem, x, y0))
    if not isinstance(estimator, str):
        raise TypeError(
            f"`estimator` must be an estimator such as `AID(...)` or a name. Got {type(estimator).__name__}."
            f" Names: {', '.join(_NAMED)}."
        )
    if estimator not in _NAMED:
        import difflib

        near = difflib.get_close_matches(estimator, _NAMED, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"there is no estimator {estimator!r}. {hint}Names: {', '.join(_NAMED)}.")
    return _NAMED[estimator].build(Setting(problem, x, y0))


def default_outer() -> AbstractOptimizer:
    """The outer optimizer of `minimize` where none is given."""
    from bilevel.solvers.adam import Adam

    return Adam(0.05)


def _choose(wish: Auto, s: Setting) -> Chosen:
    if s.problem.problem.init is not None:
        raise ValueError(
            "`Auto` does not apply to a problem with `init`: how many inner steps are taken is then part of the"
            " problem. Name the estimator, e.g. `ITD(Iterate(GradientDescent(0.1), max_steps=5))`."
        )
    if s.problem.problem.constraints is not None:
        raise ValueError("`Auto` does not apply to a problem with constraints on y. Name the estimator: 'kkt'.")
    p, q = s.x.shape[-1], s.y0.shape[-1]
    passed_over = ("finite-difference", "itd-checkpointed", "aid-gmres", "first-order", "kkt")
    names = [name for name in _NAMED if name not in passed_over]
    if q > 500:  # a dense factorization or a dense difference would cost more than it can save
        names.remove("aid-dense")
    if p > 50:
        names.remove("itd-forward")
    accurate, _ = reference(Setting(s.problem.with_tally(Tally()), s.x, s.y0))
    return choose(
        wish,
        s.problem,
        s.x,
        s.y0,
        names,
        lambda name, budget: budgeted(name, s, budget),
        accurate,
        accurate_cg,
        _NAMED["aid-cg"].build(s),
    )
