"""What estimators are measured against: the hypergradient as accurately as the dtype allows."""

from __future__ import annotations

from bilevel._estimate import FlatEstimate, FlatStart
from bilevel._linear import AbstractLinearSolver
from bilevel.named.setting import Setting, default_inner, default_unrolled


def reference(s: Setting) -> tuple[FlatEstimate, str]:
    """The implicit gradient as accurately as the dtype allows, and how it was computed; by `KKT` under constraints.

    Raises:
        ValueError: if implicit differentiation does not apply; the reference is then a central difference of Phi.
    """
    from bilevel.hypergrad.aid import AID
    from bilevel.hypergrad.finite_difference import FiniteDifference
    from bilevel.hypergrad.kkt import KKT
    from bilevel.solvers.cg import CG
    from bilevel.solvers.dense import Dense
    from bilevel.solvers.newton import Newton

    if s.problem.problem.constraints is not None:
        return KKT(default_inner(s)).estimate(
            s.problem, s.x, FlatStart(s.y0)
        ), "the implicit gradient under constraints"
    tol = s.inner_tol() * 1e-2
    dense = s.y0.shape[-1] <= 200
    linear: AbstractLinearSolver = Dense() if dense else CG(rtol=1e-13 if s.double else 1e-6)
    start = FlatStart(s.y0)
    try:
        near = AID(default_inner(s), linear).estimate(s.problem, s.x, start)
        found = AID(Newton(tol=tol, max_steps=50), linear).estimate(s.problem, s.x, FlatStart(near.y, near.v))
        return found, f"the implicit gradient ({'dense' if dense else 'conjugate gradients'})"
    except (ValueError, NotImplementedError):
        found = FiniteDifference(default_unrolled(s)).estimate(s.problem, s.x, start)
        return found, "central differences of Phi"
