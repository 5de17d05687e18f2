"""Images in folders: a folder a class, and the two usual layouts of mini-ImageNet."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath

import torch

from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import SEED
from bilevel.arguments.words import got
from bilevel.outside.images import FORMATS, SUFFIXES
from bilevel.tasks._random import generator
from bilevel.tasks.image_files import ImageFiles
from bilevel.tasks.images import AbstractImages, Splits

_OTHERS = {".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".eps", ".jp2", ".heic", ".avif"}  # not read
_LONGEST = 10_000_000  # lines of a table
_PARTS = {"train": "train", "validation": "val", "test": "test"}


@checked()
def image_folder(
    path: str | Path,
    size: int | Sequence[int],
    *,
    color: bool = True,
    invert: bool = False,
    cache: bool = True,
) -> ImageFiles:
    """Every folder below `path` that has images in it is a class, named by its path from there.

    PNG and JPEG files are read, of up to 64 million pixels, when they are drawn, and kept in memory from then on.

    Args:
        path: the folder.
        size: height and width that images are resized to, or one number for both.
        color: red, green and blue; otherwise one channel of luminance.
        invert: white becomes 0: for ink on paper.
        cache: keep what was decoded, 1 byte a pixel.

    Raises:
        ValueError: if there is no such folder, or no image in it, or one in another format.
        ImportError: if Pillow is missing.
    """
    root = Path(path)
    if not _is_folder(root):
        raise ValueError(f"`image_folder(path=...)` must be a folder. There is none at {str(path)[:100]!r}.")
    classes: dict[str, list[Path]] = {}
    for file in sorted(root.rglob("*")):
        if file.name.startswith(".") or file.parent == root:
            continue
        if file.suffix.lower() in _OTHERS:
            raise ValueError(f"images are read in the formats {' and '.join(FORMATS)}. Got {str(file)!r}. Convert it.")
        if file.suffix.lower() in SUFFIXES:
            classes.setdefault(file.parent.relative_to(root).as_posix(), []).append(file)
    if not classes:
        raise ValueError(f"no subfolder of {str(path)!r} has images ({', '.join(SUFFIXES)}). One is a class.")
    names = sorted(classes)
    return ImageFiles(tuple(tuple(classes[name]) for name in names), tuple(names), size, color, invert, cache)


@checked()
def mini_imagenet(path: str | Path, size: int | Sequence[int] = 84, *, cache: bool = True) -> Splits:
    """mini-ImageNet, or another data set in one of its layouts: 64 training, 16 validation and 20 test classes.

    Either `images/` with the tables `train.csv`, `val.csv` and `test.csv` of the columns `filename` and `label` (Ravi
    and Larochelle, ICLR 2017), or the folders `train/`, `val/` and `test/` with a folder for each class. Colors; bytes
    in memory when all are decoded: 38,400 training images of 84 by 84 pixels are 0.8 GB.

    Args:
        path: the folder with these.
        size: height and width that images are resized to, or one number for both.
        cache: keep what was decoded, 1 byte a pixel and channel.

    Raises:
        ValueError: if neither layout is found, a file is missing, or a class is in two parts.
        ImportError: if Pillow is missing.
    """
    root = Path(path)
    tables = {part: root / f"{short}.csv" for part, short in _PARTS.items()}
    folders = {part: root / short for part, short in _PARTS.items()}
    if all(_answers(table.is_file) for table in tables.values()):
        return Splits(*(_from_table(table, root / "images", size, cache) for table in tables.values()))
    if all(_answers(folder.is_dir) for folder in folders.values()):
        return Splits(*(image_folder(folder, size, cache=cache) for folder in folders.values()))
    raise ValueError(
        f"`mini_imagenet(path=...)` must be a folder with images/, train.csv, val.csv and test.csv, or with the folders"
        f" train/, val/ and test/. {got(str(path))} has {', '.join(_listed(root)) or 'none of them'}."
    )


@checked(seed=SEED)
def split(images: AbstractImages, validation: int, test: int, seed: int) -> Splits:
    """Splits at random: so many validation and test classes, and the others for training.

    Args:
        images: all classes.
        validation: how many classes to choose by.
        test: how many classes to report on.
        seed: of the choice.

    Raises:
        ValueError: if none is left for training, or a number is not positive.

    Example:
        >>> import torch
        >>> from bilevel.tasks import ImageClasses
        >>> [
        ...     len(part.names)
        ...     for part in split(ImageClasses(torch.zeros(10, 5, 8, 8)), 2, 3, seed=0).parts
        ... ]
        [5, 2, 3]
    """
    if validation < 1 or test < 1 or validation + test >= len(images):
        raise ValueError(
            f"`split(validation=..., test=...)` must leave one of {len(images)} classes for training, and be at least 1"
            f" each. Got {validation} and {test}."
        )
    order = torch.randperm(len(images), generator=generator(seed), device="cpu").tolist()
    ends = (0, test, test + validation, len(order))
    first, second, third = (images.subset(sorted(order[i:j])) for i, j in pairwise(ends))
    return Splits(third, second, first)


def _from_table(table: Path, images: Path, size: int | Sequence[int], cache: bool) -> ImageFiles:
    classes: dict[str, list[Path]] = {}
    for name, label in _rows(table):
        classes.setdefault(label, []).append(images / name)
    missing = [file for files in classes.values() for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"{str(table)!r} names {len(missing)} files that do not exist, among them {str(missing[0])!r}."
        )
    names = sorted(classes)
    return ImageFiles(tuple(tuple(classes[name]) for name in names), tuple(names), size, cache=cache)


def _rows(table: Path) -> list[tuple[str, str]]:
    """File names and labels of a table.

    Raises:
        ValueError: if it is none, or a file is named that is not in the folder of images.
    """
    found = []
    try:
        with table.open(newline="", encoding="utf-8") as lines:
            rows = csv.DictReader(lines)
            if not {"filename", "label"} <= set(rows.fieldnames or ()):
                raise ValueError(f"{str(table)!r} needs the columns filename and label. Got {rows.fieldnames}.")
            for number, row in enumerate(rows, 1):
                name, label = row["filename"], row["label"]
                if not name or not label or number > _LONGEST:
                    raise ValueError(f"{str(table)!r} needs a filename and a label in each of its rows. Row {number}.")
                path = PurePosixPath(name.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or "\0" in name:
                    raise ValueError(f"{str(table)!r} names {name!r}, which is not in the folder images/.")
                found.append((name, label))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{str(table)!r} is no table of comma-separated values: {error}.") from error
    return found


def _listed(root: Path) -> list[str]:
    known = [f"{short}{end}" for short in _PARTS.values() for end in (".csv", "")]
    return [name for name in known if _answers((root / name).exists)]


def _is_folder(path: Path) -> bool:
    """Whether it is one."""
    return _answers(path.is_dir)


def _answers(asked: Callable[[], bool]) -> bool:
    """What a path says of itself; what systems do not take for a name (too many letters, say) is nothing."""
    try:
        return asked()
    except OSError:
        return False
