"""What is put back between the examples of the gallery."""

from typing import Any

import torch


def torch_defaults(_settings: Any, _file: str) -> None:
    """Torch's dtype and its random numbers are one example's own."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
