"""Functions whose arguments are what their annotations and declared ranges say."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

from bilevel.arguments.fits import ANYTHING, Fit, UnfitError, fit, refused, resolved
from bilevel.arguments.ranges import NUMBERS, Range, demand_range
from bilevel.arguments.shapes import Shape, demand_shapes

F = TypeVar("F", bound=Callable[..., Any])


class _Argument(NamedTuple):
    name: str
    hint: Any
    admitted: Fit
    exact: frozenset[type]  # passed on without a further look
    range: Range | None

    def taken(self, call: str, value: Any) -> Any:
        """The value to pass on; a TypeError or ValueError if there is none."""
        try:
            found = self.admitted.take(value)
        except UnfitError as unfit:
            raise refused(call, self.name, unfit, self.hint) from None
        if self.range is not None:
            demand_range(call, self.name, found, self.range)
        return found


class _Arguments(NamedTuple):
    order: list[str]  # the names of those that are given by their places
    places: list[_Argument | None]  # None: anything will do
    names: dict[str, _Argument]  # of those that are looked at
    rest: _Argument | None  # *args


def checked(call: str = "", /, **allowed: Range | Shape) -> Callable[[F], F]:
    """Refuse arguments that are not what the annotations of a function say, or out of the ranges declared here.

    Numbers of numpy and tensors without axes arrive as numbers of Python; NaN is refused, and integers that 64 bits do
    not hold. Defaults are not looked at. Type checkers, `help` and `inspect.signature` see the function as it is.

    Cost: under a microsecond an argument; the annotations are resolved at the first call.

    Args:
        call: how messages call the function; its name, with that of its class, if it is empty.
        allowed: for an argument the range of its numbers, the shape of its tensor, ...

    Example:
        >>> from bilevel.arguments.ranges import POSITIVE
        >>> @checked(step=POSITIVE)
        ... def descend(step: float, *, steps: int = 1):
        ...     return step * steps
        >>> descend(0.5, steps=2)
        1.0
        >>> descend(0.5, steps="two")
        Traceback (most recent call last):
        TypeError: `descend(steps=...)` must be an integer. Got 'two' (str).
        >>> descend(-1)
        Traceback (most recent call last):
        ValueError: `descend(step=...)` must be positive and finite. Got -1.
    """
    shapes = {name: each for name, each in allowed.items() if isinstance(each, Shape)}
    ranges = {name: each for name, each in allowed.items() if isinstance(each, Range)}

    def decorate(function: F) -> F:
        arguments = functools.cache(lambda: _arguments(function, ranges))
        own = call or function.__qualname__.rpartition("<locals>.")[2].removesuffix(".__init__")

        @functools.wraps(function)
        def checking(*args: Any, **keywords: Any) -> Any:
            order, places, names, rest = arguments()
            for k, value in enumerate(args):
                argument = places[k] if k < len(places) else rest
                if argument is not None and type(value) not in argument.exact:
                    taken = argument.taken(own, value)
                    if taken is not value:
                        args = (*args[:k], taken, *args[k + 1 :])
            for name, value in keywords.items():
                argument = names.get(name)
                if argument is not None and type(value) not in argument.exact:
                    keywords[name] = argument.taken(own, value)
            if shapes:
                demand_shapes(own, shapes, dict(zip(order, args, strict=False)) | keywords)
            try:
                return function(*args, **keywords)
            except (TypeError, ValueError) as error:
                _say_where(error, own, function, args, keywords)
                raise

        return checking  # type: ignore[return-value]

    return decorate


def fitting(function: F) -> F:
    """Refuse arguments that are not what the annotations say, and say of others that do not fit what they are.

    For the library's own formulas, which call no function of the user's, in each step of a solver: the types are looked
    at, and shapes, dtypes and entries only where the function fails with them. While `torch.compile` traces it, it is
    the function itself.

    Raises:
        TypeError: naming an argument of a wrong type.
        ValueError: from an error of torch's, naming shapes and dtypes of all arguments.

    Example:
        >>> @fitting
        ... def product(A: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ...     return A @ y
        >>> try:
        ...     product(torch.ones(2, 2), torch.ones(3))
        ... except ValueError as error:
        ...     print(str(error)[:42], str(error)[-41:])
        `product(A=..., y=...)` cannot be computed . Got A: float32 (2, 2), y: float32 (3,).
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
        except Exception as error:
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


def _say_where(
    error: Exception, call: str, function: Callable[..., Any], args: tuple[Any, ...], keywords: Mapping[str, Any]
) -> None:
    """Note the call, where the error is the first to be raised and does not name it."""
    notes = getattr(error, "__notes__", [])
    if not re.search(rf"\b{call.rpartition('.')[2]}\b", f"{error} {notes}") and all(
        note.startswith("In `") for note in notes
    ):
        given = [*list(inspect.signature(function).parameters)[: len(args)], *keywords]
        error.add_note(f"In `{call}({', '.join(f'{name}=...' for name in given if name not in ('self', 'cls'))})`.")


def _arguments(function: Callable[..., Any], ranges: Mapping[str, Range]) -> _Arguments:
    own = inspect.unwrap(function)
    parameters, hints = inspect.signature(own).parameters, resolved(own.__module__, own.__annotations__)
    found = {}
    for name in parameters:
        hint = Any if name == "_" else hints.get(name, Any)  # which is there to be passed over
        admitted, range_ = fit(hint), ranges.get(name)
        if range_ is None and float in admitted.exact:
            range_ = NUMBERS
        exact = frozenset(admitted.exact if range_ is None else admitted.exact - {float})
        found[name] = _Argument(name, hint, admitted, exact, range_)
    unknown = ranges.keys() - found.keys()
    assert not unknown, f"{function.__qualname__} has no argument {unknown}"
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    order = [name for name, each in parameters.items() if each.kind in by_place]
    looked_at = {name: each for name, each in found.items() if each.range is not None or each.admitted is not ANYTHING}
    rest = next((found[name] for name, each in parameters.items() if each.kind is each.VAR_POSITIONAL), None)
    return _Arguments(order, [looked_at.get(name) for name in order], looked_at, rest)
