"""What objects of other packages hold, by name: as far as it is known what they are, else as they would be pickled."""

from __future__ import annotations

import copyreg
import os
from argparse import Namespace
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from functools import cached_property, partialmethod
from pathlib import PurePath
from pickle import PickleBuffer
from types import MappingProxyType, SimpleNamespace
from typing import Any, TypeAlias

import torch

Named: TypeAlias = Iterator[tuple[str, Any]]

# What tells of a loader, a sampler or a data set which samples come when: not how it is done (workers, pinned memory).
_OF_DATA = {
    *("dataset", "datasets", "tensors", "indices", "data_source", "batch_size", "drop_last", "collate_fn", "sampler"),
    *("batch_sampler", "replacement", "num_samples", "_num_samples", "weights", "generator", "worker_init_fn"),
    *("num_replicas", "rank", "shuffle", "seed"),
}
_HOW = {"_iterator", "_dataset_kind", "_IterableDataset_len_called", "persistent_workers", "in_order"}


def contents(value: Any, *, of_user: bool) -> Named:
    """The parts of an object that is no function, class, module, tensor, dict, list, tuple or set.

    Bytes are memoryviews. Of an object of a package that is not known, how it would be pickled: what is needed to make
    it again, without the names of its making.

    Args:
        value: the object.
        of_user: whether its class is the user's, and only derived from one that is known; its own attributes, which
            are another's to tell, are left out.

    Raises:
        Exception: whatever an object says that cannot be pickled.

    Example:
        >>> (
        ...     dict(contents(Namespace(rate=0.5), of_user=False)),
        ...     dict(contents(Fraction(1, 3), of_user=False)),
        ... )
        ({'rate': 0.5}, {'value': '1/3'})
        >>> dict(contents(deque([1, 2], maxlen=5), of_user=False))
        {'items': [1, 2], 'maxlen': 5}
    """
    for kind, tell in _KNOWN:
        if isinstance(value, kind):
            yield from tell(value)
            return
    if of_user:
        return
    if is_of_torch_data(type(value)):
        yield from ((name, own) for name, own in vars(value).items() if name in _OF_DATA)
        return
    yield from _as_pickled(value)


def is_of_torch_data(kind: type) -> bool:
    """Whether a class is one of `torch.utils.data`."""
    return kind.__module__.startswith("torch.utils.data")


def is_how_it_is_done(value: Any, attribute: str) -> bool:
    """Whether an attribute of a loader of the user's own class tells nothing of its samples."""
    if not isinstance(value, torch.utils.data.DataLoader) or attribute in _OF_DATA:
        return False
    known = torch.utils.data.DataLoader.__annotations__.keys() | _HOW
    return attribute in known or attribute.startswith("_DataLoader__")


def _path(value: PurePath) -> Named:
    if not os.path.isabs(value):  # a file may have been moved
        yield "value", str(value)


def _entries(value: Any) -> Named:
    yield "items", list(value)
    yield "maxlen", value.maxlen


def _array(value: array[Any]) -> Named:
    yield "typecode", value.typecode
    yield "bytes", memoryview(value)


_KNOWN: tuple[tuple[Any, Callable[[Any], Named]], ...] = (
    ((Namespace, SimpleNamespace), lambda value: iter(list(vars(value).items()))),
    (deque, _entries),
    ((Fraction, Decimal), lambda value: iter([("value", str(value))])),
    (MappingProxyType, lambda value: iter([("items", dict(value))])),
    (array, _array),
    ((bytearray, PickleBuffer), lambda value: iter([("bytes", memoryview(value))])),
    (PurePath, _path),
    (torch.Generator, lambda value: iter([("seed", value.initial_seed())])),  # where it is changes on the way
    ((cached_property, partialmethod), lambda value: iter([("func", value.func)])),
)


def _as_pickled(value: Any) -> Named:
    """How pickle would make it again; with protocol 5, by which large buffers are not copied."""
    kind: Any = type(value)
    if kind.__module__ == "itertools":
        raise TypeError("iterators that will not be pickled in later versions of Python")
    reduce = copyreg.dispatch_table.get(kind)
    reduced: Any = value.__reduce_ex__(5) if reduce is None else reduce(value)
    if isinstance(reduced, str):
        yield "global", reduced
        return
    parts: list[Any] = [*reduced, None, None, None]
    made, arguments, state, items, pairs = parts[:5]
    if getattr(made, "__name__", "") in ("__newobj__", "__newobj_ex__", "_reconstructor"):
        arguments = arguments[1:]  # the class
    else:
        yield "made", made
    if arguments:
        yield "args", tuple(arguments)
    for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
        if isinstance(part, dict):
            yield from ((str(name), own) for name, own in part.items())
        elif part is not None:
            yield "state", part
    if items is not None:
        yield "items", list(items)
    if pairs is not None:
        yield "items", dict(pairs)
