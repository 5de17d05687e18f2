"""The function that was given to `torch.compile`."""

from __future__ import annotations

from typing import Any


def uncompiled(function: Any) -> Any:
    """What went through `torch.compile`, as it was written; anything else as it is.

    The backward pass of a compiled function has no graph, and so no second derivative. It computes what the function
    that was compiled computes, and that one has all of them.

    Example:
        >>> import torch
        >>> uncompiled(torch.sin) is torch.sin
        True
    """
    own = getattr(function, "__dict__", {})
    parts = own.get("_modules")
    # a module's, whose other attributes are those of its forward; a scripted one has its parts in no dict
    module = parts.get("_orig_mod") if isinstance(parts, dict) else None
    inner = own.get("_torchdynamo_orig_callable") if module is None else module
    return function if inner is None else uncompiled(inner)
