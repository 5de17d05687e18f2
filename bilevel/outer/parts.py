"""What a value is made of, in texts by name."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, final

import torch
from torch import Tensor, nn

from bilevel.outer.contents import contents, is_how_it_is_done
from bilevel.outer.origin import origin_of_class, origin_of_file, origin_of_function
from bilevel.outer.tensor_digest import WHOLE, digest
from bilevel.outer.words import without_addresses

BUDGET = 4 * WHOLE  # bytes of tensors that are hashed in all; of those beyond, sizes are compared
_NODES = 20_000  # objects that are looked at; within objects of other packages twice as many
_DEPTH = 30  # of one inside another
_SHORT = 60  # characters of a constant that are kept; of longer ones a hash
_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, type(Ellipsis), torch.dtype, torch.device)
_MEMBERS = (*_PLAIN, Tensor, list, tuple, dict, staticmethod, classmethod, property)
_BUILT_IN = (list, tuple, dict, set, frozenset)
_OF_MODULES = frozenset(vars(nn.Module()))  # attributes that torch keeps for itself


@final
class Parts:
    """What there is to tell of values and of what they hold, by name, in one look.

    Args:
        code: tells of code, and the names that it takes from around it.
        tensor: tells of a tensor.
        budget: bytes of tensors that are hashed in all.

    Example:
        >>> parts = Parts(lambda code: ("code", {}), lambda tensor: "tensor")
        >>> parts.visit("data", {"a": torch.ones(2), "b": [1, 2]})
        >>> parts.texts
        {'data': 'dict of 2', "data['a']": 'tensor', "data['b']": 'list of 2: 1, 2'}
    """

    def __init__(
        self,
        code: Callable[[CodeType], tuple[str, dict[str, set[str]]]],
        tensor: Callable[[Tensor], str],
        budget: float = BUDGET,
    ) -> None:
        self._code, self._text_of = code, tensor
        self.texts: dict[str, str] = {}
        self.unread: dict[str, str] = {}  # what is not told of, and why
        self._left, self._nodes, self._nodes_of_others = budget, _NODES, 2 * _NODES
        self._seen: dict[int, object] = {}
        self._others_depth = 0  # how many objects of other packages are being looked into
        self.in_words = False  # whether numbers are told already, by the text of the setting that holds them

    def visit(self, name: str, value: Any, depth: int = 0) -> None:
        """Tell what there is to tell of a value and of what it holds."""
        self._nodes -= 1
        if self._nodes < 0 or depth > _DEPTH:
            why = "and more objects after it" if self._nodes < 0 else "nested too deeply"
            if why not in self.unread.values():
                self.unread[name] = why
            return
        if isinstance(value, Enum):
            self.texts[name] = f"{type(value).__name__}.{value.name}"
            self.visit(f"{name}.value", value.value, depth + 1)
        elif isinstance(value, _PLAIN):
            if not (isinstance(value, str) and os.path.isabs(value)):  # a file may have been moved
                self.texts[name] = _short(without_addresses(repr(value)))
        elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self._tensor(name, value)
        elif id(value) not in self._seen:
            self._seen[id(value)] = value
            try:
                self._look_into(name, value, depth + 1)
            except Exception:  # no object that could be pickled, or one with attributes of its own making
                self.unread[name] = _named(type(value))

    def _tensor(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size() if tensor.layout is torch.strided else 0
        self._left -= min(size, WHOLE)
        if self._left >= 0:
            self.texts[name] = self._text_of(tensor)
        else:
            self.texts[name] = f"tensor {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"

    def _look_into(self, name: str, value: Any, depth: int) -> None:
        if isinstance(value, nn.Parameter):
            self._tensor(name, value)
        elif isinstance(value, memoryview):
            self._bytes(name, value)
        elif isinstance(value, dict):
            self._items(name, value, depth)
        elif isinstance(value, list | tuple | set | frozenset):
            self._entries(name, value, depth)
        elif isinstance(value, functools.partial):
            self.visit(name, value.func, depth)
            self.visit(f"{name}.args", value.args, depth)
            self.visit(f"{name}.keywords", value.keywords, depth)
        elif isinstance(value, MethodType):
            self.visit(name, value.__func__, depth)
            self.visit(f"{name}.self", value.__self__, depth)
        elif isinstance(value, staticmethod | classmethod):
            self.visit(name, value.__func__, depth)
        elif isinstance(value, property):
            self.visit(name, value.fget, depth)
        elif isinstance(value, FunctionType):
            self._function(name, value, depth)
        elif isinstance(value, type):
            self._class(name, value, depth)
        elif isinstance(value, ModuleType | BuiltinFunctionType):
            self.texts[name] = value.__name__
            owner = getattr(value, "__self__", None)  # of a method of an object that is not written in Python
            if owner is not None and not isinstance(owner, ModuleType | type):
                self.visit(f"{name}.self", owner, depth)
        else:
            self._instance(name, value, depth)
        if isinstance(value, _BUILT_IN) and origin_of_class(type(value)) == "user":
            self.visit(f"{name}.class", type(value), depth)
            for attribute, own in _attributes(value):
                self.visit(f"{name}.{attribute.lstrip('_')}", own, depth)
        wrapped = None if isinstance(value, type) else getattr(value, "__dict__", {}).get("__wrapped__")
        if wrapped is not None:  # by a decorator
            self.visit(f"{name}.wrapped", wrapped, depth)

    def _items(self, name: str, value: dict[Any, Any], depth: int) -> None:
        self.texts[name] = f"dict of {len(value)}"
        seen: set[str] = set()
        for key, item in value.items():
            told = _short(repr(key)) if _is_plain(key) else type(key).__name__
            told = told if told not in seen else f"{told} {len(seen)}"  # as objects with equal names
            seen.add(told)
            self.visit(f"{name}[{told}]", item, depth)

    def _entries(self, name: str, value: Any, depth: int) -> None:
        if all(isinstance(item, _PLAIN) for item in value):
            ordered = isinstance(value, list | tuple)
            items = [*map(repr, value[:: 1 + len(value) // _NODES])] if ordered else sorted(map(repr, value))
            self.texts[name] = _short(f"{type(value).__name__} of {len(value)}: {', '.join(items)}")
            return
        self.texts[name] = f"{type(value).__name__} of {len(value)}"
        if isinstance(value, set | frozenset):
            items = sorted(self._apart(item, depth) for item in value)
            self.texts[f"{name}.items"] = f"items #{digest(repr(items).encode())}"
            return
        for i, item in enumerate(value):
            self.visit(f"{name}[{i}]", item, depth)

    def _apart(self, value: Any, depth: int) -> str:
        """All that there is to tell of a value, whatever is told beside it: for what is in no order."""
        apart = Parts(self._code, self._text_of)
        apart._nodes, apart._left = self._nodes, self._left
        apart.visit("", value, depth)
        self._nodes, self._left = apart._nodes, apart._left
        return repr(sorted(apart.texts.items()))

    def _function(self, name: str, function: FunctionType, depth: int) -> None:
        origin, code = origin_of_function(function), function.__code__
        if origin != "user":
            self.texts[name] = f"{function.__module__}.{function.__qualname__}"
        if origin == "foreign":
            self._around(name, function, depth)
            return
        for free, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                self.visit(f"{name}.{free}", cell.cell_contents, depth)
            except ValueError:  # nothing is in it yet
                continue
        defaults = function.__defaults__ or ()
        first = code.co_argcount - len(defaults)
        for argument, default in zip(code.co_varnames[first : code.co_argcount], defaults, strict=True):
            self.visit(f"{name}.{argument}", default, depth)
        for argument, default in (function.__kwdefaults__ or {}).items():
            self.visit(f"{name}.{argument}", default, depth)
        if origin == "user":
            for attribute, own in vars(function).items():
                if not attribute.startswith("__"):
                    self.visit(f"{name}.{attribute}", own, depth)
            self.texts[name], around = self._code(code)
            for free, attributes in sorted(around.items()):
                if free in function.__globals__ and not free.startswith("__"):
                    self._global(f"{name}.{free}", function.__globals__[free], attributes, depth)

    def _around(self, name: str, function: FunctionType, depth: int) -> None:
        """What a function of another package, made by a decorator say, has of the user's."""
        for free, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                inside = cell.cell_contents
            except ValueError:
                continue
            if isinstance(inside, (*_PLAIN, Tensor, FunctionType, MethodType, functools.partial)):
                self.visit(f"{name}.{free}", inside, depth)

    def _global(self, name: str, value: Any, attributes: set[str], depth: int) -> None:
        if not isinstance(value, ModuleType):
            self.visit(name, value, depth)
            return
        of_user = origin_of_file(getattr(value, "__file__", None) or "<none>") == "user"
        for attribute in sorted(attributes):  # what is used of a file of the user
            member = vars(value).get(attribute)
            if of_user and not isinstance(member, ModuleType):
                self.visit(f"{name}.{attribute}", member, depth)

    def _class(self, name: str, kind: type, depth: int) -> None:
        if origin_of_class(kind) != "user":
            self.texts[name] = _named(kind)
            return
        for base in kind.__mro__:
            if origin_of_class(base) == "user":
                self._members(name, base, depth)

    def _members(self, name: str, kind: type, depth: int) -> None:
        for member, value in sorted(vars(kind).items()):
            if isinstance(value, FunctionType):  # but for what `dataclass` writes
                told = not (member.startswith("__") and value.__code__.co_filename.startswith("<string>"))
            else:
                known = isinstance(value, (*_MEMBERS, functools.cached_property, functools.partialmethod))
                descriptor = not known and hasattr(type(value), "__get__")
                told = not descriptor and not member.startswith(("__", "_abc_"))
            if told:
                self.visit(f"{name}.{member}", value, depth)

    def _instance(self, name: str, value: Any, depth: int) -> None:
        kind = type(value)
        if isinstance(value, nn.Module):
            self._module(name, value, depth)
        elif kind.__module__ == "numpy" and getattr(value, "dtype", None) is not None:
            self._array(name, value, depth)
        elif origin_of_class(kind) == "foreign":
            self.texts[name] = _named(kind)
            self._contents(name, value, depth, of_user=False)
        else:
            in_words = self.in_words and is_dataclass(value)
            if not in_words or origin_of_class(kind) == "user":
                self.visit(f"{name}.class", kind, depth)
            told_by = getattr(kind, "TOLD_BY", None)  # of a class of ours that remembers what does not matter
            for attribute, own in _attributes(value):
                if told_by is not None and attribute.lstrip("_") not in told_by:
                    continue
                if not (in_words and isinstance(own, _PLAIN)) and not is_how_it_is_done(value, attribute):
                    self.visit(f"{name}.{attribute.lstrip('_')}", own, depth)
            if any(base.__module__ == "numpy" for base in kind.__mro__):
                self._array(f"{name}.array", value, depth)
            self._contents(name, value, depth, of_user=True)

    def _contents(self, name: str, value: Any, depth: int, *, of_user: bool) -> None:
        outermost, own_nodes = self._others_depth == 0 and not of_user, self._nodes
        share = self._nodes_of_others // 2  # lest a large one leaves nothing for what comes after it
        if outermost:
            self._nodes = share
        self._others_depth += not of_user
        try:
            for part, own in contents(value, of_user=of_user):
                self.visit(f"{name}.{part.lstrip('_')}", own, depth)
        finally:
            self._others_depth -= not of_user
            if outermost:
                self._nodes_of_others -= share - max(self._nodes, 0)
                self._nodes = own_nodes

    def _module(self, name: str, module: nn.Module, depth: int) -> None:
        for path, part in module.named_modules():
            at = f"{name}.{path}" if path else name
            self.visit(f"{at}.class", type(part), depth)
            self.texts[at] = f"{type(part).__name__}{'' if part.training else ', eval'}"
            for attribute, own in vars(part).items():
                private = attribute.startswith("_") and origin_of_class(type(part)) != "user"
                if not (private or attribute in _OF_MODULES or isinstance(own, nn.Module)):
                    self.visit(f"{at}.{attribute}", own, depth)
        for path, tensor in [*module.named_parameters(), *module.named_buffers()]:
            self._tensor(f"{name}.{path}", tensor)

    def _array(self, name: str, value: Any, depth: int) -> None:
        if value.dtype.hasobject:
            self.texts[name] = _named(type(value))
            self.visit(f"{name}.items", value.tolist(), depth)
            return
        about = f"array {getattr(value, 'shape', ())} {value.dtype}"
        self._left -= value.nbytes
        self.texts[name] = f"{about} #{digest(value.tobytes())}" if self._left >= 0 else about

    def _bytes(self, name: str, value: memoryview) -> None:
        stride = 1 + value.nbytes // WHOLE
        self._left -= min(value.nbytes, WHOLE)
        about = f"bytes ({value.nbytes},)"
        some = value.cast("B")[::stride] if value.c_contiguous else value
        self.texts[name] = f"{about} #{digest(some.tobytes())}" if self._left >= 0 else about


def _is_plain(key: Any) -> bool:
    """Whether a key is told by its text: the same in every process."""
    if isinstance(key, tuple):
        return all(map(_is_plain, key))
    return isinstance(key, _PLAIN)


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """What an instance holds, by name."""
    if is_dataclass(value):
        return [(f.name, getattr(value, f.name)) for f in fields(value) if hasattr(value, f.name)]
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if not slot.startswith("__") and hasattr(value, slot):
                found.setdefault(slot, getattr(value, slot))
    return list(found.items())


def _short(text: str) -> str:
    return text if len(text) <= _SHORT else f"{text[: _SHORT // 2]}... #{digest(text.encode())}"


def _named(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
