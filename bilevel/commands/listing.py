"""What there is, by name: for `bilevel list`, and for looking names up."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from bilevel._inner import AbstractInnerSolver
from bilevel._linear import AbstractLinearSolver, AbstractPreconditioner
from bilevel._optimizer import AbstractMinimizer, AbstractOptimizer, AbstractOuterDriver
from bilevel.arguments.nearest import nearest
from bilevel.named.registration import AUTO
from bilevel.portable.folded import folded

_SHORT = {"gd": "gradient-descent"}
_ROLES: dict[str, type] = {
    "linear solvers": AbstractLinearSolver,
    "preconditioners": AbstractPreconditioner,
    "inner solvers": AbstractInnerSolver,
    "optimizers": AbstractOptimizer,
}


def outer_methods() -> dict[str, Callable[..., Any]]:
    """The optimizers, minimizers and drivers that a name and a step length are enough to build, by name."""
    import bilevel.solvers

    found: dict[str, Callable[..., Any]] = {}
    for role in (AbstractOptimizer, AbstractMinimizer, AbstractOuterDriver):
        for cls in _classes(bilevel.solvers, role):
            needed = [p.name for p in inspect.signature(cls).parameters.values() if p.default is p.empty]
            if needed in ([], ["step"]):
                found[_kebab(cls.__name__)] = cls
    return found


def outer_method(name: str) -> Callable[..., Any]:
    """The outer method of that name.

    Raises:
        ValueError: if there is none.
    """
    methods = outer_methods()
    if _SHORT.get(name, name) not in methods:
        known = [*methods, *_SHORT]
        raise ValueError(f"there is no outer method {name!r}. {nearest(name, known)}Names: {', '.join(methods)}.")
    return methods[_SHORT.get(name, name)]


def contents() -> dict[str, dict[str, str]]:
    """By kind, every name with one line of description."""
    import bilevel.solvers
    from bilevel.algorithms.registry import available
    from bilevel.experiments.catalogue import experiments
    from bilevel.named.registry import estimators
    from bilevel.problems import catalogue

    found = {
        "problems": {name: entry.description for name, entry in catalogue().items()},
        "few-shot experiments": {name: entry.description for name, entry in experiments().items()},
        "estimators": estimators() | {AUTO: "the cheapest of them whose error meets 1 % on the problem at hand"},
    }
    for kind, role in _ROLES.items():
        found[kind] = {cls.__name__: _first_line(cls) for cls in _classes(bilevel.solvers, role)}
    short = {full: name for name, full in _SHORT.items()}
    found["outer methods"] = {
        name: _first_line(cls) + (f" (short: {short[name]})" if name in short else "")
        for name, cls in outer_methods().items()
    }
    found["algorithms"] = available()
    return found


def listing(*, as_json: bool) -> str:
    """The contents as text: for people, or as JSON."""
    found = contents()
    if as_json:
        return json.dumps(found, indent=2, ensure_ascii=False)
    width = max(len(name) for names in found.values() for name in names)
    return "\n\n".join(f"{kind}\n{_lines(names, width)}" for kind, names in found.items())


def literature(*, as_json: bool) -> str:
    """The test problems of the literature as a table, or as JSON: class, name, sizes, best known value, source."""
    from bilevel.problems.literature.collection import STATEMENTS

    if as_json:
        rows = [
            {
                "name": each.name,
                "class": each.kind,
                "sizes": list(each.sizes),
                "best": {"x": list(each.best.x), "y": list(each.best.y), "f": each.best.f, "g": each.best.g},
                "certain": each.certain,
                "source": each.source,
            }
            for each in STATEMENTS.values()
        ]
        return json.dumps(rows, indent=2, ensure_ascii=False)
    width = max(map(len, STATEMENTS))
    kinds = max(len(each.kind) for each in STATEMENTS.values())
    head = f"{'class':<{kinds}}  {'name':<{width}}  x  y  best known f"
    return "\n".join(
        [head]
        + [
            f"{each.kind:<{kinds}}  {each.name:<{width}}  {each.sizes[0]}  {each.sizes[1]}  {each.best.f:.6g}"
            + ("" if each.certain else " *")
            for each in STATEMENTS.values()
        ]
        + ["* as the source says; no numerical evidence beyond it that this is the best"]
    )


def _lines(names: Mapping[str, str], width: int) -> str:
    return "\n".join(folded(description, f"  {name:<{width}}  ") for name, description in names.items())


def _classes(module: ModuleType, role: type) -> list[type]:
    """The concrete classes of a module's namespace that play a role, by name."""
    found = {value for value in vars(module).values() if inspect.isclass(value) and issubclass(value, role)}
    return sorted((cls for cls in found if not inspect.isabstract(cls)), key=lambda cls: cls.__name__)


def _first_line(cls: object) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _kebab(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()
