"""Methods of tensors: what did not fit is said where they fail, at no cost where they do not."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from bilevel.arguments.checked import checked

F = TypeVar("F", bound=Callable[..., Any])
_FAILURES = (RuntimeError, LookupError, AttributeError, TypeError, ValueError, ArithmeticError, AssertionError)


def fitting(function: F) -> F:
    """Refuse arguments that are not what the annotations say, and say of others that do not fit what they are.

    For functions that a solver calls in each of its steps: the types are looked at, and shapes, dtypes and entries only
    where the function fails with them. While `torch.compile` traces it, it is the function itself.

    Raises:
        TypeError: naming an argument of a wrong type.
        ValueError: from an error of torch's, naming shapes and dtypes of all arguments.

    Example:
        >>> @fitting
        ... def product(A: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ...     return A @ y
        >>> product(torch.ones(2, 2), torch.ones(3))
        Traceback (most recent call last):
        ValueError: `product(A=..., y=...)` cannot be computed: size mismatch, got input (2), mat (2x2), vec...
    """
    typed = checked()(function)
    name = function.__qualname__.rpartition("<locals>.")[2]
    names = list(inspect.signature(function).parameters)
    own = names[:1] in (["self"], ["cls"])

    @functools.wraps(function)
    def explaining(*args: Any, **keywords: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **keywords)
        try:
            return typed(*args, **keywords)
        except _FAILURES as error:
            if isinstance(error, TypeError | ValueError) and str(error).startswith(f"`{name}("):  # it says so already
                raise
            from bilevel._numerics.misfits import Misfit, described

            given = dict(zip(names, args, strict=False)) | keywords
            given = dict(list(given.items())[own:])
            call = f"`{name}({', '.join(f'{each}=...' for each in given)})`"
            got = ", ".join(f"{each}: {described(value)}" for each, value in given.items())
            text = str(error).partition("\n")[0].strip().removesuffix(".") or type(error).__name__
            raise Misfit(f"{call} cannot be computed: {text}. Got {got}.") from error

    return explaining  # type: ignore[return-value]
