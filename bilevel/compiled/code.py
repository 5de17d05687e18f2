"""A problem as code: what of it a program is made of, and by which it is told from others."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any, final

import torch
from torch import Tensor

from bilevel._flat import FlatProblem
from bilevel._problem import BilevelProblem, Split
from bilevel._tree import Structure, tree_parts
from bilevel.compiled.refused import refused
from bilevel.outer.code_digest import code_text, names_from_around
from bilevel.outer.parts import Parts
from bilevel.outer.tensor_digest import WHOLE, tensor_text


@final
@dataclass(frozen=True, eq=False)
class Data:
    """The data of f and g, taken apart.

    Attributes:
        tensors: which become inputs of a program.
        others: what is no tensor, and part of it.
        build: makes the data of such tensors.
        shape: how they are nested, in words.
    """

    tensors: tuple[Tensor, ...]
    others: tuple[Any, ...]
    build: Callable[[Sequence[Tensor]], Any]
    shape: str

    @staticmethod
    def of(data: Any) -> Data:
        """What `FlatProblem.data` holds."""
        if isinstance(data, Split):
            f, g = Data.of(data.f), Data.of(data.g)
            count = len(f.tensors)
            return Data(
                (*f.tensors, *g.tensors),
                (*f.others, *g.others),
                lambda tensors: Split(f=f.build(tensors[:count]), g=g.build(tensors[count:])),
                f"Split({f.shape}, {g.shape})",
            )
        if data is None:
            return Data((), (), lambda _: None, "None")
        leaves, build = tree_parts(data)
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

        def made(given: Sequence[Tensor]) -> Any:
            new = iter(given)
            return build([next(new) if isinstance(leaf, Tensor) else leaf for leaf in leaves])

        others = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
        return Data(tensors, others, made, str(build([isinstance(leaf, Tensor) for leaf in leaves])))


@final
@dataclass(frozen=True, eq=False)
class Code:
    """f, g and init of vectors, as functions of the tensors in their data as well.

    Attributes:
        problem: in the user's structures.
        x: the structure of x.
        y: that of y.
        data: taken apart.
        is_encoded: whether x stands for an encoding.
    """

    problem: BilevelProblem
    x: Structure
    y: Structure
    data: Data
    is_encoded: bool

    @staticmethod
    def of(problem: FlatProblem) -> Code:
        """Of a problem in vectors.

        Raises:
            NotCompilableError: if its samples or tasks are over ranks, or not on the CPU.
        """
        if problem.across is not None or problem.tasks_over is not None:
            raise refused("group=...", "a program is of one process, and sends no messages")
        if problem.own_data:
            raise refused("sweep={'seed': ...}", "each of several runs side by side then has data of its own",
                          "Sweep over steps")  # fmt: skip
        data = Data.of(problem.data)
        for device in {problem.x.device, problem.y.device, *(tensor.device for tensor in data.tensors)}:
            if device.type != "cpu":
                raise refused("the problem", f"its tensors are on {device}, and programs are made for the CPU")
        if any(tensor.layout is not torch.strided for tensor in data.tensors):
            raise refused("data=...", "it has sparse tensors")
        if torch.is_autocast_enabled("cpu"):
            raise refused("the problem", "autocast is on, under which the same code computes in other dtypes")
        return Code(problem.problem, problem.x, problem.y, data, problem.is_encoded)

    def at(self, tensors: Sequence[Tensor]) -> FlatProblem:
        """The problem with these tensors in the place of those of its data."""
        return FlatProblem(self.problem, self.x, self.y, self.data.build(tensors), is_encoded=self.is_encoded)

    def key(self, *settings: Any) -> tuple[Any, ...]:
        """What tells the program of this problem from others: code, captured values, structures, shapes.

        Two problems whose functions have the same code and close over equal values have the same key, whichever objects
        they are; another number or another entry of a captured tensor is another key. Where there is something that
        cannot be told of, such as an open file, it is the object that counts.

        Args:
            settings: what else the program is made of.
        """
        walk = Parts(_code, _tensor, math.inf)
        walk.visit("problem", self.problem)
        walk.visit("settings", settings)
        walk.visit("data", self.data.others)
        unread = tuple((name, id(self.problem), id(settings)) for name in walk.unread)
        sizes = tuple((tuple(each.shape), each.stride(), str(each.dtype)) for each in self.data.tensors)
        told = tuple(sorted(walk.texts.items()))
        nestings = (self.x.describe(), self.y.describe(), self.data.shape, self.is_encoded)
        return told, unread, sizes, nestings, str(torch.get_default_dtype())


def tensors_of(data: Any) -> tuple[Tensor, ...]:
    """`Data.of(data).tensors`, and nothing else: what a loop can ask at every step."""
    sides = (data.f, data.g) if isinstance(data, Split) else (data,)
    return tuple(leaf for side in sides if side is not None for leaf in tree_parts(side)[0] if isinstance(leaf, Tensor))


_CODES: dict[int, tuple[CodeType, str, dict[str, set[str]]]] = {}
_TEXTS: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}
_MANY = 4096


def _code(code: CodeType) -> tuple[str, dict[str, set[str]]]:
    if id(code) not in _CODES:
        if len(_CODES) >= _MANY:
            _CODES.clear()
        _CODES[id(code)] = code, code_text(code), names_from_around(code)
    return _CODES[id(code)][1:]


def _tensor(tensor: Tensor) -> str:
    """Its text, kept as long as it is not written to; of one that is too large to be told whole also which it is."""
    version = -1 if tensor.is_inference() else tensor._version
    known = _TEXTS.get(id(tensor))
    if known is None or known[0]() is not tensor or known[1] != version or version < 0:
        if len(_TEXTS) >= _MANY:
            _TEXTS.clear()
        text = f"{tensor_text(tensor)} {tensor.stride() if tensor.layout is torch.strided else tensor.layout}"
        if tensor.numel() * tensor.element_size() > WHOLE:
            text += f" {id(tensor)} {version}"
        known = weakref.ref(tensor), version, text
        _TEXTS[id(tensor)] = known
    return known[2]
