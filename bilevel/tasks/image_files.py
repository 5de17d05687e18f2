"""Images on disk, decoded when they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from bilevel.arguments.checked import fitting
from bilevel.arguments.fits import demand_types
from bilevel.outside.images import open_image, pillow
from bilevel.tasks.images import AbstractImages, distinct, put


@final
@dataclass(frozen=True, eq=False, repr=False)
class ImageFiles(AbstractImages):
    """Image files by class, decoded and resized by Pillow when they are first drawn; bytes, scaled by 1 / 255.

    Args:
        files: the files of each class.
        names: of the classes.
        size: height and width that every image is resized to (antialiased; the aspect ratio is not kept), or one number
            for both.
        color: red, green and blue; otherwise one channel of luminance.
        invert: white becomes 0: for ink on paper.
        cache: keep what was decoded in memory, 1 byte a pixel.

    Raises:
        ValueError: if names do not fit or a class has no file.
        ImportError: if Pillow is missing.
    """

    files: tuple[tuple[Path, ...], ...]
    names: tuple[str, ...]
    size: int | Sequence[int]
    color: bool = True
    invert: bool = False
    cache: bool = True
    counts: Tensor = field(init=False)
    shape: tuple[int, int, int] = field(init=False)
    scale: float = field(init=False)
    _first: Tensor = field(init=False)
    _flat: tuple[Path, ...] = field(init=False)
    _decoded: Tensor = field(init=False)
    _known: Tensor = field(init=False)

    def __post_init__(self) -> None:
        demand_types(self)
        pillow()
        distinct("ImageFiles", self.names, len(self.files))
        empty = [name for name, files in zip(self.names, self.files, strict=True) if not files]
        if empty or not self.files:
            raise ValueError(
                f"every class needs an image, and {empty[0]!r} has none." if empty else "there is no class."
            )
        size = _size(self.size)
        counts = torch.tensor([len(files) for files in self.files], device="cpu")
        kept = int(counts.sum()) if self.cache else 0
        shape = (3 if self.color else 1, *size)
        put(self, "size", size)
        put(self, "counts", counts)
        put(self, "shape", shape)
        put(self, "scale", 1 / 255)
        put(self, "_first", counts.cumsum(0) - counts)
        put(self, "_flat", tuple(file for files in self.files for file in files))
        put(
            self, "_decoded", torch.empty(kept, *shape, dtype=torch.uint8, device="cpu")
        )  # pages come into being when written
        put(self, "_known", torch.zeros(kept, dtype=torch.bool, device="cpu"))

    def __reduce__(self) -> Any:
        """Without what was decoded: each process reads what it draws."""
        return ImageFiles, (self.files, self.names, self.size, self.color, self.invert, self.cache)

    @fitting
    def pixels(self, classes: Tensor, members: Tensor) -> Tensor:
        numbers = self._first[classes] + members
        if not self.cache:
            return torch.stack([self._decode(number) for number in numbers.tolist()])
        for number in set(numbers[~self._known[numbers]].tolist()):
            self._decoded[number] = self._decode(number)
            self._known[number] = True
        return self._decoded.index_select(0, numbers)

    def _decode(self, number: int) -> Tensor:
        return decoded(self._flat[number], _size(self.size), color=self.color, invert=self.invert)


def decoded(file: Path | bytes, size: tuple[int, int], *, color: bool, invert: bool) -> Tensor:
    """An image file, or its contents, as `(channels, height, width)` bytes.

    Raises:
        ValueError: if it is not an image in the format PNG or JPEG, or is too large.
        ImportError: if Pillow is missing.
    """
    name = "contents" if isinstance(file, bytes) else str(file)
    image = open_image(file, name, "RGB" if color else "L")  # palettes and bits cannot be interpolated
    image = image.resize(size[::-1], pillow().Resampling.BILINEAR)
    channels = 3 if color else 1
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*size, channels).permute(2, 0, 1)
    return 255 - pixels if invert else pixels.contiguous()


def _size(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width from one number or two."""
    both = (size, size) if isinstance(size, int) else tuple(size)
    if len(both) != 2 or not all(isinstance(one, int) and 0 < one < 2**15 for one in both):
        raise ValueError(f"`ImageFiles(size=...)` must be a positive integer, or height and width. Got {size!r}.")
    return both[0], both[1]
