"""Text that comes with every Python: sources of data for a language model, without a download."""

from __future__ import annotations

import importlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

NAMES = ("code", "help", "names", "tables")
_WANTED = 2**19  # bytes of each, at most
_LEAST = 2**17


def python_texts() -> dict[str, Tensor]:
    """Four texts as vectors of bytes, at most 2^19 each, always in the same order.

    - `code`: the modules of the standard library, one after the other;
    - `help`: the topics of `help()`, the language reference (`pydoc_data.topics`);
    - `names`: the names of all characters, one a line (`unicodedata`);
    - `tables`: the modules of `encodings`, most of which are tables of characters.

    They differ a little between versions of Python, and so do results to the last digits.

    Raises:
        FileNotFoundError: naming the source that this Python comes without (as embeddable ones do), and what to do.

    Example:
        >>> list(python_texts())
        ['code', 'help', 'names', 'tables']
    """
    library = Path(sysconfig.get_path("stdlib"))
    read = {
        "code": (_files(library), f"the source files of the standard library in {str(library)!r}"),
        "help": (_topics(), "the module `pydoc_data.topics`"),
        "names": (_characters(), "the module `unicodedata`"),
        "tables": (_files(library / "encodings"), f"the source files of `encodings` in {str(library / 'encodings')!r}"),
    }
    return {name: _text(name, parts, place) for name, (parts, place) in read.items()}


def _text(name: str, parts: Iterator[bytes], place: str) -> Tensor:
    found = bytearray()
    for part in parts:
        found += part
        if len(found) >= _WANTED:
            break
    if len(found) < _LEAST:
        raise FileNotFoundError(
            f"the source of text {name!r} is read from {place}, of which this Python has {len(found)} bytes, and at"
            f" least {_LEAST} are needed. Install Python with its standard library as source (on Debian"
            " `libpython3-stdlib`), not as an embeddable package."
        )
    return torch.frombuffer(found[:_WANTED], dtype=torch.uint8)


def _files(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.glob("*.py")):
        yield path.read_bytes()


def _topics() -> Iterator[bytes]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for _, text in sorted(topics.items()):
        yield text.encode()


def _characters() -> Iterator[bytes]:
    try:
        name = importlib.import_module("unicodedata").name
    except ImportError:
        return
    for code in range(0x110000):
        found = name(chr(code), "")
        if found and not found.startswith(("CJK", "HANGUL SYLLABLE", "TANGUT", "NUSHU", "KHITAN", "EGYPTIAN")):
            yield found.encode() + b"\n"
