"""A run's settings as TOML: what `--config` reads, and what every run leaves in `config.toml`."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilevel.arguments.nearest import nearest

# by the flags of `bilevel run`
TEXTS = ("problem", "estimator", "algorithm", "outer", "device")
NUMBERS = ("step", "tol", "steps", "seed", "seconds")
_LONGEST = 1 << 20  # bytes


def read(path: str) -> dict[str, str | list[str]]:
    """What a file says, as the words of the command line: names of flags with their values; "set" is a list.

    Raises:
        ValueError: if it cannot be read, or holds what `bilevel run` does not know.
    """
    file = Path(path)
    try:
        if file.stat().st_size > _LONGEST:
            raise ValueError("it is too large")
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`--config {path}` cannot be read: {error}.") from error
    known = (*TEXTS, *NUMBERS, "set")
    found: dict[str, str | list[str]] = {}
    for name, value in content.items():
        if name not in known:
            near = nearest(name, known)
            raise ValueError(f"`--config {path}` has an entry {name!r}. {near}Known: {', '.join(known)}.")
        if name == "set":
            if not isinstance(value, dict):
                raise ValueError(f"`--config {path}`: 'set' must be a table: [set], and below it key = value.")
            found[name] = [f"{key}={_word(each)}" for key, each in value.items()]
        elif isinstance(value, bool) or not isinstance(value, str if name in TEXTS else (int, float)):
            wanted = "a text in quotes" if name in TEXTS else "a number"
            raise ValueError(f"`--config {path}`: {name!r} must be {wanted}. Got {value!r:.100}.")
        else:
            found[name] = str(value)
    return found


def written(settings: Mapping[str, Any]) -> str:
    """Settings of a run as TOML that `--config` reads.

    Example:
        >>> print(written({"problem": "ridge", "steps": 3, "seed": None, "set": {"q": "5"}}))
        problem = "ridge"
        steps = 3
        <BLANKLINE>
        [set]
        q = "5"
        <BLANKLINE>
    """
    given = {name: settings.get(name) for name in (*TEXTS, *NUMBERS)}
    lines = [f"{name} = {_value(value)}" for name, value in given.items() if value is not None]
    arguments = settings.get("set")
    if isinstance(arguments, dict) and arguments:
        lines += ["", "[set]", *(f"{key} = {_value(value)}" for key, value in arguments.items())]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    """As TOML, whose texts are those of JSON but for one character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(_word, value)) if isinstance(value, list) else str(value)
