"""Algorithms by name, with safe step lengths derived where the problem is first met."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, final

from bilevel._calculus import FiniteDifferences
from bilevel._validate import nearest
from bilevel.algorithms.algorithm import AbstractAlgorithm
from bilevel.algorithms.amigo import AmIGO
from bilevel.algorithms.bsa import BSA, TTSA
from bilevel.algorithms.fdehbo import FdeHBO
from bilevel.algorithms.fsla import FSLA
from bilevel.algorithms.ma_soba import MASOBA
from bilevel.algorithms.mrbo import MRBO, SUSTAIN
from bilevel.algorithms.saba import SABA
from bilevel.algorithms.schedule import Power
from bilevel.algorithms.soba import SOBA
from bilevel.algorithms.srba import SPABA, SRBA
from bilevel.algorithms.step_lengths import REDUCED, inner_step, outer_step
from bilevel.algorithms.stocbio import StocBiO
from bilevel.algorithms.vrbo import VRBO
from bilevel.named.implicit import IMPLICIT
from bilevel.named.registration import AUTO, demand_registration
from bilevel.named.setting import Setting
from bilevel.requirements.properties import DoesNotApply
from bilevel.requirements.why_not import why_not

Build: TypeAlias = Callable[[Setting], AbstractAlgorithm[Any]]

DESCENT = "descent"  # built by `minimize`, whose `estimator=`, `outer=` and the like are its arguments
_CONSTANT_FOR = 1000  # steps before the default schedule has much effect: a transient, which needs long steps


def stepped(make: Callable[[float, float], AbstractAlgorithm[Any]], share: float = 1.0) -> Build:
    """A builder of what is made of rho and gamma, derived from the problem; rho is so much of the longest step."""

    def build(s: Setting) -> AbstractAlgorithm[Any]:
        why = why_not(make(1.0, 1.0), s.problem.problem)  # before curvatures are looked for that may not exist
        if why:
            raise ValueError(why)
        rho = share * inner_step(s)
        return make(rho, outer_step(s, rho))

    return build


def _soba(rho: float, gamma: float) -> SOBA:
    return SOBA(rho, gamma, schedule=Power(0.5, after=_CONSTANT_FOR))


def _differences(kind: Callable[..., AbstractAlgorithm[Any]]) -> Build:
    return stepped(lambda rho, gamma: kind(rho, gamma, products=FiniteDifferences()), REDUCED)


@final
@dataclass(frozen=True)
class NamedAlgorithm:
    """A name's description and how its algorithm is built where the problem is first met."""

    description: str
    build: Build


_BUILT_IN = {
    name: NamedAlgorithm(description, build)
    for name, build, description in (
        ("soba", stepped(_soba), "one loop: y, v and x step together, each along a batch; no inner or linear solves"),
        (
            "saba",
            stepped(SABA, REDUCED),
            "soba with tables of what blocks said: constant steps converge",
        ),
        ("ma-soba", stepped(MASOBA), "soba whose outer direction is a moving average"),
        ("srba", stepped(SRBA, REDUCED), "recursive differences, all the data now and then: converges without tables"),
        ("srba-fd", _differences(SRBA), "srba from first derivatives only"),
        ("spaba", stepped(SPABA, REDUCED), "srba that decides by a coin when to see all the data"),
        ("spaba-fd", _differences(SPABA), "spaba from first derivatives only"),
        ("fsla", stepped(FSLA), "y, v and x in turns, with recursive momentum on x"),
        ("amigo", stepped(AmIGO), "ten steps of y, ten of v, one of x, all started warm"),
        ("stocbio", stepped(StocBiO), "ten steps of y, then a Neumann series over batches, one step of x"),
        ("bsa", stepped(BSA), "ten steps of y, then a Neumann series of random length"),
        ("ttsa", stepped(TTSA), "one step of y, a Neumann series of random length, and two time scales"),
        ("sustain", stepped(SUSTAIN), "recursive momentum on y and x, with a Neumann series of random length"),
        ("mrbo", stepped(MRBO), "recursive momentum on y and x, with a Neumann series"),
        ("vrbo", stepped(VRBO), "recursive differences in an inner loop, with a Neumann series"),
        ("fdehbo", stepped(FdeHBO), "recursive momentum on y, v and x, from first derivatives only"),
    )
}
_REGISTERED: dict[str, NamedAlgorithm] = {}  # by users, in this process


def _named() -> dict[str, NamedAlgorithm]:
    return _BUILT_IN | _REGISTERED


def available() -> dict[str, str]:
    """The algorithms that `minimize(algorithm=...)` takes by name, each with one line of description.

    Example:
        >>> available()["soba"][:8]
        'one loop'
    """
    descent = "x moves by an optimizer along hypergradient estimates: the default, any estimator and outer method"
    named = {name: named.description for name, named in _named().items()}
    return {DESCENT: descent, **named, AUTO: "for finite sums: chosen for the problem, with steps that a sweep finds"}


def register_algorithm(name: str, build: Build, description: str) -> None:
    """Give an algorithm of your own a name for `minimize(algorithm=NAME)` and the command line.

    Call it at the top level of a module: a name is known in the process that has imported it.

    Args:
        name: one word.
        build: a function of one argument, from a setting (the flat problem on its first data as `setting.problem`, and
            where it is first met as `setting.x` and `setting.y0`) to the algorithm.
        description: one line.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if the name is taken or reserved ("auto", "implicit"), it is not one word, or the description
            not one line.

    Example:
        >>> register_algorithm("soba-small", lambda setting: SOBA(1e-3, 1e-4), "SOBA with small steps")
        >>> available()["soba-small"]
        'SOBA with small steps'
        >>> del _REGISTERED["soba-small"]
    """
    known = {IMPLICIT, *available()}  # an estimator's name that is the default, and would mislead here
    demand_registration("register_algorithm", name, build, description, known=known, registered=_REGISTERED)
    _REGISTERED[name] = NamedAlgorithm(description, build)


def unknown_algorithm(name: str) -> ValueError:
    """That there is no such algorithm, and which name comes nearest."""
    names = available()
    return ValueError(f"there is no algorithm {name[:100]!r}. {nearest(name, names)}Names: {', '.join(names)}.")


def resolve_algorithm(algorithm: AbstractAlgorithm[Any] | str, setting: Setting) -> AbstractAlgorithm[Any]:
    """An algorithm from a name or from itself.

    Raises:
        TypeError: if it is neither, or what was registered builds something else.
        ValueError: if there is no algorithm of that name, or it does not apply to the problem.
    """
    if isinstance(algorithm, AbstractAlgorithm):
        return algorithm
    if not isinstance(algorithm, str):
        got = f"the class {algorithm.__name__} itself" if isinstance(algorithm, type) else type(algorithm).__name__
        raise TypeError(
            f"`minimize(algorithm=...)` must be an algorithm such as `SOBA(0.1, 0.01)` or a name. Got {got}."
            f" Names: {', '.join(available())}."
        )
    if algorithm not in _named():
        raise unknown_algorithm(algorithm)
    try:
        found = _named()[algorithm].build(setting)
    except DoesNotApply as error:
        raise ValueError(f"the algorithm {algorithm!r} does not apply: {error.reason}") from error
    if not isinstance(found, AbstractAlgorithm):
        raise TypeError(f"the `build` that {algorithm!r} was registered with must return an algorithm. Got {found!r}.")
    return found
