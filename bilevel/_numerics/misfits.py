"""Errors in a user's functions, with what these were given: torch names neither the function nor its arguments."""

from __future__ import annotations

import dis
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from bilevel._numerics.nesting import tree_leaves, tree_map
from bilevel.requirements.properties import DoesNotApply

R = TypeVar("R")

_TORCH = Path(torch.__file__).parent
_LONG = 200  # characters of one argument, beyond which a description hides what it describes
_DEVICES = re.compile(r"same device|found at least two devices|not on the expected device")
_DTYPES = re.compile(r"dtype|scalar type|weight type|same type|different types|bool tensor", re.IGNORECASE)
_SHAPES = re.compile(
    r"size|shape|dimension|broadcast|mat1 and mat2|must be matrices|1D tensors|number of (?:input )?channels|subscript",
    re.IGNORECASE,
)


@final
class Misfit(ValueError):  # noqa: N818  (what it says is what is wrong)
    """Arguments of a user's function that torch could not put together; raised from torch's error."""


def called(form: str, function: Callable[..., R], /, *arguments: Any) -> R:
    """function(*arguments), a function of the user's; what it raises says with what it was called.

    Free where nothing is raised. An error keeps its type and gains a note, unless torch raised it for arguments that do
    not fit together: that is a wrong argument.

    Args:
        form: how it is called, such as "g(x, y, data)"; without the last names where it takes fewer.
        function: the function.
        arguments: what it is called with.

    Raises:
        Misfit: a ValueError from torch's error, naming the function, shapes and dtypes, and what to do.
    """
    try:
        return function(*arguments)
    except Exception as error:
        explain_call(error, form, arguments)
        raise


def explain_call(error: Exception, form: str, arguments: tuple[Any, ...]) -> None:
    """What :func:`called` does with an error, for functions that are called so often that a call more would show.

    Raises:
        Misfit: from the error, where arguments do not fit together.
    """
    if isinstance(error, DoesNotApply):
        return
    name, names = form.partition("(")[0], re.findall(r"\w+", form.partition("(")[2])[: len(arguments)]
    call, misfit = f"`problem.{name}({', '.join(names)})`", _misfit(error)
    pairs = dict(zip(names, arguments, strict=True))
    given = ", ".join(f"{word}: {described(argument)}" for word, argument in pairs.items())
    hint = _of_loaders(pairs.get("data"))
    if misfit is None:
        error.add_note(f"{call} was called with {given}.{hint}")
        return
    failed, remedy = misfit
    raise Misfit(f"{call} {failed}: {_line(error)}. Got {given}. {remedy}{hint}") from error


def origin(error: BaseException) -> BaseException:
    """What torch raised in a user's function, where the error says of it what did not fit; else the error itself."""
    return error.__cause__ if isinstance(error, Misfit) and error.__cause__ is not None else error


def described(tree: Any) -> str:
    """Dtypes and shapes in the nesting of the tree, such as `{'w': float64 (3, 2)}`."""
    try:
        text = str(tree_map(lambda leaf: _Bare(_leaf(leaf)), tree))
    except (ValueError, RecursionError):  # it holds itself, or is very deep
        return f"{type(tree).__name__} without an end"
    return text if len(text) <= _LONG else f"{type(tree).__name__} of {len(tree_leaves(tree))} leaves"


@final
class _Bare(str):
    """A text that shows itself without quotation marks."""

    def __repr__(self) -> str:
        return str(self)


def _leaf(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    device = "" if leaf.device.type == "cpu" else f" on {leaf.device}"
    return f"{leaf.dtype} {tuple(leaf.shape)}{device}".removeprefix("torch.")


def _misfit(error: Exception) -> tuple[str, str] | None:
    """What does not fit and what to do, where torch says so of its arguments; None for errors of the user's making."""
    if type(error) not in (RuntimeError, ValueError, IndexError) or not _is_torchs(error):
        return None
    text = str(error)
    if _DEVICES.search(text):
        return "met tensors on several devices", "Move x, y0 and all data to one, such as `x.to(device)`."
    if _DTYPES.search(text):
        return "met several dtypes", (
            "Give x, y0 and all data one dtype, those that f and g close over included: `x.double()`, `module.float()`."
        )
    if _SHAPES.search(text):
        return "met shapes that do not fit", "y has the shapes of y0: pass x, y0 and data as f and g are written for."
    return None


def _is_torchs(error: Exception) -> bool:
    """Whether an operation of torch raised it: in its own code, or called by a line that is no `raise`."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    raised = dis.opname[code.co_code[trace.tb_lasti]].startswith("RAISE")
    return not raised or _TORCH in Path(code.co_filename).parents


def _line(error: Exception) -> str:
    text = str(error).partition("\n")[0].strip()
    return text.removesuffix(".")


def _of_loaders(data: Any) -> str:
    """A hint where data looks like one source of batches for f and another one for g."""
    two = isinstance(data, tuple) and len(data) == 2 and all(callable(part) or _iterates(part) for part in data)
    if not two:
        return ""
    return " A tuple is one batch; one source of batches for f and one for g is `Split(f=..., g=...)`."


def _iterates(part: Any) -> bool:
    return hasattr(part, "__iter__") and not isinstance(part, Tensor | dict | str)
