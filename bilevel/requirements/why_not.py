"""Whether an estimator or an algorithm applies to a problem: the one place where what is declared is compared."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from bilevel._estimate import AbstractRequiring
from bilevel._inner import AbstractInnerSolver
from bilevel._linear import AbstractLinearSolver, unmet
from bilevel._problem import BilevelProblem
from bilevel.inner_problems.kind import AbstractInnerProblem
from bilevel.inner_problems.kinds import inner_problem
from bilevel.requirements.iterations import parts_of, why_iteration
from bilevel.requirements.properties import FOUND, Feature, Property, implied


def why_not(
    estimator: object,
    problem: BilevelProblem,
    lacking: Mapping[Property, str] = MappingProxyType({}),
    indefinite: str = "",
) -> str:
    """Why an estimator, or a whole algorithm, does not apply to a problem, as far as that is declared; empty: it does.

    What it requires is compared with what the kind of inner problem offers, what the kind has beyond a smooth
    objective with what its inner solvers heed, and what its linear solvers demand with what the kind declares of its
    linearization. The solvers are those among the values that it is made of.

    Args:
        estimator: the estimator, or the algorithm.
        problem: the problem.
        lacking: properties that the problem was found to lack, each with the reason.
        indefinite: why the linearization is not positive definite, where it was found not to be.
    """
    if not isinstance(estimator, AbstractRequiring):
        return ""
    kind, required = inner_problem(problem), estimator.requires
    offers = kind.offers
    own = why_iteration(estimator)
    if own and required & _OF_SOLUTIONS:
        first = min(required & _OF_SOLUTIONS, key=list(Property).index)
        return refusal(estimator, _OWN.format(own=own, needed=first.value))
    missing = _missing(frozenset(required), frozenset(offers))
    if problem.init is not None:
        missing -= {Property.start_in_x}
    if lacking:
        missing |= required & lacking.keys()
    if missing:
        needed = min(missing, key=list(Property).index)
        return refusal(estimator, lacking.get(needed, _NO_START if needed is Property.start_in_x else kind.refusal))
    if Property.stationary in offers and any(unmet(each.demands, kind.operator) for each in estimator.solves_with):
        return refusal(estimator, kind.refusal)
    parts = [(name, getattr(estimator, name)) for name in parts_of(type(estimator))]
    whys = [why_not(part, problem, lacking, indefinite) for _, part in parts if _requires(part.__class__)]
    if indefinite or kind.features or not kind.operator.positive_definite:  # or any solver will do
        whys += sorted((_why_not_part(estimator, *part, kind, indefinite) for part in parts), key=_wholly)
    return next((why for why in whys if why), "")


_OF_SOLUTIONS = frozenset({Property.stationary, Property.minimum})
_OWN = (
    "{own}, so that y is what the steps make of their start, while it is required that {needed}. Use `ITD`, `ESJ` or"
    " `FiniteDifference`, or settings that are numbers."
)
_NO_START = "the start of y does not depend on x. Give the problem `init=lambda x: x`, or use another estimator."


def _wholly(why: str) -> bool:
    """False of a refusal of the estimator as a whole, which comes before that of an argument."""
    return "does not apply" not in why


def _why_not_part(estimator: object, name: str, part: object, kind: AbstractInnerProblem, indefinite: str) -> str:
    """Why a solver that the estimator is made of cannot be used for this kind of inner problem."""
    if isinstance(part, AbstractInnerSolver) and kind.features:
        ignored = kind.features - part.heeds
        if ignored:
            feature = min(ignored, key=list(Feature).index)
            return (
                f"`{_name(estimator)}({name}=...)` must heed {feature.value}. Got `{_name(part)}`, which"
                f" ignores {_PRONOUN.get(feature, 'them')}. Use {_HEEDING[feature]}."
            )
    if isinstance(part, AbstractLinearSolver) and Property.stationary in kind.offers:
        lacks = unmet(part.demands, kind.operator)
        if lacks:
            other = f"Or take another `{name}=`: `{_name(part)}` {lacks}"
            return refusal(estimator, f"{kind.refusal} {other}")
        if indefinite and not part.tolerates_indefinite:
            return refusal(estimator, indefinite)
    return ""


_PRONOUN = {Feature.prox: "it", Feature.cones: "it", Feature.fixed_point: "it"}
_HEEDING = {
    Feature.constraints: "`QuadraticProgram`, or `InteriorPoint` where g is not quadratic",
    Feature.nonlinear_constraints: "`InteriorPoint`",
    Feature.many_constraints: "`ProximalMultipliers`",
    Feature.cones: "`Clarabel`",
    Feature.prox: "`ProximalGradient`",
    Feature.own_steps: "`OwnSteps`",
    Feature.fixed_point: "`Anderson`, `Broyden` or, where the map contracts, `FixedPointIteration`",
}


def refusal(estimator: object, reason: str) -> str:
    """The text of a refusal: which estimator, and why."""
    return f"`{_name(estimator)}` does not apply: {reason}"


def _name(value: object) -> str:
    return type(value).__name__


@cache
def _missing(required: frozenset[Property], offers: frozenset[Property]) -> frozenset[Property]:
    """What is required and not offered; kept, as differences of sets take longer than all the rest does."""
    return required - implied(offers) - FOUND


@cache
def _requires(kind: type) -> bool:
    """Whether it is a class of what declares what it requires; kept, as it is asked before every estimate."""
    return issubclass(kind, AbstractRequiring)
