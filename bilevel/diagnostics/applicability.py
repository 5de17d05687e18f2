"""Which estimators apply to a problem: what they declare against what was found of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from bilevel._estimate import AbstractEstimator
from bilevel._result import Status
from bilevel.diagnostics.findings import Findings
from bilevel.diagnostics.subject import Subject
from bilevel.named.registry import build
from bilevel.requirements.kinks import SEEN_BY
from bilevel.requirements.properties import START_ONLY, Property
from bilevel.requirements.why_not import why_not

# Enough for every name to take a step; estimators of a budget are built without the solves that accurate defaults take.
_BUDGET = 10_000
_UNSOLVED = (
    "g has a kink at the inner solution, to which no gradient shows the way, and the inner solver does not meet its"
    " tolerance there. Give a non-smooth term as `prox=`, or replace it by a smooth one."
)
_PHI = (
    "the derivative of Phi that those of the inner problem give is not that of its values: x is detached in a part of"
    " it. Use x itself there, or 'esj' or 'finite-difference'."
)


def why_not_applicable(name: str, subject: Subject, found: Findings) -> str:
    """Why the estimator of that name does not apply; empty if it does. What `check` lists, and `compare` heeds."""
    try:
        return why_not_here(lambda: _built(name, subject), subject, found)
    except (ValueError, NotImplementedError) as error:
        return str(error)


def why_not_here(build: Callable[[], AbstractEstimator], subject: Subject, found: Findings) -> str:
    """The same of an estimator that is built once nothing that was found speaks against all of them.

    Raises:
        ValueError: if it cannot be built.
    """
    if "values" in found.wrong:
        return "f and g must run, and be finite, at (x, y0) first"
    if "g in y" in found.wrong:
        return "the derivative of g in y is not that of its values: no inner solver finds y*"
    indefinite = "" if found.definite else "the inner Hessian is not positive definite at the solution"
    if found.dependence == "none" and not found.detached:
        return "y does not depend on x: Phi(x) = f(x, y*) needs no estimator"
    why = why_not(build(), subject.problem.problem, _lacking(found), indefinite)
    return why or (_UNSOLVED if found.kinked and not found.solvable else "")


def _lacking(found: Findings) -> dict[Property, str]:
    """What an estimator may require and the problem was found not to have, each with the reason."""
    lacking: dict[Property, str] = {}
    if found.no_condition:
        lacking[Property.stationary] = found.no_condition
    if "Phi" in found.wrong:
        lacking |= dict.fromkeys(SEEN_BY, _PHI)
    if found.kinked:
        lacking |= dict.fromkeys(SEEN_BY, Status.kink.value)
    if found.wrong & {"f in x", "f in y"}:
        lacking[Property.outer_gradient] = "the derivative of f is not that of its values"
    if found.wrong & {"T in x", "T in y"}:
        lacking[Property.second_derivatives] = "the derivative of T is not that of its values"
    if not found.second_order:
        lacking[Property.second_derivatives] = "an operation of g has no second derivative"
    if found.detached:
        reason = "the derivative of grad_y g in x is zero to autograd: x is detached in g"
        lacking |= {Property.second_derivatives: reason, Property.beyond_start: reason}
    elif found.dependence == "start":
        lacking[Property.beyond_start] = START_ONLY
    return lacking


def _built(name: str, subject: Subject) -> AbstractEstimator:
    try:
        return build(name, replace(subject.setting, budget=_BUDGET))
    except ValueError:  # a registered name whose builder knows no budgets
        return build(name, subject.setting)
