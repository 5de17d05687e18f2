"""The storages that are alive, counted at every operation: exact, whoever holds them, Python or a graph of autograd."""

from __future__ import annotations

import gc
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside it, `bytes` and `count` are those of all storages that operations have made and that are still held.

    A weak reference to a storage expires when nothing holds it any more, C++ included. What an operation makes and
    frees within itself is not seen.

    Args:
        least: storages of fewer bytes are not counted.
        peaks: whether `peak`, the most bytes at once, is kept.
    """

    def __init__(self, least: int = 1, peaks: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.least, self.peaks, self.peak = least, peaks, 0
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def storages(self) -> dict[int, int]:
        """Those that are alive, and their bytes."""
        self._seen = {key: kept for key, kept in self._seen.items() if not kept[0].expired()}  # type: ignore[no-untyped-call]
        return {key: size for key, (_, size) in self._seen.items()}

    @property
    def bytes(self) -> int:
        return sum(self.storages().values())

    @property
    def count(self) -> int:
        return len(self.storages())

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operation would import torch's compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        grown = False
        # pytree's own walk leaves a cycle of references behind at each call
        for each in _tensors(found):
            storage = each.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if size < self.least or (key in self._seen and not self._seen[key][0].expired()):  # type: ignore[no-untyped-call]
                continue
            if not any(given.untyped_storage()._cdata == key for given in _tensors((args, kwargs))):
                self._seen[key] = StorageWeakRef(storage), size  # type: ignore[no-untyped-call]
                grown = True
        if grown and self.peaks:
            self.peak = max(self.peak, self.bytes)
        elif grown and len(self._seen) > 10_000:
            self.storages()
        return found


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        if tree.layout == torch.strided:
            yield tree
    elif isinstance(tree, list | tuple):
        for each in tree:
            yield from _tensors(each)
    elif isinstance(tree, dict):
        yield from _tensors(tuple(tree.values()))


@contextmanager
def without_collector() -> Iterator[None]:
    """Python's collector of cycles has run, and is off; it no longer looks at what is there already, for speed."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        if was:
            gc.enable()


def cycles() -> list[str]:
    """What the collector finds now, and only it would free; nothing is freed."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    found = [getattr(each, "__qualname__", type(each).__qualname__) for each in gc.garbage]
    gc.garbage.clear()
    return found


def held(thing: Any, but: tuple[Any, ...] = ()) -> list[Tensor]:
    """The tensors that an object holds, through fields, containers and closures, and not through `but`."""
    stack, seen, found = [thing], {id(each) for each in but}, list[Tensor]()
    kept = []  # so that no identity is used again
    while stack:
        each = stack.pop()
        if id(each) in seen or isinstance(each, type | types.ModuleType | types.FrameType):
            continue
        seen.add(id(each))
        kept.append(each)
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, types.FunctionType):
            stack += [cell.cell_contents for cell in each.__closure__ or () if _is_filled(cell)]
            stack += each.__defaults__ or ()
        else:
            stack += gc.get_referents(each)
    return found


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


@dataclass
class Left:
    """What a call left behind.

    Attributes:
        strays: the bytes of storages that are alive and that the result does not hold.
        graphs: how many tensors of the result have a graph.
        cycles: what only the collector of cycles frees, with the result held and without it.
        after: the bytes of what is alive when the result is gone.
        kept: the bytes of the result.
        peak: the most bytes on the way.
    """

    strays: list[int] = field(default_factory=list)
    graphs: int = 0
    cycles: list[str] = field(default_factory=list)
    after: int = 0
    kept: int = 0
    peak: int = 0


def left_by(call: Callable[[], Any], but: tuple[Any, ...] = (), least: int = 1, peaks: bool = False) -> Left:
    """What a call leaves behind, with the collector off; `but` is what the result may refer to, and is not its own."""
    left = Left()
    with without_collector():
        with Live(least, peaks) as live:
            result = call()
        left.peak, left.kept = live.peak, live.bytes
        tensors = held(result, but)
        own = {each.untyped_storage()._cdata for each in tensors}
        left.strays = [size for key, size in live.storages().items() if key not in own]
        left.graphs = sum(each.grad_fn is not None for each in tensors)
        left.cycles = cycles()
        del result, tensors
        left.cycles += cycles()
        left.after = live.bytes
    return left
