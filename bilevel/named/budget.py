"""Estimators by name that spend a given number of oracle calls."""

from __future__ import annotations

from bilevel._estimate import AbstractEstimator
from bilevel._inner import AbstractInnerSolver
from bilevel._linear import AbstractLinearSolver
from bilevel.named.setting import Setting, default_inner


def budgeted(name: str, s: Setting, budget: int) -> AbstractEstimator:
    """The named estimator made to spend about `budget` gradients and products of g: half inner, half linear.

    Raises:
        ValueError: if it is not known what that estimator spends, or the budget is too small for it.
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
    if name not in spent_on and not name.startswith(("aid", "kkt")):
        raise ValueError(f"it is not known what {name!r} spends. Pass an estimator instead of a budget.")
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
