"""What estimators are measured against: the hypergradient as accurately as the dtype allows."""

from __future__ import annotations

from bilevel._estimate import FlatEstimate, FlatStart
from bilevel._linear import AbstractLinearSolver
from bilevel.inner_problems.kinds import inner_problem
from bilevel.named.implicit import implicit_name
from bilevel.named.setting import Setting
from bilevel.requirements.properties import Property

_DENSE = 200  # up to so many y the q products and the factorization take less than a second
_DIFFERENCES = "central differences of Phi"


def reference(s: Setting) -> tuple[FlatEstimate, str]:
    """The implicit gradient as accurately as the dtype allows, and how it was computed; by `KKT` under constraints.

    Raises:
        ValueError: if implicit differentiation does not apply; the reference is then a central difference of Phi.
    """
    from bilevel._apply import apply_estimator
    from bilevel.hypergrad.aid import AID
    from bilevel.hypergrad.finite_difference import FiniteDifference
    from bilevel.hypergrad.kkt import KKT
    from bilevel.solvers.cg import CG
    from bilevel.solvers.dense import Dense
    from bilevel.solvers.gmres import GMRES
    from bilevel.solvers.newton import Newton

    start = FlatStart(s.y0)
    if implicit_name(s.problem) == "kkt":
        return apply_estimator(KKT(s.inner()), s.problem, s.x, start), "the implicit gradient under constraints"
    kind = inner_problem(s.problem.problem)
    if Property.stationary not in kind.offers:
        # The tolerance of y comes over the step, as for the name; steps of the problem's own have none.
        step = None if s.features or s.problem.problem.init is not None else 1e-4 if s.double else 2e-2
        return apply_estimator(FiniteDifference(s.unrolled(), step=step), s.problem, s.x, start), _DIFFERENCES
    tol = s.inner_tol() * 1e-2  # two digits beyond the names' own tolerance, which are measured against it
    dense = s.y0.shape[-1] <= _DENSE
    linear: AbstractLinearSolver = Dense() if dense else CG(rtol=1e-13 if s.double else 1e-6)  # some roundings
    try:
        if Property.smooth not in kind.offers:
            general = linear if dense or kind.operator.positive_definite else GMRES(rtol=1e-13 if s.double else 1e-6)
            found = apply_estimator(AID(s.inner(), general), s.problem, s.x, start)
            return found, "the implicit gradient of the inner problem"
        near = apply_estimator(AID(s.inner(), linear), s.problem, s.x, start)
        # From an accurate y Newton's method doubles the digits a step: 50 end what does not converge.
        exact = AID(Newton(tol=tol, max_steps=50), linear)
        found = apply_estimator(exact, s.problem, s.x, FlatStart(near.y, near.v))
        return found, f"the implicit gradient ({'dense' if dense else 'conjugate gradients'})"
    except (ValueError, NotImplementedError):
        steps = Property.steps in kind.offers
        found = apply_estimator(FiniteDifference(s.unrolled() if steps else s.inner()), s.problem, s.x, start)
        return found, _DIFFERENCES
