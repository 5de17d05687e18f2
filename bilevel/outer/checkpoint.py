"""Checkpoints of an outer run: written atomically, read without executing anything."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from bilevel._files import write_atomically

_FORMAT = 2  # 1 held the state of a descent, entry by entry, and nothing else


def fingerprint(settings: Mapping[str, object]) -> dict[str, str]:
    """Settings in words, for comparison with those of another process: without the addresses of functions.

    Fields that are as they are by default are left out, so that a field more in a later version changes nothing.

    Example:
        >>> from bilevel import Constants
        >>> fingerprint({"constants": Constants(mu=1.0), "estimator": "aid-cg"})
        {'constants': 'Constants(mu=1.0)', 'estimator': 'aid-cg'}
    """
    texts = {name: setting if isinstance(setting, str) else _described(setting) for name, setting in settings.items()}
    return {name: re.sub(r" at 0x[0-9a-fA-F]+", "", text) for name, text in texts.items()}


def _described(value: object) -> str:
    if not is_dataclass(value) or isinstance(value, type):
        return repr(value)
    given = [(f, getattr(value, f.name)) for f in fields(value) if f.repr]
    told = [f"{f.name}={_described(v)}" for f, v in given if f.default is MISSING or repr(v) != repr(f.default)]
    return f"{type(value).__name__}({', '.join(told)})"


def _alike(saved: str, now: str) -> bool:
    """Whether a setting of a file of format 1, with all its fields of then, may be this one: it has the same name."""
    names = [text.split("(")[0] for text in (saved, now)]
    return names[0] == names[1] or (now == "implicit" and saved in ("aid-cg", "kkt"))  # what the default stood for


@final
@dataclass(frozen=True)
class Checkpoint:
    """The file of a run.

    Attributes:
        path: where it is.
        every: how many steps lie between two writes.
        settings: what the run was begun with, from :func:`fingerprint`.
    """

    path: str | os.PathLike[str]
    every: int
    settings: Mapping[str, str]

    def save(self, step: int, point: tuple[Tensor, Tensor], history: list[dict[str, Any]], **state: Any) -> None:
        """Write a state and the history so far; a crash leaves the previous file or the new one, never half of one.

        Args:
            step: how many steps were taken.
            point: x and y, for whoever looks at the file.
            history: the records of these steps.
            state: everything that the rest of the run depends on, as plain data.
        """
        content = {
            "format": _FORMAT,
            "settings": dict(self.settings),
            "step": step,
            "x": point[0],
            "y": point[1],
            "history": history,
            **state,
        }
        write_atomically(self.path, lambda file: torch.save(content, file))

    def load(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Read back what :meth:`save` wrote, for a run that begins at x and y.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a checkpoint that this version reads, is of a problem with other sizes or dtype, or
                of another algorithm.
        """
        if not Path(self.path).exists():
            raise FileNotFoundError(
                f"there is no checkpoint at {str(self.path)!r} to resume from. Run without `resume` first."
            )
        try:
            content = torch.load(self.path, map_location=x.device, weights_only=True)
        except Exception as error:
            raise ValueError(unreadable(self.path)) from error
        if not isinstance(content, dict) or content.get("format") not in (1, _FORMAT):
            raise ValueError(f"{str(self.path)!r} is not a checkpoint of this version of bilevel.")
        for name, saved, wanted in (("x", content["x"], x), ("y", content["y"], y)):
            # What y has before its last axis are tasks, for each of which the run begins at the same y.
            if saved.shape[-1:] != wanted.shape[-1:] or saved.dtype != wanted.dtype:
                raise ValueError(
                    f"the checkpoint {str(self.path)!r} is of another problem: its {name} has {tuple(saved.shape)}"
                    f" entries of {saved.dtype}, this one {tuple(wanted.shape)} of {wanted.dtype}."
                )
        self.demand(content, "algorithm")
        return _upgraded(content) if content["format"] == 1 else content

    def demand(self, content: Mapping[str, Any], *names: str) -> None:
        """Refuse the checkpoint of a run with other settings; those that the file does not tell are taken on trust.

        Args:
            content: what was read.
            names: of the settings; none: all of them.

        Raises:
            ValueError: naming what has changed.
        """
        saved = content.get("settings", {})
        same = _alike if content.get("format") == 1 else str.__eq__
        changed = [
            f"{name} was {saved[name]} and is {now}"
            for name, now in self.settings.items()
            if (not names or name in names) and not same(saved.get(name, now), now)
        ]
        if changed:
            raise ValueError(
                f"the checkpoint {str(self.path)!r} is of a run with other settings: {'; '.join(changed)}. Resume it as"
                f" it was begun, or begin another run, with another file, from its x and y."
            )

    def foreign(self, what: object) -> ValueError:
        """What to say of a checkpoint whose state is another algorithm's."""
        return ValueError(
            f"the checkpoint {str(self.path)!r} was written with another outer optimizer or algorithm: {what}."
        )


def begun_with(path: str | os.PathLike[str], name: str, setting: str) -> bool:
    """Whether a checkpoint tells that this was a setting of its run; one without settings tells what was the default.

    False where there is none that can be read, which :meth:`Checkpoint.load` reports.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return False
    if not isinstance(content, dict):
        return False
    saved = content.get("settings", {}).get(name, setting)
    return bool(saved == setting or (content.get("format") == 1 and saved.split("(")[0] == setting.split("(")[0]))


def _upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a file of format 1, as it would be written now."""
    state = {name: content[name] for name in ("x", "y", "v", "memory")}
    return {**content, "state": state, "calls": {}}


def unreadable(path: str | os.PathLike[str]) -> str:
    """What to say of a file that `torch.load` refuses; its own words are long and about something else."""
    return (
        f"{str(path)!r} is not a readable checkpoint: it is damaged, or is none. Run without `resume`, or name another"
        f" file."
    )
