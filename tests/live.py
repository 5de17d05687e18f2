"""The storages that are alive, counted at every operation: exact, whoever holds them, Python or a graph of autograd."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Inside it, `bytes` are those of all storages that operations have made and that are still held.

    A weak reference to a storage expires when nothing holds it any more, C++ included. What an operation makes and
    frees within itself is not seen.

    Args:
        least: smaller storages are not counted.
    """

    def __init__(self, least: int = 0) -> None:
        super().__init__()
        self.least, self.peak, self.where = least, 0, ""
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self._alive())

    @property
    def count(self) -> int:
        return len(self._alive())

    def _alive(self) -> list[tuple[StorageWeakRef, int]]:
        self._seen = {key: kept for key, kept in self._seen.items() if not kept[0].expired()}
        return list(self._seen.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {a.untyped_storage()._cdata for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        found = func(*args, **kwargs)
        grown = False
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                storage = leaf.untyped_storage()
                if storage.nbytes() >= max(self.least, 1) and storage._cdata not in known:
                    self._seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    grown = True
        if grown and (now := self.bytes) > self.peak:
            self.peak, self.where = now, str(func)
        return found


@contextmanager
def without_collector() -> Iterator[None]:
    """Python's collector of cycles has run, and is off."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
        gc.collect()


def cycles(call: Callable[[], Any]) -> Counter[str]:
    """The types of what only the collector of cycles frees: after the call, with its result held, and without it."""
    found: Counter[str] = Counter()

    def collect() -> None:
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        gc.set_debug(0)
        for thing in gc.garbage:
            found[getattr(thing, "__qualname__", type(thing).__qualname__)] += 1
        gc.garbage.clear()

    with without_collector():
        result = call()
        collect()
        del result
        collect()
    return found
