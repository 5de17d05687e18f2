"""Text to values: `--set key=value` as the arguments of a function, typed from its signature."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bilevel.arguments.nearest import nearest

_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def split(settings: Sequence[str]) -> dict[str, str]:
    """`["p=3", "kappa=10"]` as a dict; the last of equal keys wins.

    Raises:
        ValueError: if one is not of the form key=value.
    """
    found = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip().isidentifier():
            raise ValueError(f"`--set` needs key=value. Got {setting!r}.")
        found[key.strip()] = value.strip()
    return found


def with_data(settings: Sequence[str], source: str | None) -> tuple[str, ...]:
    """The settings, and after `--from FILE` data=FILE.

    Raises:
        ValueError: if they say where the data are as well.

    Example:
        >>> with_data(["seed=1"], "mine.npz")
        ('seed=1', 'data=mine.npz')
    """
    if source is None:
        return tuple(settings)
    if "data" in split(settings):
        raise ValueError("the data were given twice: by `--from` and by `--set data=...`. Leave one of them out.")
    return (*settings, f"data={source}")


def signature(function: Callable[..., Any]) -> inspect.Signature:
    """The signature with its annotations as types where they can be found, else as they are."""
    try:
        return inspect.signature(function, eval_str=True)
    except NameError:  # annotations of names that exist for type checkers only
        return inspect.signature(function)


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of that name, or one that is a group with it."""
    parameters = signature(function).parameters
    return name in parameters or any(name in group for group in _groups(parameters).values())


def _groups(parameters: Mapping[str, inspect.Parameter]) -> dict[str, dict[str, Any]]:
    """Parameters that are a dataclass with defaults, each with the types of its fields: arguments of their own."""
    kinds = {name: parameter.annotation for name, parameter in parameters.items()}
    return {
        name: {field.name: typing.get_type_hints(kind)[field.name] for field in dataclasses.fields(kind) if field.init}
        for name, kind in kinds.items()
        if inspect.isclass(kind) and dataclasses.is_dataclass(kind) and isinstance(parameters[name].default, kind)
    }


def bind(problem: str, function: Callable[..., Any], texts: Mapping[str, str], given: Mapping[str, Any]) -> Any:
    """The arguments for `function`: the given ones, and texts converted to what its signature says.

    Where a parameter is a dataclass with a default, its fields are given as if they were parameters.

    Raises:
        ValueError: naming the parameters that there are, or what a value should have been.
    """
    parameters = signature(function).parameters
    groups = _groups(parameters)
    free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    wanted: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if parameter.kind in named:
            own = groups[name] if name in groups else {name: _wanted(parameter)}
            twice = sorted(own.keys() & wanted.keys())
            if twice:
                raise ValueError(f"{problem} takes {twice[0]!r} twice, by {name!r} too. Rename one of them.")
            wanted |= own
    unknown = [name for name in texts if name not in wanted and not free]
    if unknown:
        names, near = ", ".join(wanted) if wanted else "none", nearest(unknown[0], wanted)
        raise ValueError(f"{problem} has no argument {unknown[0]!r}. {near}Its arguments: {names}.")
    bound = dict(given)
    for name, text in texts.items():
        try:
            bound[name] = convert(text, wanted.get(name, Any))
        except ValueError as error:
            near = nearest(text, _words_of(wanted.get(name, Any)))
            said = f"`--set {name}=...` of {problem} must be {error}. Got {text!r}. {near}"
            raise ValueError(said.rstrip()) from error
    for group, fields in groups.items():
        changes = {name: bound.pop(name) for name in fields if name in bound}
        if changes:
            bound[group] = dataclasses.replace(parameters[group].default, **changes)
    needed = [name for name in wanted if name in parameters and parameters[name].default is inspect.Parameter.empty]
    missing = [name for name in needed if name not in bound]
    if missing:
        raise ValueError(f"{problem} needs {' and '.join(f'`--set {name}=...`' for name in missing)}.")
    return bound


def _words_of(wanted: Any) -> list[str]:
    """The words that an argument may be, where it is one of some."""
    options = typing.get_args(wanted)
    if typing.get_origin(wanted) is typing.Literal:
        return list(map(str, options))
    return [word for option in options for word in _words_of(option)]


def _wanted(parameter: inspect.Parameter) -> Any:
    if parameter.annotation is not inspect.Parameter.empty and not isinstance(parameter.annotation, str):
        return parameter.annotation
    default = parameter.default
    return Any if default is inspect.Parameter.empty or default is None else type(default)


def convert(text: str, wanted: Any) -> Any:
    """A value of the wanted type; of any type: as Python would read it, or the text itself.

    Raises:
        ValueError: whose text says what was wanted.

    Example:
        >>> (
        ...     convert("3", int | None),
        ...     convert("none", int | None),
        ...     convert("1, 2", tuple[float, ...]),
        ... )
        (3, None, (1.0, 2.0))
    """
    origin, options = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted in (str, Path):
        return wanted(text)
    if wanted is bool and text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if wanted in (int, float):
        try:
            return wanted(text)
        except ValueError:
            raise ValueError(_describe(wanted)) from None
    if wanted in (None, types.NoneType) and text.lower() == "none":
        return None
    if origin is typing.Literal and text in map(str, options):
        return next(option for option in options if str(option) == text)
    if origin in (typing.Union, types.UnionType):
        return _first(text, wanted, sorted(options, key=lambda option: (option in (str, Path), option is str)))
    if origin in (tuple, list, Sequence) or wanted in (tuple, list):
        return _several(text, tuple if (origin or wanted) is tuple else list, options)
    if wanted in (Any, object):
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text
    raise ValueError(_describe(wanted))


def _first(text: str, wanted: Any, options: Sequence[Any]) -> Any:
    """The first of the alternatives that reads the text."""
    for option in options:
        try:
            return convert(text, option)
        except ValueError:
            continue
    raise ValueError(_describe(wanted))


def _several(text: str, kind: type, options: tuple[Any, ...]) -> Any:
    """Comma-separated values; `options` are the arguments of tuple[...] or list[...]."""
    words = [word.strip() for word in text.strip("()[]").split(",") if word.strip()]
    if kind is tuple and options and options[-1] is not Ellipsis:
        if len(options) != len(words):
            raise ValueError(f"{len(options)} values separated by commas")
        return tuple(convert(word, option) for word, option in zip(words, options, strict=True))
    return kind(convert(word, options[0] if options else Any) for word in words)


def _describe(wanted: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", types.NoneType: "none", str: "a text"}
    if wanted in names:
        return names[wanted]
    options = typing.get_args(wanted)
    if typing.get_origin(wanted) is typing.Literal:
        return f"one of {', '.join(map(str, options))}"
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in options)
    return f"something that a command line can give, not {getattr(wanted, '__name__', wanted)}"
