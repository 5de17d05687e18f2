"""Estimators by name: the one file that knows both the estimators and default solvers for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._auto import Auto, Chosen
from bilevel._calculus import outer_gradients
from bilevel._choose import choose
from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver, Objective
from bilevel._linear import AbstractLinearSolver
from bilevel._objective import inner_objective, refuse_constraints
from bilevel._optimizer import AbstractOptimizer
from bilevel._result import Tally


@final
@dataclass(frozen=True, eq=False)
class Setting:
    """What safe defaults are derived from: the problem at the point where it is first met."""

    problem: FlatProblem
    x: Tensor
    y0: Tensor

    @property
    def double(self) -> bool:
        """Whether the computation is in float64."""
        return self.y0.dtype == torch.float64

    def inner_tol(self) -> float:
        """A gradient norm that counts as zero: relative to the gradient at y0, or to L |y0| if that is larger.

        A warm start makes the first gradient of later solves small, so that this is fixed where the problem is
        first met. It is 1e-9 of the scale in float64 and 1e-4 of it in float32. Where y0 = 0 happens to be the
        solution, the scale is what the gradient becomes as x moves.
        """
        quiet = self.problem.with_tally(Tally())
        objective = inner_objective(quiet, self.x)
        y0 = self.problem.start(self.x, self.y0).detach()
        gradient = objective.gradient(y0)
        scale = torch.linalg.vector_norm(gradient, dim=-1)
        if bool((y0 != 0).any()):
            scale = scale.maximum(objective.largest_curvature(y0).abs() * torch.linalg.vector_norm(y0, dim=-1))
        root = torch.finfo(y0.dtype).eps ** 0.5
        signs = torch.randint(0, 2, self.x.shape, generator=torch.Generator().manual_seed(0)).to(self.x) * 2 - 1
        reach = self.x.abs().max().clamp_min(1.0)
        moved = inner_objective(quiet, self.x + root * reach * signs).gradient(y0)
        response = torch.linalg.vector_norm(moved - gradient, dim=-1).max() / root
        largest = response if bool(scale.max() <= root * response) else scale.max()
        tol = (1e-9 if self.double else 1e-4) * float(largest)
        tiny = torch.finfo(self.y0.dtype).tiny
        return max(tol, tiny) if math.isfinite(tol) else tiny  # what is not finite is reported by the solver

    def derivative_steps(self) -> int:
        """How many steps of gradient descent the derivative of its iterates needs, wherever y starts.

        That is the k with |(I - H / L)^k grad_y f| <= 1e-7 |grad_y f| (float32: 1e-3), found by taking them at y*(x).
        """
        quiet = self.problem.with_tally(Tally())
        objective = inner_objective(quiet, self.x)
        y0 = self.problem.start(self.x, self.y0).detach()
        if self.problem.problem.init is not None:
            return 0
        y = default_inner(self).solve(objective, y0).value
        left = outer_gradients(quiet, self.x, y)[2]
        hessian = objective.hessian(y)[2]
        step = 1 / objective.largest_curvature(y).clamp_min(torch.finfo(y.dtype).tiny).unsqueeze(-1)
        target = (1e-7 if self.double else 1e-3) * torch.linalg.vector_norm(left)
        for k in range(_MOST_STEPS):
            if not torch.linalg.vector_norm(left) > target:
                return k
            left = left - step * hessian.mv(left)
        return _MOST_STEPS

    def penalty_weight(self) -> float:
        """A weight that makes g dominate f: a multiple of the ratio of their largest curvatures in y."""
        quiet = self.problem.with_tally(Tally())
        y0 = self.problem.start(self.x, self.y0).detach()
        objectives = (Objective(lambda y: quiet.g(self.x, y)), Objective(lambda y: quiet.f_each(self.x, y)))
        top_g, top_f = (float(objective.largest_curvature(y0).abs().max()) for objective in objectives)
        ratio = top_f / top_g if top_f > 0 and top_g > 0 else 1.0
        if top_f == 0:  # f is linear in y: the shift of y is |grad f| / (weight mu), compared with |y| or 1
            _, _, fy = outer_gradients(quiet, self.x, y0)
            ratio = float(torch.linalg.vector_norm(fy)) / (top_g or 1.0)
        ratio = ratio if math.isfinite(ratio) else 1.0
        return (1e4 if self.double else 1e2) * max(ratio, torch.finfo(self.y0.dtype).tiny)


def default_inner(s: Setting) -> AbstractInnerSolver:
    """The inner solver behind names whose estimator takes any: accurate L-BFGS; one that heeds constraints on y."""
    from bilevel.solvers.lbfgs import LBFGS
    from bilevel.solvers.quadratic_program import QuadraticProgram

    if s.problem.problem.constraints is not None:
        return QuadraticProgram()
    return LBFGS(tol=s.inner_tol(), max_steps=1000)


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


_MOST_STEPS = 5000  # of an unrolled iteration


def _unrolled(s: Setting, min_steps: int = 0) -> AbstractInnerSolver:
    from bilevel.solvers.gradient_descent import GradientDescent
    from bilevel.solvers.iterate import Iterate

    if s.problem.problem.constraints is not None:
        return default_inner(s)
    if s.problem.problem.init is not None:  # the number of steps is part of the problem: adaptation, not convergence
        return Iterate(GradientDescent(), max_steps=10)
    tol = s.inner_tol() * (1e2 if s.double else 10)
    return Iterate(GradientDescent(), max_steps=_MOST_STEPS, tol=tol, min_steps=min_steps)


def _itd(
    truncate: int | None = None, forward: bool = False, checkpoint: bool = False
) -> Callable[[Setting], AbstractEstimator]:
    def build(s: Setting) -> AbstractEstimator:
        from bilevel.hypergrad.itd import ITD

        refuse_constraints(s.problem, "ITD")
        least = s.derivative_steps() if truncate is None else truncate
        return ITD(_unrolled(s, least), truncate=truncate, forward=forward, checkpoint=checkpoint)

    return build


def _esj(s: Setting) -> AbstractEstimator:
    from bilevel.hypergrad.esj import ESJ

    directions = min(s.x.shape[-1], 20)
    # The rounding and the tolerance of y come over the radius, its square over one: the balance of the two.
    inner = _unrolled(s) if s.problem.problem.init is not None else default_inner(s)
    return ESJ(inner, directions=directions, radius=1e-4 if s.double else 1e-2, distribution="orthonormal")


def _first_order(s: Setting) -> AbstractEstimator:
    from bilevel.hypergrad.first_order import FirstOrder

    return FirstOrder(_unrolled(s) if s.problem.problem.init is not None else default_inner(s))


def _kkt(s: Setting) -> AbstractEstimator:
    from bilevel.hypergrad.kkt import KKT

    return KKT(default_inner(s))


def _penalty(s: Setting) -> AbstractEstimator:
    from bilevel.hypergrad.penalty import Penalty

    return Penalty(default_inner(s), weight=s.penalty_weight(), extrapolate=True)


def _finite_difference(s: Setting) -> AbstractEstimator:
    from bilevel.hypergrad.finite_difference import FiniteDifference

    inner = _unrolled(s) if s.problem.problem.init is not None else default_inner(s)
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


def default_linear(like: Tensor) -> AbstractLinearSolver:
    """The linear solver that certificates use where none is given: conjugate gradients, accurate for the dtype."""
    from bilevel.solvers.cg import CG

    return CG(rtol=1e-10 if like.dtype == torch.float64 else 1e-5, max_steps=10 * like.shape[-1])


def reference(s: Setting) -> tuple[FlatEstimate, str]:
    """The implicit gradient as accurately as the dtype allows, and how it was computed; by `KKT` under constraints.

    Raises:
        ValueError: if implicit differentiation does not apply; the reference is then a central difference of Phi.
    """
    from bilevel.hypergrad.aid import AID
    from bilevel.hypergrad.finite_difference import FiniteDifference
    from bilevel.solvers.cg import CG
    from bilevel.solvers.dense import Dense
    from bilevel.solvers.newton import Newton

    if s.problem.problem.constraints is not None:
        return _kkt(s).estimate(s.problem, s.x, FlatStart(s.y0)), "the implicit gradient under constraints"
    tol = s.inner_tol() * 1e-2
    dense = s.y0.shape[-1] <= 200
    linear: AbstractLinearSolver = Dense() if dense else CG(rtol=1e-13 if s.double else 1e-6)
    start = FlatStart(s.y0)
    try:
        near = AID(default_inner(s), linear).estimate(s.problem, s.x, start)
        found = AID(Newton(tol=tol, max_steps=50), linear).estimate(s.problem, s.x, FlatStart(near.y, near.v))
        return found, f"the implicit gradient ({'dense' if dense else 'conjugate gradients'})"
    except (ValueError, NotImplementedError):
        found = FiniteDifference(_unrolled(s)).estimate(s.problem, s.x, start)
        return found, "central differences of Phi"


def budgeted(name: str, s: Setting, budget: int) -> AbstractEstimator:
    """The named estimator made to spend about `budget` gradients and products of g: half inner, half linear.

    Raises:
        ValueError: if there is no estimator of that name, or the budget is too small for it.
    """
    from bilevel.hypergrad.aid import AID
    from bilevel.hypergrad.esj import ESJ
    from bilevel.hypergrad.finite_difference import FiniteDifference
    from bilevel.hypergrad.first_order import FirstOrder
    from bilevel.hypergrad.itd import ITD
    from bilevel.hypergrad.kkt import KKT
    from bilevel.hypergrad.penalty import Penalty
    from bilevel.solvers.gradient_descent import GradientDescent
    from bilevel.solvers.iterate import Iterate
    from bilevel.solvers.lbfgs import LBFGS

    p, q = s.x.shape[-1], s.y0.shape[-1]
    directions = min(p, 20)
    spent_on = {  # how many gradients or products one inner step takes
        "itd": 2,
        "itd-truncated": 1,
        "itd-checkpointed": 3,
        "itd-forward": 1 + p,
        "one-step": 1,
        "first-order": 1,
        "esj": directions + 1,
        "penalty": 3,
        "finite-difference": 2 * p + 1,
    }
    if name not in _NAMED:
        raise ValueError(f"there is no estimator {name!r}. Names: {', '.join(_NAMED)}.")
    steps = budget // (2 if name.startswith(("aid", "kkt")) else spent_on[name])
    if steps < 1 or (name in ("aid-dense", "aid-nystrom") and budget <= 1):
        raise ValueError(f"a budget of {budget} oracle calls is too small for {name!r}.")
    inner: AbstractInnerSolver = Iterate(GradientDescent(), max_steps=steps)
    fast: AbstractInnerSolver = LBFGS(tol=0.0, max_steps=steps)
    constrained = s.problem.problem.constraints is not None
    if constrained:
        fast = default_inner(s)  # which takes its q products, whatever the budget
    if name.startswith("aid"):
        return AID(fast, _budgeted_linear(name, min(steps, q) if name in ("aid-dense", "aid-nystrom") else steps))
    if name == "kkt":
        return KKT(fast)
    if name == "esj":
        inner = fast if constrained else inner
        return ESJ(inner, directions=directions, radius=1e-4 if s.double else 1e-2, distribution="orthonormal")
    if name == "first-order":
        return FirstOrder(fast)
    if name == "penalty":
        return Penalty(fast, weight=s.penalty_weight(), extrapolate=True)
    if name == "finite-difference":
        return FiniteDifference(fast)
    truncate = {"itd-truncated": min(20, steps), "one-step": 1}.get(name)
    return ITD(inner, truncate=truncate, forward=name == "itd-forward", checkpoint=name == "itd-checkpointed")


def _budgeted_linear(name: str, steps: int) -> AbstractLinearSolver:
    from bilevel.solvers.cg import CG
    from bilevel.solvers.dense import Dense
    from bilevel.solvers.gmres import GMRES
    from bilevel.solvers.minres import MINRES
    from bilevel.solvers.neumann import Neumann
    from bilevel.solvers.nystrom import Nystrom

    solvers: dict[str, AbstractLinearSolver] = {
        "aid-cg": CG(rtol=0.0, max_steps=steps),
        "aid-neumann": Neumann(step=None, terms=steps),
        "aid-dense": Dense(),
        "aid-minres": MINRES(rtol=0.0, max_steps=steps),
        "aid-gmres": GMRES(rtol=0.0, max_steps=steps),
        "aid-nystrom": Nystrom(rank=steps, damping=None),
    }
    return solvers[name]


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
        default_linear,
        _NAMED["aid-cg"].build(s),
    )
