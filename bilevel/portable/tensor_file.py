"""Plain data in one safetensors file: its tensors as they are, the rest as JSON beside them."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel._files import write_atomically
from bilevel.portable.plain import as_bytes

_FORMAT = "1"
_TENSOR, _NUMBER = "$tensor", "$number"


_LONGEST = 200  # letters of a name: systems take 255 bytes, and the file that becomes it has some more


def write_tensors(path: str | os.PathLike[str], kind: str, content: Mapping[str, Any]) -> None:
    """Write plain data; a crash leaves the previous file or the new one, never half of one.

    Args:
        path: the file; its folder is made if need be.
        kind: what it is, which :func:`read_tensors` has to ask for.
        content: nested dicts and lists of tensors, numbers, texts and None.

    Raises:
        ImportError: if safetensors is missing.
        ValueError: if the path is no name of a file.
    """
    name = Path(path).name
    if not 0 < len(name) <= _LONGEST:
        raise ValueError(
            f"`{kind}.save(path=...)` must name a file, in at most {_LONGEST} letters. Got {name[:100]!r}."
        )
    save = _safetensors().torch.save
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_packed(content, "", tensors), allow_nan=False)
    about = {"kind": kind, "format": _FORMAT, "content": text, "sha256": _digest(text, tensors)}
    data = save(tensors, about)
    write_atomically(path, lambda file: file.write(data))


def read_tensors(path: str | os.PathLike[str], kind: str, device: torch.device | str) -> dict[str, Any]:
    """Read what :func:`write_tensors` wrote, onto a device. Nothing in the file is executed or imported.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or holds something else.
        ImportError: if safetensors is missing.
    """
    package = _safetensors()
    try:
        torch.device(device)
    except RuntimeError as error:
        text = str(error).partition("\n")[0][:100]
        raise ValueError(f"`{kind}.load(device=...)` must be a device. Got {str(device)[:100]!r}: {text}") from error
    try:
        is_there = Path(path).is_file()
    except (OSError, ValueError) as error:  # a name that is too long, or has a zero in it
        raise ValueError(f"`{kind}.load(path=...)` must be the path of a file. {str(error)[:100]}.") from error
    if not is_there:
        raise FileNotFoundError(f"`{kind}.load(path)`: there is no file {str(path)[:200]!r}.")
    try:
        with package.safe_open(path, framework="pt", device="cpu") as opened:
            about = opened.metadata() or {}
            if about.get("kind") != kind or about.get("format") != _FORMAT:
                what = f"{about.get('kind', 'something else')} (format {about.get('format')})"
                raise ValueError(f"it holds {what}")
            read: dict[str, Tensor] = {}
            found = _unpacked(json.loads(about["content"]), opened, read)
        if about.get("sha256") != _digest(about["content"], read):
            raise ValueError("its checksum is another")
        if not isinstance(found, dict):
            raise ValueError("its JSON is no object")
    except Exception as error:  # of safetensors, of JSON, of what is missing in either
        raise unreadable(path, kind, error) from error
    return {name: _moved(part, device) for name, part in found.items()}


@contextmanager
def damaged(path: str | os.PathLike[str], kind: str) -> Iterator[None]:
    """An error of what a file holds names the file.

    Raises:
        ValueError: from any other error of values, but for one that names it already.
    """
    try:
        yield
    except ValueError as error:
        raise error if str(error).startswith(f"`{kind}.load(") else unreadable(path, kind, error) from error


def unreadable(path: str | os.PathLike[str], kind: str, error: BaseException) -> ValueError:
    """What to say of a file that is damaged or of something else."""
    why = " ".join(str(error).split())[:200] or type(error).__name__
    return ValueError(
        f"`{kind}.load(path)`: {str(path)!r} is damaged, or was not written by `{kind}.save` of this version ({why})."
        f" Write it again."
    )


def _packed(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """Plain data as JSON: tensors go to `tensors`, each by a name of its own."""
    if isinstance(value, Tensor):
        name = place if place not in tensors else f"{place}#{len(tensors)}"
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {_TENSOR: name}
    if isinstance(value, float) and not math.isfinite(value):
        return {_NUMBER: repr(value)}
    if isinstance(value, dict):
        return {key: _packed(part, f"{place}.{key}" if place else key, tensors) for key, part in value.items()}
    if isinstance(value, list):
        return [_packed(part, f"{place}.{k}", tensors) for k, part in enumerate(value)]
    return value


def _unpacked(value: Any, opened: Any, read: dict[str, Tensor]) -> Any:
    """Plain data from JSON, with the tensors that it names, which go to `read`."""
    if isinstance(value, list):
        return [_unpacked(part, opened, read) for part in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TENSOR}:
        if value[_TENSOR] in read:  # which would make more of a file than it holds
            raise ValueError("it names a tensor twice")
        tensor: Tensor = opened.get_tensor(value[_TENSOR]).clone()  # the file may change, or go
        read[value[_TENSOR]] = tensor
        return tensor
    if value.keys() == {_NUMBER}:
        return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[value[_NUMBER]]
    return {key: _unpacked(part, opened, read) for key, part in value.items()}


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the JSON and of the bytes of all tensors: damage that leaves the form as it was is seen too."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        found.update(as_bytes(tensors[name]).numpy().data)
    return found.hexdigest()


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(part, device) for key, part in value.items()}
    return [_moved(part, device) for part in value] if isinstance(value, list) else value


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            '`save` and `load` write and read safetensors: `pip install "bilevel[safetensors]"`. `to_dict()` needs'
            " nothing: `torch.save(result.to_dict(), path)`."
        ) from error
    return safetensors
