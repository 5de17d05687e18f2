"""Omniglot's two archives, as they are downloaded, to the `.npz` file that `omniglot` reads."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from bilevel._files import write_atomically
from bilevel.arguments.checked import checked
from bilevel.tasks._vinyals import class_names, split_of
from bilevel.tasks.image_files import decoded

ARCHIVES = ("images_background", "images_evaluation")
"""Their names: `.zip` files, or the folders in them."""

_DRAWING = re.compile(r"(?P<name>[^/]+/character\d+)/[^/.][^/]*\.png")  # not ._name: what macOS adds
_DRAWINGS, _SIZE = 20, 28


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
        found: dict[str, list[tuple[str, Path | zipfile.Path]]] = {}
        for archive in ARCHIVES:
            for name, drawing in _contents(folder, archive, open_archives):
                found.setdefault(name, []).append((drawing.name, drawing))
        for number, name in enumerate(names):
            drawings = [drawing for _, drawing in sorted(found.get(name, []), key=lambda named: named[0])]
            if len(drawings) != _DRAWINGS:
                raise ValueError(
                    f"Omniglot has {_DRAWINGS} drawings of {name!r}. {str(folder)!r} has {len(drawings)}."
                    " Download the archives again, or unpack them there."
                )
            for member, drawing in enumerate(drawings):
                images[number, member] = _decoded(drawing)[0]
    return images


def _decoded(drawing: Path | zipfile.Path) -> Tensor:
    try:
        return decoded(drawing.read_bytes(), (_SIZE, _SIZE), color=False, invert=True)
    except (zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"{str(drawing)!r} is damaged: {error}. Download the archives again.") from error


def _contents(folder: Path, archive: str, open_archives: ExitStack) -> Iterator[tuple[str, Path | zipfile.Path]]:
    """The drawings of an archive, each with the name of its class."""
    zipped, unpacked = folder / f"{archive}.zip", folder / archive
    paths: dict[str, Path | zipfile.Path]
    if unpacked.is_dir():
        paths = {file.relative_to(folder).as_posix(): file for file in unpacked.rglob("*.png")}
    elif zipped.is_file():
        opened = open_archives.enter_context(_opened(zipped))
        paths = {name: zipfile.Path(opened, name) for name in opened.namelist()}
    else:
        raise FileNotFoundError(
            f"{str(folder)!r} has neither {archive}.zip nor a folder {archive}. `bilevel data omniglot` downloads both."
        )
    for path, drawing in paths.items():
        match = _DRAWING.search(path)
        if match and path.endswith(match[0]):
            yield match["name"], drawing


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{str(path)!r} is not a zip file: {error}. Download it again.") from error
