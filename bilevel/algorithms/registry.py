"""Algorithms by name: those of the library, and those that users register."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, final

from bilevel.algorithms.algorithm import AbstractAlgorithm
from bilevel.arguments.nearest import nearest
from bilevel.named.implicit import IMPLICIT
from bilevel.named.registration import AUTO, demand_registration
from bilevel.named.setting import Setting
from bilevel.requirements.properties import DoesNotApply

Build: TypeAlias = Callable[[Setting], AbstractAlgorithm[Any]]

DESCENT = "descent"  # built by `minimize`, whose `estimator=`, `outer=` and the like are its arguments


@final
@dataclass(frozen=True)
class NamedAlgorithm:
    """A name's description and how its algorithm is built where the problem is first met."""

    description: str
    build: Build


_REGISTERED: dict[str, NamedAlgorithm] = {}  # by users, in this process


def _named() -> dict[str, NamedAlgorithm]:
    return _built_in() | _REGISTERED


@functools.cache
def _built_in() -> dict[str, NamedAlgorithm]:
    from bilevel.algorithms.table import ROWS  # every algorithm there is, where a name is asked for

    return {name: NamedAlgorithm(description, build) for name, build, description in ROWS}


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
        >>> register_algorithm(
        ...     "soba-small", lambda setting: SOBA(1e-3, 1e-4), "SOBA with small steps"
        ... )
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
