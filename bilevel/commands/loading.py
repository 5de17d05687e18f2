"""From PROBLEM and the values of `--set` to an instance."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem
from bilevel.arguments.nearest import nearest
from bilevel.commands.arguments import bind, takes
from bilevel.commands.home import Home

if TYPE_CHECKING:
    from bilevel.few_shot.experiment import Experiment

LITERATURE = "literature:"  # before the name of a test problem
_LOADED: dict[tuple[str, int, int], ModuleType] = {}  # by path, time and size


def load(
    problem: str, arguments: Mapping[str, str], seed: int | None, device: str | None = None
) -> tuple[Instance, bool]:
    """The instance that PROBLEM names, and whether the seed was used in building it.

    Args:
        problem: a name of the catalogue, `literature:NAME`, or `my_file.py:NAME`.
        arguments: what `--set` gave, as text; typed from the signature of the function that builds the instance.
        seed: passed to that function if it takes one.
        device: likewise; None: the function's own.

    Raises:
        ValueError: if there is no such problem, or it does not take these arguments.
        TypeError: if NAME is nothing that can be run.
        ImportError: if a package is missing.
    """
    if is_experiment(problem):
        experiment, seeded = load_experiment(problem, arguments, seed)
        return experiment.instance(0 if seed is None else seed), seeded
    own = _own(problem)
    if own is not None:
        return _instance(problem, own[1], own[0], arguments, seed, device)
    if problem.startswith(LITERATURE):
        from bilevel.problems import literature

        _refuse_arguments(problem, arguments)
        return literature.load(problem.removeprefix(LITERATURE)), False
    from bilevel.experiments.catalogue import experiments
    from bilevel.problems import catalogue

    known = catalogue()
    if problem not in known:
        near = nearest(problem, [*known, *experiments()])
        raise ValueError(
            f"there is no problem {problem!r}. {near}`bilevel list` shows the names; a problem of your own is"
            f" my_file.py:NAME."
        )
    return _instance(problem, known[problem].build, None, arguments, seed, device)


def is_experiment(problem: str) -> bool:
    """Whether PROBLEM names a few-shot experiment: of the library, or an `Experiment` in a file.

    A function in a file counts if it is annotated to return one: what it returns is not known before it is called.
    """
    from bilevel.experiments.catalogue import experiments
    from bilevel.few_shot.experiment import Experiment

    own = _own(problem)
    if own is None:
        return problem in experiments()
    returned = getattr(own[1], "__annotations__", {}).get("return")
    name = returned if isinstance(returned, str) else getattr(returned, "__name__", "")
    return isinstance(own[1], Experiment) or name.rpartition(".")[2] == "Experiment"


def load_experiment(problem: str, arguments: Mapping[str, str], seed: int | None) -> tuple[Experiment, bool]:
    """The few-shot experiment of that name, and whether the seed was used in building it; see :func:`load`."""
    from bilevel.experiments.catalogue import experiments
    from bilevel.few_shot.experiment import Experiment

    own = _own(problem)
    if own is None:
        module, build = None, experiments()[problem].build
    elif isinstance(own[1], Experiment):
        _refuse_arguments(problem, arguments)
        return own[1], False
    else:
        module, build = own
    experiment = _built(problem, build, module, arguments, seed)
    if not isinstance(experiment, Experiment):
        raise TypeError(f"{problem} must return an Experiment, as it says. Got {type(experiment).__name__}.")
    return experiment, takes(build, "seed") and seed is not None


def _own(problem: str) -> tuple[ModuleType, Any] | None:
    """The module and the member that `my_file.py:NAME` names; None where PROBLEM is no such name."""
    path, colon, name = problem.rpartition(":")
    if colon and path.endswith(".py"):
        module = _module(Path(path))
        return module, _member(module, path, name)
    if problem.endswith(".py"):
        if Path(problem).is_dir():
            raise ValueError(f"{problem!r} is a folder: name a Python file, and a problem in it, as file.py:NAME.")
        raise ValueError(f"{problem!r} is a file: say which problem in it, as {problem}:NAME.")
    return None


def _module(path: Path) -> ModuleType:
    """The file's module: executed once in a process, and again only where it has changed."""
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder: name a Python file, and a problem in it, as file.py:NAME.")
    if not path.is_file():
        if path.is_symlink():
            raise ValueError(f"{str(path)!r} is a link that leads to no file.")
        others = [file.name for file in path.parent.glob("*.py") if file.is_file()] if path.parent.is_dir() else []
        near = nearest(path.name, others)
        raise ValueError(f"there is no file {str(path)!r}. {near}".rstrip())
    about = path.stat()
    key = str(path.resolve()), about.st_mtime_ns, about.st_size
    if key not in _LOADED:
        _LOADED[key] = _executed(path)
    return _LOADED[key]


def _executed(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # it may import its neighbours, then and later
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickle look there
    home = Home()
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except ImportError as error:
        raise ImportError(f"{_where(path, error)}: {error}") from error
    except BaseException as error:  # `sys.exit()` too: it is not for a file that is looked into to end what looks
        raise ValueError(f"{_where(path, error)}: {_said(error)}") from error
    finally:
        home.back_from(str(path))
    return module


def _said(error: BaseException) -> str:
    """Its type and what it says, if anything."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _where(path: Path, error: BaseException) -> str:
    """`file.py:12`: the last line of the file that the error passed through."""
    if isinstance(error, SyntaxError):
        return f"{error.filename or path}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _member(module: ModuleType, path: str, name: str) -> Any:
    if not hasattr(module, name):
        runnable = [
            key
            for key, value in vars(module).items()
            if isinstance(value, BilevelProblem | Instance)
            or (inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_"))
        ]
        found = f"It has: {', '.join(runnable)}." if runnable else "It defines no problem and no function."
        raise ValueError(f"{path} has no {name!r}. {nearest(name, runnable)}{found}")
    return getattr(module, name)


def _instance(
    problem: str,
    found: Any,
    module: ModuleType | None,
    arguments: Mapping[str, str],
    seed: int | None,
    device: str | None = None,
) -> tuple[Instance, bool]:
    if isinstance(found, Instance | BilevelProblem) or not callable(found):
        _refuse_arguments(problem, arguments)
        return _complete(problem, found, module), False
    built = _built(problem, found, module, arguments, seed, device)
    return _complete(problem, built, module), takes(found, "seed") and seed is not None


def _refuse_arguments(problem: str, arguments: Mapping[str, str]) -> None:
    if arguments:
        raise ValueError(f"{problem} is not a function: it takes no `--set`. Got {', '.join(arguments)}.")


def _built(
    problem: str,
    found: Callable[..., Any],
    module: ModuleType | None,
    arguments: Mapping[str, str],
    seed: int | None,
    device: str | None = None,
) -> Any:
    """What a function makes of the arguments, and of the seed if it takes one."""
    seeded = takes(found, "seed") and seed is not None
    if seeded and "seed" in arguments:
        raise ValueError("the seed was given twice: by `--seed` and by `--set seed=...`. Use `--seed`.")
    given: dict[str, Any] = {"seed": seed} if seeded else {}
    if device is not None and takes(found, "device") and "device" not in arguments:
        given["device"] = device
    bound, home = bind(problem, found, arguments, given), Home()
    try:
        return found(**bound)
    except (ValueError, ImportError, KeyboardInterrupt):  # its own words are the best ones
        raise
    except BaseException as error:
        where = "" if module is None else f" ({_where(Path(problem.rpartition(':')[0]), error)})"
        raise ValueError(f"building {problem} failed: {_said(error)}{where}") from error
    finally:
        home.back_from(problem)


def _complete(problem: str, found: Any, module: ModuleType | None) -> Instance:
    """An instance from whatever PROBLEM led to."""
    if isinstance(found, Instance):
        return found
    if isinstance(found, tuple) and len(found) == 3 and isinstance(found[0], BilevelProblem):
        return Instance(*found)
    if not isinstance(found, BilevelProblem):
        raise TypeError(
            f"{problem} must be a BilevelProblem, an Instance, an Experiment, or a function that returns (problem, x0,"
            f" y0) or an Instance, or is annotated to return an Experiment. Got {type(found).__name__}."
        )
    missing = [name for name in ("x0", "y0") if not hasattr(module, name)]
    if missing:
        raise ValueError(
            f"{problem} is a BilevelProblem without a start: define x0 and y0 next to it (there is no"
            f" {' and no '.join(missing)}), or name a function that returns (problem, x0, y0) or an Instance."
        )
    return Instance(found, getattr(module, "x0"), getattr(module, "y0"))  # noqa: B009  (a module's type has no such names)
