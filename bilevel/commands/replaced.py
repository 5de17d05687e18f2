"""The files of a run that another one replaces: kept until the new one has something to show.

A process may be killed between any two of these steps, and no file of the earlier run may be lost by that. So a name
says what is where: files in `.replacing` and in the folder are together those of one run, on the way out or back; once
all are out that becomes `.replaced`, and what is in the folder belongs to the new run; and `.forgotten` is nobody's.
"""

from __future__ import annotations

from pathlib import Path

from bilevel.commands.folder import Folder


def set_aside(folder: Folder) -> None:
    """Move the files of an earlier run to :attr:`Folder.replaced`."""
    files = [file for file in folder.files if file.exists()]
    if files:
        _moving(folder).mkdir(exist_ok=True)
        for file in files:
            file.replace(_moving(folder) / file.name)
        _moving(folder).rename(folder.replaced)


def bring_back(folder: Folder) -> bool:
    """Undo :func:`set_aside`, removing what a new run has written meanwhile; whether there was something."""
    _remove(_forgotten(folder))
    if folder.replaced.is_dir():
        folder.clear()
        folder.replaced.rename(_moving(folder))
    if not _moving(folder).is_dir():
        return False
    for file in folder.files:
        if (_moving(folder) / file.name).exists():
            (_moving(folder) / file.name).replace(file)
    _moving(folder).rmdir()
    return True


def forget(folder: Folder) -> None:
    """Remove what was set aside."""
    if folder.replaced.is_dir():
        folder.replaced.rename(_forgotten(folder))
        _remove(_forgotten(folder))


def _moving(folder: Folder) -> Path:
    return folder.path / ".replacing"


def _forgotten(folder: Folder) -> Path:
    return folder.path / ".forgotten"


def _remove(path: Path) -> None:
    if path.is_dir():
        Folder(path).clear()
        path.rmdir()
