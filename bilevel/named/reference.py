"""What estimators are measured against: the hypergradient as accurately as the dtype allows, known to be right."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._apply import apply_estimator
from bilevel._calculus import outer_gradients
from bilevel._estimate import FlatEstimate, FlatStart
from bilevel._linear import AbstractLinearSolver
from bilevel._result import BilevelError, Status, Tally
from bilevel.inner_problems.kinds import inner_problem
from bilevel.named.implicit import implicit_name
from bilevel.named.setting import Setting
from bilevel.named.slopes import Slopes, slopes
from bilevel.requirements.properties import Property

_DENSE = 200  # up to so many y the q products and the factorization take less than a second
_COORDINATES = 200  # up to so many x the 2p inner solves of differences stand in for an implicit gradient that is wrong
_DISTANCES = 3
_DIFFERENCES = "central differences of Phi"
_FLOOR = (Status.successful, Status.stagnated, Status.line_search_failed)  # as good as one can be, or checked anyhow


@final
@dataclass(frozen=True, eq=False)
class Reference:
    """A hypergradient that others are measured against.

    Attributes:
        estimate: the hypergradient.
        how: how it was computed, and why not otherwise.
        off: how far it is from differences of Phi along a random direction, scaled to the whole; of differences, how
            far those of two lengths are apart. It is limited by the accuracy of the differences.
        wrong: why the implicit gradient was not taken, though it applies; empty if it was, or does not.
    """

    estimate: FlatEstimate
    how: str
    off: float
    wrong: str = ""


def reference(s: Setting) -> Reference:
    """The implicit gradient as accurately as the dtype allows; by `KKT` under constraints.

    Before it is taken for right it has to agree with a difference of Phi along a random direction, from accurate inner
    solutions on both sides: estimators that share what they do not see, such as a kink of g at y*, agree with each
    other. Where it does not, or does not apply, the reference is a central difference of Phi, and must be the same at
    two lengths.

    Cost: beside the gradient up to seven inner solves; of differences 4p + 2.

    Raises:
        BilevelError: if there is none: Phi has a kink at x, or neither can be trusted.
    """
    s = replace(s, problem=s.problem.with_tally(Tally()))
    kind = inner_problem(s.problem.problem)
    if Property.stationary not in kind.offers:
        return _differences(s, "", unrolled=True)
    try:
        found, how = _implicit(s)
    except (ValueError, NotImplementedError):
        return _differences(s, "", unrolled=Property.steps in kind.offers)
    statuses = [report.status for report in found.reports]
    if Status.kink in statuses:  # whatever else failed there: what differentiates nothing can answer all the same
        return _or_differences(s, found, how, Status.kink, "g has a kink at y*")
    status = Status.worst(statuses)
    if not bool(found.grad.isfinite().all()) or not bool(found.y.isfinite().all()):
        raise _none(found, how, status, "")
    e = _direction(s.x)
    along = _slopes(s, found, e)
    floor = _floor(s, found)
    if along.one_sided(floor):
        raise _none(found, how, Status.one_sided, f"slopes {along.left[-1]:.5g} and {along.right[-1]:.5g}")
    slope, scale = float(found.grad @ e), s.x.numel() ** 0.5
    off = along.off(slope)
    size = max(abs(slope), abs(along.central[0]), float(torch.linalg.vector_norm(found.grad)) / scale)
    if status in _FLOOR and off <= (0.01 if s.double else 0.05) * size + floor:
        return Reference(found, how, off * scale)
    if status not in _FLOOR and status is not Status.weakly_active:
        raise _none(found, how, status, "")
    why = f"{how} is {slope:.5g} along a line where differences are {along.central[-1]:.5g}"
    return _or_differences(s, found, how, status, why)


def _or_differences(s: Setting, found: FlatEstimate, how: str, status: Status, why: str) -> Reference:
    """Differences of Phi in the place of an implicit gradient that is wrong; of few enough outer variables."""
    if s.x.numel() > _COORDINATES:
        raise _none(found, how, Status.worst((status, Status.kink)), why)
    return _differences(s, why, unrolled=False)


def _implicit(s: Setting) -> tuple[FlatEstimate, str]:
    """The implicit gradient of the kind of inner problem, and its name.

    Raises:
        ValueError: if implicit differentiation does not apply.
    """
    from bilevel.hypergrad.aid import AID
    from bilevel.named.builders import kkt
    from bilevel.solvers.cg import CG
    from bilevel.solvers.dense import Dense
    from bilevel.solvers.gmres import GMRES
    from bilevel.solvers.newton import Newton

    start = FlatStart(s.y0)
    name = implicit_name(s.problem, s.x, s.y0)
    if name == "kkt":
        return apply_estimator(kkt(s), s.problem, s.x, start), "the implicit gradient under constraints"
    kind = inner_problem(s.problem.problem)
    dense = s.y0.shape[-1] <= _DENSE
    linear: AbstractLinearSolver = Dense() if dense else CG(rtol=1e-13 if s.double else 1e-6)  # some roundings
    if Property.smooth not in kind.offers:
        definite = kind.operator.positive_definite and name != "aid-gmres"
        general = linear if dense or definite else GMRES(rtol=1e-13 if s.double else 1e-6)
        found = apply_estimator(AID(s.inner(), general), s.problem, s.x, start)
        return found, "the implicit gradient of the inner problem"
    tol = s.inner_tol() * 1e-2  # two digits beyond the names' own tolerance, which are measured against it
    near = apply_estimator(AID(s.inner(), linear), s.problem, s.x, start)
    how = f"the implicit gradient ({'dense' if dense else 'conjugate gradients'})"
    if Status.kink in [report.status for report in near.reports]:
        return near, how
    # From an accurate y Newton's method doubles the digits a step: 50 end what does not converge.
    return apply_estimator(AID(Newton(tol=tol, max_steps=50), linear), s.problem, s.x, FlatStart(near.y, near.v)), how


def _slopes(s: Setting, found: FlatEstimate, e: Tensor) -> Slopes:
    return slopes(s.problem, s.x, found.y, s.inner(), e, found.v, _DISTANCES)


def _differences(s: Setting, wrong: str, unrolled: bool) -> Reference:
    """Central differences of Phi, if those of two lengths are the same.

    Raises:
        BilevelError: if they are not, or Phi has a kink at x.
    """
    from bilevel.hypergrad.finite_difference import FiniteDifference

    inner = s.unrolled() if unrolled else s.inner()
    # The tolerance of y comes over the step, as for the name; steps of the problem's own have none.
    exact = unrolled and bool(s.features or s.problem.problem.init is not None)
    step = torch.finfo(s.x.dtype).eps ** (1 / 3) if exact else 1e-4 if s.double else 2e-2
    found, other = (
        apply_estimator(FiniteDifference(inner, step=each), s.problem, s.x, FlatStart(s.y0))
        for each in (step, 4 * step)
    )
    how = f"{_DIFFERENCES}, as {wrong}" if wrong else _DIFFERENCES
    status = Status.worst(report.status for report in found.reports)
    off = float(torch.linalg.vector_norm(found.grad - other.grad))
    size = max(float(torch.linalg.vector_norm(each.grad)) for each in (found, other))
    floor = _floor(s, found) * s.x.numel() ** 0.5
    if status is Status.one_sided or not off <= (0.02 if s.double else 0.1) * size + floor:
        raise _none(found, how, status, f"at another length they are off by {off:.3g} of {size:.3g}")
    return Reference(found, how, off, wrong)


def _floor(s: Setting, found: FlatEstimate) -> float:
    """How large a slope differences take for none: hypergradients are small where x is optimal."""
    value, fx, fy = outer_gradients(s.problem, s.x, found.y)
    size = abs(float(value)) + float(torch.linalg.vector_norm(fx)) + float(torch.linalg.vector_norm(fy))
    return float(torch.finfo(s.x.dtype).eps ** (1 / 3) * size)


def _none(found: FlatEstimate, how: str, status: Status, words: str) -> BilevelError:
    failed = [str(report) for report in found.reports if not report.status.ok]
    said = failed if any(report.status is status for report in found.reports) else [status.value, *failed]
    return BilevelError(
        f"there is no reference to measure estimators against: {how} cannot be trusted"
        f"{f' ({words})' if words else ''}. {' '.join(said)}",
        status,
        found,
    )


def _direction(x: Tensor) -> Tensor:
    """A unit vector, the same on every device and in every call."""
    generator = torch.Generator(device="cpu").manual_seed(1)
    e = torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x)
    unit: Tensor = e / torch.linalg.vector_norm(e)
    return unit
