"""Data for problems: built in, the user's arrays, or an .npz file; split and scaled reproducibly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from bilevel.arguments.fits import demand_types
from bilevel.arguments.nearest import nearest
from bilevel.arguments.ranges import COUNT, demand_ranges
from bilevel.outside.arrays import read_arrays

Arrays: TypeAlias = str | Path | Mapping[str, Any] | tuple[Any, Any]
"""A path of an .npz file, a mapping with its keys, or a pair (X, y); numpy arrays or tensors.

Keys: `X` and `y` (or `images` and `labels`), which are split; or `X_train` and `y_train` with `X_val`, `y_val` and
`X_test`, `y_test`, where a missing validation or test part is split off the training part.
"""

_ALIASES = {"images": "X", "labels": "y"}
_PARTS = ("train", "val", "test")
_LONG = 200  # characters of a path in a message


@final
@dataclass(frozen=True, eq=False)
class Dataset:
    """Inputs `(n, d)` and targets `(n,)` of three disjoint parts; labels are numbered 0 to classes - 1.

    Attributes:
        X_train: training inputs, scaled by their own statistics.
        y_train: training targets.
        X_val: validation inputs, scaled by those of the training part, as are the test inputs.
        y_val: validation targets.
        X_test: test inputs.
        y_test: test targets.
        raw_train: training inputs before scaling, for pictures.
        classes: number of classes; 0 for real targets.
    """

    X_train: Tensor
    y_train: Tensor
    X_val: Tensor
    y_val: Tensor
    X_test: Tensor
    y_test: Tensor
    raw_train: Tensor
    classes: int

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, classes=COUNT)


def load(
    data: Arrays | None,
    builtin: str,
    *,
    sizes: tuple[float, float],
    seed: int,
    regression: bool = False,
    per_feature: bool = True,
    bias: bool = True,
    double: bool = True,
) -> Dataset:
    """Load, split by a seeded permutation, and scale by statistics of the training part only.

    Args:
        data: the user's data; None for the built-in ones.
        builtin: which of scikit-learn's data sets: its name after `load_`.
        sizes: of the training and validation parts: counts if at least 1, else shares; the rest is for testing.
        seed: of the permutation.
        regression: real targets, which are scaled too, else class labels.
        per_feature: divide every feature by its own deviation, else all by a common one (pixels).
        bias: append a feature that is always 1.
        double: float64, else float32.

    Raises:
        ImportError: if a package that is needed is missing, naming the extra to install.
        TypeError: if the data are of no known kind, or hold something else than real numbers.
        ValueError: if keys, shapes or sizes do not fit, a value is not finite, or a class label no integer.
    """
    arrays = _arrays(data, builtin)
    try:
        return _dataset(arrays, sizes, seed, regression, per_feature, bias, double)
    except ValueError as error:
        if isinstance(data, str | Path):
            raise ValueError(f"{str(data)!r} cannot be used: {error}") from error
        raise


def _dataset(
    arrays: dict[str, Tensor],
    sizes: tuple[float, float],
    seed: int,
    regression: bool,
    per_feature: bool,
    bias: bool,
    double: bool,
) -> Dataset:
    parts = _parts(arrays, sizes, seed)
    dtype = torch.float64 if double else torch.float32
    for name, (X, y) in parts.items():
        if not bool(X.isfinite().all()) or (regression and not bool(y.isfinite().all())):
            raise ValueError(f"the {name} part holds NaN or infinite values. Drop or impute them first.")
    inputs = {name: X for name, (X, _) in parts.items()}
    targets = {name: y for name, (_, y) in parts.items()}
    shift, scale = _statistics(inputs["train"], per_feature)
    scaled = {name: ((X - shift) / scale).to(dtype) for name, X in inputs.items()}
    if bias:
        scaled = {name: torch.cat([X, torch.ones_like(X[:, :1])], dim=1) for name, X in scaled.items()}
    classes = 0
    if not regression:
        for name, y in targets.items():
            _refuse_fractions(name, y)
    if regression:
        shift, scale = _statistics(targets["train"].double().unsqueeze(1), True)
        targets = {name: ((y.double() - shift) / scale).to(dtype) for name, y in targets.items()}
    else:
        labels = torch.unique(torch.cat(list(targets.values())))
        classes = len(labels)
        targets = {name: torch.searchsorted(labels, y) for name, y in targets.items()}
        if classes < 2:
            raise ValueError(f"a classification problem needs at least 2 classes. Got {classes}.")
    return Dataset(
        X_train=scaled["train"],
        y_train=targets["train"],
        X_val=scaled["val"],
        y_val=targets["val"],
        X_test=scaled["test"],
        y_test=targets["test"],
        raw_train=inputs["train"],
        classes=classes,
    )


def _arrays(data: Arrays | None, builtin: str) -> dict[str, Tensor]:
    if data is None:
        try:
            from sklearn import datasets
        except ImportError as error:
            raise ImportError(
                f'the data set "{builtin}" comes with scikit-learn: `pip install "bilevel[sklearn]"`,'
                f" or pass your own with `data=`."
            ) from error
        X, y = getattr(datasets, f"load_{builtin}")(return_X_y=True)
        return {"X": torch.from_numpy(X), "y": torch.from_numpy(y)}
    if isinstance(data, str | Path):
        if not _is_file(data) or Path(data).suffix != ".npz":
            folder = Path(str(data)[:_LONG]).parent
            near = nearest(Path(data).name, [file.name for file in folder.glob("*.npz")]) if folder.is_dir() else ""
            raise ValueError(f"`data=` must name an existing .npz file. Got {str(data)[:_LONG]!r}. {near}".rstrip())
        data = read_arrays(data, _is_part, "sklearn")
    if isinstance(data, tuple) and len(data) == 2:
        data = {"X": data[0], "y": data[1]}
    if not isinstance(data, Mapping):
        got = f"a {type(data).__name__} of {len(data)}" if isinstance(data, list | tuple) else type(data).__name__
        raise TypeError(
            f"`data=` must be a pair (X, y), a mapping with these keys, or the path of an .npz file. Got {got}."
        )
    found = {_ALIASES.get(key, key): _tensor(key, value) for key, value in data.items() if _is_part(key)}
    if not ({"X", "y"} <= set(found) or {"X_train", "y_train"} <= set(found)):
        raise ValueError(f"`data=` needs the keys X and y, or X_train and y_train. Got {sorted(map(str, data))}.")
    return found


def _is_file(path: str | Path) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _tensor(key: str, value: Any) -> Tensor:
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:  # texts, rows of several lengths, ...
        kind = f"{type(value).__name__} of {value.dtype}" if hasattr(value, "dtype") else type(value).__name__
        raise TypeError(
            f"`data=` needs an array of numbers in {key}. Got {kind} ({' '.join(str(error).split())}). Number the"
            f" classes from 0: `numpy.unique(labels, return_inverse=True)[1]`."
        ) from error
    if tensor.is_complex() or tensor.dim() == 0:
        got = "complex numbers" if tensor.is_complex() else "a single number"
        raise TypeError(f"`data=` needs an array of real numbers in {key}, one row a sample. Got {got}.")
    return tensor


def _refuse_fractions(name: str, y: Tensor) -> None:
    wrong = y[~(y == y.round()) | ~y.isfinite()] if y.is_floating_point() else y[:0]
    if len(wrong):
        raise ValueError(
            f"a classification problem needs labels that are integers. Got {float(wrong[0]):.6g} among those of the"
            f" {name} part. Real targets are for a regression problem, such as `ridge_diabetes`."
        )


def _is_part(key: str) -> bool:
    return key in _ALIASES or key in {"X", "y"} | {f"{side}_{part}" for side in "Xy" for part in _PARTS}


def _column(key: str, y: Tensor) -> Tensor:
    """One target a sample; a single column is taken as such, for it would broadcast against predictions."""
    if y.dim() == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.dim() != 1:
        raise ValueError(f"`data=` needs one target a sample in {key}, of shape (n,). Got {tuple(y.shape)}.")
    return y.to(torch.int64) if y.dtype is torch.bool else y


def _parts(arrays: dict[str, Tensor], sizes: tuple[float, float], seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    arrays = {
        key: value.reshape(len(value), -1 if len(value) else 0).double() if key[0] == "X" else _column(key, value)
        for key, value in arrays.items()
    }
    for part in _PARTS:
        if (f"X_{part}" in arrays) != (f"y_{part}" in arrays):
            raise ValueError(f"`data=` needs X_{part} and y_{part} together. Got only one of them.")
    given = {
        part: (arrays[f"X_{part}"], arrays[f"y_{part}"])
        for part in _PARTS
        if f"X_{part}" in arrays and f"y_{part}" in arrays
    }
    pool = given.pop("train") if "train" in given else (arrays["X"], arrays["y"])
    for name, (X, y) in (("whole", pool), *given.items()):
        if len(X) != len(y) or len(X) == 0:
            raise ValueError(
                f"`data=` needs as many inputs as targets, and at least one. Got {len(X)} and {len(y)} ({name})."
            )
        if X.shape[1] == 0:
            raise ValueError(f"`data=` needs at least one feature. Got inputs of shape {tuple(X.shape)} ({name}).")
        if X.shape[1] != pool[0].shape[1]:
            raise ValueError(
                f"`data=` needs the same features in every part. Got {pool[0].shape[1]} in the training part and"
                f" {X.shape[1]} in the {name} part."
            )
    n = len(pool[0])
    counts = {part: round(size if size >= 1 else size * n) for part, size in zip(_PARTS, sizes, strict=False)}
    wanted = [part for part in ("train", "val") if part not in given]
    if "test" in given and "val" in given:
        counts["train"] = min(counts["train"], n) if sizes[0] >= 1 else n
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed), device="cpu")
    parts, begin = dict(given), 0
    for part in wanted:
        chosen = order[begin : begin + counts[part]]
        parts[part] = (pool[0][chosen], pool[1][chosen])
        begin += counts[part]
    if "test" not in given:
        parts["test"] = (pool[0][order[begin:]], pool[1][order[begin:]])
    if begin > n or ("test" not in given and begin == n):
        asked = " and ".join(f"{counts[part]} for {part}" for part in wanted)
        left = "" if begin > n else ", which leaves none for test"
        raise ValueError(
            f"the parts do not fit into the {n} samples of `data=`: {asked} were asked for{left}. Ask for"
            f" fewer{' (`n_train=`, `n_val=`)' if sizes[0] >= 1 else ''}, or give more data."
        )
    for name, (X, _) in parts.items():
        if len(X) == 0:
            raise ValueError(f"the {name} part has no sample: {n} of `data=` are too few. Give more data.")
    return parts


def _statistics(X: Tensor, per_feature: bool) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the training part; a constant feature is left at zero rather than divided by zero."""
    shift, deviation = X.mean(0), X.std(0, correction=0)
    scale = deviation if per_feature else deviation.square().mean().sqrt().expand_as(deviation)
    return shift, torch.where(scale > 0, scale, torch.ones_like(scale))
