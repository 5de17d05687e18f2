"""What a run is: from the command line, and from what a resumed run recorded, to the arguments of `minimize`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, final

import torch

from bilevel._estimate import AbstractEstimator
from bilevel._flat import FlatProblem
from bilevel._instance import Instance
from bilevel._optimizer import AbstractOuterDriver
from bilevel._problem import check_signature
from bilevel._tree import ravel
from bilevel.algorithms.registry import DESCENT, available, unknown_algorithm
from bilevel.arguments.nearest import nearest
from bilevel.commands.arguments import split, takes
from bilevel.commands.listing import outer_method
from bilevel.commands.loading import load
from bilevel.named.registration import AUTO
from bilevel.named.registry import demand_names, resolve
from bilevel.outer.batches import first_batch

_KNOWN = {
    *("algorithm", "estimator", "outer", "outer_step", "max_steps", "tol", "data", "constraint", "warm_start"),
    "outer_inequalities",
}
_FIXED = ("algorithm", "estimator", "outer", "step", "seed", "device")  # what cannot change when a run is resumed


@final
@dataclass(frozen=True)
class Request:
    """The words of `bilevel run`; None where nothing was said."""

    problem: str
    algorithm: str | None = None
    estimator: str | None = None
    outer: str | None = None
    step: float | None = None
    steps: int | None = None
    tol: float | None = None
    seed: int | None = None
    seconds: float | None = None
    device: str | None = None
    arguments: tuple[str, ...] = ()
    out: str | None = None
    resume: bool = False
    force: bool = False
    checkpoint_seconds: float | None = None
    overwrite: bool = False
    keep_going: bool = False
    quiet: bool = False


@final
@dataclass(frozen=True, eq=False)
class Plan:
    """A run that is ready to start.

    Attributes:
        instance: the problem.
        options: keyword arguments of `minimize`.
        settings: what was asked for, as plain data: enough to ask for it again.
        notes: what a person should know before it starts.
    """

    instance: Instance
    options: dict[str, Any]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def plan(request: Request, recorded: Mapping[str, Any] | None) -> Plan:
    """What to run.

    Args:
        request: the command line.
        recorded: the settings of the run that is resumed, or None.

    Raises:
        ValueError: if a name is unknown, a value out of range, or a resumed run would become another one.
        TypeError: if the problem is none.
        ImportError: if a package is missing.
    """
    arguments = split(request.arguments)
    if recorded is not None:
        request, arguments = merge(request, arguments, recorded)
    instance, seeded = load(request.problem, arguments, request.seed, request.device)
    _demand_device(request, instance)
    known = instance.settings
    unknown = set(known) - _KNOWN
    if unknown:
        raise ValueError(
            f"the settings of {request.problem} have an unknown entry {sorted(unknown)[0]!r}."
            f" {nearest(sorted(unknown)[0], sorted(_KNOWN))}Known: {', '.join(sorted(_KNOWN))}."
        )
    algorithm = _algorithm(request, known)
    if algorithm is not None:
        return _of_algorithm(request, arguments, instance, algorithm, seeded)
    estimator = request.estimator if request.estimator is not None else known.get("estimator", "implicit")
    if isinstance(estimator, str) and estimator != AUTO:
        demand_names(estimator)
    asked, notes = estimator if isinstance(estimator, str) else None, []
    if request.seed is not None:
        chosen = _seeded(estimator, instance, request.seed)
        if chosen is None and not seeded:
            notes.append(f"--seed has no effect: neither {request.problem} nor the estimator draws random numbers.")
        estimator = estimator if chosen is None else chosen
    outer, name, step = _outer(request, instance)
    coupled = () if isinstance(outer, AbstractOuterDriver) else ("outer_inequalities",)  # a driver has its own way
    options = {"estimator": estimator, "outer": outer, **_common(request, known, "warm_start", *coupled)}
    settings = {
        "problem": request.problem,
        "set": arguments,
        "seed": request.seed,
        "algorithm": None if request.algorithm is None else DESCENT,
        "estimator": asked,
        "outer": name,
        "step": step,
        "steps": options["max_steps"],
        "tol": options["tol"],
        "device": request.device,
        "chosen": {
            "estimator": estimator if isinstance(estimator, str) else repr(estimator),
            "outer": "the default" if outer is None else repr(outer),
        },
    }
    return Plan(instance, options, settings, notes)


def _demand_device(request: Request, instance: Instance) -> None:
    """Refuse a device on which the problem is not: tensors that f and g close over are the problem's own.

    Raises:
        ValueError: saying where it is.
    """
    if request.device is None:
        return
    found = ravel(instance.x0, "x0")[1].device
    if found.type != torch.device(request.device).type:
        raise ValueError(
            f"`--device {request.device}` is not where {request.problem} is: its x0 is on {found}. A file's problem"
            f" follows the device where it makes tensors without naming one, or takes an argument `device`."
        )


def _algorithm(request: Request, known: Mapping[str, Any]) -> Any:
    """The whole algorithm that is asked for, or that the problem comes with; None: descent.

    Raises:
        ValueError: if there is no such algorithm, or it was given settings that belong to descent.
    """
    given = [f"--{name}" for name in ("estimator", "outer", "step") if getattr(request, name) is not None]
    if request.algorithm is None:  # what the problem comes with gives way to what is asked for
        algorithm = None if given else known.get("algorithm")
        return None if algorithm == DESCENT else algorithm
    if request.algorithm not in available():
        raise unknown_algorithm(request.algorithm)
    if request.algorithm == DESCENT:
        return None
    if given:
        belong = "belongs" if len(given) == 1 else "belong"
        raise ValueError(
            f"`--algorithm {request.algorithm}` chooses its own steps: leave out {' and '.join(given)}, which {belong}"
            f" to `--algorithm {DESCENT}`."
        )
    return request.algorithm


def _of_algorithm(
    request: Request, arguments: dict[str, str], instance: Instance, algorithm: Any, seeded: bool
) -> Plan:
    """The plan of a run of a whole algorithm."""
    notes = []
    if request.seed is not None and not seeded:
        notes.append(f"--seed has no effect: neither {request.problem} nor the algorithm draws random numbers.")
    options = {"algorithm": algorithm, **_common(request, instance.settings)}
    settings = {
        "problem": request.problem,
        "set": arguments,
        "seed": request.seed,
        "algorithm": algorithm if isinstance(algorithm, str) else None,
        "estimator": None,
        "outer": None,
        "step": None,
        "steps": options["max_steps"],
        "tol": options["tol"],
        "device": request.device,
        "chosen": {"algorithm": algorithm if isinstance(algorithm, str) else repr(algorithm)},
    }
    return Plan(instance, options, settings, notes)


def _common(request: Request, known: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """The arguments of `minimize` that have nothing to do with the algorithm, and those of `more` that are known."""
    return {
        "max_steps": request.steps if request.steps is not None else known.get("max_steps", 100),
        "tol": request.tol if request.tol is not None else known.get("tol"),
        **{key: known[key] for key in ("data", "constraint", *more) if key in known},
    }


def merge(request: Request, arguments: dict[str, str], recorded: Mapping[str, Any]) -> tuple[Request, dict[str, str]]:
    """A resumed run is what it was; only its number of steps and its tolerance may change.

    Raises:
        ValueError: if the command line says otherwise.
    """
    changed = [
        f"{name} {getattr(request, name)} (it was {_said(recorded.get(name))})"
        for name in _FIXED
        if getattr(request, name) is not None and getattr(request, name) != recorded.get(name)
    ]
    if PurePath(request.problem).name != PurePath(recorded["problem"]).name:
        changed.append(f"problem {request.problem} (it was {recorded['problem']})")
    for name, text in arguments.items():
        if recorded["set"].get(name) != text:
            changed.append(f"{name}={text} (it was {_said(recorded['set'].get(name))})")
    if changed:
        raise ValueError(
            f"`--resume` continues a run as it was begun; this would change {'; '.join(changed)}. Leave it out, or"
            f" start another run in another `--out`."
        )
    kept: dict[str, Any] = {
        name: recorded.get(name) for name in (*_FIXED, "steps", "tol") if getattr(request, name) is None
    }
    return dataclasses.replace(request, **kept), dict(recorded["set"])


def _said(value: object) -> object:
    return "not given" if value is None else value


def _seeded(estimator: AbstractEstimator | str, instance: Instance, seed: int) -> AbstractEstimator | None:
    """The estimator with this seed, or None if it takes none."""
    if not isinstance(estimator, AbstractEstimator):  # built as `minimize` would
        x, x_structure = ravel(instance.x0, "x0")
        y, y_structure = ravel(instance.y0, "y0")
        batch = first_batch(instance.settings.get("data"))
        check_signature(instance.problem, batch)
        flat = FlatProblem(instance.problem, x_structure, y_structure, batch)
        estimator = resolve(estimator, flat, x.detach().clone(), y.detach().clone())
    return estimator.with_seed(seed)


def _outer(request: Request, instance: Instance) -> tuple[Any, str | None, float | None]:
    """The outer method, its name and its step length, which belongs to the problem's own method unless it is given.

    None, None, None where nothing is said: `minimize` then takes the default that fits the estimator and the data. A
    step length alone is that of `Adam`.
    """
    known = instance.settings
    own = known.get("outer", "adam" if "outer_step" in known else None)
    if request.outer is None and not (own is None or isinstance(own, str)):
        if request.step is None:
            return own, None, None
        raise ValueError(f"the outer method of {request.problem} is {own!r}: `--step` needs `--outer NAME`.")
    name = own if request.outer is None else request.outer
    if name is None and request.step is None:
        return None, None, None
    name = "adam" if name is None else name
    build, step = outer_method(name), request.step
    if step is None and isinstance(own, str) and build is outer_method(own):
        step = known.get("outer_step")
    if not takes(build, "step"):
        if request.step is not None:
            raise ValueError(f"`--outer {name}` chooses its own steps: leave out `--step`.")
        return build(), name, None
    if step is None and name == "adam":
        return build(step=0.05), name, None
    if step is None:
        raise ValueError(f"`--outer {name}` needs a step length: add `--step`.")
    return build(step=step), name, step
