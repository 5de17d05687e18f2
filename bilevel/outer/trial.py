"""One of the runs of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from bilevel._result import Status
from bilevel.arguments.checked import checked as arguments
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import NUMBERS, demand_ranges
from bilevel.outer.words import without_addresses
from bilevel.portable.plain import demanded, number, refused


@final
@dataclass(frozen=True)
class Trial:
    """How far a combination of settings came in a sweep.

    Attributes:
        settings: by name: `inner_step`, `outer_step` and what else was swept.
        value: Phi(x) on all the data, to some digits, with y solved anew; infinite where it is no number.
        status: `successful` where the combination is still a number at the end of the sweep, else `diverged`.
        chosen: whether it was gone on with.

    Example:
        >>> Trial({"inner_step": 0.1}, 2.0, Status.successful, True).settings["inner_step"]
        0.1
    """

    settings: Mapping[str, Any]
    value: float
    status: Status
    chosen: bool

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, value=NUMBERS)

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data, objects such as an optimizer in words; :meth:`from_dict` is the inverse for others."""
        return {
            "settings": {name: _plain(value) for name, value in self.settings.items()},
            "value": self.value,
            "status": self.status.name,
            "chosen": self.chosen,
        }

    @staticmethod
    @arguments("Trial.from_dict")
    def from_dict(content: Mapping[str, Any]) -> Trial:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: if it is no such data.
        """
        with refused("Trial"):
            return Trial(
                demanded(content, "settings", dict),
                number(content, "value"),
                Status[demanded(content, "status", str)],
                demanded(content, "chosen", bool),
            )


def _plain(value: Any) -> Any:
    """What a file can hold and nothing is executed to read."""
    return value if value is None or isinstance(value, bool | int | float | str) else without_addresses(repr(value))
