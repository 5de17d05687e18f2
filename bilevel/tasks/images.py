"""Images by class, and splits of the classes."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from bilevel.arguments.checked import checked, fitting
from bilevel.arguments.fits import demand_type, demand_types
from bilevel.arguments.ranges import Range, demand_ranges
from bilevel.arguments.shapes import Shape, demand_shapes
from bilevel.portable.pickling import AbstractPortable


class AbstractImages(AbstractPortable, abc.ABC):
    """Classes of images of one shape: what `Episodes` draws from.

    Attributes:
        names: of the classes, no two of them equal.
        counts: how many images each class has, `(classes,)` integers.
        shape: channels, height and width.
        scale: what a pixel is multiplied by.
    """

    names: tuple[str, ...]
    counts: Tensor
    shape: tuple[int, int, int]
    scale: float

    @abc.abstractmethod
    def pixels(self, classes: Tensor, members: Tensor) -> Tensor:
        """The images `(n, channels, height, width)` with these numbers `(n,)`: of the class, and within the class."""

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        images = f"{int(self.counts.sum())} images of shape {self.shape}"
        return f"{type(self).__name__}({len(self)} classes, {images})"

    @checked()
    def subset(self, classes: Sequence[int]) -> Subset:
        """The classes with these numbers, in this order; nothing is copied."""
        return Subset(self, tuple(classes))


@final
@dataclass(frozen=True, eq=False, repr=False)
class Subset(AbstractImages):
    """Some classes of others: `images.subset(classes)`.

    Args:
        images: the others.
        classes: the numbers of those that are meant.

    Raises:
        ValueError: if one does not exist or is repeated, or there is none.
    """

    images: AbstractImages
    classes: tuple[int, ...]
    names: tuple[str, ...] = field(init=False)
    counts: Tensor = field(init=False)
    shape: tuple[int, int, int] = field(init=False)
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        demand_types(self)
        classes = tuple(map(int, self.classes))
        if not classes or len(set(classes)) < len(classes) or not all(0 <= k < len(self.images) for k in classes):
            raise ValueError(
                f"`subset(classes=...)` must be different numbers from 0 to {len(self.images) - 1}. Got {classes}."
            )
        put(self, "classes", classes)
        put(self, "names", tuple(self.images.names[k] for k in classes))
        put(self, "counts", self.images.counts[list(classes)])
        put(self, "shape", self.images.shape)
        put(self, "scale", self.images.scale)
        put(self, "_of", torch.tensor(classes, device="cpu"))

    def __reduce__(self) -> Any:
        return Subset, (self.images, self.classes)

    @fitting
    def pixels(self, classes: Tensor, members: Tensor) -> Tensor:
        of: Tensor = self.__dict__["_of"]
        return self.images.pixels(of[classes], members)


@final
@dataclass(frozen=True, eq=False, repr=False)
class ImageClasses(AbstractImages):
    """Images in memory, as they are stored (bytes, say): only those of a batch are made floating-point.

    Args:
        images: `(classes, per class, height, width)` or `(classes, per class, channels, height, width)`, of any dtype;
            or one tensor a class, where their numbers differ.
        names: of the classes; empty: their numbers.
        scale: what a pixel is multiplied by; None: 1 / 255 for bytes, else 1.

    Raises:
        ValueError: if shapes or names do not fit, a class is empty, or two have the same name.

    Example:
        >>> import torch
        >>> classes = ImageClasses(torch.zeros(4, 20, 28, 28), names=("a", "b", "c", "d"))
        >>> len(classes), classes.shape, classes.subset([3, 1]).names
        (4, (1, 28, 28), ('d', 'b'))
    """

    images: Tensor | tuple[Tensor, ...]
    names: tuple[str, ...] = ()
    scale: float = None  # type: ignore[assignment]
    counts: Tensor = field(init=False)
    shape: tuple[int, int, int] = field(init=False)
    _flat: Tensor = field(init=False)
    _first: Tensor = field(init=False)

    def __post_init__(self) -> None:
        demand_type("ImageClasses", "images", self.images, Tensor | Sequence[Tensor])
        demand_type("ImageClasses", "names", self.names, Sequence[str])
        demand_type("ImageClasses", "scale", self.scale, float | None)
        if self.scale is not None:
            demand_ranges(self, scale=Range(least=-1e300, below=1e300))
            put(self, "scale", float(self.scale))
        parts = (self.images,) if isinstance(self.images, Tensor) else self.images
        for part in parts:
            demand_shapes("ImageClasses", {"images": Shape(kind="number")}, {"images": part})
            if not part.dim():
                raise ValueError("`ImageClasses(images=...)` must have axes. Got a tensor without.")
        classes = list(self.images)
        shapes = sorted({tuple(one.shape[1:]) for one in classes})
        if len(shapes) != 1 or len(shapes[0]) not in (2, 3):
            arrived = tuple(self.images.shape) if isinstance(self.images, Tensor) else f"images of the shapes {shapes}"
            raise ValueError(
                "`ImageClasses(images=...)` must be (classes, per class, height, width), or (classes, per class,"
                f" channels, height, width), or one tensor a class with images of one shape. Got {arrived}."
            )
        names = tuple(map(str, self.names or range(len(classes))))
        distinct("ImageClasses", names, len(classes))
        counts = torch.tensor([len(one) for one in classes], device="cpu")
        if int(counts.min()) < 1:
            name = names[int(counts.argmin())]
            raise ValueError(f"`ImageClasses(images=...)`: every class needs an image, and {name!r} has none.")
        flat = self.images.flatten(0, 1) if isinstance(self.images, Tensor) else torch.cat(classes)
        flat = flat.unsqueeze(1) if flat.ndim == 3 else flat
        put(self, "names", names)
        put(self, "counts", counts)
        put(self, "shape", tuple(flat.shape[1:]))
        put(self, "_flat", flat)
        put(self, "_first", counts.cumsum(0) - counts)
        if self.scale is None:
            put(self, "scale", 1 / 255 if flat.dtype == torch.uint8 else 1.0)

    def __reduce__(self) -> Any:
        """The images once."""
        return ImageClasses, (self.images, self.names, self.scale)

    @fitting
    def pixels(self, classes: Tensor, members: Tensor) -> Tensor:
        return self._flat.index_select(0, (self._first[classes] + members).to(self._flat.device))


@final
@dataclass(frozen=True, eq=False)
class Splits:
    """Classes to learn from, to choose by, and to report on; no class is in two of them.

    Attributes:
        train: classes that are learned from.
        validation: classes that steps and settings are chosen by.
        test: classes that are reported on.

    Raises:
        ValueError: if two parts share a class (by name), or their images differ in shape.

    Example:
        >>> import torch
        >>> classes = ImageClasses(torch.zeros(4, 20, 28, 28))
        >>> Splits(classes.subset([0, 1]), classes.subset([2]), classes.subset([1, 3]))
        Traceback (most recent call last):
        ValueError: `Splits`: the classes of train and test must be different. Both have '1'. Leave it out of one.
    """

    train: AbstractImages
    validation: AbstractImages
    test: AbstractImages

    @property
    def parts(self) -> tuple[AbstractImages, AbstractImages, AbstractImages]:
        """The three, in this order."""
        return self.train, self.validation, self.test

    def __post_init__(self) -> None:
        demand_types(self)
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
            both = sorted(set(parts[one].names) & set(parts[other].names))
            if both:
                more = f" and {len(both) - 1} more" if len(both) > 1 else ""
                raise ValueError(
                    f"`Splits`: the classes of {one} and {other} must be different. Both have {both[0]!r}{more}."
                    " Leave it out of one."
                )
        shapes = {name: part.shape for name, part in parts.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(
                f"`Splits`: the images of train, validation and test must have one shape (channels, height,"
                f" width). Got {shapes}."
            )


def distinct(call: str, names: Sequence[str], count: int) -> None:
    """Refuse names that are not `count` different ones."""
    if len(names) == count == len(set(names)):
        return
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    arrived = f"{repeated[0]!r} more than once" if repeated else f"{len(names)} names"
    raise ValueError(f"`{call}(names=...)` must be a different name for each of {count} classes. Got {arrived}.")


def put(instance: object, name: str, value: object) -> None:
    """Set a field of a frozen dataclass in its `__post_init__`."""
    object.__setattr__(instance, name, value)
