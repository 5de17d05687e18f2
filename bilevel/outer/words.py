"""Settings in words, the same in every process."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass


def in_words(settings: Mapping[str, object]) -> dict[str, str]:
    """Settings in words, for comparison with those of another process: without the addresses of functions.

    Fields that are as they are by default are left out, so that a field more in a later version changes nothing.

    Example:
        >>> from bilevel import Constants
        >>> in_words({"constants": Constants(mu=1.0), "estimator": "aid-cg"})
        {'constants': 'Constants(mu=1.0)', 'estimator': 'aid-cg'}
    """
    texts = {name: setting if isinstance(setting, str) else _described(setting) for name, setting in settings.items()}
    return {name: without_addresses(text) for name, text in texts.items()}


def without_addresses(text: str) -> str:
    """Without where things are in memory, which the next process has elsewhere.

    Example:
        >>> without_addresses("<function f at 0x7f0dc>")
        '<function f>'
    """
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _described(value: object) -> str:
    if not is_dataclass(value) or isinstance(value, type):
        return repr(value)
    given = [(f, getattr(value, f.name)) for f in fields(value) if f.repr]
    told = [f"{f.name}={_described(v)}" for f, v in given if f.default is MISSING or repr(v) != repr(f.default)]
    return f"{type(value).__name__}({', '.join(told)})"
