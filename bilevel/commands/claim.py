"""Where a run may write: the folder is made, locked, mended after a crash; if nothing comes of it, it is as it was."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any, final

from bilevel.commands.contents import BEGUN, INTERRUPTED, STOPPED, read_result
from bilevel.commands.folder import Folder
from bilevel.commands.plan import Request
from bilevel.commands.progress import note
from bilevel.commands.replaced import bring_back
from bilevel.outer.lock import demand_free, locked

_TRIES = 10  # to make and lock a folder that others, who leave it, remove
_LONG = 100  # characters of a problem's name in that of a folder


@final
@dataclass(frozen=True)
class Claim:
    """A folder that is this process's own.

    Attributes:
        folder: which.
        before: what the run recorded that is to be resumed; None: there is none.
        goes_on: whether that run has a checkpoint; if not, it begins anew, as it was asked for.
    """

    folder: Folder
    before: dict[str, Any] | None = None
    goes_on: bool = False


@contextlib.contextmanager
def claimed(request: Request) -> Iterator[Claim]:
    """The run's folder, a new one under `runs` where none was named, for this process alone.

    Raises:
        ValueError: if it is none, is in use, has nothing to resume, or holds a run and nothing was said about what to
            do with it.
    """
    _demand_sense(request)
    made: list[Path] = []
    try:
        with contextlib.ExitStack() as stack:
            folder = _entered(request, made, stack)
            for file in (folder.checkpoint, folder.best):  # of a run in Python, which locks no folder
                demand_free(file)
            folder.demand_files()
            folder.remove_halves()
            bring_back(folder)  # of a run that was killed before its first evaluation had ended
            yield _resumed(folder) if request.resume else _begun(folder, overwrite=request.overwrite)
    finally:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()


def _entered(request: Request, made: list[Path], stack: contextlib.ExitStack) -> Folder:
    """The folder, made if need be and locked until the stack is left."""
    attempt = 0
    while True:
        folder = _new(request.problem, made) if request.out is None else Folder(Path(request.out))
        try:
            _make(folder.path, made)
            stack.enter_context(locked(folder.path))
        except OSError as error:
            attempt += 1
            if attempt == _TRIES or not isinstance(error, FileNotFoundError):
                where = "the folder `runs`" if request.out is None else f"`--out {request.out}`"
                raise ValueError(f"{where} cannot hold a run: {error}.") from error
        else:
            return folder


def _demand_sense(request: Request) -> None:
    if request.resume and request.overwrite:
        raise ValueError("`--resume` continues a run and `--overwrite` replaces it: choose one.")
    if request.force and not request.resume:
        raise ValueError("`--force` resumes a run in spite of what has changed: it goes with `--resume`.")
    if request.out is None:
        if request.resume:
            raise ValueError("`--resume` needs `--out DIR` to say which run.")
        return
    path = Path(request.out)
    if not request.out.strip() or (os.path.lexists(path) and not path.is_dir()):
        what = "empty" if not request.out.strip() else "a file" if path.is_file() else "no folder"
        raise ValueError(f"`--out {request.out}` is {what}: name a folder.")
    if request.resume and not path.exists():
        raise _nothing(Folder(path))


def _resumed(folder: Folder) -> Claim:
    """The run in the folder, to go on with."""
    if not folder.result.exists():
        raise _nothing(folder)
    before = read_result(folder)
    if folder.saved:
        return Claim(folder, before, goes_on=True)
    if before["status"] not in (BEGUN, INTERRUPTED, STOPPED):
        raise ValueError(
            f"the run in {str(folder.path)!r} has ended, and has no checkpoint to go on from. `--overwrite` begins it"
            f" anew."
        )
    note(f"the run in {str(folder.path)!r} was ended before its first checkpoint: it begins again from step 0.")
    return Claim(folder, before)


def _begun(folder: Folder, *, overwrite: bool) -> Claim:
    """The folder, for a new run; of what a run left that was killed, nothing that can be used is removed."""
    # who is killed between the first two files leaves what was asked for, and nothing that was computed
    if overwrite or not any(_filled(file) for file in folder.files if file != folder.config):
        return Claim(folder)
    if not folder.saved and not _filled(folder.solution) and not _filled(folder.model) and _status(folder) == BEGUN:
        note(f"the run in {str(folder.path)!r} was ended before its first checkpoint: another one takes its place.")
        return Claim(folder)
    raise ValueError(f"{str(folder.path)!r} holds a run: `--resume` continues it, `--overwrite` replaces it.")


def _status(folder: Folder) -> str | None:
    """That of the run in the folder, as it was recorded; None where that cannot be read."""
    try:
        return str(read_result(folder)["status"]) if folder.result.exists() else None
    except ValueError:
        return None


def _nothing(folder: Folder) -> ValueError:
    return ValueError(
        f"there is no run to resume in {str(folder.path)!r}. Start it with the same `--out`, without `--resume`."
    )


def _filled(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def _new(problem: str, made: list[Path]) -> Folder:
    """A folder that was not there before."""
    stem = PurePath(problem).name.replace(".py:", "-")[:_LONG]
    name = f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"
    for again in itertools.count(1):
        path = Path("runs") / (name if again == 1 else f"{name}-{again}")
        _make(path.parent, made)
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            made.append(path)
            return Folder(path)
    raise AssertionError


def _make(path: Path, made: list[Path]) -> None:
    """Make a folder, and keep in mind what was made."""
    for each in reversed([each for each in (path, *path.parents) if not each.exists()]):
        with contextlib.suppress(FileExistsError):
            each.mkdir()
            made.append(each)
