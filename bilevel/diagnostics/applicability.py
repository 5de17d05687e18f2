"""Which estimators apply to a problem, by what was found of it."""

from __future__ import annotations

from bilevel.diagnostics.findings import Findings


def why_not_applicable(name: str, found: Findings) -> str:
    """Why the estimator of that name does not apply; empty if it does."""
    implicit, unrolled = name.startswith(("aid", "kkt")), name.startswith(("itd", "one-step"))
    by_values = name == "finite-difference"
    if "values" in found.wrong:
        return "f and g must run, and be finite, at (x, y0) first"
    if "g in y" in found.wrong:
        return "the derivative of g in y is not that of its values: no inner solver finds y*"
    if found.wrong & {"f in x", "f in y"} and not by_values:
        return "the derivative of f is not that of its values"
    if found.detached and not by_values and name != "esj":
        return "the derivative of grad_y g in x is zero to autograd: x is detached in g"
    if found.constrained and (implicit or unrolled or name == "penalty") and name != "kkt":
        return "y is constrained: grad_y g need not be zero at y*; use 'kkt'"
    if not found.second_order and (implicit or unrolled):
        return "an operation of g has no second derivative"
    if found.dependence == "start" and (implicit or name == "penalty"):
        return "y depends on x only through its start"
    if not found.definite and name in ("aid-cg", "aid-neumann", "aid-dense", "aid-nystrom", "kkt"):
        return "the inner Hessian is not positive definite at the solution"
    if found.dependence == "none" and not found.detached:
        return "y does not depend on x: Phi(x) = f(x, y*) needs no estimator"
    return ""
