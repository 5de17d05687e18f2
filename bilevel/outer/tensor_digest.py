"""A tensor in a few characters: its shape, its dtype and a hash of its entries."""

from __future__ import annotations

import ctypes
import hashlib
import math

from torch import Tensor

WHOLE = 2**24  # bytes of a tensor that are hashed; of larger ones as many entries, evenly spaced


def tensor_text(tensor: Tensor) -> str:
    """Shape, dtype and hash; only the first two where there are no entries to read (sparse layouts, "meta").

    Two tensors of up to 16 MiB have the same text if and only if they are equal bit for bit (but for collisions of the
    hash); of larger ones 16 MiB of evenly spaced entries are compared. The device does not matter.

    Example:
        >>> import torch
        >>> (
        ...     tensor_text(torch.ones(2)) == tensor_text(torch.ones(4)[::2]),
        ...     tensor_text(torch.ones(2))[:21],
        ... )
        (True, 'tensor (2,) float32 #')
    """
    about = f"tensor {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    if type(tensor).__name__ == "DTensor":  # of which every rank has other entries, and none has all
        return f"{about} shared out"
    try:
        return f"{about} #{digest(bytes_of(tensor))}"
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return about


def digest(content: bytes) -> str:
    """Twelve hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=6).hexdigest()


def bytes_of(tensor: Tensor) -> bytes:
    """Its entries in memory, or 16 MiB of them."""
    flat = tensor.detach().reshape(-1)
    stride = max(1, math.ceil(flat.numel() * flat.element_size() / WHOLE))
    some = flat[::stride].resolve_conj().resolve_neg().to("cpu").contiguous()
    if some.numel() == 0:
        return b""
    return ctypes.string_at(some.data_ptr(), some.numel() * some.element_size())
