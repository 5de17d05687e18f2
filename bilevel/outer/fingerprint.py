"""What can be known of a run: by which another one that would go on from its checkpoint is told from it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from types import CodeType
from typing import final

from torch import Tensor

from bilevel.outer.code_digest import code_text, names_from_around
from bilevel.outer.parts import Parts
from bilevel.outer.tensor_digest import tensor_text
from bilevel.outer.words import in_words


@final
class Fingerprint:
    """What a run is made of, by name: `problem.f` -> its code, `problem.f.target` -> the tensor that f closes over.

    Of functions that the user wrote: their code (without comments, names of files and line numbers), their defaults,
    what they close over, and the globals that they name, functions and classes among them likewise. Of tensors and
    arrays: sizes and a hash of up to 16 MiB of each and 64 MiB in all. Of numbers and texts: themselves, but for
    absolute paths. Of modules of torch: parameters and buffers. Of loaders what tells which samples come when. Of what
    other packages have made: what it would be pickled as. What is made anew in every process, or moved with the same
    content, is therefore the same. What cannot be told of (open files, more than 20,000 objects) is in `unread`.

    A part that changes while the run goes on (a counter, a list that grows) is nothing that a run can be told by:
    :meth:`changing` finds these.

    Cost: some 0.1 ms for a problem of a few functions; code and tensors that have not changed are not hashed again.

    Args:
        settings: what is in words already.
        made_of: by name the problem, the data and the settings that functions and tensors are looked for in.
        starts: tensors that a run begins with: one that is like them may be another in a run that goes on.

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem
        >>> problem = lambda target: BilevelProblem(
        ...     lambda x, y: (y - target).square(), lambda x, y: (y - x).square()
        ... )
        >>> one, other = (
        ...     Fingerprint({}, {"problem": problem(torch.tensor(t))}).parts for t in (1.0, 2.0)
        ... )
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
        self.parts = self._walk() | in_words(settings)

    def changing(self) -> set[str]:
        """The parts that are not what they were when the run began."""
        now = self._walk()
        self._changing |= {name for name, text in now.items() if self.parts.get(name, text) != text}
        return self._changing

    def _walk(self) -> dict[str, str]:
        walk = Parts(self._code, self._tensor)
        for name, value in self._made_of.items():
            walk.in_words = name in self._settings
            walk.visit(name, value)
        self.unread = [f"{name} ({why})" for name, why in walk.unread.items()]
        return {name: text for name, text in walk.texts.items() if name not in self._settings}

    def _code(self, code: CodeType) -> tuple[str, dict[str, set[str]]]:
        """The text of code, and what it names."""
        if id(code) not in self._codes:
            self._codes[id(code)] = code, code_text(code), names_from_around(code)
        return self._codes[id(code)][1:]

    def _tensor(self, tensor: Tensor) -> str:
        """The text of a tensor."""
        known = self._texts.get(id(tensor))
        version = -1 if tensor.is_inference() else tensor._version
        if known is None or known[0]() is not tensor or known[1] != version or version < 0:
            text = tensor_text(tensor)
            known = weakref.ref(tensor), version, f"{text} of a start" if text in self._starts else text
            self._texts[id(tensor)] = known
        return known[2]


def differences(saved: Mapping[str, str], now: Mapping[str, str], changing: Iterable[str] = ()) -> list[str]:
    """What another run has otherwise, in words; parts that only one of them tells are taken on trust.

    Args:
        saved: the parts of the run that is to go on.
        now: those of the one that would go on.
        changing: parts that change while a run goes on.

    Example:
        >>> differences(
        ...     {"estimator": "itd", "x": "(2,)", "outer": "Adam"},
        ...     {"estimator": "aid-cg", "x": "(2,)"},
        ... )
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
