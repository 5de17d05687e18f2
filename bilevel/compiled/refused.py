"""What cannot be compiled, and why."""

from __future__ import annotations

from typing import final


@final
class NotCompilableError(ValueError):
    """A computation that `compile=True` cannot make one program of; its text names the part and the reason.

    Example:
        >>> str(refused("AID(inner=...)", "`LBFGS` has a line search", "Use `Iterate`"))
        '`compile=True` cannot compile `AID(inner=...)`: `LBFGS` has a line search. Use `Iterate`.'
    """


def refused(part: str, reason: str, remedy: str = "Leave out `compile=True`") -> NotCompilableError:
    """The error for a part."""
    return NotCompilableError(f"`compile=True` cannot compile `{part}`: {reason}. {remedy}.")
