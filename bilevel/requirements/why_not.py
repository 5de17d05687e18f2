"""Whether an estimator or an algorithm applies to a problem: the one place where what is declared is compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import MappingProxyType

from bilevel._estimate import AbstractRequiring
from bilevel._inner import AbstractInnerSolver
from bilevel._linear import AbstractLinearSolver, unmet
from bilevel._problem import BilevelProblem
from bilevel.inner_problems.kind import AbstractInnerProblem
from bilevel.inner_problems.kinds import inner_problem
from bilevel.requirements.properties import FOUND, Feature, Property


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
    kind = inner_problem(problem)
    offered = kind.offers | FOUND if problem.init is None else kind.offers | FOUND | {Property.start_in_x}
    missing = (estimator.requires - offered) | (estimator.requires & lacking.keys())
    if missing:
        needed = min(missing, key=list(Property).index)
        return refusal(estimator, lacking.get(needed, _NO_START if needed is Property.start_in_x else kind.refusal))
    whys = [_why_not_part(estimator, name, part, kind, indefinite) for name, part in _parts(estimator)]
    inside = (why_not(part, problem, lacking, indefinite) for _, part in _parts(estimator))
    return next((why for why in (*sorted(whys, key=_wholly), *inside) if why), "")


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
                f"`{_name(estimator)}({name}=...)` must heed {feature.value}. Got `{_name(part)}`, which ignores them."
                f" Use {_HEEDING[feature]}."
            )
    if isinstance(part, AbstractLinearSolver) and Property.stationary in kind.offers:
        lacks = unmet(part.demands, kind.operator)
        if lacks:
            other = f"Or take another `{name}=`: `{_name(part)}` {lacks}"
            return refusal(estimator, f"{kind.refusal} {other}")
        if indefinite and not part.tolerates_indefinite:
            return refusal(estimator, indefinite)
    return ""


_HEEDING = {
    Feature.constraints: "`QuadraticProgram`",
    Feature.prox: "`ProximalGradient`",
    Feature.own_steps: "`OwnSteps`",
}


def refusal(estimator: object, reason: str) -> str:
    """The text of a refusal: which estimator, and why."""
    return f"`{_name(estimator)}` does not apply: {reason}"


def _name(value: object) -> str:
    return type(value).__name__


def _parts(value: object) -> Iterator[tuple[str, object]]:
    """What a dataclass is made of, by the names of its fields."""
    if is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in fields(value))
