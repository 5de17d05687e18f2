"""Images to learn from, how near one is to another, and pictures of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor

from bilevel.outside.arrays import read_arrays
from bilevel.outside.images import SUFFIXES, open_image
from bilevel.portable.pickling import AbstractPortable
from bilevel.tasks._random import seed_of_step
from bilevel.terms.convolution import Convolution

Pictures: TypeAlias = Literal["auto", "scikit-image", "synthetic"]

# Which ship with scikit-image: other photographs are for testing than for training.
_TRAIN = ("coffee", "chelsea", "coins", "rocket", "brick", "page", "cell", "clock", "gravel")
_TEST = ("camera", "astronaut", "moon", "text")
_NEW = ("grass", "hubble_deep_field", "stereo_motorcycle", "retina")  # on which nothing was ever chosen
_HALF = 0.5  # of the parts of an image that is large enough are of it at half its size


def images(
    count: int,
    side: int,
    *,
    test: bool,
    pictures: Pictures = "auto",
    data: str = "",
    seed: int = 0,
    new: bool = False,
) -> tuple[Tensor, str]:
    """So many gray images `(count, side, side)` of values in [0, 1], and where they are from.

    Args:
        count: how many.
        side: of each.
        test: other images than those of training.
        pictures: "scikit-image": parts of the photographs that ship with it; "synthetic": constant on random
            rectangles and disks; "auto": the first where it is installed.
        data: a PNG or JPEG file, of whose left half the images for training are parts and of whose right half those for
            testing; or an .npz file with `images` `(n, h, w)`, the last fifth for testing.
        seed: of the parts.
        new: with `test`: a third set of images, which neither training nor the choice of a setting has seen; of a file
            other parts of the same images.

    Raises:
        ValueError: if a file cannot be read, or its images are smaller than `side`.
        ImportError: if scikit-image is asked for and missing.
    """
    generator = torch.Generator().manual_seed(2 * seed + test + 1_000_000 * new)
    if data:
        demand_readable(data)
        return _parts(_from_file(data, test), count, side, generator, Path(data).name), Path(data).name
    if _kind(pictures) == "synthetic":
        return torch.stack([_synthetic(side, generator) for _ in range(count)]), "synthetic images"
    whole = _photographs((_NEW if new else _TEST) if test else _TRAIN)
    return _parts(whole, count, side, generator, "scikit-image"), "photographs of scikit-image"


def _kind(pictures: Pictures) -> Pictures:
    if pictures != "auto":
        return pictures
    return "scikit-image" if find_spec("skimage") is not None else "synthetic"


@final
@dataclass(frozen=True, eq=False)
class Draws(AbstractPortable):
    """Batch k of training: new parts of the training images, turned and mirrored, blurred and with new noise.

    Half of the parts of an image that is large enough are of it at half its size: more edges to see in as many pixels.

    Args:
        whole: the images `(h, w)`.
        count: how many parts.
        side: of each.
        kernel: of the blur.
        level: the standard deviation of the noise.
        seed: of all draws.
    """

    whole: tuple[Tensor, ...]
    count: int
    side: int
    kernel: Tensor
    level: float
    seed: int

    @staticmethod
    def of(count: int, side: int, kernel: Tensor, level: float, *, pictures: Pictures, data: str, seed: int) -> Draws:
        """Those of the training images that `images` takes its parts of."""
        if data:
            demand_readable(data)
            whole, name = _from_file(data, test=False), Path(data).name
        elif _kind(pictures) == "synthetic":
            generator = torch.Generator().manual_seed(seed)
            whole, name = [_synthetic(2 * side, generator) for _ in range(16)], "synthetic"
        else:
            whole, name = _photographs(_TRAIN), "scikit-image"
        _demand_large(whole, side, name)
        return Draws(tuple(whole), count, side, kernel, level, seed)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """The parts `(count, side, side)`, and how they are seen."""
        generator, found = torch.Generator().manual_seed(seed_of_step(self.seed, step)), []
        for _ in range(self.count):
            number, coin, turn = (float(share) for share in torch.rand(3, generator=generator, device="cpu"))
            each = self.whole[int(number * len(self.whole))]
            if min(each.shape) >= 2 * self.side and coin < _HALF:
                each = torch.nn.functional.avg_pool2d(each[None, None], 2)[0, 0]
            part = torch.rot90(_part(each, self.side, generator), int(8 * turn) % 4)
            found.append(part.mT if turn >= 0.5 else part)
        truth = torch.stack(found)
        seen = Convolution(self.kernel, (self.side, self.side)).forward(truth)
        drawn = torch.randn(truth.shape, generator=generator, dtype=torch.float64, device="cpu")
        return truth, seen + self.level * drawn.to(truth)


def demand_readable(path: str) -> None:
    """Refuse a path of no file.

    Raises:
        ValueError: naming the argument.
    """
    try:
        there = Path(path).is_file()
    except (OSError, ValueError):  # too long, or with characters that none has
        there = False
    if not there:
        raise ValueError(f"`data` must be the path of a PNG, JPEG or .npz file. Got {path[:200]!r}, which is none.")


def _photographs(names: Sequence[str]) -> list[Tensor]:
    try:
        import skimage.data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            'the photographs need scikit-image: `pip install "bilevel[imaging]"`; `--set pictures=synthetic` does'
            " without."
        ) from error
    found = []
    for name in names:
        picture = getattr(skimage.data, name)()
        if isinstance(picture, tuple):  # two views, and more
            picture = picture[0]
        levels = torch.as_tensor(picture, device="cpu").double() / 255
        found.append(levels if levels.dim() == 2 else levels.mean(-1))
    return found


def _from_file(path: str, test: bool) -> list[Tensor]:
    if path.lower().endswith(SUFFIXES):
        picture = open_image(path, path, "L")
        levels = torch.tensor(list(picture.tobytes()), dtype=torch.float64, device="cpu") / 255
        whole = levels.reshape(picture.height, picture.width)
        half = whole.shape[1] // 2
        return [whole[:, half:] if test else whole[:, :half]]
    arrays = read_arrays(path, lambda name: name == "images", "images")
    if "images" not in arrays or arrays["images"].ndim != 3:
        raise ValueError(f"{path!r} must be a PNG or JPEG file, or an .npz file with `images` (n, h, w). It has none.")
    levels = torch.as_tensor(arrays["images"], dtype=torch.float64, device="cpu")
    levels = levels / 255 if float(levels.max()) > 1 else levels
    cut = len(levels) - max(1, len(levels) // 5)
    return list(levels[cut:] if test else levels[:cut])


def _parts(whole: Sequence[Tensor], count: int, side: int, generator: torch.Generator, name: str) -> Tensor:
    """Random squares, of one image after the other."""
    _demand_large(whole, side, name)
    return torch.stack([_part(whole[k % len(whole)], side, generator) for k in range(count)])


def _demand_large(whole: Sequence[Tensor], side: int, name: str) -> None:
    if any(min(each.shape) < side for each in whole) or not whole:
        raise ValueError(f"the images of {name!r} must have at least {side} pixels a side. Set a smaller `side`.")


def _part(image: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A random square."""
    top, left = (int(torch.randint(size - side + 1, (), generator=generator, device="cpu")) for size in image.shape)
    return image[top : top + side, left : left + side]


def _synthetic(side: int, generator: torch.Generator) -> Tensor:
    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64, device="cpu")

    image = draw(1).expand(side, side).clone() * 0.3
    at = torch.arange(side, dtype=torch.float64, device="cpu")
    for _ in range(6):
        middle, size, level = side * draw(2), side * (0.08 + 0.25 * draw(2)), draw(1)
        dy, dx = (at - middle[0]).unsqueeze(-1) / size[0], (at - middle[1]) / size[1]
        inside = (dy.square() + dx.square() < 1) if draw(1) < 0.5 else (dy.abs() < 1) & (dx.abs() < 1)
        image = torch.where(inside, level, image)
    return image


def noise(like: Tensor, level: float, seed: int) -> Tensor:
    """Gaussian, of this standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    return level * torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu").to(like)


def gaussian(width: float, radius: int) -> Tensor:
    """A Gaussian kernel `(2 radius + 1, 2 radius + 1)` of sum one."""
    at = torch.arange(-radius, radius + 1, dtype=torch.float64, device="cpu")
    line = (-(at / width).square() / 2).exp()
    kernel = line.unsqueeze(-1) * line
    return kernel / kernel.sum()


def psnr(found: Tensor, truth: Tensor) -> float:
    """The mean over images of 10 log10(1 / mean squared error): decibels, for values in [0, 1]."""
    errors = (found - truth).square().flatten(-2).mean(-1)
    return float((-10 * errors.log10()).mean()) if bool(errors.isfinite().all()) else -math.inf


def draw_images(figure: Any, rows: Mapping[str, Tensor], truth: Tensor, count: int = 3) -> None:
    """A row of pictures for each of the first images: as it was seen, what was made of it, and the truth; PSNR."""
    columns = {**rows, "truth": truth}
    count = min(count, len(truth))
    axes = figure.subplots(count, len(columns), squeeze=False)
    for i in range(count):
        for axis, (name, found) in zip(axes[i], columns.items(), strict=True):
            axis.imshow(found[i].detach().clamp(0, 1).tolist(), cmap="gray", vmin=0, vmax=1)
            own = "" if name == "truth" else f"{psnr(found[i : i + 1], truth[i : i + 1]):.2f} dB"
            axis.set_title(f"{name} {own}".strip() if i == 0 else own, fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
