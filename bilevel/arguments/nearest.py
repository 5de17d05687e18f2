"""The known name that a mistaken one comes nearest to."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

_NEAR = 0.65  # the part of letters in common from which on a name may have been meant


def nearest(name: Any, known: Iterable[str]) -> str:
    """A sentence with the known name that a mistaken one comes nearest to, and a space; empty where none is near.

    Example:
        >>> nearest("lerning_rate", ["learning_rate", "steps"])
        "Did you mean 'learning_rate'? "
    """
    text, names = str(name), list(known)
    longer = [other for other in names if len(text) > 1 and other.startswith(text)]
    found = longer or difflib.get_close_matches(text, names, n=1, cutoff=_NEAR)
    return f"Did you mean {found[0]!r}? " if found else ""
