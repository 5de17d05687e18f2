"""Whose code a function or a class is: the user's, this library's, or that of torch and the other packages."""

from __future__ import annotations

import os
import reprlib
import sys
from pathlib import Path
from types import FunctionType
from typing import Literal, TypeAlias

import torch

Origin: TypeAlias = Literal["user", "library", "foreign"]

_LIBRARY = tuple(
    os.path.realpath(folder)
    for package in (Path(__file__).resolve().parent.parent,)
    for folder in (package, package / "solvers", package / "problems")  # links, in a checkout
)
_FOREIGN = tuple(os.path.realpath(Path(str(module.__file__)).parent) for module in (torch, os))


def origin_of_function(function: FunctionType) -> Origin:
    """By the file that it was written in; what was typed in or executed from a text is the user's.

    Example:
        >>> (
        ...     origin_of_function(os.path.join),
        ...     origin_of_function(origin_of_function),
        ...     origin_of_function(lambda: 0),
        ... )
        ('foreign', 'library', 'user')
    """
    return origin_of_file(function.__code__.co_filename)


def origin_of_class(kind: type) -> Origin:
    """By the file of its first method, else of its module."""
    functions = [member for member in vars(kind).values() if isinstance(member, FunctionType)]
    made = ("<", reprlib.__file__)  # by `dataclass`
    written = [function for function in functions if not function.__code__.co_filename.startswith(made)]
    if written:
        return origin_of_function(written[0])
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is None:
        return "foreign" if kind.__module__.partition(".")[0] in sys.stdlib_module_names - {"__main__"} else "user"
    return origin_of_file(file)


def origin_of_file(file: str) -> Origin:
    """By its folder."""
    if file.startswith("<frozen"):
        return "foreign"
    if file.startswith("<"):
        return "user"
    path = os.path.realpath(file)
    if _within(path, _LIBRARY):
        return "library"
    if _within(path, _FOREIGN) or "/site-packages/" in path or "/dist-packages/" in path:
        return "foreign"
    return "user"


def _within(path: str, folders: tuple[str, ...]) -> bool:
    return any(path.startswith(folder + os.sep) for folder in folders)
