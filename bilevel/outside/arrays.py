"""Arrays from outside: `.npz` files, whose arrays are of numbers or texts, and of a limited size."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bilevel.outside.archives import MIB, Archive, Limits, opened_zip

BYTES = 8192 * MIB
"""Of one array, and of all that are read from a file."""
_LIMITS = Limits(members=1000, member=BYTES, total=BYTES)
FREE, TIMES = 64 * MIB, 100
"""Of all arrays that are read: so many bytes from any file, and from a larger one so many times its own."""
_RATIO = 1032  # how much deflate can shrink at most, and so how much a byte can become
_KINDS = {"b": "booleans", "i": "integers", "u": "integers", "f": "numbers", "c": "complex numbers", "U": "texts"}
_HEADER = 10_000  # characters, as numpy has it


def read_arrays(
    path: str | os.PathLike[str], wanted: Callable[[str], bool], extra: str, most: int = BYTES
) -> dict[str, Any]:
    """Those arrays of an `.npz` file that are wanted, by name.

    The header of each is read first: an array of objects, which would be unpickled, is refused, as is one of more bytes
    than are there, and arrays that together are more than 64 MiB and 100 times the file. Nothing in it is executed.

    Args:
        path: the file.
        wanted: which names.
        extra: what to install where numpy is missing.
        most: bytes of all that are wanted together.

    Raises:
        ValueError: if it is no `.npz` file, is damaged, holds something else than numbers and texts, or too much.
        ImportError: if numpy is missing.
    """
    try:
        from numpy.lib import format as npy
    except ImportError as error:
        raise ImportError(f'reading .npz files needs numpy: `pip install "bilevel[{extra}]"`.') from error
    found: dict[str, Any] = {}
    with opened_zip(path, _LIMITS) as archive:
        names = {name.removesuffix(".npy"): name for name in archive.names if name.endswith(".npy")}
        chosen = {key: name for key, name in names.items() if wanted(key)}
        left, held = most, Path(path).stat().st_size
        for key, name in chosen.items():
            left -= _demand_header(npy, archive, name, Path(path), left)
            if most - left > max(FREE, TIMES * held):
                raise ValueError(
                    f"{str(path)!r} has {held} bytes, and its arrays up to {key!r} have {most - left}: beyond"
                    f" {FREE // MIB} MiB at most {TIMES} times the file is read. If you trust it, load it yourself"
                    f" and pass the arrays."
                )
            found[key] = _read(npy, archive, name, Path(path))
    return found


def _demand_header(npy: Any, archive: Archive, name: str, path: Path, most: int) -> int:
    """Read the header of an array; returns its bytes."""
    with archive.stream(name) as file:
        try:
            version = npy.read_magic(file)
            read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[tuple(version)]
            shape, _, dtype = read(file, max_header_size=_HEADER)
        except Exception as error:  # numpy's words advise to trust the file
            raise _damaged(path, name, "its header cannot be read") from error
    if dtype.hasobject or dtype.kind not in _KINDS:
        kinds = ", ".join(dict.fromkeys(_KINDS.values()))
        raise ValueError(
            f"{str(path)!r} holds an array {name.removesuffix('.npy')!r} of the dtype {dtype}, which is not read: only"
            f" arrays of {kinds} are. Convert it (`array.astype(float)`, or `.astype(str)`) and save it again."
        )
    size = int(dtype.itemsize)
    for length in shape:
        if not isinstance(length, int) or length < 0:
            raise _damaged(path, name, "its shape is none")
        size *= length
    if size > most:
        raise ValueError(
            f"{str(path)!r} holds an array {name.removesuffix('.npy')!r} of shape {shape} with {size} bytes; at most"
            f" {most} more are read."
        )
    if size > _RATIO * path.stat().st_size:
        raise _damaged(path, name, f"its shape {shape} is of more numbers than there can be in the file")
    return size


def _read(npy: Any, archive: Archive, name: str, path: Path) -> Any:
    with archive.stream(name) as file:
        try:
            array = npy.read_array(file, allow_pickle=False, max_header_size=_HEADER)
            more = file.read(1)  # the end, where its checksum is looked at
        except Exception as error:
            raise _damaged(path, name, "its numbers cannot be read") from error
    if more:
        raise _damaged(path, name, "it holds more than its shape says")
    return array


def _damaged(path: Path, name: str, why: str) -> ValueError:
    return ValueError(
        f"{str(path)!r} holds an array {name.removesuffix('.npy')!r} that is damaged: {why}. Save the file again, by"
        f" `numpy.savez`."
    )
