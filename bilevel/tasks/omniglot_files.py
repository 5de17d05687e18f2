"""Omniglot's two archives, as they are downloaded, to the `.npz` file that `omniglot` reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bilevel._files import write_atomically
from bilevel.arguments.checked import checked
from bilevel.outside.archives import MIB, Limits, opened_zip
from bilevel.tasks._vinyals import class_names, split_of
from bilevel.tasks.image_files import decoded

ARCHIVES = ("images_background", "images_evaluation")
"""Their names: `.zip` files, or the folders in them."""

_DRAWING = re.compile(r"(?P<name>[^/]+/character\d+)/[^/.][^/]*\.png")  # not ._name: what macOS adds
_DRAWINGS, _SIZE = 20, 28
LIMITS = Limits(members=100_000, member=MIB, total=256 * MIB)
"""The archives have 20,600 members of some hundred bytes, and 14 MB."""


@checked()
def convert_omniglot(folder: str | Path, target: str | Path) -> Path:
    """Write the `.npz` file that `omniglot` reads, from the archives or unpacked folders in `folder`.

    Every drawing is reduced to 28 by 28 bytes (antialiased, bilinear) with ink = 255. Takes some seconds and writes
    some 6 MB: `images` `(1623, 20, 28, 28)`, `class_names` and `split_vinyals` `(1623,)`.

    Args:
        folder: where `images_background` and `images_evaluation` are, each a `.zip` file or a folder.
        target: the file to write; one that exists is replaced when the new one is complete.

    Raises:
        FileNotFoundError: if an archive is missing.
        ValueError: if a class or a drawing is missing.
        ImportError: if numpy or Pillow is missing.
    """
    try:
        import numpy as np
    except ImportError as error:
        raise ImportError('writing .npz files needs numpy: `pip install "bilevel[images]"`.') from error
    names = class_names()
    images = _drawings(Path(folder), names)
    classes, part = np.array(names), np.array(split_of(names), dtype=np.int8)
    write_atomically(
        target,
        lambda file: np.savez_compressed(file, images=images.numpy(), class_names=classes, split_vinyals=part),
    )
    return Path(target)


def _drawings(folder: Path, names: tuple[str, ...]) -> Tensor:
    images = torch.zeros(len(names), _DRAWINGS, _SIZE, _SIZE, dtype=torch.uint8, device="cpu")
    with ExitStack() as open_archives:
        found: dict[str, list[tuple[str, str, Callable[[], bytes]]]] = {}
        for archive in ARCHIVES:
            for name, path, read in _contents(folder, archive, open_archives):
                found.setdefault(name, []).append((path.rpartition("/")[2], path, read))
        for number, name in enumerate(names):
            drawings = sorted(found.get(name, []), key=lambda drawing: drawing[0])
            if len(drawings) != _DRAWINGS:
                raise ValueError(
                    f"Omniglot has {_DRAWINGS} drawings of {name!r}. {str(folder)!r} has {len(drawings)}."
                    " Download the archives again, or unpack them there."
                )
            for member, (_, path, read) in enumerate(drawings):
                images[number, member] = _decoded(path, read)[0]
    return images


def _decoded(path: str, read: Callable[[], bytes]) -> Tensor:
    try:
        return decoded(read(), (_SIZE, _SIZE), color=False, invert=True)
    except ValueError as error:
        raise ValueError(f"{path!r} is damaged: {error} Download the archives again.") from error


def _contents(folder: Path, archive: str, open_archives: ExitStack) -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    """The drawings of an archive: the name of the class, the path, and how it is read."""
    zipped, unpacked = folder / f"{archive}.zip", folder / archive
    paths: dict[str, Callable[[], bytes]]
    if unpacked.is_dir():
        paths = {file.relative_to(folder).as_posix(): partial(_short, file) for file in unpacked.rglob("*.png")}
    elif zipped.is_file():
        opened = open_archives.enter_context(opened_zip(zipped, LIMITS))
        paths = {name: partial(opened.read, name) for name in opened.names}
    else:
        raise FileNotFoundError(
            f"{str(folder)!r} has neither {archive}.zip nor a folder {archive}. `bilevel data omniglot` downloads both."
        )
    for path, read in paths.items():
        match = _DRAWING.search(path)
        if match and path.endswith(match[0]):
            yield match["name"], f"{folder.as_posix()}/{path}", read


def _short(file: Path) -> bytes:
    """The contents of a file that is no longer than a drawing may be."""
    with file.open("rb") as opened:
        content = opened.read(LIMITS.member + 1)
    if len(content) > LIMITS.member:
        raise ValueError(f"it has more than {LIMITS.member} bytes.")
    return content
