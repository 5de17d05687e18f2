"""One process a folder: a lock that the kernel releases when the process dies, however it dies."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import stat
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import ModuleType

try:
    import fcntl as _fcntl
except ImportError:  # not a Unix
    _locks: ModuleType | None = None
else:
    _locks = _fcntl

NAME = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system that has none
_held: dict[int, Path] = {}  # the open lock files of this process: what is open is the kernel's state, and not ours


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which must exist.

    It is `flock` on the file `.lock` in it: held as long as this process lives and has it open, and not inherited by
    what it forks. The file says who holds it; left behind by a process that was killed, it means nothing.

    Where there is no `flock` (on Windows, on file systems without locks) the file itself is the lock: there, one left
    behind has to be removed by hand, and the refusal says so.

    Raises:
        ValueError: if another process, or another thread of this one, holds it: which one, where and since when.
        OSError: if no file can be written in the folder.
    """
    path = folder / NAME
    handle = _taken(path)
    _held[handle] = path
    try:
        yield
    finally:
        del _held[handle]
        _drop(path, handle)


def abandon() -> None:
    """What may still be done when the process ends at once: remove half-written files and locks of its folders."""
    for handle, path in _held.items():
        for half in path.parent.glob(".*.part"):
            half.unlink(missing_ok=True)
        _drop(path, handle)


def _taken(path: Path) -> int:
    while True:
        handle = _opened(path)
        try:
            supported = _flocked(handle)
            if supported and _is(path, handle):
                os.truncate(handle, 0)
                os.write(handle, _who())
                return handle
        except BlockingIOError:
            text = os.read(handle, 4096)
            os.close(handle)
            raise ValueError(_refusal(path, text)) from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if not supported:
            return _created(path)
        # else whoever held it has removed it meanwhile


def _opened(path: Path) -> int:
    """The lock file itself, never what a link of that name leads to: a folder may come from anywhere.

    Raises:
        ValueError: if there is something else of that name.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        if path.is_symlink():
            raise ValueError(f"{str(path)!r} is a link, which the lock of a run folder never is. Remove it.") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{str(path)!r} is no file, which the lock of a run folder is. Remove it.")
    return handle


def _flocked(handle: int) -> bool:
    """Whether the file is locked now; False where there are no locks.

    Raises:
        BlockingIOError: if it is another's.
    """
    if _locks is None:
        return False
    try:
        _locks.flock(handle, _locks.LOCK_EX | _locks.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _created(path: Path) -> int:
    """The lock where there are no locks: that the file was not there."""
    if path.stat().st_size == 0:  # made by `_taken`, an instant ago
        path.unlink(missing_ok=True)
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        gone = f" If it is gone, remove {str(path)!r}: here, nothing else can tell."
        raise ValueError(_refusal(path, path.read_bytes()) + gone) from None
    os.write(handle, _who())
    return handle


def _drop(path: Path, handle: int) -> None:
    with contextlib.suppress(OSError):
        if _is(path, handle):  # and not that of another, after somebody has removed ours
            path.unlink()
        os.close(handle)


def _is(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _who() -> bytes:
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return json.dumps({"pid": os.getpid(), "host": platform.node(), "since": now}).encode()


def _refusal(path: Path, text: bytes) -> str:
    holder = "another process"
    with contextlib.suppress(ValueError, TypeError, KeyError):
        told = json.loads(text)
        holder = f"process {told['pid']} on {told['host']} since {told['since']}"
    return f"{str(path.parent)!r} is in use by {holder}: wait until it has ended, or name another `--out`."


def _not_inherited() -> None:
    for handle in _held:  # that of the parent stays locked: only its own, or all at once, release it
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):  # else a worker that outlives a killed run would hold its lock
    os.register_at_fork(after_in_child=_not_inherited)
