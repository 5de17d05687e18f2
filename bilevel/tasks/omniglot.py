"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel.arguments.checked import checked
from bilevel.outside.archives import MIB
from bilevel.outside.arrays import read_arrays
from bilevel.tasks._vinyals import class_names, split_of
from bilevel.tasks.images import ImageClasses, Splits

_SIZE = 28  # pixels to a side, to which the drawings are reduced in the literature since Vinyals et al. (2016)


@checked()
def omniglot(path: str | Path) -> Splits:
    """Omniglot in 28 by 28 pixels, ink = 1: 1,028 training, 172 validation and 423 test classes.

    The split is that of Vinyals et al., NeurIPS 2016, as published by Snell et al., NeurIPS 2017, without rotations:
    `Episodes(rotations=True)` adds them. The data: Lake, Salakhutdinov, Tenenbaum, Science 350 (2015).
    `bilevel data omniglot` downloads and converts them.

    Args:
        path: an `.npz` file with the images, `bits` `(1623, 20, 98)` (pixels packed by `numpy.packbits`) or `images`
            `(1623, 20, 28, 28)` (bytes, ink = 255). It may have `class_names` `(1623,)` ("alphabet/character01";
            without them, all classes in the order of the two archives) and `split_vinyals` `(1623,)` of
            0 (training), 1 (validation) and 2 (test).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has another layout.
        ImportError: if numpy is missing.
    """
    arrays = _read(Path(path))
    if not {"bits", "images"} & arrays.keys():
        raise ValueError(f"{str(path)!r} has neither bits nor images of Omniglot. Make one by `bilevel data omniglot`.")
    if "bits" in arrays:
        images, scale = _unpacked(torch.from_numpy(arrays["bits"])), 1.0
    else:
        images, scale = torch.from_numpy(arrays["images"]), 1 / 255
    names = tuple(map(str, arrays.get("class_names", class_names())))
    part = [int(k) for k in arrays["split_vinyals"]] if "split_vinyals" in arrays else split_of(names)
    if images.ndim != 4 or not len(images) == len(names) == len(part):
        raise ValueError(
            f"{str(path)!r}: images, class_names and split_vinyals must be of equally many classes. Got images of shape"
            f" {tuple(images.shape)}, {len(names)} names and {len(part)} entries of the split."
        )
    if set(part) != {0, 1, 2}:
        raise ValueError(
            f"{str(path)!r}: split_vinyals must be 0 (training), 1 (validation) or 2 (test), each at least once."
            f" Got {sorted(set(part))}."
        )
    classes = ImageClasses(images, names, scale)
    return Splits(*(classes.subset([i for i, k in enumerate(part) if k == wanted]) for wanted in (0, 1, 2)))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {str(path)!r}. `bilevel data omniglot` downloads and converts Omniglot."
        )
    arrays = read_arrays(path, _WANTED.__contains__, "images", _BYTES)
    for key, array in arrays.items():
        kinds, axes, what = _WANTED[key]
        if array.dtype.kind not in kinds or array.ndim not in axes:
            raise ValueError(f"{str(path)!r}: {key} must be {what}. Got {array.dtype} of shape {array.shape}.")
    pixels = arrays.get("images")
    if pixels is not None and pixels.dtype.kind == "f":
        _demand_range(path, pixels)
    return arrays


_WANTED = {
    "class_names": ("U", (1,), "texts, one a class"),
    "split_vinyals": ("iu", (1,), "integers, one a class"),
    "bits": ("u", (3,), "bytes, (classes, drawings, 98)"),
    "images": ("uf", (4,), "bytes, (classes, drawings, 28, 28)"),
}
_BYTES = 1024 * MIB  # 26 MB are usual


def _demand_range(path: Path, pixels: Any) -> None:
    """Numbers in the place of bytes are no others."""
    if not pixels.size or not (pixels.min() >= 0 and pixels.max() <= 255):  # NaN is neither
        raise ValueError(f"{str(path)!r}: images must be finite numbers from 0 to 255.")


def _unpacked(bits: Tensor) -> Tensor:
    """`(..., 98)` bytes as `(..., 28, 28)` zeros and ones, the highest bit first."""
    if bits.shape[-1] * 8 != _SIZE**2:
        raise ValueError(
            f"bits must hold {_SIZE} by {_SIZE} pixels in {_SIZE**2 // 8} bytes. Got {bits.shape[-1]} bytes."
        )
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device="cpu")
    pixels = (bits.unsqueeze(-1) >> shifts) & 1
    return pixels.reshape(*bits.shape[:-1], _SIZE, _SIZE)
