"""Checkpoints of an outer run: written atomically, read without executing anything."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bilevel._estimate import FlatStart
from bilevel._files import write_atomically
from bilevel.algorithms.descent import OuterState

_FORMAT = 1


def fingerprint(settings: Mapping[str, object]) -> dict[str, str]:
    """Settings in words, for comparison with those of another process: without the addresses of functions."""
    return {name: re.sub(r" at 0x[0-9a-fA-F]+", "", str(setting)) for name, setting in settings.items()}


def save_checkpoint(
    path: str | os.PathLike[str], state: OuterState, history: list[dict[str, Any]], settings: dict[str, str]
) -> None:
    """Write a state and the history so far; a crash leaves the previous file or the new one, never half of one."""
    content = {
        "format": _FORMAT,
        "settings": settings,
        "step": state.step,
        "x": state.x,
        "y": state.start.y,
        "v": state.start.v,
        "count": state.start.count,
        "memory": state.memory,
        "history": history,
    }
    write_atomically(path, lambda file: torch.save(content, file))


def load_checkpoint(
    path: str | os.PathLike[str], like: OuterState, settings: dict[str, str]
) -> tuple[OuterState, list[dict[str, Any]]]:
    """Read back what :func:`save_checkpoint` wrote, for a run whose initial state is `like`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a checkpoint of this format, is of a problem with other sizes or dtype, or of a run
            with other settings (checkpoints of earlier versions do not say which theirs were).
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no checkpoint at {str(path)!r} to resume from. Run without `resume` first.")
    try:
        content = torch.load(path, map_location=like.x.device, weights_only=True)
    except Exception as error:
        raise ValueError(unreadable(path)) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{str(path)!r} is not a checkpoint of this version of bilevel.")
    for name, saved, wanted in (("x", content["x"], like.x), ("y", content["y"], like.start.y)):
        if saved.shape != wanted.shape or saved.dtype != wanted.dtype:
            raise ValueError(
                f"the checkpoint {str(path)!r} is of another problem: its {name} has {tuple(saved.shape)} entries of"
                f" {saved.dtype}, this one {tuple(wanted.shape)} of {wanted.dtype}."
            )
    if content["memory"].keys() != like.memory.keys():
        raise ValueError(
            f"the checkpoint {str(path)!r} was written with another outer optimizer: its state has"
            f" {sorted(content['memory'])}, this one {sorted(like.memory)}."
        )
    saved = content.get("settings", {})
    changed = [
        f"{name} was {saved[name]} and is {now}" for name, now in settings.items() if saved.get(name, now) != now
    ]
    if changed:
        raise ValueError(
            f"the checkpoint {str(path)!r} is of a run with other settings: {'; '.join(changed)}. Resume it as it was"
            f" begun, or begin another run, with another file, from its x and y."
        )
    start = FlatStart(content["y"], content["v"], content["count"])
    return OuterState(content["step"], content["x"], start, content["memory"]), content["history"]


def unreadable(path: str | os.PathLike[str]) -> str:
    """What to say of a file that `torch.load` refuses; its own words are long and about something else."""
    return (
        f"{str(path)!r} is not a readable checkpoint: it is damaged, or is none. Run without `resume`, or name another"
        f" file."
    )
