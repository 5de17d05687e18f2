"""What a module holds beside its registered parameters, buffers and layers, and where."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.modules.absent import Absent

_OWN = frozenset(vars(nn.Module()))  # what every module has
_MOST = 20_000  # objects that are looked at: a module may hold a data set
_OPAQUE = (Tensor, type, types.ModuleType, types.BuiltinFunctionType, torch.dtype, torch.device, torch.Generator)
_ATOMS = (int, float, complex, str, bytes, type(None))


def attributes(part: nn.Module) -> dict[str, Any]:
    """The plain attributes of one layer."""
    return {name: value for name, value in vars(part).items() if name not in _OWN}


def place(name: str, part: nn.Module, attribute: str) -> str:
    """An attribute of a layer, in words."""
    return f"attribute `{attribute}` of layer {name or '(root)'!r} ({type(part).__name__})"


def reached(value: Any, where: str, seen: Iterable[int] = ()) -> Iterator[tuple[str, Any]]:
    """What a value holds, itself first, each with the expression that leads there; what is in `seen` is left out.

    Containers, attributes of objects, arguments of partial functions, what a function closes over and the global
    variables that it reads.
    """
    known, stack = set(seen), deque([(where, value)])
    for _ in range(_MOST):
        if not stack:
            return
        where, value = stack.popleft()
        if not isinstance(value, _ATOMS):
            if id(value) in known:
                continue
            known.add(id(value))
            stack.extend(_parts(value, where))
        yield where, value


def _parts(value: Any, where: str) -> Iterable[tuple[str, Any]]:
    if isinstance(value, _OPAQUE):
        return ()
    if isinstance(value, nn.Module):
        own = {**value._parameters, **value._buffers, **value._modules, **attributes(value)}
        return [(f"{where}.{name}", part) for name, part in own.items()]
    if isinstance(value, Mapping):
        return [(f"{where}[{key!r}]", part) for key, part in list(value.items())]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return [(f"{where}[{index}]", part) for index, part in enumerate(value)]
    if isinstance(value, partial):
        return [(f"{where}.func", value.func), (f"{where}.args", value.args), (f"{where}.keywords", value.keywords)]
    if isinstance(value, types.MethodType):
        return [(where, value.__self__), (where, value.__func__)]
    if isinstance(value, types.FunctionType):
        return _variables(value, where)
    return [(f"{where}.{name}", part) for name, part in getattr(value, "__dict__", {}).items()]


def _variables(function: types.FunctionType, where: str) -> list[tuple[str, Any]]:
    code, found = function.__code__, list[tuple[str, Any]]()
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            found.append((f"{name} (closed over by {where})", cell.cell_contents))
        except ValueError:  # empty
            continue
    names = [name for name in code.co_names if name in function.__globals__]
    found += [(f"{name} (a global variable that {where} reads)", function.__globals__[name]) for name in names]
    given = (f"{where}.__defaults__", function.__defaults__), (f"{where}.__kwdefaults__", function.__kwdefaults__)
    return [*found, *given]


def where_is(tensor: Tensor, module: nn.Module) -> str:
    """Where a module holds a tensor that is not registered, in words; as far as can be seen."""
    registered = [id(part) for part in module.modules()]
    for name, part in module.named_modules():
        for attribute, value in attributes(part).items():
            for where, found in reached(value, attribute, registered):
                if found is tensor:
                    return place(name, part, where)
    for name, part in module.named_modules():
        hooks = (*part._forward_pre_hooks.values(), *part._forward_hooks.values())
        for function in (type(part).forward, *hooks):
            label = getattr(function, "__qualname__", type(function).__name__)
            for where, found in reached(function, label, registered):
                if found is tensor:
                    return f"`{where}` in layer {name or '(root)'!r} ({type(part).__name__})"
    return "a place outside of the module"


def trace(value: Any, seen: Iterable[int]) -> list[Any]:
    """What tells whether anything that a value holds was changed in place: equal lists, no change."""
    return [
        (id(part), _mark(part)) if not isinstance(part, _ATOMS) else repr(part) for _, part in reached(value, "", seen)
    ]


def _mark(value: Any) -> Any:
    if isinstance(value, Tensor) and not isinstance(value, Absent):
        return None if value.is_inference() else value._version
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    return None
