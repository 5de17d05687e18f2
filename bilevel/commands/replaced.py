"""The files of a run that another one replaces: kept until the new one has something to show."""

from __future__ import annotations

from bilevel.commands.folder import Folder


def set_aside(folder: Folder) -> None:
    """Move the files of an earlier run to :attr:`Folder.replaced`."""
    for file in folder.files:
        if file.exists():
            folder.replaced.mkdir(exist_ok=True)
            file.replace(folder.replaced / file.name)


def bring_back(folder: Folder) -> bool:
    """Undo :func:`set_aside`, removing what a new run has written meanwhile; whether there was something."""
    if not folder.replaced.is_dir():
        return False
    folder.clear()
    for file in folder.files:
        if (folder.replaced / file.name).exists():
            (folder.replaced / file.name).replace(file)
    folder.replaced.rmdir()
    return True


def forget(folder: Folder) -> None:
    """Remove what was set aside."""
    if folder.replaced.is_dir():
        Folder(folder.replaced).clear()
        folder.replaced.rmdir()
