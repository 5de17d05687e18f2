"""Files of `torch.save`: plain data, read without executing anything and without unpacking more than there is."""

from __future__ import annotations

import os
import zipfile
from typing import Any

import torch

from bilevel.outside.archives import directory_size

_DIRECTORY = 64 << 20  # bytes of the directory: some 500,000 tensors


def load_plain(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Any:
    """What `torch.load(path, weights_only=True)` returns, of files that `torch.save` wrote uncompressed, as it does.

    A compressed one could hold a thousand times its size, which torch would unpack.

    Args:
        path: the file.
        device: where its tensors go.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such file, or is damaged; the text is what to say of it in brackets.
    """
    with open(path, "rb") as file:
        try:
            if directory_size(file) > _DIRECTORY:
                raise ValueError("its directory is too long")
            with zipfile.ZipFile(file) as opened:
                members = opened.infolist()
            stored = sum(info.file_size for info in members)
            if any(info.compress_type != zipfile.ZIP_STORED for info in members) or stored > os.stat(path).st_size:
                raise ValueError("it is compressed, which files of `torch.save` are not")
            file.seek(0)
            content = torch.load(file, map_location=device, weights_only=True)
            if not _is_held(content):
                raise ValueError("it holds a tensor that is larger than what is stored of it")
            return content
        except (KeyboardInterrupt, SystemExit):
            raise
        except Exception as error:  # torch's own words are long, and advise to trust the file
            why = str(error) if isinstance(error, ValueError) and str(error).startswith("it") else _SHORT
            raise ValueError(why) from error


def _is_held(content: Any) -> bool:
    """Whether no tensor repeats what is stored of it, and so would be larger wherever it is copied."""
    if isinstance(content, torch.Tensor):
        strided = content.layout == torch.strided
        return strided and content.numel() * content.element_size() <= content.untyped_storage().nbytes()
    parts = (
        content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple | set) else ()
    )
    return all(map(_is_held, parts))


_SHORT = "it is damaged, or holds something else than tensors, numbers and texts"
