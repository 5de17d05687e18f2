"""Code in a few characters: the same for the same program text, wherever it is and whoever has compiled it."""

from __future__ import annotations

import dis
import sys
from types import CodeType
from typing import Any

from bilevel.outer.tensor_digest import digest


def code_text(code: CodeType) -> str:
    """A hash of what the code does: instructions, constants and names, without its place, its file and its comments.

    Instructions are of one version of Python, which is named: codes of different versions tell nothing of each other.

    Example:
        >>> one, same, other = lambda x: x + 1, lambda x: x + 1, lambda x: x + 2
        >>> code_text(one.__code__) == code_text(same.__code__) != code_text(other.__code__)
        True
    """
    return f"code #{digest(repr(_content(code)).encode())} of Python {sys.version_info[0]}.{sys.version_info[1]}"


def names_from_around(code: CodeType) -> dict[str, set[str]]:
    """The globals that code names, that of its inner functions included, and the attributes taken of each at once."""
    found: dict[str, set[str]] = {}
    latest: str | None = None
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            latest = str(instruction.argval)
            found.setdefault(latest, set())
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and latest is not None:
            found[latest].add(str(instruction.argval))
            latest = None
        elif instruction.opname not in ("CACHE", "PUSH_NULL", "EXTENDED_ARG"):
            latest = None
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            for name, attributes in names_from_around(inner).items():
                found.setdefault(name, set()).update(attributes)
    return found


def _content(code: CodeType) -> tuple[Any, ...]:
    return (
        code.co_code,
        [_constant(each) for each in code.co_consts],
        code.co_names,
        code.co_varnames,
        code.co_freevars,
        code.co_cellvars,
        (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags),
    )


def _constant(value: Any) -> Any:
    if isinstance(value, CodeType):
        return _content(value)
    if isinstance(value, tuple):
        return tuple(_constant(each) for each in value)
    if isinstance(value, frozenset):  # in an order that changes with the seed of hashes
        return sorted(repr(_constant(each)) for each in value)
    if isinstance(value, str) and "<locals>" in value:  # a name for tracebacks, which tells where a function is
        return "<locals>"
    return value
