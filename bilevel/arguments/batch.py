"""One batch of data, and no loader of many."""

from __future__ import annotations

import collections.abc
from typing import Any


def demand_batch(data: Any) -> None:
    """Refuse a loader where one batch is needed, and a tuple, list or dict of loaders.

    Raises:
        TypeError: saying how to get one.
    """
    if _is_loader(data):
        raise TypeError(
            f"`data=...` must be one batch here: f and g are called with it. Got a {type(data).__name__}. Pass"
            f" `next(iter(loader))`; a loader goes to `minimize(data=...)`."
        )
    if isinstance(data, tuple | list | dict):
        parts = list(data.values() if isinstance(data, dict) else data)
        if parts and all(map(_is_loader, parts)):
            raise TypeError(
                f"`data=...` must be one batch: f and g are called with it. Got a {type(data).__name__} of"
                f" {len(parts)} loaders ({', '.join(type(part).__name__ for part in parts)}). One loader for f and one"
                f" for g are `minimize(data=Split(f=loader, g=loader))`; elsewhere pass a batch of each, such as"
                f" `data=Split(f=next(iter(loader)), g=next(iter(loader)))`."
            )


def _is_loader(data: Any) -> bool:
    names = {f"{base.__module__}.{base.__name__}" for base in type(data).__mro__}
    loader = "torch.utils.data.dataloader.DataLoader" in names  # known by its name: nothing is imported for it
    return loader or isinstance(data, collections.abc.Iterator)
