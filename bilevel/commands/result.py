"""Results as plain data."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel import __version__
from bilevel._tree import Tree, tree_leaves
from bilevel.outer.words import without_addresses

_SMALL = 200  # entries of x that are written out


def plain(value: Any) -> Any:
    """Data that JSON can hold; NaN and infinities, which it cannot, as the texts "NaN", "Infinity", "-Infinity".

    Texts are without the addresses of objects, which are others in every process.

    Example:
        >>> plain({"a": (1, float("nan")), "b": torch.ones(2)})
        {'a': [1, 'NaN'], 'b': [1.0, 1.0]}
    """
    if isinstance(value, Tensor):
        return plain(value.detach().tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if value is None or isinstance(value, bool | int | float):
        return value
    return without_addresses(str(value))


def describe(tree: Tree) -> dict[str, Any]:
    """Shapes and ranges of the leaves of a structure, and its entries if they are few."""
    leaves: list[Tensor] = [leaf.detach() for leaf in tree_leaves(tree)]
    found: dict[str, Any] = {
        "leaves": [
            {
                "shape": list(leaf.shape),
                "dtype": str(leaf.dtype).removeprefix("torch."),
                **({} if leaf.numel() == 0 else _range(leaf.double())),
            }
            for leaf in leaves
        ]
    }
    if sum(leaf.numel() for leaf in leaves) <= _SMALL:
        found["values"] = tree
    return found


def _range(leaf: Tensor) -> dict[str, float]:
    return {
        "min": float(leaf.min()),
        "max": float(leaf.max()),
        "mean": float(leaf.mean()),
        "norm": float(torch.linalg.vector_norm(leaf)),
    }


def versions() -> dict[str, str]:
    """Of everything that the bits of a result depend on."""
    return {
        "bilevel": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
