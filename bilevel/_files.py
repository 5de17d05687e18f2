"""Files that are whole or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: nobody can tell there whether a writer is alive, and nothing is removed
    fcntl = None  # type: ignore[assignment]


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Replace a file by what `write` writes; a crash leaves the previous file or the new one, never half of one.

    A link of that name is replaced by the file, and what it leads to stays as it is. The bytes are on the disk before
    the file has its name, and the name is on the disk before this returns. The name that they have until then is of
    this call alone; what a call that was killed has left is removed by the next one.

    Args:
        path: the file; its folder is made if need be.
        write: called with the open file.

    Raises:
        OSError: if there is a device, a pipe or a folder of that name; if the disk is full or the like, also where
            `write` reports that as something else, as `torch.save` does.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(f"{folder}/runs/a.txt", lambda file: file.write(b"whole"))
        ...     Path(f"{folder}/runs/a.txt").read_text()
        'whole'
    """
    target = Path(path)
    demand_regular(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    # in the same folder: a rename within one disk
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # a file system that has no locks
                    fcntl.flock(file, fcntl.LOCK_EX)  # held for as long as this process lives
            try:
                write(file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # the archive of `torch.save`, closed over a full disk
                    raise error.__context__ from None
                raise
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def demand_regular(path: str | os.PathLike[str]) -> None:
    """Refuse to put a file in the place of a device, a pipe, a socket or a folder.

    Raises:
        OSError: if there is one of that name.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        mode = os.lstat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise OSError(errno.EEXIST, "there is something of that name that is no file", os.fspath(path))


@contextlib.contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """Make a folder, and those around it; in the end those that were made and hold nothing are removed.

    Raises:
        OSError: if that cannot be.
    """
    made: list[Path] = []
    own = Path(os.path.abspath(path))  # also once the current directory is another one
    try:
        for each in reversed([each for each in (own, *own.parents) if not each.exists()]):
            with contextlib.suppress(FileExistsError):
                each.mkdir()
                made.append(each)
        yield
    finally:
        for each in reversed(made):
            with contextlib.suppress(OSError):  # it is not empty, or gone
                each.rmdir()


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Have the names in a folder on the disk: a file that was renamed or made there has its name after a power cut."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # where folders cannot be opened, as on Windows, the system does this itself
        return
    try:
        with contextlib.suppress(OSError):  # not every file system has it for folders, and the file is there
            os.fsync(handle)
    finally:
        os.close(handle)


def _remove_abandoned(target: Path) -> None:
    """Remove what calls for this file left that were killed: their process is gone, and so is its lock."""
    if fcntl is None:
        return
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(\d+)(-[0-9a-f]+)?\.part")
    for name in os.listdir(target.parent):
        found = pattern.fullmatch(name)
        if found is not None and not _alive(int(found[1])):
            path = target.parent / name
            try:
                with path.open("rb") as file:  # a process of another container has another number, and the lock
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            except OSError:
                continue


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's
        return True
    return True
