"""What can be known of a run: by which another one that would go on from its checkpoint is told from it."""

from __future__ import annotations

import functools
import os
import re
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from bilevel.outer.code_digest import code_text, names_from_around
from bilevel.outer.origin import origin_of_class, origin_of_file, origin_of_function
from bilevel.outer.tensor_digest import WHOLE, digest, tensor_text

Parts: TypeAlias = dict[str, str]

BUDGET = 4 * WHOLE  # bytes of tensors that are hashed in all; of those beyond, sizes are compared
_NODES = 20_000  # objects that are looked at
_DEPTH = 30  # of one inside another
_SHORT = 60  # characters of a constant that are kept; of longer ones a hash
_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, type(Ellipsis), torch.dtype, torch.device)
_MEMBERS = (*_PLAIN, Tensor, list, tuple, dict, staticmethod, classmethod, property)
_OF_A_LOADER = ("dataset", "datasets", "batch_size", "drop_last", "tensors", "indices")  # not how it is done


def fingerprint(settings: Mapping[str, object]) -> Parts:
    """Settings in words, for comparison with those of another process: without the addresses of functions.

    Fields that are as they are by default are left out, so that a field more in a later version changes nothing.

    Example:
        >>> from bilevel import Constants
        >>> fingerprint({"constants": Constants(mu=1.0), "estimator": "aid-cg"})
        {'constants': 'Constants(mu=1.0)', 'estimator': 'aid-cg'}
    """
    texts = {name: setting if isinstance(setting, str) else _described(setting) for name, setting in settings.items()}
    return {name: without_addresses(text) for name, text in texts.items()}


def without_addresses(text: str) -> str:
    """Without where things are in memory, which the next process has elsewhere.

    Example:
        >>> without_addresses("<function f at 0x7f0dc>")
        '<function f>'
    """
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _described(value: object) -> str:
    if not is_dataclass(value) or isinstance(value, type):
        return repr(value)
    given = [(f, getattr(value, f.name)) for f in fields(value) if f.repr]
    told = [f"{f.name}={_described(v)}" for f, v in given if f.default is MISSING or repr(v) != repr(f.default)]
    return f"{type(value).__name__}({', '.join(told)})"


@final
class Fingerprint:
    """What a run is made of, by name: `problem.f` -> its code, `problem.f.target` -> the tensor that f closes over.

    Of functions that the user wrote: their code (without comments, names of files and line numbers), their defaults,
    what they close over, and the globals that they name, functions and classes among them likewise. Of tensors and
    arrays: sizes and a hash of up to 16 MiB of each and 64 MiB in all. Of numbers and texts: themselves, but for
    absolute paths. Of modules of torch: parameters and buffers. Of what other packages have made: its type. What is
    made anew in every process, or moved with the same content, is therefore the same.

    A part that changes while the run goes on (a counter, a list that grows) is nothing that a run can be told by:
    :meth:`changing` finds these.

    Cost: some 0.1 ms for a problem of a few functions; code and tensors that have not changed are not hashed again.

    Args:
        settings: what is in words already.
        made_of: by name the problem, the data and the settings that functions and tensors are looked for in.
        starts: tensors that a run begins with: one that is like them may be another in a run that goes on.

    Example:
        >>> from bilevel import BilevelProblem
        >>> problem = lambda target: BilevelProblem(lambda x, y: (y - target).square(), lambda x, y: (y - x).square())
        >>> one, other = (Fingerprint({}, {"problem": problem(torch.tensor(t))}).parts for t in (1.0, 2.0))
        >>> [name for name in one if one[name] != other[name]]
        ['problem.f.target']
    """

    def __init__(
        self, settings: Mapping[str, object], made_of: Mapping[str, object] = {}, starts: Iterable[Tensor] = ()
    ) -> None:
        self._settings, self._made_of = dict(settings), dict(made_of)
        self._texts: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}
        self._codes: dict[int, tuple[CodeType, str, dict[str, set[str]]]] = {}
        self._starts = {tensor_text(start) for start in starts}
        self._changing: set[str] = set()
        self.parts = self._walk() | fingerprint(settings)

    def changing(self) -> set[str]:
        """The parts that are not what they were when the run began."""
        now = self._walk()
        self._changing |= {name for name, text in now.items() if self.parts.get(name, text) != text}
        return self._changing

    def _walk(self) -> Parts:
        walk = _Walk(self)
        for name, value in self._made_of.items():
            walk.in_words = name in self._settings
            walk.visit(name, value, 0)
        return {name: text for name, text in walk.parts.items() if name not in self._settings}

    def code(self, code: CodeType) -> tuple[str, dict[str, set[str]]]:
        """The text of code, and what it names."""
        if id(code) not in self._codes:
            self._codes[id(code)] = code, code_text(code), names_from_around(code)
        return self._codes[id(code)][1:]

    def tensor(self, tensor: Tensor) -> str:
        """The text of a tensor."""
        known = self._texts.get(id(tensor))
        version = -1 if tensor.is_inference() else tensor._version
        if known is None or known[0]() is not tensor or known[1] != version or version < 0:
            text = tensor_text(tensor)
            known = weakref.ref(tensor), version, f"{text} of a start" if text in self._starts else text
            self._texts[id(tensor)] = known
        return known[2]


@final
class _Walk:
    """One look at everything."""

    def __init__(self, owner: Fingerprint) -> None:
        self.owner, self.parts, self.left, self.nodes = owner, Parts(), BUDGET, _NODES
        self.seen: dict[int, object] = {}
        self.in_words = False  # whether numbers are told already, by the text of the setting that holds them

    def visit(self, name: str, value: Any, depth: int) -> None:
        """Tell what there is to tell of a value and of what it holds."""
        self.nodes -= 1
        if self.nodes < 0 or depth > _DEPTH:
            return
        if isinstance(value, Enum):
            self.parts[name] = f"{type(value).__name__}.{value.name}"
        elif isinstance(value, _PLAIN):
            if not (isinstance(value, str) and os.path.isabs(value)):  # a file may have been moved
                self.parts[name] = _short(repr(value))
        elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self._tensor(name, value)
        elif id(value) not in self.seen:
            self.seen[id(value)] = value
            try:
                self._look_into(name, value, depth + 1)
            except Exception:  # an object with attributes of its own making: what is not known is not compared
                return

    def _tensor(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size() if tensor.layout is torch.strided else 0
        self.left -= min(size, WHOLE)
        if self.left >= 0:
            self.parts[name] = self.owner.tensor(tensor)
        else:
            self.parts[name] = f"tensor {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"

    def _look_into(self, name: str, value: Any, depth: int) -> None:
        if isinstance(value, nn.Parameter):
            self._tensor(name, value)
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
            self.parts[name] = value.__name__
        else:
            self._instance(name, value, depth)
        if not isinstance(value, type) and "__wrapped__" in getattr(value, "__dict__", {}):
            self.visit(f"{name}.wrapped", value.__wrapped__, depth)

    def _items(self, name: str, value: dict[Any, Any], depth: int) -> None:
        self.parts[name] = f"dict of {len(value)}"
        for key, item in value.items():
            told = _short(repr(key)) if isinstance(key, _PLAIN) else type(key).__name__
            self.visit(f"{name}[{told}]", item, depth)

    def _entries(self, name: str, value: Any, depth: int) -> None:
        if all(isinstance(item, _PLAIN) for item in value):
            ordered = isinstance(value, list | tuple)
            items = [*map(repr, value[:: 1 + len(value) // _NODES])] if ordered else sorted(map(repr, value))
            self.parts[name] = _short(f"{type(value).__name__} of {len(value)}: {', '.join(items)}")
            return
        self.parts[name] = f"{type(value).__name__} of {len(value)}"
        if not isinstance(value, set | frozenset):
            for i, item in enumerate(value):
                self.visit(f"{name}[{i}]", item, depth)

    def _function(self, name: str, function: FunctionType, depth: int) -> None:
        origin, code = origin_of_function(function), function.__code__
        if origin != "user":
            self.parts[name] = f"{function.__module__}.{function.__qualname__}"
        if origin == "foreign":
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
            self.parts[name], around = self.owner.code(code)
            for free, attributes in sorted(around.items()):
                if free in function.__globals__ and not free.startswith("__"):
                    self._global(f"{name}.{free}", function.__globals__[free], attributes, depth)

    def _global(self, name: str, value: Any, attributes: set[str], depth: int) -> None:
        if not isinstance(value, ModuleType):
            self.visit(name, value, depth)
            return
        of_user = origin_of_file(getattr(value, "__file__", None) or "<none>") == "user"
        for attribute in sorted(attributes):  # what is used of a file of the user
            member = vars(value).get(attribute)
            if of_user and isinstance(member, (*_MEMBERS, FunctionType, type)):
                self.visit(f"{name}.{attribute}", member, depth)

    def _class(self, name: str, kind: type, depth: int) -> None:
        if origin_of_class(kind) != "user":
            self.parts[name] = _named(kind)
            return
        for base in kind.__mro__:
            if origin_of_class(base) == "user":
                self._members(name, base, depth)

    def _members(self, name: str, kind: type, depth: int) -> None:
        for member, value in sorted(vars(kind).items()):
            if isinstance(value, FunctionType):  # but for what `dataclass` writes
                told = not (member.startswith("__") and value.__code__.co_filename.startswith("<string>"))
            else:
                told = isinstance(value, _MEMBERS) and not member.startswith(("__", "_abc_"))
            if told:
                self.visit(f"{name}.{member}", value, depth)

    def _instance(self, name: str, value: Any, depth: int) -> None:
        kind = type(value)
        if isinstance(value, nn.Module):
            self._module(name, value, depth)
        elif kind.__module__ == "numpy":
            self._array(name, value)
        elif _named(kind).startswith("torch.utils.data."):
            self.parts[name] = _named(kind)
            for attribute in _OF_A_LOADER:
                if attribute in vars(value):
                    self.visit(f"{name}.{attribute}", vars(value)[attribute], depth)
        elif origin_of_class(kind) == "foreign":
            self.parts[name] = _named(kind)
        else:
            in_words = self.in_words and is_dataclass(value)
            if not in_words or origin_of_class(kind) == "user":
                self.visit(f"{name}.class", kind, depth)
            for attribute, own in _attributes(value):
                if not (in_words and isinstance(own, _PLAIN)):
                    self.visit(f"{name}.{attribute.lstrip('_')}", own, depth)

    def _module(self, name: str, module: nn.Module, depth: int) -> None:
        for path, part in module.named_modules():
            at = f"{name}.{path}" if path else name
            self.visit(f"{at}.class", type(part), depth)
            self.parts[at] = f"{type(part).__name__}{'' if part.training else ', eval'}"
            for attribute, own in vars(part).items():
                if not attribute.startswith("_") and attribute != "training" and not isinstance(own, nn.Module):
                    self.visit(f"{at}.{attribute}", own, depth)
        for path, tensor in [*module.named_parameters(), *module.named_buffers()]:
            self._tensor(f"{name}.{path}", tensor)

    def _array(self, name: str, value: Any) -> None:
        about = f"array {getattr(value, 'shape', ())} {getattr(value, 'dtype', '')}"
        if getattr(value, "dtype", None) is None or value.dtype.hasobject:
            self.parts[name] = _named(type(value))
            return
        self.left -= value.nbytes
        self.parts[name] = f"{about} #{digest(value.tobytes())}" if self.left >= 0 else about


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


def differences(saved: Mapping[str, str], now: Mapping[str, str], changing: Iterable[str] = ()) -> list[str]:
    """What another run has otherwise, in words; parts that only one of them tells are taken on trust.

    Args:
        saved: the parts of the run that is to go on.
        now: those of the one that would go on.
        changing: parts that change while a run goes on.

    Example:
        >>> differences({"estimator": "itd", "x": "(2,)", "outer": "Adam"}, {"estimator": "aid-cg", "x": "(2,)"})
        ['estimator was itd and is aid-cg']
    """
    return [
        _difference(name, text, now[name])
        for name, text in saved.items()
        if name in now and name not in changing and not _alike(text, now[name])
    ]


def _alike(saved: str, now: str) -> bool:
    if saved == now:
        return True
    if saved.startswith("code #") and now.startswith("code #"):
        return saved.split(" of ")[1] != now.split(" of ")[1]  # of another version of Python: nobody knows
    if saved.startswith("tensor ") and now.startswith("tensor "):
        sizes = [text.partition(" #")[0] for text in (saved, now)]
        start_or_unread = any(text.endswith(" of a start") or "#" not in text for text in (saved, now))
        return sizes[0] == sizes[1] and start_or_unread
    return False


def _difference(name: str, saved: str, now: str) -> str:
    sizes = [text.partition("#")[0] for text in (saved, now)]
    if "#" in saved and sizes[0] == sizes[1]:
        kind = sizes[0].split(" ")[0]
        return f"{name} has other code" if kind == "code" else f"{name} ({sizes[0].strip()}) has other values"
    return f"{name} was {saved} and is {now}"
