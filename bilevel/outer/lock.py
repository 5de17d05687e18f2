"""One run a folder and a file: locks that the kernel releases when the process dies, however it dies."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import final

from bilevel._files import made_folder

try:
    import fcntl as _fcntl
except ImportError:  # not a Unix
    _locks: ModuleType | None = None
else:
    _locks = _fcntl

NAME = ".lock"
_LISTENS = 20  # hundredths of a second, to who holds a file
_TRIES = 10  # to lock a file in a folder that others, who leave it, remove
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system that has none


@final
@dataclass(frozen=True, eq=False)
class _Held:
    """An open lock file of this process, and which half-written files beside it are of whoever holds it."""

    path: Path
    handle: int
    halves: str


@final
@dataclass(frozen=True)
class _Words:
    """How errors call what is held, who asked for it, and what else could be asked for."""

    call: str
    what: str
    other: str


_held: dict[int, _Held] = {}  # by identity: what is open is the kernel's state, and not ours


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
    with _locked(Path(os.path.abspath(folder)) / NAME, ".", _Words("", str(folder), "`--out`")):
        yield


@contextlib.contextmanager
def held(path: str | os.PathLike[str] | None, call: str = "", other: str = "file") -> Iterator[None]:
    """Hold a file that a run reads and replaces, as :func:`locked` does a folder: by `.NAME.lock` beside it.

    The folder is made if need be, and removed at the end if nothing has come into it.

    Args:
        path: the file, which need not be there; None: nothing is held.
        call: what was called, for errors.
        other: what to name another of.

    Raises:
        ValueError: if another run of this process or another one holds it, or no file can be written there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, held(f"{folder}/a.pt"):
        ...     os.listdir(folder)
        ['.a.pt.lock']
    """
    if path is None:
        yield
        return
    own, words = Path(os.path.abspath(path)), _Words(f"`{call}`: " if call else "", os.fspath(path), other)
    with contextlib.ExitStack() as stack:
        for attempt in range(_TRIES):
            try:
                stack.enter_context(made_folder(own.parent))
                lock = own.with_name(f".{own.name}{NAME}")
                stack.enter_context(_locked(lock, f".{own.name}.", words))
                break
            except OSError as error:
                if not isinstance(error, FileNotFoundError) or attempt == _TRIES - 1:
                    raise ValueError(f"{words.call}{words.what!r} cannot be written: {error}.") from error
        yield


def demand_free(path: Path) -> None:
    """Refuse a file that somebody holds now.

    Raises:
        ValueError: saying who.
    """
    if path.parent.is_dir():
        with held(path, other="`--out`"):
            pass


@contextlib.contextmanager
def _locked(path: Path, halves: str, words: _Words) -> Iterator[None]:
    own = _Held(path, _taken(path, words), halves)
    _held[id(own)] = own
    try:
        yield
    finally:
        if _held.pop(id(own), None) is not None:  # else this is a fork, and the lock its parent's
            _drop(own.path, own.handle)


def abandon() -> None:
    """What may still be done when the process ends at once: remove half-written files and locks of its runs."""
    for own in list(_held.values()):
        for name in os.listdir(own.path.parent):
            if name.startswith(own.halves) and name.endswith(".part"):
                (own.path.parent / name).unlink(missing_ok=True)
        _drop(own.path, own.handle)


def _taken(path: Path, words: _Words) -> int:
    while True:
        handle = _opened(path)
        try:
            supported = _flocked(handle)
            if supported and _is(path, handle):
                with contextlib.suppress(OSError):  # a full disk: it is held, and does not say by whom
                    os.truncate(handle, 0)
                    os.write(handle, _who())
                return handle
        except BlockingIOError:
            text = _told(handle)
            os.close(handle)
            raise ValueError(_refusal(words, text)) from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if not supported:
            return _created(path, words)
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
            raise ValueError(f"{str(path)!r} is a link, which the lock of a run never is. Remove it.") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{str(path)!r} is no file, which the lock of a run is. Remove it.")
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


def _created(path: Path, words: _Words) -> int:
    """The lock where there are no locks: that the file was not there."""
    if path.stat().st_size == 0:  # made by `_taken`, an instant ago
        path.unlink(missing_ok=True)
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        gone = f" If it is gone, remove {str(path)!r}: here, nothing else can tell."
        raise ValueError(_refusal(words, path.read_bytes()) + gone) from None
    with contextlib.suppress(OSError):
        os.write(handle, _who())
    return handle


def _drop(path: Path, handle: int) -> None:
    with contextlib.suppress(OSError):
        if _is(path, handle):  # and not that of another, after somebody has removed ours
            path.unlink()
    with contextlib.suppress(OSError):
        os.close(handle)


def _is(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _who() -> bytes:
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return json.dumps({"pid": os.getpid(), "host": platform.node(), "since": now}).encode()


def _told(handle: int) -> bytes:
    """Who holds a file; one that has taken it this very instant has not said so yet."""
    for _ in range(_LISTENS):
        text = os.pread(handle, 4096, 0)
        if text:
            return text
        time.sleep(0.01)
    return b""


def _refusal(words: _Words, text: bytes) -> str:
    holder = "another process"
    with contextlib.suppress(ValueError, TypeError, KeyError):
        told = json.loads(text)
        own = told["pid"] == os.getpid() and told["host"] == platform.node()
        holder = f"process {told['pid']} on {told['host']} since {told['since']}{' (this very one)' if own else ''}"
    return f"{words.call}{words.what!r} is in use by {holder}: wait until it has ended, or name another {words.other}."


def _not_inherited() -> None:
    for own in _held.values():  # that of the parent stays locked: only its own, or all at once, release it
        os.close(own.handle)
    _held.clear()


if hasattr(os, "register_at_fork"):  # else a worker that outlives a killed run would hold its lock
    os.register_at_fork(after_in_child=_not_inherited)
