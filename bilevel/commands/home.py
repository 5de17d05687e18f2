"""The current directory, which the paths of a command are relative to, whatever the user's code does with it."""

from __future__ import annotations

import os
from typing import final

from bilevel.commands.progress import note


@final
class Home:
    """The directory that the command was called in, to come back to after code that may call `os.chdir`."""

    def __init__(self) -> None:
        self._path = os.getcwd()
        self._told = False

    def back_from(self, whose: str) -> None:
        """Come back, if need be, and say so once.

        Args:
            whose: code it was.
        """
        try:
            away = os.getcwd()
        except FileNotFoundError:  # it has been removed
            away = "one that is gone"
        if away != self._path:
            os.chdir(self._path)
            if not self._told:
                note(f"{whose} changes the current directory, to {away}: the command goes on in {self._path}.")
            self._told = True
