"""Zip files from outside: read within limits, and nothing of them is written anywhere."""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, final

MIB = 1 << 20
_END, _END_64 = b"PK\x05\x06", b"PK\x06\x06"
_ENTRY = 46  # bytes of a member in the directory, beside its name
_NAMES = 256  # bytes of a name and what comes with it, on the average
_BLOCK = MIB


@final
@dataclass(frozen=True)
class Limits:
    """What an archive may hold.

    Attributes:
        members: how many files and folders.
        member: bytes of one file when it is unpacked.
        total: bytes of all of them.
    """

    members: int = 100_000
    member: int = 16 * MIB
    total: int = 1024 * MIB


@final
class Archive:
    """An open zip file whose members are within limits; made by :func:`opened_zip`.

    Attributes:
        path: where it is.
        names: of its files, with `/` between folders.
    """

    def __init__(self, path: Path, opened: zipfile.ZipFile) -> None:
        self.path, self._opened = path, opened
        self.names = tuple(info.filename for info in opened.infolist() if not info.is_dir())

    def read(self, name: str) -> bytes:
        """The contents of a file, no more than the directory says.

        Raises:
            ValueError: if it is damaged.
        """
        with self.stream(name) as file, _one_error(self.path, f" at {name!r}"):
            return file.read()

    def stream(self, name: str) -> IO[bytes]:
        """A file of the archive, to be read from its beginning; it ends where the directory says."""
        with _one_error(self.path, f" at {name!r}"):
            return self._opened.open(name)


@contextmanager
def opened_zip(path: str | os.PathLike[str], limits: Limits = Limits()) -> Iterator[Archive]:
    """Open a zip file and look at its directory, before anything is unpacked.

    Refused are archives of more members or bytes than the limits, by what the directory says, which reading does not go
    beyond; members that are links, encrypted, or compressed by other means than deflate; names that are absolute,
    lead out of the archive, or are there twice.

    Args:
        path: the file.
        limits: what it may hold.

    Raises:
        ValueError: naming the file, the member and the limit.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with zipfile.ZipFile(f"{folder}/a.zip", "w") as made:
        ...         made.writestr("b/c.txt", "text")
        ...     with opened_zip(f"{folder}/a.zip") as archive:
        ...         archive.names, archive.read("b/c.txt")
        (('b/c.txt',), b'text')
    """
    own = Path(path)
    with _one_error(own), own.open("rb") as file:
        room = limits.members * (_ENTRY + _NAMES)
        if (size := directory_size(file)) > room:
            raise ValueError(
                f"the directory of the archive {str(path)!r} has {size} bytes; at most {room} are read, those of"
                f" {limits.members} members."
            )
        with zipfile.ZipFile(file) as opened:
            _demand(own, opened.infolist(), limits)
            yield Archive(own, opened)


def directory_size(file: IO[bytes]) -> int:
    """How many bytes the directory at the end of a zip file has, as `zipfile` will look for it; 0: there is none."""
    length = file.seek(0, os.SEEK_END)
    tail = min(length, 22 + 65_535)  # with the longest comment
    file.seek(length - tail)
    end = file.read(tail)
    place = len(end) - 22 if end[-22:-18] == _END and end.endswith(b"\0\0") else end.rfind(_END)
    if place < 0 or len(end) < place + 22:
        return 0
    size: int = struct.unpack_from("<L", end, place + 12)[0]
    before = length - tail + place - 20 - 56  # the record of large archives, and what says where it is
    if before >= 0:
        file.seek(before)
        record = file.read(56)
        if record[:4] == _END_64:
            size = max(size if size != 0xFFFFFFFF else 0, struct.unpack_from("<Q", record, 40)[0])
    return size


def _demand(path: Path, members: list[zipfile.ZipInfo], limits: Limits) -> None:
    if len(members) > limits.members:
        raise ValueError(f"the archive {str(path)!r} has {len(members)} members; at most {limits.members} are read.")
    seen: set[str] = set()
    for info in members:
        name, mode = info.filename, info.external_attr >> 16
        parts = name.replace("\\", "/").split("/")
        if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "\0" in name:
            why = "has a name that leads out of it"
        elif name in seen:
            why = "is there twice, of which programs read the one or the other"
        elif stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            why = "is a link, or no file"
        elif info.flag_bits & 1:
            why = "is encrypted"
        elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            why = "is compressed by other means than deflate, which has no limit"
        elif info.file_size > limits.member:
            why = f"has {info.file_size} bytes when unpacked; at most {limits.member} are read"
        else:
            seen.add(name)
            continue
        raise ValueError(f"the archive {str(path)!r} has a member {name!r} that {why}. It was not unpacked.")
    total = sum(info.file_size for info in members)
    if total > limits.total:
        raise ValueError(
            f"the archive {str(path)!r} has {total} bytes when unpacked; at most {limits.total} are read. It was not"
            f" unpacked."
        )


@contextmanager
def _one_error(path: Path, where: str = "") -> Iterator[None]:
    """What `zipfile` raises of a damaged archive, in one sentence."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{str(path)!r} is not a zip file that can be read{where}: {error}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not a zip file that can be read: a name is no text.") from error
