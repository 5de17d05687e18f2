"""Images from outside: PNG and JPEG, of a limited size."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import Any

FORMATS = ("PNG", "JPEG")
SUFFIXES = (".png", ".jpg", ".jpeg")
BYTES = 64 << 20
"""Of a file."""
PIXELS = 64 << 20
"""Of an image, which is decoded to 3 or 4 bytes each."""


def open_image(file: str | os.PathLike[str] | bytes, name: str, mode: str) -> Any:
    """Decode an image file, or its contents, to an image of Pillow.

    The content tells the format, among `FORMATS`, whatever the name's ending is: no other decoder of Pillow is asked,
    and none that calls another program.

    Args:
        file: its path or contents.
        name: what errors call it.
        mode: "RGB" or "L".

    Raises:
        ValueError: if it is no image in one of the formats, or too large, or damaged.
        ImportError: if Pillow is missing.
    """
    Image = pillow()
    size = len(file) if isinstance(file, bytes) else _size(file, name)
    if size > BYTES:
        raise ValueError(f"{name!r} has {size} bytes; images of at most {BYTES} are read. Scale it down.")
    try:
        with Image.open(BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as opened:
            width, height = opened.size
            if width * height > PIXELS:
                raise ValueError(_too_large(name, f"{width} by {height} pixels"))
            if opened.mode.startswith("I"):  # 16 bits, which Pillow cuts off at 255 where it converts to 8
                opened = opened.convert("I").point(lambda level: level * (1 / 257) + 0.5).convert("L")
            return opened.convert(mode)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(_too_large(name, str(error))) from error
    except Exception as error:  # Pillow raises many kinds on broken files
        if str(error).startswith(f"{name!r} has"):
            raise
        formats = " or ".join(FORMATS)
        raise ValueError(
            f"{name!r} cannot be read as an image in the format {formats}: {error}. Convert, replace or remove it."
        ) from error


def pillow() -> Any:
    """Pillow's module `Image`.

    Raises:
        ImportError: if it is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('reading image files needs Pillow: `pip install "bilevel[images]"`.') from error
    return Image


def _size(file: str | os.PathLike[str], name: str) -> int:
    try:
        return Path(file).stat().st_size
    except OSError as error:
        raise ValueError(f"{name!r} cannot be read as an image: {error}. Replace or remove it.") from error


def _too_large(name: str, what: str) -> str:
    return f"{name!r} has {what}; images of at most {PIXELS} pixels are read. Scale it down."
