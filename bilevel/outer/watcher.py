"""Whoever is told of a run, and keeps what it was told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class AbstractWatcher(ABC):
    """A callback that writes what it is told, and has it on the disk before a checkpoint counts it.

    It is called as the callbacks of `minimize` or of `train` are.
    """

    @abstractmethod
    def before_save(self) -> None:
        """Have all of it on the disk.

        Raises:
            OSError: if that cannot be.
        """


class AbstractEverywhere(AbstractWatcher):
    """A watcher that every rank of a group calls, and that answers the same on all of them.

    What one rank alone is to do in it, such as writing a file, goes by `first_says`, so that all learn of its failure.
    """


def before_save(callback: Any) -> None:
    """What is to be done for a callback before a checkpoint is written: for most of them nothing."""
    if isinstance(callback, AbstractWatcher):
        callback.before_save()
